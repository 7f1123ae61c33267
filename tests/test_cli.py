"""The real command line, end to end, on a tiny random model."""

import json
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

import ruscarl
from conftest import ROOT, RUN, command, completion, needs_vllm, read, refused, write_tasks

RUBRIC = [{"criterion": f"Has the letter {letter}.", "points": (-1) ** i * (i + 1),
           "tags": ["verifier:rule", "function:regex", "parameters:" + json.dumps({"pattern": letter})]}
          for i, letter in enumerate("aeioustn")]


@pytest.fixture
def tiny(model_folder, tmp_path):
    """Flags of a run of seconds, on questions about which letters a response has."""
    path = tmp_path / "letters.jsonl"
    write_tasks(path, RUBRIC)
    return ["--model", model_folder, "--tasks", path, "--runs", tmp_path / "runs", "--steps", "4",
            "--group-size", "4", "--batch-size", "2", "--mini-batch-size", "1", "--max-new-tokens", "12", "--lr", "1e-3",
            "--held-out", "3", "--eval-every", "2", "--eval-samples", "2", "--save-every", "2", "--temperature", "1",
            "--top-p", "1", "--top-k", "0", "--max-prompt-tokens", "1000", "--dtype", "float32", "--sampler", "transformers"]


def test_a_whole_run(tiny, tmp_path):
    status, out, err, _ = command(RUN, *tiny, "--name", "a", fresh=True)
    assert status == 0, err
    folder = tmp_path / "runs" / "a"
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2, 4]
    every_step = {"reward/mean", "reward/std", "reward/unscaffolded", "reward/zero_variance_groups", "scaffold/ratio",
                  "loss", "kl", "entropy", "clip_fraction", "grad_norm", "response/length", "response/truncated",
                  "scaffold/recited_plain",
                  "judge/unknown", "judge/seconds_per_call", "gap/mean", "gap/max", "time/sample", "time/judge",
                  "time/update", "time/step", "tokens_per_second"}
    assert all(every_step <= set(row) for row in rows[:-1])
    assert rows[0]["kl"] < rows[3]["kl"]  # the policy leaves the reference
    assert max(row["gap/max"] for row in rows[:-1]) < 1e-3  # and the sampler follows the policy
    rollouts = read(folder / "rollouts" / "step_00000.jsonl")
    assert [(r["group"], r["sample"]) for r in rollouts] == [(g, s) for g in range(2) for s in range(4)]
    shown = [sum(c["shown"] for c in r["criteria"]) for r in rollouts]
    sizes = [len(r["criteria"]) for r in rollouts]
    # at step 0 lambda_step is 1, so the first sample of each group sees everything and the last nothing
    assert shown[0] == sizes[0] and shown[4] == sizes[4] and shown[3] == shown[7] == 0
    for group in (rollouts[:4], rollouts[4:]):
        assert sum(r["advantage"] for r in group) == pytest.approx(0, abs=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == 4 and config["kl"] == 1e-3 and config["steepness"] == 125  # --model: the paper's preset
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "before" in out and "after" in out and "reward" in err + out
    trained = AutoModelForCausalLM.from_pretrained(folder / "policy")
    start = AutoModelForCausalLM.from_pretrained(tiny[1])
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    status, _, err, _ = command(RUN, *tiny, "--name", "a")
    assert status == 2 and "exists" in err


@pytest.mark.slow
@needs_vllm
def test_a_whole_run_with_vllm(tiny, tmp_path):
    status, _, err, _ = command(RUN, *tiny, "--sampler", "vllm", "--check-sync", "--tis", "2", "--name", "v")
    assert status == 0, err
    assert "sampler: vllm in float32" in err and "check-sync: mean gap" in err
    rows = read(tmp_path / "runs" / "v" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert max(row["gap/max"] for row in rows[:-1]) < 1e-3  # after each update, too
    assert all(row["tis/mean"] == pytest.approx(1, abs=1e-3) and row["tis/capped"] == 0 for row in rows[:-1])
    assert rows[0]["kl"] < rows[3]["kl"]


@pytest.mark.slow
@needs_vllm
def test_vllm_as_its_own_judge_with_filtered_samples(tiny, tmp_path):
    path = tmp_path / "open.jsonl"
    write_tasks(path, [{"criterion": f"Is {word}.", "points": 1, "tags": []} for word in ("kind", "clear", "short", "calm")])
    status, _, err, _ = command(RUN, *tiny, "--tasks", path, "--sampler", "vllm", "--judge", "self", "--top-p", "0.8",
                                "--top-k", "20", "--steps", "2", "--name", "self")
    assert status == 0, err
    rows = read(tmp_path / "runs" / "self" / "metrics.jsonl")
    assert all(row["judge/unknown"] == 0 and "gap/max" not in row for row in rows[:-1])  # no gap where samples are filtered


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time/") and
             k not in ("tokens_per_second", "judge/seconds_per_call")} for row in rows]


def test_resume_continues_as_if_never_stopped(tiny, tmp_path):
    status, _, err, _ = command(RUN, *tiny, "--name", "whole")
    assert status == 0, err
    status, _, err, _ = command(RUN, *tiny, "--name", "cut", "--save-every", "1",
                                signalled=(signal.SIGKILL, r"^os\.rename \S*part \S*step_00002"))
    assert status == -signal.SIGKILL, err
    (tmp_path / "runs" / "cut" / "metrics.jsonl").open("a").write('{"step": 3, "torn')
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--resume")  # the settings come from config.json
    assert status == 0, err
    whole, cut = (without_times(read(tmp_path / "runs" / name / "metrics.jsonl")) for name in ("whole", "cut"))
    assert whole == cut
    weights = [(tmp_path / "runs" / name / "policy" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--resume", "--name", "cut")
    assert status == 0 and err == "cut is finished: there is nothing to resume\n"
    (tmp_path / "runs" / "cut" / "curves.png").unlink()  # as if it had been killed just before its end
    status, _, err, _ = command(RUN, *tiny, "--name", "cut", "--resume", "--lr", "0.5")
    assert status == 2 and "lr was 0.001, is 0.5" in err
    write_tasks(tmp_path / "letters.jsonl", RUBRIC[:4])
    status, _, err, _ = command(RUN, *tiny, "--name", "cut", "--resume")
    assert status == 2 and "tasks in" in err and "have changed" in err


@pytest.mark.slow(5)
def test_interrupt_without_a_checkpoint_can_be_resumed(tiny, tmp_path):
    status, _, err, _ = command(RUN, *tiny, "--save-every", "4", "--name", "early",
                                signalled=(signal.SIGINT, r"^open \S*rollouts/eval_00000"))
    assert status == 130 and "--resume" in err and "Traceback" not in err
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "early", "--resume")
    assert status == 0, err
    assert [row["step"] for row in read(tmp_path / "runs" / "early" / "metrics.jsonl")] == list(range(5))


def test_an_llm_judge_over_http_and_one_that_fails(tiny, tmp_path, server):
    path = tmp_path / "open.jsonl"
    write_tasks(path, [{"criterion": "Is kind.", "points": 5}, {"criterion": "Is rude.", "points": -3}])
    server.answers = lambda body, n: completion(json.dumps({"explanation": "", "criteria_met": n % 3 == 0}))
    flags = [*tiny, "--tasks", path, "--judge-url", server.url, "--steps", "1"]
    status, _, err, _ = command(RUN, *flags, "--name", "judged")
    assert status == 0, err
    assert len(server.requests) == 2 * (3 * 2 + 2 * 4 + 3 * 2)  # two criteria: evaluation, step, evaluation
    server.answers = lambda body, n: completion(json.dumps({"1": n % 3 == 0, "2": n % 2 == 0}))
    status, _, err, _ = command(RUN, *flags, "--judge-per", "response", "--name", "at-once")
    assert status == 0 and len(server.requests) == 3 * (3 * 2 + 2 * 4 + 3 * 2), err
    server.answers = lambda body, n: (404, {}, '{"error": {"message": "gone"}}')
    status, _, err, _ = command(RUN, *flags, "--name", "failed")
    assert status == 1 and "100% of the verdicts could not be had" in err and "gone" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("ratio", ["unbiased", "scaffolded"])
def test_the_policy_as_its_own_judge_and_the_other_ratios(tiny, tmp_path, ratio):
    path = tmp_path / "open.jsonl"
    rubric = [{"criterion": f"Is {word}.", "points": 1, "tags": []} for word in ("kind", "clear", "short", "calm")]
    write_tasks(path, rubric)
    status, _, err, _ = command(RUN, *tiny, "--tasks", path, "--judge", "self", "--ratio", ratio, "--name", "self")
    assert status == 0, err
    assert "judges itself" in err and "Qwen3-32B" in err
    rows = read(tmp_path / "runs" / "self" / "metrics.jsonl")
    assert all(row["judge/unknown"] == 0 for row in rows[:-1])


def test_mistakes_are_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUSCARL_JUDGE_URL", "")
    broken = tmp_path / "broken.jsonl"
    good = {"prompt": [{"role": "user", "content": "Hi"}], "rubrics": [{"criterion": "c", "points": 1}]}
    lines = [json.dumps({**good, "prompt_id": str(i)}) for i in range(9)]
    broken.write_text("\n".join([*lines[:6], '{"prompt": [', *lines[7:]]))
    mistakes = [
        (["--tasks", "nosuch.jsonl"], "no such task file: nosuch.jsonl"), (["--decay", "sigmod"], "sigmoid"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "no server answers"),
        (["--model", tmp_path / "nosuch", "--tasks", "first_aid", "--held-out", "9"], "no such folder"),
        (["--tasks", broken], "broken.jsonl, line 7: unreadable JSON"),
        (["--steps", "0"], "--steps"), (["--lr", "fast"], "--lr"), (["--group-size", "1"], "at least 2"),
        (["--judge-model", "m"], "--judge-model needs"), (["--judge-rpm", "-1"], "--judge-rpm"),
        (["--judge-per", "response"], "--judge-per response needs --judge-url"), (["--judge-per", "x"], "--judge-per"),
        (["--judge", "self", "--judge-url", "http://h/v1"], "no server"),
        (["--batch-size", "3", "--mini-batch-size", "2"], "multiple"),
        (["--nosuch", "1"], "--nosuch"), (["--judge-url", ","], "http"),
        (["--model", ""], "--model"), (["--name", ""], "--name must not be empty"), (["--step", "3"], "--step"),
        (["--runs", broken], "cannot write"), (["--tracker", "wandb"], "pip install wandb"),
        (["--judge", "chat"], "--judge-url"), (["--held-out", "80"], "--held-out"),
        (["--judge-url", "http://h/v1", "--judge-extra", "{"], "--judge-extra: unreadable JSON"),
        (["--judge-extra", '{"n": 1}'], "--judge-extra needs"), (["--plan", "--judge-calibrate"], "not allowed with"),
        (["--judge-url", "http://"], "--judge-url: 'http://' is not"),
        (["--name", "../x"], "--name"), (["--resume"], "no run to resume"),
        (["--temperature", "nan"], "--temperature"), (["--offload", "yes"], "--offload"), (["--tis", "-1"], "--tis"),
        (["--tis", "2", "--top-p", "0.9"], "--tis needs"), (["--gpu-gb", "80"], "--gpu-gb"), (["--gpus", "8"], "--gpus"),
        (["--judge-calibrate"], "--judge-url"), (["--tis", "0.5"], "--tis must be at least 1"),
        (["--plan", "--judge", "chat"], "--judge chat needs"), (["--plan", "--offload", "yes"], "--offload yes"),
        (["--max-prompt-tokens", "9000"], "the model's context is 8192"), (["--plan", "--held-out", "80"], "--held-out"),
    ]
    if not torch.cuda.is_available():
        mistakes.append((["--device", "cuda"], "no CUDA"))
    for number, (flags, message) in enumerate(mistakes):
        flags = ["--runs", tmp_path / "runs", *flags]
        assert message in refused(ruscarl, capsys, *flags), flags
        if number < 2:  # and alone, as a user sees it
            status, out, err, seconds = command(RUN, *flags, env={"HF_HUB_OFFLINE": "1"}, fresh=True)
            assert status == 2 and out == "" and len(err.strip().splitlines()) == 1 and message in err, (flags, err)
            assert seconds < 30
    assert not (tmp_path / "runs").exists()


def test_a_tracker_gets_the_same_numbers(tiny, tmp_path):
    (tmp_path / "wandb.py").write_text(
        "import json, os\ndef write(name, row):\n with open(os.environ['SENT'] + name, 'a') as f:\n"
        "  f.write(json.dumps(row) + '\\n')\nclass Run:\n id = 'abc'\n def log(self, numbers, step):\n"
        "  write('', [step, numbers])\ndef init(id, **options):\n write('.ids', id)\n return Run()\n")
    sent = tmp_path / "sent.jsonl"
    status, _, err, _ = command(RUN, *tiny, "--name", "tracked", "--tracker", "wandb",
                                env={"PYTHONPATH": str(tmp_path), "SENT": str(sent)})
    assert status == 0, err
    rows = read(tmp_path / "runs" / "tracked" / "metrics.jsonl")
    assert [step for step, _ in read(sent)] == [row["step"] for row in rows]
    for (_, numbers), row in zip(read(sent), rows):
        assert numbers == {k: v for k, v in row.items() if isinstance(v, int | float)}
    (tmp_path / "runs" / "tracked" / "curves.png").unlink()
    status, _, err, _ = command(RUN, "--runs", tmp_path / "runs", "--name", "tracked", "--resume",
                                env={"PYTHONPATH": str(tmp_path), "SENT": str(sent)})
    assert status == 0 and read(tmp_path / "sent.jsonl.ids") == [None, "abc"], err


@pytest.mark.parametrize("script", ["ruscarl.py", "evaluation.py"])
def test_an_interrupt_during_the_imports_is_one_line(tmp_path, script):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    flags = ["--name", "x"] if script == "ruscarl.py" else ["smollm2"]
    status, out, err, _ = command(ROOT / script, *flags, env={"PYTHONPATH": str(tmp_path)}, fresh=True)
    assert status == 130 and out == "" and len(err.splitlines()) == 1 and err.startswith(f"{script}: interrupted"), err


def test_help_is_quick_and_complete():
    status, out, _, seconds = command(RUN, "--help", fresh=True)
    assert status == 0 and seconds < 3
    for flag in ("model", "tasks", "name", "runs", "seed", "steps", "group-size", "batch-size", "mini-batch-size", "lr",
                 "kl",
                 "max-new-tokens", "temperature", "top-p", "top-k", "decay", "midpoint", "steepness", "pattern", "ratio",
                 "sampler", "judge", "judge-url", "judge-model", "resume"):
        assert f"--{flag} " in out or f"--{flag}\n" in out
    readme = (ROOT / "README.md").read_text()
    assert "python ruscarl.py" in readme
