"""bench/step.py: its tables, and what it refuses."""

import json
import sys
from dataclasses import asdict

import pytest

from conftest import ROOT, command

sys.path.append(str(ROOT / "bench"))
import output
import step

WORK = step.Work("short", 60, 64, 8, 2, "float32")


def row(engine, number, sample, update, started="monday"):
    """A step as it is written down."""
    return {**asdict(WORK), "engine": engine, "round": number, "sample": sample, "update": update, "tokens": 1024,
            "peak": 5e9, "versions": {"torch": "2.13.0"}, "date": "2026-11-21", "started": started}


def test_only_rounds_done_in_turn_are_compared():
    rows = [row("transformers", 0, 2, 3), row("trl", 0, 5, 5), row("transformers", 1, 2, 2), row("trl", 1, 8, 8),
            row("transformers", 2, 1, 1), row("trl", 2, 50, 50, "tuesday")]
    ours, trl = step.step_table(rows, "float32")[2:]
    assert ours == ("| short: 2 x 60 + 64 | 8 | ours, transformers | 4.0 (2.0 to 5.0) | 8.00 | 512 | 5.0 "
                    "| 3.00 (2.00 to 4.00) |")
    assert trl.endswith("| 5.0 |  |")
    assert step.step_table(rows, "bfloat16")[2:] == []


def test_what_is_written_down_is_gone_on_from(tmp_path, capsys):
    path, parser = tmp_path / "new" / "step.jsonl", step.argparse.ArgumentParser()
    rows = step.Rows(*output.earlier(parser, path.parent, path.name))
    rows.keep(row("trl", 0, 5, 5))
    rows.keep(row("trl", 0, 6, 6))
    with path.open("a") as file:
        file.write(json.dumps(row("trl", 1, 7, 7))[:50])  # torn by a kill
    again = step.Rows(*output.earlier(parser, path.parent, path.name))
    assert [r["sample"] for r in again.values()] == [6]
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("flags, message", [
    (["--engines", "verl"], "verl: it is transformers, vllm, trl or trl:key=value"),
    (["--engines", "vllm:x=1"], "vllm:x=1: it is transformers"),
    (["--engines", "trl:x", "--trl-python", sys.executable], "trl:x: a setting is key=value"),
    (["--engines", "trl:=3", "--trl-python", sys.executable], "trl:=3: a setting is key=value"),
    (["--engines", "trl"], "needs --trl-python"), (["--trl-python", "/"], "no such interpreter"),
    (["--output", sys.executable], "cannot write there"),
    (["--trl-python", "nosuch/python"], "nosuch/python: no such interpreter"),
    (["--groups", "1"], "--groups at least 2"),
    (["--rounds", "0"], "--rounds must be at least 1"),
    (["--quick", "--cases", "long"], "--quick has a case of its own"),
])
def test_bad_input_is_one_line(flags, message):
    status, _, err, _ = command("bench/step.py", *flags, fresh=True)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_a_setting_of_trl_is_read():
    assert step.engine_of("trl:per_device_train_batch_size=4,bf16=true,loss_type=grpo") == (
        "trl", {"per_device_train_batch_size": 4, "bf16": True, "loss_type": "grpo"})


def test_an_engine_that_has_ended_says_how(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho '{\"versions\": {}}'\necho out of memory >&2\nexit 3\n")
    interpreter.chmod(0o755)
    engine = step.Engine("trl", str(interpreter), "steps")
    assert engine.read() == {"versions": {}}
    engine.process.wait()
    with pytest.raises(RuntimeError, match="trl ended with status 3:\nout of memory"):
        engine.step()
    engine.close()
