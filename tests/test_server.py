"""A real judge server: vLLM's OpenAI server on 127.0.0.1 with SmolLM2, driven, overloaded, killed and restarted.

The quality of its verdicts is not the point.
"""

import os
import socket
import subprocess
import sys
import time

import pytest
import requests

from conftest import ROOT, RUN, command, needs_vllm, read, write_tasks
from judge import VERDICT_SCHEMA, ChatJudge, Judge, judge_messages, parse_verdict, score
from plumbing.chat import ChatClient, ChatError
from plumbing.policy import default_model_folder
from tasks import Criterion, Task

pytestmark = needs_vllm
QUESTION = [{"role": "user", "content": "I have a cold."}]
CRITERIA = tuple(Criterion(f"Says {word}.", points) for word, points in
                 (("to rest", 3), ("to drink water", 2), ("something rude", -4), ("to see a doctor", 1)))


class VLLMServer:
    """One server process on a port of its own."""

    def __init__(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        """Start it; it may take a minute until `wait` returns."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", default_model_folder(),
             "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "smollm2", "--dtype", "bfloat16",
             "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager", "--kv-cache-memory-bytes", "256M"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"})
        return self

    def wait(self):
        """Block until it answers."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended"
            try:
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=2).ok:
                    return self
            except requests.RequestException:
                time.sleep(0.5)
        raise TimeoutError("no answer in 240 s")

    def kill(self):
        """SIGKILL to the server and what it has started."""
        os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture(scope="module")
def served():
    """A server that is up."""
    server = VLLMServer().start().wait()
    yield server
    server.kill()


def client(*servers, **options):
    return ChatClient([server.url for server in servers], "smollm2", **{"max_tokens": 300, "retries": 2, **options})


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


def test_requests_run_at_the_same_time(served):
    c = client(served)
    ask(c, 1)[0].result()
    futures = ask(c, 16)
    running = 0
    while not all(future.done() for future in futures):
        metrics = requests.get(f"http://127.0.0.1:{served.port}/metrics", timeout=10).text
        running = max([running, *(float(line.split()[-1]) for line in metrics.splitlines()
                                  if line.startswith("vllm:num_requests_running"))])
    assert running > 4 and c.counts["failures"] == 0


def test_a_wrong_model_name_and_a_too_long_prompt_are_final(served):
    with pytest.raises(ValueError, match="does not serve 'qwen'; it serves smollm2"):
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
        "--judge-url", served.url, timeout=400)
    assert status == 0, err
    row = read(tmp_path / "judged" / "metrics.jsonl")[0]
    assert row["judge/unknown"] == 0 and row["judge/seconds_per_call"] > 0.05 and "reward/mean" in row


def test_of_two_servers_one_may_die(served):
    second = VLLMServer().start().wait()
    c = client(served, second)
    c.check()
    futures = ask(c, 24)
    time.sleep(1)
    assert not all(future.done() for future in futures)
    second.kill()
    assert all(isinstance(future.result(), bool) for future in futures)
    assert c.counts["failures"] == 0 and c.counts["tries"] > c.counts["calls"]


def test_a_server_killed_in_the_middle_and_restarted_loses_nothing(served):
    c = client(served, retries=0)  # waiting for it is not counted as a retry
    futures = ask(c, 24)
    time.sleep(1)
    assert not all(future.done() for future in futures)
    served.kill()
    served.start()
    assert all(isinstance(future.result(), bool) for future in futures)
    assert c.counts["failures"] == 0
