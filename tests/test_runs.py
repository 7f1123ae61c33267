"""Files that a kill, or a hand, has damaged; two that want to write them."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
import types

import pytest

from conftest import RUN, command, completion, start, write_tasks
from plumbing import command_line, config, files, runs


@pytest.mark.parametrize(("content", "mended", "said"), [
    (b'{"a": 1}\n{"b": 2', b'{"a": 1}\n', "cut off"),  # torn by a kill
    (b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n', ""),  # written by hand, without a last line break
    (b'{"a": 1}\n', b'{"a": 1}\n', ""), (b"", b"", ""),
])
def test_only_a_torn_line_is_removed(tmp_path, capsys, content, mended, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    files.JsonLines(path)
    assert path.read_bytes() == mended
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("line", ["[1]", "garbage", "7", '"step"', "\x00", "PK\3\4"])
def test_other_rows_are_told_with_their_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"b": 2}}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: (must be a|unreadable) JSON"):
        files.JsonLines(path)


def test_a_row_without_its_step(tmp_path):
    run = runs.Run(config.Config(runs=str(tmp_path), name="new"), "digest")
    run.folder.mkdir()
    run.metrics.write_text('{"step": 0}\n{"stop": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: step: must be a whole number, got None"):
        run.rows()


@pytest.mark.parametrize(("saved", "message"), [
    ({"steps": "abc"}, "config.json of damaged: steps: must be int, got 'abc'"), ({"steps": 3.5}, "steps: must be int"),
    ({"decay": "foo"}, "decay: must be one of sigmoid"), ({"sampler": "x"}, "sampler: must be one of auto, vllm"),
    ({"tasks": 7}, "tasks: must be str"), ({"lr": True}, "lr: must be float"), ({"resume": 1}, "resume: must be bool"),
    ({"nosuch": 1}, "unknown settings: nosuch"), ([], "must be a JSON object"),
    ({"steps": -1}, "config.json of damaged: --steps must be a number above 0"),
])
def test_a_damaged_config_is_told(tmp_path, capsys, saved, message):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit) as stop:
        command_line.parse_training(["--runs", str(tmp_path), "--resume"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("change", "flags", "message"), [
    ({"lr": None}, [], "its config.json lacks lr"),
    ({}, ["--judge-url", "http://127.0.0.1:9/v1"], "it began without a server"),
    ({"judge_url": "http://a/v1"}, ["--judge-model", "other"], "judge_model was '', is 'other'"),
])
def test_a_run_is_continued_as_it_was(tmp_path, capsys, change, flags, message):
    settings = dataclasses.asdict(config.Config(name="run", runs=str(tmp_path))) | change
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    with pytest.raises(SystemExit) as stop:
        command_line.parse_training(["--runs", str(tmp_path), "--resume", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_was_moved_is_continued_where_it_is(tmp_path, capsys):
    settings = dataclasses.asdict(config.Config(name="run", runs="elsewhere"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    _, found = command_line.parse_training(["--runs", str(tmp_path), "--resume"])
    assert (found.runs, found.name) == (str(tmp_path), "run")
    with pytest.raises(SystemExit):
        command_line.parse_training(["--runs", str(tmp_path.parent), "--resume", "--name", f"{tmp_path.name}/run"])
    assert "--name" in capsys.readouterr().err


def test_a_model_is_no_mistyped_run_where_runs_are(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tasks.sha256").write_text("0")
    monkeypatch.chdir(tmp_path)
    assert config.absent("smollm2") is None and config.absent("gpt2") is None
    assert config.absent(f"../{tmp_path.name}/rum") == "no such folder"
    monkeypatch.chdir(tmp_path.parent)
    assert config.absent(f"{tmp_path.name}/rum") == "no such run"


def test_a_folder_that_cannot_be_made_is_told():
    with pytest.raises((ValueError, PermissionError), match="--runs"):
        runs.Run(config.Config(runs="/proc/nosuch", name="run"), "digest").open()


@pytest.mark.parametrize("content", ["[]", "[1]", "{"])
def test_damaged_settings_are_told(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings.json: (must be a|unreadable) JSON"):
        files.claim(tmp_path, {"samples": 2}, "samples.jsonl")


def test_a_run_has_one_writer(server, flags, tmp_path):
    write_tasks(tmp_path / "letters.jsonl", [{"criterion": "Is kind.", "points": 1}])
    flags += ["--steps", "2", "--judge-url", server.url, "--name", "one"]
    folder, go_on, good = tmp_path / "runs" / "one", threading.Event(), completion('{"criteria_met": true}')
    server.answers = lambda body, n: good if n <= 16 else go_on.wait(600) and None  # it hangs in the second step
    with open(os.devnull, "w") as nowhere:
        first = start(RUN, *flags, stdout=nowhere.fileno(), stderr=nowhere.fileno())
    while len(server.requests) < 17:
        assert first.poll() is None
        time.sleep(0.05)
    before = (folder / "metrics.jsonl").read_bytes()
    status, out, err, _ = command(RUN, "--runs", tmp_path / "runs", "--resume")
    assert status == 2 and out == "" and len(err.splitlines()) == 1, err
    assert "one: another process is at work on this run" in err and (folder / "metrics.jsonl").read_bytes() == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    go_on.set()
    server.answers = lambda body, n: good
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--resume")
    assert status == 0 and len((folder / "metrics.jsonl").read_text().splitlines()) == 3, err


def test_a_file_system_without_locks_is_told(tmp_path, capsys, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    files.lock(tmp_path)
    files.lock(tmp_path)  # it is this process that writes there
    assert capsys.readouterr().err.count(f"{tmp_path}: this file system has no locks") == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_trackio_is_called_as_it_wants(tmp_path, monkeypatch, resumed):
    sent = []

    class Run:
        def log(self, metrics, step):
            sent.append((metrics, step))

    def init(project, name, config, resume):
        sent.append((project, name, config["steps"], resume))
        return Run()

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    send = runs._tracker("trackio", tmp_path, config.Config(name="mine", steps=7, resume=resumed))
    send({"step": 3, "loss": 0.5}, 3)
    assert sent == [("ruscarl", "mine", 7, "allow" if resumed else "never"), ({"loss": 0.5}, 3)]


def test_two_that_start_a_run_at_the_same_time(tmp_path):
    run = runs.Run(config.Config(runs=str(tmp_path), name="new"), "digest")
    (run.folder / "rollouts").mkdir(parents=True)
    with open(run.folder / "lock", "a") as held:  # another has been quicker
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="new: another process is at work on this run"):
            run.open()
        run.metrics.write_text('{"step": 0}\n{"step"')  # it is writing
        with pytest.raises(ValueError, match="another process"):
            runs.Run(config.Config(runs=str(tmp_path), name="new", resume=True), "digest")
        assert run.metrics.read_text() == '{"step": 0}\n{"step"'
    run.open()
    runs.Run(config.Config(runs=str(tmp_path), name="new", resume=True), "digest").open()  # the same process may go on
