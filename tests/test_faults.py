"""Faults, done for real: kills, signals, a full disk, a broken checkpoint, gradients that are not finite."""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import ruscarl
from config import Config
from conftest import ROOT, RUN, Terminal, command, read, rows, tiny_model
from judge import Judge
from runs import Run
from sampler import TransformersSampler
from tasks import load_tasks, split_tasks


@pytest.mark.parametrize("phase", ["sampling", "updating", "saving"])
def test_killed_anywhere_and_continued(flags, uncut, whole, tmp_path, phase):
    terminal = Terminal(RUN, *flags, "--name", "cut")
    assert terminal.send(signal.SIGKILL, phase, after=1) == -signal.SIGKILL
    folder = tmp_path / "runs" / "cut"
    assert 1 <= len(read_whole_lines(folder / "metrics.jsonl")) < 6
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "cut", "--resume")
    assert status == 0, err
    assert rows(folder) == whole
    weights = [(run / "policy" / "model.safetensors").read_bytes() for run in (uncut, folder)]
    assert weights[0] == weights[1]


def read_whole_lines(path):
    """Lines of a file that may end in a torn one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("number, phase", [(signal.SIGINT, "sampling"), (signal.SIGTERM, "updating")])
def test_asked_to_leave_it_saves(flags, whole, tmp_path, number, phase):
    terminal = Terminal(RUN, *flags, "--name", "left", "--save-every", "100")
    assert terminal.send(number, phase, after=1) == 128 + number, terminal.text
    assert f"stopped: {number.name}; continue with --resume" in terminal.text and "Traceback" not in terminal.text
    folder = tmp_path / "runs" / "left"
    done = len(read(folder / "metrics.jsonl"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{done:05d}"]  # nothing is lost
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "left", "--resume")
    assert status == 0, err
    assert rows(folder) == whole


def test_a_full_disk_leaves_the_last_checkpoint_whole(flags, whole, tmp_path):
    terminal = Terminal(RUN, *flags, "--name", "full")
    terminal.send(signal.SIGKILL, "sampling", after=2)
    folder = tmp_path / "runs" / "full"
    before = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    size = next((folder / "checkpoints" / before[-1]).iterdir()).stat().st_size
    done = subprocess.run([sys.executable, RUN, "--runs", tmp_path / "runs", "--name", "full", "--resume"], cwd=ROOT,
                          text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)))
    assert done.returncode == 1 and "stopped: cannot save" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "full", "--resume")
    assert status == 0, err
    assert rows(folder) == whole


def test_a_broken_checkpoint_is_told_and_the_one_before_it_used(flags, whole, tmp_path):
    terminal = Terminal(RUN, *flags, "--name", "torn")
    terminal.send(signal.SIGKILL, "sampling", after=3)
    folders = sorted((tmp_path / "runs" / "torn" / "checkpoints").glob("step_*"))
    assert len(folders) == 2  # --keep-checkpoints
    (shard,) = folders[-1].iterdir()
    shard.write_bytes(shard.read_bytes()[:500_000])
    (folders[-1].parent / "part").mkdir()
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "torn", "--resume")
    assert status == 0 and f"{folders[-1].name}: unreadable checkpoint" in err, err
    assert "part: a half-written checkpoint, not used" in err
    assert rows(tmp_path / "runs" / "torn") == whole
    for path in (tmp_path / "runs" / "torn" / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"")
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "torn", "--resume")
    assert status == 2 and "unreadable checkpoint" in err and "Traceback" not in err


def test_gradients_that_are_not_finite_are_skipped_and_then_stop_the_run(flags, tokenizer, tmp_path):
    tasks, held_out = split_tasks(load_tasks(tmp_path / "letters.jsonl"), 3)

    def train(bad):
        """Rows of a run of 6 steps in which the steps in `bad` have a gradient that is not a number."""
        given = dict(zip((str(f)[2:].replace("-", "_") for f in flags[::2]), flags[1::2]))
        given = {name: Config.__annotations__[name](value) for name, value in given.items()}
        config = Config(**given, name=f"nan{len(bad)}")
        policy, run = tiny_model(), Run(config, "digest")
        run.open()
        calls = iter(range(100))
        policy.get_input_embeddings().weight.register_hook(
            lambda gradient: gradient * float("nan") if len(run.rows()) in bad and next(calls) >= 0 else gradient)
        weights = policy.state_dict()["model.norm.weight"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                ruscarl.train(config, policy, tiny_model(), tokenizer, torch.optim.AdamW(policy.parameters(), lr=1e-3),
                              TransformersSampler(policy, [1]), Judge(), tasks, held_out, run)
                reason = None
            except ruscarl.Stopped as stop:
                reason = str(stop)
        assert torch.isfinite(weights).all()
        return run.rows(), reason

    found, reason = train({1, 2, 4})
    assert reason is None and [row.get("skipped_steps") for row in found] == [0, 2, 2, 0, 2, 0, None]
    found, reason = train({1, 2, 3, 4})
    assert "not finite in 3 steps in a row" in reason and len(found) == 4
