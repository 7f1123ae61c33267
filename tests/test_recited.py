"""Responses that repeat their rubric: the rule, the metrics, the warning, the option; and what was reached from nothing."""

import pytest

from judge import Judge
from plumbing.config import Config
from plumbing.rules import rule_from_tags
from plumbing.runs import Run
from ruscarl import Rollout, pass_rates, recited, rollout_metrics, set_advantages
from tasks import Criterion, Task

RECITES = ("verifier:rule", "function:recites")
SHORT = ("verifier:rule", "function:max_words", 'parameters:{"limit": 4}')


def rollout(text="", shown=(), reward=0.0, met=(), recited=False, task="1", rubric=()):
    return Rollout(Task(task, [{"role": "user", "content": "?"}], tuple(rubric)), 0, 0, 0, list(shown), [], [], text=text,
                   reward=reward, verdicts=list(met), recited=recited)


def test_reciting_is_five_words_in_a_row_of_one_criterion():
    rubric = ["Recommends to drink plenty of water.", "Doesn\u2019t suggest butter, oil or ice", "Is kind."]
    check = rule_from_tags(RECITES)
    for text in ("- Recommends to drink PLENTY of ...", "it recommends: to drink plenty \u2013 of tea",
                 "doesn't suggest butter oil, or"):
        assert check(text, rubric), text
    for text in ("Drink plenty of water.", "to drink plenty of", "Is kind.", "of water doesn't suggest butter", ""):
        assert not check(text, rubric), text
    assert rule_from_tags((*RECITES, 'parameters:{"limit": 4}'))("to drink plenty of", rubric)
    with pytest.raises(ValueError, match="limit must be a whole number"):
        rule_from_tags((*RECITES, 'parameters:{"limit": 0}'))


def test_a_criterion_against_reciting_knows_its_rubric():
    task = Task("1", [], (Criterion("Says when to call an ambulance.", 2, SHORT), Criterion("Repeats these.", -3, RECITES)))
    judge = Judge()
    for text, verdicts in (("It says when to call an ambulance.", [False, True]), ("Call one.", [True, False])):
        assert [verdict.result() for verdict in judge.submit(task, text)] == verdicts


def test_shares_are_told_apart_by_what_was_shown():
    rubric = [Criterion("c", 1)]
    rollouts = [rollout(shown=rubric, recited=True), rollout(shown=rubric), rollout(), rollout()]
    found = rollout_metrics(rollouts, 2)
    assert (found["scaffold/recited"], found["scaffold/recited_plain"]) == (0.5, 0.0)
    assert rollout_metrics(rollouts[2:], 2)["scaffold/recited"] is None and recited([]) is None


def test_a_response_that_recites_can_be_compared_as_the_worst():
    rubric = [Criterion("a", 4), Criterion("b", -2)]
    rollouts = [rollout(reward=1.0, recited=True, rubric=rubric), rollout(reward=0.0, rubric=rubric), rollout(reward=None)]
    set_advantages(rollouts, 3)
    assert rollouts[0].advantage > 0 > rollouts[1].advantage and rollouts[2].advantage == 0
    set_advantages(rollouts, 3, punish_recited=True)  # -2 of 4 points
    assert rollouts[0].advantage < 0 < rollouts[1].advantage and rollouts[2].advantage == 0
    assert rollouts[0].reward == 1.0  # what is reported stays


@pytest.fixture
def run(tmp_path):
    run = Run(Config(runs=str(tmp_path), name="run"), "digest")
    run.open()
    return run


def test_one_warning_where_more_than_a_tenth_recites(run, capsys):
    for step, share in enumerate([0.1, 0.11, 0.5]):
        run.log({"step": step, "eval/recited": share})
    told = capsys.readouterr().err
    assert told.count("the policy repeats the rubric instead of following it") == 1 and "11% of the plain" in told


@pytest.mark.parametrize(("plain", "told"), [(20, True), (19, False)])  # of fewer, two would be a tenth
def test_a_step_in_which_many_recite_is_told_before_the_next_evaluation(run, capsys, plain, told):
    run._began = 0.0
    row = {"skipped_steps": 0, "scaffold/recited_plain": 0.5}
    run.finish_step(0, row, [rollout() for _ in range(plain)] + [rollout(shown=[Criterion("c", 1)])] * 9, None, None)
    assert ("50% of the plain responses recite" in capsys.readouterr().err) == told


def test_what_was_reached_from_nothing_is_counted(run):
    rubric = [Criterion(text, 1) for text in ("never", "now", "a little", "before")] + [Criterion("bad", -1)]

    def evaluation(step, met):
        rates = pass_rates([rollout(task=str(i % 3), rubric=rubric, met=met(i)) for i in range(30)]
                           + [rollout(task="9", rubric=[Criterion("its own", 1)], met=[step > 0])])
        wanted = {c.text for c in [*rubric, Criterion("its own", 1)] if c.points > 0}
        found = run.reached({text: rate for text, rate in rates.items() if text in wanted})
        run.log({"step": step, "eval/pass_rate": rates})
        return found

    assert evaluation(0, lambda i: [False, False, False, i == 0, False]) == 0
    assert evaluation(8, lambda i: [False, i < 4, i < 3, True, True]) == 1  # "now": 4 of 30; 3 are no more
