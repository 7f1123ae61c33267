"""The schedule against figures of the official code, and what the scaffold shows."""

import json
import random
from pathlib import Path

import pytest

from scaffold import choose_criteria, group_ratios, scaffold_messages, scaffold_ratios, step_ratio
from tasks import Criterion

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "schedule.json").read_text())
RUBRIC = tuple(Criterion(f"criterion {i}", 1 if i % 3 else -1) for i in range(10))


@pytest.mark.parametrize("golden", GOLDENS)
def test_ratios_equal_the_official_ones(golden):
    ratios = scaffold_ratios(golden["step"] - 1, golden["total"], golden["G"],
                             decay=golden["rule"].removeprefix("step_"), midpoint=golden["t0"],
                             steepness=golden["alpha"], power=golden["power"], pattern=golden["group"],
                             full_samples=golden["full"])
    assert ratios == pytest.approx(golden["ratios"], rel=1e-9, abs=1e-12)


def test_first_sees_all_and_last_nothing():
    assert group_ratios(5) == [1, 0.75, 0.5, 0.25, 0]
    assert group_ratios(4, "binary", 3) == [1, 1, 1, 0]
    assert group_ratios(4, "none") == [0] * 4
    assert group_ratios(1) == [0]


def test_sigmoid_is_half_at_its_midpoint_and_never_overflows():
    assert step_ratio(0.3, midpoint=0.3) == 0.5
    assert step_ratio(1.0, steepness=1e6) == 0
    assert step_ratio(0.0, steepness=1e6) == 1
    width = 9.19 / 125  # from 99% to 1% of the scaffold, as a share of the run
    assert step_ratio(0.2 - width / 2) == pytest.approx(0.99, abs=1e-3)
    assert step_ratio(0.2 + width / 2) == pytest.approx(0.01, abs=1e-3)


def test_a_run_of_one_step_is_at_its_beginning():
    assert scaffold_ratios(0, 1, 2, decay="linear") == [1, 0]


@pytest.mark.parametrize("call", [
    lambda: group_ratios(4, "linera"), lambda: step_ratio(0.5, "sigmod"), lambda: step_ratio(1.5),
    lambda: group_ratios(0), lambda: group_ratios(4, "binary", -1), lambda: scaffold_ratios(10, 10, 4),
])
def test_bad_arguments_raise(call):
    with pytest.raises(ValueError):
        call()


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="sigmoid, constant, linear, power, none"):
        step_ratio(0.5, "sigmod")


def test_selection_counts_order_and_independence():
    for ratio in (0, 0.1, 0.24, 0.26, 0.5, 1):
        chosen = choose_criteria(RUBRIC, ratio, random.Random(0))
        assert len(chosen) == round(ratio * 10)
        assert chosen == sorted(chosen, key=RUBRIC.index)
    draws = [tuple(choose_criteria(RUBRIC, 0.3, random.Random(seed))) for seed in range(3000)]
    for criterion in RUBRIC:  # each of the ten is in 30% of the draws
        assert sum(criterion in draw for draw in draws) / len(draws) == pytest.approx(0.3, abs=0.04)
    assert draws[0] == tuple(choose_criteria(RUBRIC, 0.3, random.Random(0)))


def test_message_shows_criteria_by_sign_and_no_points():
    question = [{"role": "user", "content": "What helps?"}]
    [user] = scaffold_messages(question, [Criterion("Promises a cure.", -9), Criterion("Says rest.", 7)])
    assert user["role"] == "user"
    places = [user["content"].index(part) for part in (
        "What helps?", "should meet", "- Says rest.", "should not", "- Promises a cure.", "Do not mention")]
    assert places == sorted(places)
    assert "7" not in user["content"] and "9" not in user["content"]
    assert scaffold_messages(question, []) == question == [{"role": "user", "content": "What helps?"}]
    assert "should not" not in scaffold_messages(question, [Criterion("Says rest.", 7)])[0]["content"]
    assert "should meet" not in scaffold_messages(question, [Criterion("Promises a cure.", -9)])[0]["content"]


def test_a_system_message_and_earlier_turns_stay():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "What helps?"}]
    before = [dict(message) for message in messages]
    result = scaffold_messages(messages, [Criterion("Says rest.", 1)])
    assert result[:-1] == messages[:-1] and messages == before
    assert result[-1]["content"].startswith("What helps?\n\n") and "Says rest." in result[-1]["content"]
