"""A real judge server: vLLM's OpenAI server on 127.0.0.1, driven, overloaded, killed and restarted.

It serves the tiny model of random weights: what it says is not the point, nor how fast.
"""

import json
import os
import signal
import socket
import time
from concurrent.futures import FIRST_COMPLETED, wait

import pytest
import requests

from conftest import PATIENCE, RUN, THREADS, command, needs_vllm, read, start, tiny_model, tiny_tokenizer, write_tasks
from judge import VERDICT_SCHEMA, ChatJudge, Judge, judge_messages, parse_verdict, score
from plumbing.chat import ChatClient, ChatError
from tasks import Criterion, Task

pytestmark = [needs_vllm, pytest.mark.slow(60)]
QUESTION = [{"role": "user", "content": "I have a cold."}]
CRITERIA = tuple(Criterion(f"Says {word}.", points) for word, points in
                 (("to rest", 3), ("to drink water", 2), ("something rude", -4), ("to see a doctor", 1)))
# Fields of a request by which random weights give a short answer: of what the schema allows they close a string at once.
BRIEF = {"logit_bias": {tiny_tokenizer().convert_tokens_to_ids(token): bias
                        for token, bias in (('"', 100), ("{", 50), ("}", 50), (":", 50), (",", 50), ("f", 50))}}


class VLLMServer:
    """One server process on a port of its own."""

    def __init__(self, model_folder):
        self.model_folder = model_folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        """Start it; it may take a minute until `wait` returns."""
        with open(os.devnull, "w") as nowhere:
            self.process = start(
                "tests/vllm_server.py", "--model", self.model_folder, "--host", "127.0.0.1", "--port", self.port,
                "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "16",
                "--enforce-eager", "--kv-cache-memory-bytes", "128M", stdout=nowhere.fileno(), stderr=nowhere.fileno(),
                env={"OMP_NUM_THREADS": THREADS, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"})
        return self

    def wait(self):
        """Block until it answers."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended"
            try:
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=2).ok:
                    return self
            except requests.RequestException:
                time.sleep(0.5)
        raise TimeoutError("no answer")

    def signal(self, number):
        """Signal the server and what it has started."""
        os.killpg(self.process.pid, number)

    def kill(self):
        """SIGKILL to all of it."""
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server that is up."""
    folder, model = tmp_path_factory.mktemp("served"), tiny_model()
    model.config.max_position_embeddings = 4096  # the tiny tokenizer makes a token of every letter
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    server = VLLMServer(folder).start().wait()
    yield server
    server.kill()


class Rambling(ChatClient):
    """Takes a text that ended at the limit of tokens for an answer: requests that take their time."""

    def _text(self, answer):
        return answer.json()["choices"][0]["message"]["content"]


def client(*servers, kind=ChatClient, **options):
    return kind([server.url for server in servers], "tiny", **{
        "max_tokens": 300, "retries": 2, "timeout": PATIENCE, "patience": PATIENCE, "extra": BRIEF, **options})


def ask(c, n):
    """n futures of verdicts on n different responses."""
    return [c.submit(judge_messages(QUESTION, f"Rest, and drink {i} cups of tea.", CRITERIA[i % 4]), parse=parse_verdict,
                     schema=VERDICT_SCHEMA) for i in range(n)]


def test_structured_output_gives_a_verdict_every_time(served):
    c = client(served)
    c.check()
    judge = Judge(ChatJudge(c))
    verdicts = [future.result() for future in judge.submit(Task("t", QUESTION, CRITERIA), "Rest and drink water.")]
    assert all(isinstance(verdict, bool) for verdict in verdicts)
    assert score(CRITERIA, verdicts) is not None
    assert c.structured and c.counts["failures"] == 0 and c.counts["prompt_tokens"] > 0
    judge.close()


def until_stopped_in_the_middle(server, c):
    """Futures of long answers, some of which are there, when the server has been stopped (SIGSTOP)."""
    while True:
        futures = [c.submit([{"role": "user", "content": f"Write {i} lines."}]) for i in range(24)]
        wait(futures, return_when=FIRST_COMPLETED)
        server.signal(signal.SIGSTOP)
        if not all(future.done() for future in futures):
            return futures
        server.signal(signal.SIGCONT)  # this machine was too busy to look in time


def test_requests_run_at_the_same_time(served):
    def steps():
        """(steps of the engine so far, tokens in them)."""
        text = requests.get(f"http://127.0.0.1:{served.port}/metrics", timeout=PATIENCE).text
        return [sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
                for name in ("vllm:iteration_tokens_total_count", "vllm:iteration_tokens_total_sum")]

    c = client(served, max_tokens=500, extra={"ignore_eos": True}, kind=Rambling)
    for _ in range(5):  # a busy machine may serve one request before it reads the next
        before = steps()
        served.signal(signal.SIGSTOP)  # until all of them are sent
        futures = [c.submit([{"role": "user", "content": "Hi"}]) for _ in range(16)]
        while sum(c._in_flight.values()) < 16:
            time.sleep(0.1)
        served.signal(signal.SIGCONT)
        assert all(isinstance(future.result(), str) for future in futures)
        taken, tokens = (after - then for after, then in zip(steps(), before))
        assert tokens >= 16 * 500 and c.counts["failures"] == 0
        if tokens / taken > 4:
            return
    pytest.fail(f"{tokens:.0f} tokens in {taken:.0f} steps of the engine")


def test_a_wrong_model_name_and_a_too_long_prompt_are_final(served):
    with pytest.raises(ValueError, match="does not serve 'qwen'; it serves tiny"):
        ChatClient([served.url], "qwen").check()
    c = ChatClient([served.url], "qwen")
    with pytest.raises(ChatError, match=r"HTTP 404: .*qwen"):
        c.complete(QUESTION)
    c = client(served)
    with pytest.raises(ChatError, match=r"HTTP 400: .*context length"):
        c.complete([{"role": "user", "content": "very " * 2000}], parse=parse_verdict, schema=VERDICT_SCHEMA)
    assert c.counts["tries"] == 1 and c.structured
    judge = Judge(ChatJudge(c))
    assert judge.submit(Task("t", QUESTION, CRITERIA[:1]), "very " * 2000)[0].result() is None  # unknown, not "not met"
    assert judge.submit(Task("t", QUESTION, CRITERIA[:1]), "Rest.")[0].result() is not None


def test_a_run_judged_by_it(served, model_folder, tmp_path):
    tasks = tmp_path / "open.jsonl"
    write_tasks(tasks, [{"criterion": c.text, "points": c.points} for c in CRITERIA])
    status, _, err, _ = command(
        RUN, "--model", model_folder, "--tasks", tasks, "--runs", tmp_path, "--name", "judged", "--preset", "laptop",
        "--sampler", "vllm", "--steps", "1", "--group-size", "2", "--batch-size", "2", "--mini-batch-size", "2",
        "--max-new-tokens", "8", "--max-prompt-tokens", "1000", "--held-out", "2", "--eval-samples", "1",
        "--judge-url", served.url, "--judge-extra", json.dumps(BRIEF))
    assert status == 0, err
    row = read(tmp_path / "judged" / "metrics.jsonl")[0]
    assert row["judge/unknown"] == 0 and row["judge/seconds_per_call"] > 0 and "reward/mean" in row


def test_a_server_killed_in_the_middle_and_restarted_loses_nothing(served):
    # waiting for a server that is down is not counted as a retry; one that had sent half of its answer is
    c = client(served, max_tokens=500, concurrency=12, retries=1, extra={"ignore_eos": True}, kind=Rambling)
    futures = until_stopped_in_the_middle(served, c)
    served.kill()
    served.start()
    results = [future.result() for future in futures]
    assert all(isinstance(result, str) for result in results), c.last_error
    assert c.counts["failures"] == 0 and c.counts["tries"] > c.counts["calls"]
