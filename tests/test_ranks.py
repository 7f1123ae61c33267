"""Several ranks on one machine: the same result as one rank, and nothing lost when one of them dies."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, RUN, Terminal, command, needs_vllm, read, refused, rows
from two_ranks import CASES, gradients

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def same(ours, theirs):
    """Whether two runs have the same rows up to rounding."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, other in zip(ours, theirs):
        assert row == {name: pytest.approx(value, abs=3e-5, rel=1e-5) for name, value in other.items()}, row["step"]


def processes(terminal):
    """{rank: process id} of what torchrun has started."""
    found = {}
    for task in os.listdir(f"/proc/{terminal.process.pid}/task"):
        with open(f"/proc/{terminal.process.pid}/task/{task}/children") as file:
            for child in file.read().split():
                with open(f"/proc/{child}/environ") as environment:
                    of_child = dict(line.split("=", 1) for line in environment.read().split("\0") if "=" in line)
                found[int(of_child["RANK"])] = int(child)
    return found


def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path):
    status, _, err, _ = command(*TORCHRUN, "tests/two_ranks.py", "write_gradients", tmp_path)
    assert status == 0, err
    for name, arguments in CASES.items():
        ours, theirs = load_file(tmp_path / f"{name}.safetensors"), gradients(*arguments)
        assert ours.keys() == theirs.keys() and ours["1.loss"] != 0
        close = 2e-3 if name == "bfloat16" else 1e-5
        for key in theirs:
            assert torch.allclose(ours[key].float(), theirs[key].float(), atol=close, rtol=1e-5), (name, key)
        assert max(theirs[key].abs().max() for key in theirs if key.endswith("proj.weight")) > 10 * close


def test_two_ranks_train_as_one_and_one_continues_what_two_began(flags, uncut, whole, tmp_path):
    terminal = Terminal(*TORCHRUN, RUN, *flags, "--name", "two")
    terminal.until("updating", after=2)
    for process in (*processes(terminal).values(), terminal.process.pid):
        os.kill(process, signal.SIGKILL)
    terminal.process.wait()
    folder = tmp_path / "runs" / "two"
    same(rows(folder), whole[: len(rows(folder))])
    for step in range(3):
        name = f"rollouts/step_{step:05d}.jsonl"
        assert [r["response"] for r in read(folder / name)] == [r["response"] for r in read(uncut / name)]
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "two", "--resume")
    assert status == 0, err
    same(rows(folder), whole)
    ours, theirs = (load_file(run / "policy" / "model.safetensors") for run in (folder, uncut))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_asked_to_leave_they_save_and_two_continue_what_one_began(flags, whole, tmp_path):
    terminal = Terminal(RUN, *flags, "--name", "one", "--save-every", "100")
    assert terminal.send(signal.SIGINT, "sampling", after=0) == 130
    terminal = Terminal(*TORCHRUN, RUN, "--runs", tmp_path / "runs", "--name", "one", "--resume")
    assert terminal.send(signal.SIGTERM, "sampling", after=2) == 1
    assert terminal.text.count("stopped: SIGTERM; continue with --resume") == 1
    folder = tmp_path / "runs" / "one"
    done = len(rows(folder))
    assert (folder / "checkpoints" / f"step_{done:05d}").exists()
    status, _, err, _ = command(*TORCHRUN, RUN, "--runs", tmp_path / "runs", "--name", "one", "--resume")
    assert status == 0, err
    same(rows(folder), whole)


@pytest.mark.parametrize("dying, phase", [(1, "sampling"), (0, "updating")])
def test_when_one_dies_the_others_end_within_a_minute(flags, whole, tmp_path, dying, phase):
    terminal = Terminal(*TORCHRUN, RUN, *flags, "--name", "dead")
    terminal.until(phase, after=1)
    started = processes(terminal)
    os.kill(started[dying], signal.SIGKILL)
    start = time.monotonic()
    assert terminal.process.wait(timeout=90) == 1
    assert time.monotonic() - start < 60
    assert not any(os.path.exists(f"/proc/{process}") for process in started.values())
    assert "is gone" in terminal.text and "; continue with --resume" in terminal.text
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "dead", "--resume")
    assert status == 0, err
    same(rows(tmp_path / "runs" / "dead"), whole)


@needs_vllm
def test_every_rank_has_its_engine(flags, tmp_path):
    short = [*flags, "--sampler", "vllm", "--steps", "2", "--eval-every", "2", "--check-sync"]
    for name, how in (("one", ()), ("two", TORCHRUN)):
        status, _, err, _ = command(*how, RUN, *short, "--name", name, timeout=300)
        assert status == 0 and "check-sync: mean gap" in err and "Traceback" not in err, err
        same(*(rows(tmp_path / "runs" / run) for run in (name, "one")))


@pytest.mark.parametrize("function, signs", [
    ("wait_for_a_judge", {"timed out"}), ("leave_late", {"left 0", "left 1"}), ("start_late", {"came 0", "came 1"}),
    ("fill_the_disk", {"told 0", "told 1", "step_00001"}),
])
def test_slow_ranks_are_waited_for_and_one_fault_is_known_to_all(function, signs, tmp_path):
    status, _, err, _ = command(*TORCHRUN, "tests/two_ranks.py", function, tmp_path)
    assert status == 0, err
    assert {path.name for path in tmp_path.iterdir()} == signs


def test_an_error_of_one_rank_is_told_with_its_number(tmp_path):
    status, _, err, seconds = command(*TORCHRUN, "tests/two_ranks.py", "complain", tmp_path)
    assert status == 1 and err.count("rank 1: the disk of this one is broken") == 1 and seconds < 50, err


def test_a_rank_that_dies_on_another_machine_ends_this_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
                               "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port),
                               "tests/two_ranks.py", "die_elsewhere", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) for node in (0, 1)]
    err = nodes[0].communicate(timeout=120)[1]
    nodes[1].communicate(timeout=60)
    assert nodes[0].returncode == nodes[1].returncode == 1 and "rank 0: rank 1 is gone" in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["evaluation", "refine"])
def test_what_is_one_process_is_not_started_many_times(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused(importlib.import_module(name), capsys, "smollm2")


@pytest.mark.parametrize("mistake, message", [
    (["--steps", "0"], "--steps must be above 0"), (["--tasks", "nosuch.jsonl"], "no such task file: nosuch.jsonl"),
])
def test_a_mistake_is_told_once(flags, mistake, message):
    status, out, err, _ = command(*TORCHRUN, RUN, *flags, *mistake)
    assert status == 1 and err.count(message) == 1 and "ruscarl.py: error: " in err and out == "", err
