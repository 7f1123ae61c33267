"""Several ranks on one machine: the same result as one rank, and nothing lost when one of them dies."""

import importlib
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import (
    PATIENCE,
    RUN,
    TORCHRUN,
    Ranks,
    Terminal,
    command,
    needs_vllm,
    read,
    refused,
    rows,
    shows,
    tiny_model,
    tiny_tokenizer,
)
from two_ranks import CASES, gradients


def same(ours, theirs):
    """Whether two runs have the same rows up to rounding."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, other in zip(ours, theirs):
        assert row == {name: pytest.approx(value, abs=3e-5, rel=1e-5) for name, value in other.items()}, row["step"]


def processes(terminal):
    """{rank: process id} of what torchrun has started so far."""
    found = {}
    for task in os.listdir(f"/proc/{terminal.process.pid}/task"):
        with open(f"/proc/{terminal.process.pid}/task/{task}/children") as file:
            for child in file.read().split():
                with open(f"/proc/{child}/environ") as environment:
                    of_child = dict(line.split("=", 1) for line in environment.read().split("\0") if "=" in line)
                if "RANK" in of_child:
                    found[int(of_child["RANK"])] = int(child)
    return found


def stopped(process):
    """Whether a process has been stopped by SIGSTOP."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "T"


def on_two_ranks(*args):
    """What a command says on stderr that two ranks do, both of which must come to its end."""
    both = Ranks(*args)
    assert both.wait() == [0, 0], both.text[-5000:]
    return both.text


def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path):
    on_two_ranks("tests/two_ranks.py", "write_gradients", tmp_path)
    for name, arguments in CASES.items():
        ours, theirs = load_file(tmp_path / f"{name}.safetensors"), gradients(*arguments)
        assert ours.keys() == theirs.keys() and ours["1.loss"] != 0
        for key in theirs:
            if name == "bfloat16":  # two ranks take each pack's gradient in bfloat16
                assert (ours[key] - theirs[key]).float().norm() < 0.03 * theirs[key].float().norm() + 1e-3, key
            else:
                assert torch.allclose(ours[key].float(), theirs[key].float(), atol=1e-5, rtol=1e-5), (name, key)
        assert max(theirs[key].abs().max() for key in theirs if key.endswith("proj.weight")) > 0.02


def test_two_ranks_train_as_one_and_one_continues_what_two_began(flags, uncut, whole, tmp_path):
    both = Ranks(RUN, *flags, "--name", "two", signalled=(signal.SIGKILL, shows("updating", 3)))
    assert both.processes[0].wait(PATIENCE) == -signal.SIGKILL, both.text[-2000:]
    both.processes[1].kill()
    folder = tmp_path / "runs" / "two"
    assert len(rows(folder)) == 3
    same(rows(folder), whole[:3])
    for step in range(3):
        name = f"rollouts/step_{step:05d}.jsonl"
        assert [r["response"] for r in read(folder / name)] == [r["response"] for r in read(uncut / name)]
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "two", "--resume")
    assert status == 0, err
    same(rows(folder), whole)
    ours, theirs = (load_file(run / "policy" / "model.safetensors") for run in (folder, uncut))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_asked_to_leave_they_save_and_two_continue_what_one_began(flags, whole, tmp_path):
    terminal = Terminal(RUN, *flags, "--name", "one", "--save-every", "100", signalled=(signal.SIGINT, shows("sampling", 1)))
    assert terminal.wait() == 130
    resumed = ["--runs", tmp_path / "runs", "--name", "one", "--resume"]
    both = Ranks(RUN, *resumed, signalled=(signal.SIGTERM, shows("sampling", 3)))  # one of them is told
    assert both.wait() == [143, 143], both.text[-5000:]
    assert both.text.count("stopped: SIGTERM; continue with --resume") == 1
    folder = tmp_path / "runs" / "one"
    assert len(rows(folder)) == 3 and (folder / "checkpoints" / "step_00003").exists()
    on_two_ranks(RUN, *resumed)
    same(rows(folder), whole)


@pytest.mark.slow
@pytest.mark.parametrize("dying, phase", [(1, "sampling"), (0, "updating")])
def test_when_one_dies_torchrun_ends_and_the_run_can_go_on(flags, whole, tmp_path, dying, phase):
    terminal = Terminal(*TORCHRUN, "tests/two_ranks.py", "stop_when", shows(phase, 2), RUN, *flags, "--name", "dead")
    while len(started := processes(terminal)) < 2 or not stopped(started[0]):
        assert terminal.process.poll() is None, terminal.text[-2000:]
        time.sleep(0.1)
    os.kill(started[dying], signal.SIGKILL)
    os.kill(started[0], signal.SIGCONT)
    start = time.monotonic()
    assert terminal.wait() == 1
    assert time.monotonic() - start < 180
    assert not any(os.path.exists(f"/proc/{process}") for process in started.values())
    assert "is gone" in terminal.text and "; continue with --resume" in terminal.text
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "dead", "--resume")
    assert status == 0, err
    same(rows(tmp_path / "runs" / "dead"), whole)


@pytest.mark.slow
@needs_vllm
def test_every_rank_has_its_engine(flags, tmp_path):
    short = [*flags, "--sampler", "vllm", "--steps", "2", "--eval-every", "2", "--check-sync"]
    status, _, one, _ = command(RUN, *short, "--name", "one")
    assert status == 0, one
    two = on_two_ranks(RUN, *short, "--name", "two")
    assert "check-sync: mean gap" in one and "check-sync: mean gap" in two
    same(rows(tmp_path / "runs" / "two"), rows(tmp_path / "runs" / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("function, signs", [
    ("wait_for_a_judge", {"timed out"}), ("leave_late", {"left 0", "left 1"}), ("start_late", {"came 0", "came 1"}),
    ("fill_the_disk", {"told 0", "told 1", "step_00001"}),
])
def test_slow_ranks_are_waited_for_and_one_fault_is_known_to_all(function, signs, tmp_path):
    on_two_ranks("tests/two_ranks.py", function, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == signs


def test_gradients_are_reduced_once_a_mini_batch_where_they_fit(tmp_path):
    on_two_ranks("tests/two_ranks.py", "count_reductions", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_one_rank_reads_the_weights_and_all_have_them(tied, tmp_path):
    tiny_model(1, tied).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    on_two_ranks("tests/two_ranks.py", "deal_out_weights", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "dealt 0", "dealt 1"}


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_with_its_number(tmp_path):
    status, _, err, _ = command(*TORCHRUN, "tests/two_ranks.py", "complain", tmp_path)
    assert status == 1 and err.count("rank 1: the disk of this one is broken") == 1, err
    assert not list(tmp_path.iterdir())  # torchrun has ended the other


@pytest.mark.slow
def test_a_rank_that_dies_on_another_machine_ends_this_one(tmp_path):
    both = Ranks("tests/two_ranks.py", "die_elsewhere", tmp_path)  # and no torchrun ends the other
    assert both.wait() == [1, 9] and "rank 0: rank 1 is gone" in both.text, both.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["evaluation", "refine"])
def test_what_is_one_process_is_not_started_many_times(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused(importlib.import_module(name), capsys, "smollm2")


@pytest.mark.parametrize("mistake, message", [
    (["--steps", "0"], "--steps must be a number above 0"), (["--tasks", "nosuch.jsonl"], "no such task file: nosuch.jsonl"),
])
def test_a_mistake_is_told_once(flags, mistake, message):
    both = Ranks(RUN, *flags, *mistake)
    assert both.leader.wait() == 2, both.text
    both.processes[1].kill()  # as torchrun does, or this rank would say in the end that it is in trouble, too
    told = [line for line in both.text.splitlines() if message in line and not line.startswith("rank 1: ")]
    assert len(told) == 1 and told[0].startswith("ruscarl.py: error: "), both.text
