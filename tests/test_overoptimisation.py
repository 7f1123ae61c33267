"""The over-optimisation experiment's parts by hand, and a run of two steps."""

import sys
from dataclasses import replace

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
import lab
import overoptimisation as tail

GOLD = [replace(task, rubric=tail.gold_rubric(task)) for task in lab.make_tasks()]


def test_gold_scores_by_hand():
    tea = GOLD[0]
    assert [c.points for c in tea.rubric] == [3, 2, 2, 1, 1, 2, 2, -2, -3, -3]
    assert tail.gold_score(tea.rubric, "amber basil cedar delta ember cup leaf") == 1
    assert tail.gold_score(tea.rubric, "warm cup leaf brown") == pytest.approx(2 / 13)
    assert tail.gold_score(tea.rubric, "amber " * 12) == 0
    assert tail.gold_score(tea.rubric, "amber fable") == 0


def test_ranking_accuracy_by_hand():
    pools = {"good": [["amber", "basil", "cup", "x"]], "great": [["amber basil", "amber basil cup", "warm", "warm fable"]]}
    gold = GOLD[:1]  # best quarter: amber basil (cup); worst: warm, warm fable
    assert tail.ranking_accuracy(gold, gold, pools) == (1, 1)
    truncated = [replace(gold[0], rubric=gold[0].rubric[:2])]
    assert tail.ranking_accuracy(gold, truncated, pools) == (0.5, 0.5)
    backwards = [replace(gold[0], rubric=(lab.says("amber", 1), lab.says("cup", -1), lab.says("fable", 1)))]
    assert tail.ranking_accuracy(gold, backwards, pools) == (0, 0)


def test_proxies_hold_only_what_is_gold_and_are_trained_on(tmp_path):
    lab.make_model(lab.make_tokenizer(), 0.03, steps=5).save_pretrained(tmp_path)
    pools = tail.sample_pools(tmp_path, GOLD[:4])
    assert [len(texts) for texts in pools["great"]] == [tail.POOL] * 4
    proxies = tail.make_proxies(GOLD[:4], pools)
    assert set(proxies) == set(tail.ARMS) and all(len(task.rubric) == 2 for task in proxies["truncated"])
    for tasks in proxies.values():
        assert all(set(task.rubric) <= set(gold.rubric) for task, gold in zip(tasks, GOLD))
    proxy = [replace(task, rubric=task.rubric[:2]) for task in GOLD]
    arm, seed, curve = tail.train_arm("truncated", 3, tmp_path, proxy, GOLD, 2)
    assert (arm, seed, [point[0] for point in curve]) == ("truncated", 3, [0, 2])
    lines = tail.table({"truncated": [curve, curve]}, {"truncated": (0.5, 0.5)}, {"truncated": proxy})
    assert len(lines) == 3 and "50.0%" in lines[2]
    tail.draw_theory(tmp_path / "a.png")
    tail.draw_curves({"truncated": [curve, curve]}, tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))
