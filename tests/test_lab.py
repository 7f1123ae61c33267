"""The lab's parts by hand, and the whole of it in a few seconds."""

import random
import sys

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
import lab
import lab_report
import output
from judge import Judge, score
from plumbing.policy import prompt_ids
from scaffold import scaffold_messages


def test_tokens_are_words_and_rubrics_can_be_met():
    tokenizer, tasks = lab.make_tokenizer(), lab.make_tasks()
    assert len(tasks) == 96 and len({task.id for task in tasks}) == 96
    for task in tasks[::7]:
        ids = prompt_ids(tokenizer, scaffold_messages(task.messages, task.rubric))
        assert tokenizer.unk_token_id not in ids
        wanted = [c.text[5:-1] for c in task.rubric if c.points > 0]
        verdicts = [f.result() for f in Judge().submit(task, " ".join(wanted))]
        assert score(task.rubric, verdicts) == 1
        verdicts = [f.result() for f in Judge().submit(task, " ".join(lab.habits(task.id.rsplit("-", 1)[0])))]
        assert score(task.rubric, verdicts) == pytest.approx(-2 / 9)


def test_dialogues_do_what_is_shown():
    rng, task = random.Random(0), lab.make_tasks()[0]
    for _ in range(200):
        messages, reply = lab.dialogue(rng, task, base_rate=0.0)
        said = set(reply.split()) & set(lab.RARE)
        assert all(f"Says {word}." in messages[-1]["content"] for word in said)


def test_spoiled_rubrics():
    task = lab.make_tasks()[0]
    points = [c.points for c in task.rubric]
    rng = random.Random(0)
    assert [c.points for c in lab.noisy(task, "inverse", rng).rubric] == [-p for p in points]
    negated = [-p if i % 2 == 0 else p for i, p in enumerate(points)]
    assert [c.points for c in lab.noisy(task, "negated", rng).rubric] == negated
    half = lab.noisy(task, "half removed", rng).rubric
    assert len(half) == 3 and set(half) < set(task.rubric)
    assert lab.noisy(task, "clean", rng) == task


def test_a_faulty_judge_fails_in_a_tenth_of_its_verdicts():
    tasks = lab.make_tasks()
    judge = lab.FaultyJudge(None, {tasks[0].id})
    assert not any(f.result() is None for text in map(str, range(50)) for f in judge.submit(tasks[0], text))
    verdicts = [f.result() for task in tasks for text in ("amber", "tea", "x") for f in judge.submit(task, text)]
    assert 0.07 < sum(v is None for v in verdicts) / len(verdicts) < 0.13
    judge.close()


def test_mixed_up_scaffolds_half_of_the_batch_with_other_rubrics():
    tokenizer, batch = lab.make_tokenizer(), lab.make_tasks()[::24]
    rollouts = lab.mixed_up(batch, [1.0, 0.0], tokenizer, (0, 0))
    assert [r.task for r in rollouts] == [task for task in batch for _ in range(2)]
    assert [list(r.task.rubric) == r.shown for r in rollouts if r.shown] == [True, True, False, False]


@pytest.mark.slow(5)
def test_the_whole_lab_and_its_continuation(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "base_model", lambda rate, cache: lab.make_model(lab.make_tokenizer(), rate, steps=5)
                        .save_pretrained(tmp_path / f"base_{rate}"))
    lab.base_model(0.005, tmp_path)
    results = {}
    for seed in range(2):
        for arm in (lab.RUSCARL, lab.PLAIN):
            results[lab.key_of(arm, seed, 2)] = lab.train_arm(arm, seed, tmp_path / "base_0.005", 2)
    again = lab.train_arm(lab.PLAIN, 1, tmp_path / "base_0.005", 2)
    assert again == results[lab.key_of(lab.PLAIN, 1, 2)]  # a seed is a seed
    arms = lab.by_arm(lab.QUICK, results, 2, 2)
    lines = lab_report.table(arms)
    assert len(lines) == 4 and "no scaffold" in lines[3] and lines[3].count("+-") == 3
    for draw in (lab_report.draw_arms, lab_report.draw_curves):
        draw(arms, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    output.write(tmp_path / "report.md", ["# Title", "old", output.READING, "by hand"])
    output.write(tmp_path / "report.md", ["# Title", "new"])
    assert (tmp_path / "report.md").read_text().split() == ["#", "Title", "new", "##", "Reading", "by", "hand"]
    rows = [{"key": key, **row} for key, row in results.items()]
    found = lab.run_all(lab.QUICK, 2, 2, tmp_path / "lab.jsonl", rows, tmp_path, 1)  # everything is there: nothing is run
    assert {key: found[key]["end"] for key in results} == {key: row["end"] for key, row in results.items()}


def test_the_interval_is_students():
    mean, half = lab_report.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2, rel=0.02)
