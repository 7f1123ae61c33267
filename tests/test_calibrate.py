"""Judging the judge: the figures by hand, and a scripted judge over HTTP."""

import json

import numpy
import pytest

from conftest import RUN, command, completion
from plumbing.config import Config
from tasks import Criterion, Task
from tools.checks import balanced_f1, interval, known_cases
from tools.plan import print_work


def test_balanced_f1_by_hand():
    truth = [True, True, True, False, False]
    said = [True, True, False, False, True]
    # met: 2 right, 3 true, 3 said; not met: 1 right, 2 true, 2 said
    assert balanced_f1(truth, said) == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert balanced_f1(truth, truth) == 1
    assert balanced_f1(truth, [True] * 5) == pytest.approx(6 / 8 / 2)


def test_the_interval_resamples_whole_responses():
    truth, said = numpy.array([True] * 40), numpy.array([True] * 20 + [False] * 20)

    def agreement(a, b):
        return (a == b).mean()

    narrow = interval(agreement, truth, said, list(range(40)))
    wide = interval(agreement, truth, said, [i // 10 for i in range(40)])  # four responses of ten criteria
    assert narrow[0] == pytest.approx(0.5 - 1.96 * (0.25 / 40) ** 0.5, abs=0.03)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    low, high = interval(agreement, numpy.array([True] * 400), numpy.arange(400) < 200, list(range(400)))
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.08)  # 95%; of 90% it is 16% less


def test_known_cases_hold_both_answers_for_both_signs():
    cases = known_cases()
    for sign in (1, -1):
        truths = [truth for _, _, criterion, truth, _ in cases if criterion.points * sign > 0]
        assert min(sum(truths), len(truths) - sum(truths)) >= 25
    assert len({owner for *_, owner in cases}) == 40


@pytest.mark.slow(5)
def test_a_perfect_a_contrary_and_a_failing_judge(server):
    known = {(response, criterion.text): truth for _, response, criterion, truth, _ in known_cases()}

    def answer(right):
        def about(body, number):
            lines = body["messages"][-1]["content"].split("\n")
            response, asked = json.loads(lines[1])[-1]["content"], json.loads(lines[4])
            if isinstance(asked, str):
                return completion(json.dumps({"explanation": "", "criteria_met": right(response, asked)}))
            return completion(json.dumps({key: right(response, line) for key, line in asked.items()}))

        return about

    flags = ["--judge-calibrate", "--judge-url", server.url]
    server.answers = answer(lambda response, line: known[response, line.split("] ", 1)[1]])
    status, out, err, _ = command(RUN, *flags)
    assert status == 0, err
    rows = {line[:18].strip(): line[18:].split() for line in out.splitlines()}
    assert rows["one call a"] == ["criterion", "response"] and rows["calls"] == [f"{len(known)}", "40"]
    assert rows["verdicts"] == [f"{len(known)}", "of", f"{len(known)}"] * 2
    assert rows["agreement"] == rows["balanced F1"] == ["1.000", "1.000", "to", "1.000"] * 2
    assert rows["tokens"] == [f"{10 * len(known):,}", "+", f"{5 * len(known):,}", "400", "+", "200"]
    server.answers = answer(lambda response, line: True)
    status, out, _, _ = command(RUN, *flags, "--judge-per", "response")
    share = sum(known.values()) / len(known)
    assert out.count(f"{share:.3f}  ") == 2 and "with one call a response" in out and "most often wrong" in out
    server.answers = lambda body, n: (404, {}, '{"error": {"message": "gone"}}')
    status, out, err, _ = command(RUN, *flags)
    assert status == 1 and out.count(f"unknown: {len(known)}") == 2 and "gone" in out and "Traceback" not in err


@pytest.mark.parametrize(("per", "calls"), [("criterion", 2), ("response", 1)])
def test_the_plan_counts_the_calls_of_both_ways(capsys, tokenizer, per, calls):
    ruled = Criterion("Says x.", 1, ("verifier:rule", "function:mentions_any", 'parameters:{"words": ["x"]}'))
    task = Task("t", [{"role": "user", "content": "Q?"}], (Criterion("Is kind.", 1), ruled, Criterion("Is rude.", -1)))
    config = Config(judge_per=per, judge_url="http://h/v1", steps=10, batch_size=4, group_size=8, eval_every=10, held_out=1)
    print_work(config, [task, task], [task], numpy.array([[5, 9]] * 3), tokenizer)
    line = next(line for line in capsys.readouterr().out.splitlines() if "judge calls" in line)
    assert f"{32 * calls} a step, {(320 + 2 * 4) * calls} in all" in line
