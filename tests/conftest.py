"""A tiny random chat model, runs of seconds with it, and a local HTTP server that misbehaves on request.

What takes more than about 3 seconds is marked `slow`: `pytest -m "not slow"` leaves it out.
"""

import contextlib
import importlib.util
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = str(max(1, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))  # this worker's share of the cores
os.environ.setdefault("OMP_NUM_THREADS", THREADS)  # before torch is imported; for what tests start, too
ROOT = Path(__file__).parents[1]
RUN = "ruscarl.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PRELOADED = ["ruscarl", "evaluation", "refine", "transformers.models.llama.modeling_llama", "torch.distributed.checkpoint",
             "matplotlib.backends.backend_agg"]
PATIENCE = 600  # seconds until a test gives up on what it waits for: longer than a slow, busy machine takes
sys.path.insert(0, str(ROOT))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fork_server import ForkServer
from plumbing import terminal

# In CI nothing may be skipped for want of vllm: there the tests fail without it.
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None and not os.environ.get("CI"),
                                reason="vllm is not installed (README, Install)")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer():
    """Byte-level BPE, 400 tokens, in which " true" and " false" are whole tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|start|>", "<|end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["it is true or it is false", "drink water and get some rest"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>",
                                   chat_template=CHAT_TEMPLATE)


def tiny_model(seed=0, tied=True):
    """Two layers, 128 wide, heads of 32 (the narrowest that vLLM takes on a CPU), grouped key heads, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=400, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                         attn_implementation="sdpa", initializer_range=0.1)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny tokenizer."""
    return tiny_tokenizer()


@pytest.fixture
def model():
    """A fresh tiny model."""
    return tiny_model()


@pytest.fixture
def float32_products():
    """torch's setting of how a CPU multiplies float32, put back afterwards."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The tiny model as a transformers folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: -seconds(item))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deal out tests one by one, but for files whose tests share a server or an engine."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        """LoadScopeScheduling's scopes are the units of work that a worker gets."""

        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return path if Path(path).stem in ("test_server", "test_vllm") else nodeid

    return Scheduler(config, log)


def seconds(item):
    """About how long a test takes, as its marker `slow` says."""
    slow = item.get_closest_marker("slow")
    return (*slow.args, 5)[0] if slow else 0


fork_servers = []  # one, as soon as it is needed


def start(*args, env=None, stdout, stderr, fresh=False, **limits):
    """A process (with Popen's functions) that does `args`: a script with its arguments, in the project's folder.

    env: changes of the environment. stdout, stderr: file descriptors. fresh: in a new interpreter, not a fork of one
    that has imported the project; so is what is no script, and all that is started elsewhere than on Linux. limits:
    signalled (a signal that the process gets, and when) and largest_file, see fork_server.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if fresh or not str(args[0]).endswith(".py") or sys.platform != "linux":
        if limits:
            pytest.skip("needs a fork server, which needs Linux")
        return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stdout=stdout, stderr=stderr, env=env,
                                stdin=subprocess.DEVNULL)
    if not fork_servers:
        fork_servers.append(ForkServer(PRELOADED, {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}))  # a child may use a GPU, then
    modules = ["vllm_server"] if {"vllm", "tests/vllm_server.py"} & set(args) else []
    return fork_servers[0].start(args, env, stdout, stderr, modules, **limits)


def pytest_unconfigure():
    """End the fork server."""
    for server in fork_servers:
        server.close()


def command(*args, timeout=PATIENCE, **options):
    """(exit status, stdout, stderr, CPU seconds) of a command; see `start` for the arguments."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(*args, stdout=out.fileno(), stderr=err.fileno(), **options)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = getattr(process, "cpu_seconds", after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return status, *texts, seconds


@pytest.fixture
def here(capfd):
    """A function (module, *arguments) -> (status, all that was printed): the command of `module`, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(module, *arguments):
        try:
            parsed = module.parse_command_line([str(argument) for argument in arguments])
            parsed = parsed if isinstance(parsed, tuple) else (parsed,)
            status = terminal.exit_status(f"{module.__name__}.py", lambda: module.main(*parsed))
        except SystemExit as stop:
            status = stop.code
        return status, "".join(capfd.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(module, capsys, *arguments):
    """The one line with which the command of `module` refuses; in this process, which spares the imports."""
    try:
        parsed = module.parse_command_line([str(argument) for argument in arguments])
        parsed = parsed if isinstance(parsed, tuple) else (parsed,)
        status = terminal.exit_status(f"{module.__name__}.py", lambda: module.main(*parsed))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "", (arguments, err)
    lines = [line for line in err.splitlines() if line.strip() and "Loading weights" not in line]
    assert lines[-1].startswith(f"{module.__name__}.py: error: "), err
    return lines[-1]


def write_tasks(path, rubric):
    """Twelve questions with the same rubric."""
    records = [{"prompt_id": str(i), "rubrics": rubric, "prompt": [{"role": "user", "content": f"Question {i}?"}]}
               for i in range(12)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


LETTERS = [{"criterion": f"Has the letter {letter}.", "points": points, "tags": [
    "verifier:rule", "function:regex", f'parameters:{{"pattern": "{letter}"}}']}
    for letter, points in (("a", 2), ("e", 1), ("o", -1), ("i", 2))]


def flags_in(model_folder, folder):
    """A run of 6 steps that takes seconds."""
    write_tasks(folder / "letters.jsonl", LETTERS)
    return ["--model", model_folder, "--preset", "laptop", "--tasks", folder / "letters.jsonl",
            "--runs", folder / "runs", "--steps", "6", "--group-size", "4", "--batch-size", "2",
            "--mini-batch-size", "1", "--max-new-tokens", "12",
            "--max-prompt-tokens", "500", "--held-out", "3", "--eval-every", "3", "--eval-samples", "2", "--save-every", "1",
            "--dtype", "float32", "--sampler", "transformers", "--kl", "0.01", "--lr", "1e-3"]


@pytest.fixture
def flags(model_folder, tmp_path):
    """Flags of a run in a folder of its own."""
    return flags_in(model_folder, tmp_path)


@pytest.fixture(scope="session")
def uncut(model_folder, tmp_path_factory):
    """Folder of the same run, never interrupted."""
    folder = tmp_path_factory.mktemp("uncut")
    status, _, err, _ = command(RUN, *flags_in(model_folder, folder), "--name", "whole")
    assert status == 0, err
    return folder / "runs" / "whole"


@pytest.fixture
def whole(uncut):
    """Its metrics."""
    return rows(uncut)


def rows(folder):
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith("time/") and "second" not in k}
            for row in read(folder / "metrics.jsonl")]


class Terminal:
    """A command whose progress bar is read, as on a terminal: what it shows says where in a step it is."""

    def __init__(self, *args, **options):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 150))
        self.text, self.ours = "", ours
        with open(os.devnull, "w") as nowhere:
            self.process = start(*args, stdout=nowhere.fileno(), stderr=theirs, **options)
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(self.ours, 65536):
                self.text += data.decode(errors="replace")

    def until(self, phase, after):
        """Return as soon as the bar shows `phase` in a step later than `after`."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            steps = re.findall(rf"{phase}[^\r\n]*\| (\d)/6", self.text)
            if steps and int(steps[-1]) > after:
                break
            time.sleep(0.01)

    def wait(self):
        """Exit status; then all of the text is there."""
        status = self.process.wait(timeout=PATIENCE)
        self._reader.join(timeout=10)
        return status


class Ranks:
    """A command in two processes, as torchrun would start them; but nobody ends one when the other dies.

    leader: its Terminal. signalled: the signal that the leader gets, and when. processes: {rank: process}.
    """

    def __init__(self, *args, signalled=None):
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's part
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
               "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.leader = Terminal(*args, env={**env, "RANK": "0", "LOCAL_RANK": "0"}, signalled=signalled)
        self.processes = {0: self.leader.process, 1: start(
            *args, env={**env, "RANK": "1", "LOCAL_RANK": "1"}, stdout=self._file.fileno(), stderr=self._file.fileno())}

    def wait(self):
        """The ranks' exit statuses."""
        return [self.leader.wait(), self.processes[1].wait(PATIENCE)]

    @property
    def text(self):
        """What they have said on stderr."""
        self._file.seek(0)
        return self.leader.text + self._file.read().decode(errors="replace")


def shows(phase, step):
    """For `signalled`: the moment at which the bar of a run of 6 steps first shows `phase` in step number `step`."""
    return rf"{phase}[^\r\n]*\| {step}/6"


class Server:
    """OpenAI-compatible server on 127.0.0.1. `answers`: a function (body, number of the request) -> (status, headers,
    body text), or None to hang up without an answer, set by the test; `requests`: the bodies received."""

    def __init__(self, port=0, model="judge"):
        self.requests, self.answers = [], None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {}, json.dumps({"data": [{"id": model}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body["_authorization"] = self.headers.get("Authorization")
                server.requests.append(body)
                if answer := server.answers(body, len(server.requests)):
                    self.reply(*answer)
                else:
                    self.close_connection = True

            def reply(self, status, headers, text):
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client had stopped waiting

            def log_message(self, *args):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128  # the default of 5 turns a burst away

        self._http = Listener(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()


def completion(text, finish_reason="stop"):
    """A chat completion as (status, headers, body)."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}})


@pytest.fixture
def server():
    """A running Server."""
    server = Server()
    yield server
    server.close()
