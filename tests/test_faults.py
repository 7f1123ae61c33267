"""Faults, done for real: kills, signals, a full disk, a broken checkpoint, gradients that are not finite."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import threading
import time

import pytest
import torch

import ruscarl
from conftest import (
    PATIENCE,
    RUN,
    Server,
    Terminal,
    command,
    completion,
    flags_in,
    read,
    rows,
    shows,
    tiny_model,
    write_tasks,
)
from judge import Judge
from plumbing import checkpoints
from plumbing.config import Config
from plumbing.runs import Run
from plumbing.transformers_sampler import TransformersSampler
from tasks import load_tasks, split_tasks

PART = r"^os\.rename \S*part "  # a checkpoint is written, and gets its name


def resume(runs, name):
    """Continue the run, which must go to its end; what it says on stderr."""
    status, _, err, _ = command(RUN, "--runs", runs, "--name", name, "--resume")
    assert status == 0, err
    return err


@pytest.mark.parametrize("moment, done", [
    (shows("sampling", 2), 2), (shows("judging", 2), 2), (shows("updating", 2), 2), (shows("saving", 2), 3),
    (r"^open \S*rollouts/step_00002", 2), (r"^open \S*part/\S*safetensors", 1), (PART + ".*_00003", 3)],
    ids=["sampling", "judging", "updating", "saving", "rollouts", "first checkpoint", "rename"])
def test_killed_anywhere_and_continued(flags, uncut, whole, tmp_path, moment, done):
    terminal = Terminal(RUN, *flags, "--name", "cut", signalled=(signal.SIGKILL, moment))
    assert terminal.wait() == -signal.SIGKILL, terminal.text[-2000:]
    folder = tmp_path / "runs" / "cut"
    assert len(read(folder / "metrics.jsonl")) == done
    resume(tmp_path / "runs", "cut")
    assert rows(folder) == whole
    weights = [(run / "policy" / "model.safetensors").read_bytes() for run in (uncut, folder)]
    assert weights[0] == weights[1]


def test_a_line_that_a_kill_has_cut_off_is_written_again(flags, whole, tmp_path):
    terminal = Terminal(RUN, *flags, "--name", "cut", signalled=(signal.SIGKILL, shows("saving", 2)))
    assert terminal.wait() == -signal.SIGKILL, terminal.text[-2000:]
    metrics = tmp_path / "runs" / "cut" / "metrics.jsonl"
    os.truncate(metrics, metrics.stat().st_size - 20)
    assert "its last line was cut off" in resume(tmp_path / "runs", "cut")
    assert rows(metrics.parent) == whole


@pytest.mark.parametrize("number, phase", [(signal.SIGINT, "sampling"), (signal.SIGTERM, "updating")])
def test_asked_to_leave_it_saves(flags, whole, tmp_path, number, phase):
    terminal = Terminal(RUN, *flags, "--name", "left", "--save-every", "100", signalled=(number, shows(phase, 2)))
    assert terminal.wait() == 128 + number, terminal.text[-2000:]
    assert f"stopped: {number.name}; continue with --resume" in terminal.text and "Traceback" not in terminal.text
    folder = tmp_path / "runs" / "left"
    done = len(read(folder / "metrics.jsonl"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{done:05d}"]  # nothing is lost
    assert done == (2 if phase == "sampling" else 3)  # a step whose update has begun is done whole
    resume(tmp_path / "runs", "left")
    assert rows(folder) == whole


def test_a_full_disk_leaves_the_last_checkpoint_whole(flags, whole, tmp_path):
    Terminal(RUN, *flags, "--name", "full", signalled=(signal.SIGKILL, shows("sampling", 3))).wait()
    folder = tmp_path / "runs" / "full"
    before = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    size = next((folder / "checkpoints" / before[-1]).glob("*.safetensors")).stat().st_size
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "full", "--resume", largest_file=size // 2)
    assert status == 1 and "stopped: cannot save" in err and "Traceback" not in err, err
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    resume(tmp_path / "runs", "full")
    assert rows(folder) == whole


def test_a_broken_checkpoint_is_told_and_the_one_before_it_used(flags, whole, tmp_path):
    terminal = Terminal(RUN, *flags, "--name", "torn", signalled=(signal.SIGKILL, PART + ".*_00005"))
    assert terminal.wait() == -signal.SIGKILL, terminal.text[-2000:]
    checkpoints = tmp_path / "runs" / "torn" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step_00003", "step_00004", "part"}  # --keep-checkpoints 2
    (shard,) = (checkpoints / "step_00004").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:500_000])
    err = resume(tmp_path / "runs", "torn")
    assert "step_00004: unreadable checkpoint" in err and "part: a half-written checkpoint, not used" in err, err
    assert rows(tmp_path / "runs" / "torn") == whole
    for path in checkpoints.rglob("*.safetensors"):
        path.write_bytes(b"")
    (tmp_path / "runs" / "torn" / "curves.png").unlink()  # or it would count as finished
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "torn", "--resume")
    assert status == 2 and "unreadable checkpoint" in err and "Traceback" not in err


def test_a_checkpoint_that_lacks_a_file_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 200_000)
    policy = tiny_model()
    optimizer = torch.optim.AdamW(policy.parameters())
    for step in (1, 2):
        checkpoints.save(tmp_path, step, policy, optimizer, keep=2)
    files = sorted((tmp_path / "step_00002").glob("*.safetensors"))
    assert len(files) > 3
    files[2].rename(tmp_path / "elsewhere")
    assert checkpoints.load_newest(tmp_path, policy, optimizer) == 1
    assert f"{files[2].name} is missing or cut off; the one before it is used" in capsys.readouterr().err


def test_the_newest_checkpoint_has_the_largest_number(tmp_path):
    policy = tiny_model()
    optimizer = torch.optim.AdamW(policy.parameters())
    (tmp_path / "step_mine").mkdir()
    for step in (99_999, 100_000):
        checkpoints.save(tmp_path, step, policy, optimizer, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step_100000", "step_mine"}
    assert checkpoints.load_newest(tmp_path, policy, optimizer) == 100_000


def test_metrics_are_kept_when_all_checkpoints_are_gone(tmp_path, capsys):
    run = Run(Config(runs=str(tmp_path), name="a", resume=True), "digest")
    run.open()
    for step in range(3):
        run.log({"step": step, "time/step": 1.0})
    again = Run(run.config, "digest")
    policy = tiny_model()
    assert again.load_checkpoint(policy, torch.optim.AdamW(policy.parameters())) == 0
    assert len(read(run.folder / "metrics.old.jsonl")) == 3 and again.rows() == []
    assert "starts again from step 0; its metrics so far are in metrics.old.jsonl" in capsys.readouterr().err


def verdict(body, number):
    """A judge's answer that depends on what it is asked only."""
    asked = json.dumps([message["content"] for message in body["messages"]])
    return completion(json.dumps({"explanation": "", "criteria_met": hashlib.sha256(asked.encode()).digest()[0] % 2 == 0}))


def judged_by(url, flags, folder):
    """`flags` of a run whose criteria only a language model can check."""
    rubric = [{"criterion": f"Is {word}.", "points": 1} for word in ("kind", "calm", "brief", "new")]
    write_tasks(folder / "open.jsonl", rubric)
    return [*flags, "--tasks", folder / "open.jsonl", "--judge-url", url, "--judge-model", "judge"]


@pytest.fixture(scope="module")
def well_judged(model_folder, tmp_path_factory):
    """What a run gets whose judge never fails."""
    folder, server = tmp_path_factory.mktemp("judged"), Server()
    server.answers = verdict
    status, _, err, _ = command(RUN, *judged_by(server.url, flags_in(model_folder, folder), folder), "--name", "good")
    server.close()
    assert status == 0, err
    return rows(folder / "runs" / "good")


@pytest.mark.slow
def test_a_judge_that_is_down_for_a_while_is_waited_for(flags, well_judged, tmp_path):
    server, is_down = Server(), threading.Event()

    def answers(body, number):
        if number <= 40:
            return verdict(body, number)
        is_down.set()
        return None  # it hangs up

    server.answers = answers
    terminal = Terminal(RUN, *judged_by(server.url, flags, tmp_path), "--name", "waited")
    assert is_down.wait(PATIENCE)
    server.close()
    time.sleep(float(os.environ.get("OUTAGE_SECONDS", "5")))
    again = Server(int(server.url.split(":")[2].split("/")[0]))
    again.answers = verdict
    assert terminal.wait() == 0, terminal.text[-2000:]
    again.close()
    assert "cannot be reached; waiting for it" in terminal.text
    assert rows(tmp_path / "runs" / "waited") == well_judged


def test_one_verdict_in_twenty_that_fails_is_unknown_and_the_run_goes_on(flags, server, tmp_path):
    server.answers = lambda body, n: verdict(body, n) if n % 20 else (404, {}, "")
    status, _, err, _ = command(RUN, *judged_by(server.url, flags, tmp_path), "--max-unknown", "0.2", "--name", "some")
    assert status == 0, err
    folder = tmp_path / "runs" / "some"
    unknown = [row["judge/unknown"] for row in read(folder / "metrics.jsonl") if "loss" in row]
    assert 0.03 < sum(unknown) / len(unknown) < 0.07
    for row in [r for step in range(6) for r in read(folder / f"rollouts/step_{step:05d}.jsonl")]:
        missing = any(criterion["met"] is None for criterion in row["criteria"])
        assert (row["reward"] is None) == missing and (not missing or row["advantage"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 1])
def test_a_judge_that_fails_too_often_stops_the_run_which_can_go_on(flags, well_judged, server, tmp_path, share):
    asked = 3 * 2 * 4 + 2 * 2 * 4 * 4  # criteria of the first evaluation and of two steps
    server.answers = lambda body, n: (404, {}, "") if n > asked and n % (1 / share) < 1 else verdict(body, n)
    status, _, err, _ = command(RUN, *judged_by(server.url, flags, tmp_path), "--name", "bad")
    assert status == 1 and "Traceback" not in err, err
    assert re.search(r"stopped: \d+% of the verdicts could not be had \(limit 10%, --max-unknown\); .*HTTP 404", err), err
    folder = tmp_path / "runs" / "bad"
    assert rows(folder) == well_judged[:2]
    server.answers = verdict
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "bad", "--resume")
    assert status == 0, err
    assert rows(folder) == well_judged


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
