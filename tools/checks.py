"""--judge-calibrate: how far can an LLM judge be trusted? Ask it what is already known.

40 recorded responses to the first_aid questions, whose criteria are checked by rules: the rules are the truth, and the
judge is asked in the very words of training. Agreement here bounds what a run can learn from this judge; criteria about
wording and length are easier to state than medical ones, and counting words is harder.
"""

import json
import time
from collections import Counter, defaultdict

import numpy
from tqdm import tqdm

from judge import ChatJudge
from plumbing.prepare import connect
from plumbing.rules import rule_from_tags
from tasks import BUNDLED, load_tasks


def known_cases():
    """(messages, response, criterion, truth, number of the response) for every criterion of the recorded responses."""
    tasks = {task.id: task for task in load_tasks("first_aid")}
    recorded = json.loads((BUNDLED / "calibration.json").read_text(encoding="utf-8"))
    return [(tasks[record["prompt_id"]].messages, record["response"], criterion,
             rule_from_tags(criterion.tags)(record["response"]), i)
            for i, record in enumerate(recorded) for criterion in tasks[record["prompt_id"]].rubric]


def balanced_f1(truth, verdicts):
    """Mean of the F1 of "met" and the F1 of "not met", as in HealthBench's meta-evaluation. Two lists of booleans.

    F1 of a class = 2 x right / (times it was true + times it was said); 0 for a class that never occurs in either.
    """
    truth, verdicts = numpy.asarray(truth, bool), numpy.asarray(verdicts, bool)
    scores = []
    for kind in (True, False):
        there, said = truth == kind, verdicts == kind
        scores.append(2 * (there & said).sum() / max(1, there.sum() + said.sum()))
    return float(numpy.mean(scores))


def interval(statistic, truth, verdicts, owners, draws=1000):
    """95% bootstrap interval of statistic(truth, verdicts), resampling whole responses (`owners`), with a fixed seed."""
    by_owner = defaultdict(list)
    for i, owner in enumerate(owners):
        by_owner[owner].append(i)
    groups, rng = list(by_owner.values()), numpy.random.default_rng(0)
    values = []
    for _ in range(draws):
        picked = numpy.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])
        values.append(statistic(truth[picked], verdicts[picked]))
    return numpy.percentile(values, [2.5, 97.5])


def calibrate_judge(config):
    """Ask the judge of `config` and print what came back; returns whether there was any verdict.

    Raises ConnectionError or ValueError for a server that cannot judge.
    """
    client = connect(config)
    try:
        return calibrate(ChatJudge(client)) != (None, None)
    finally:
        client.close()


def calibrate(judge):
    """Ask `judge` (a ChatJudge) about every known case and print what came back. Returns (agreement, balanced F1).

    Verdicts that could not be had are counted apart; (None, None) if there were no others.
    """
    cases, start = known_cases(), time.monotonic()
    futures = [judge.submit(messages, text, criterion) for messages, text, criterion, _, _ in cases]
    answers = [future.result() for future in tqdm(futures, "judging", leave=False, disable=None)]
    seconds, error = time.monotonic() - start, judge.counts()[2]
    judged = [(criterion, known, answer, owner)
              for (_, _, criterion, known, owner), answer in zip(cases, answers) if answer is not None]
    print(f"{len(judged)} of {len(cases)} verdicts, {len(cases) / seconds:.1f} a second")
    if len(judged) < len(cases):
        print(f"unknown: {len(cases) - len(judged)}" + (f", the last because of {error}" if error else ""))
    if not judged:
        return None, None
    truth, verdicts = (numpy.array([row[i] for row in judged]) for i in (1, 2))
    owners = [row[3] for row in judged]

    def agreement(truth, verdicts):
        return float((truth == verdicts).mean())

    print(f"\n{'':14s}{'':>8s}  95% interval, over responses")
    for name, statistic in (("agreement", agreement), ("balanced F1", balanced_f1)):
        low, high = interval(statistic, truth, verdicts, owners)
        print(f"{name:14s}{statistic(truth, verdicts):>8.3f}  {low:.3f} to {high:.3f}")
    print(f"always {'met' if truth.mean() > 0.5 else 'not met'} would agree in {max(truth.mean(), 1 - truth.mean()):.3f}")
    for sign, points in (("positive", 1), ("negative", -1)):
        table = Counter((known, said) for criterion, known, said, _ in judged if criterion.points * points > 0)
        print(f"\ncriteria of {sign} points   judged met   judged not met")
        for known in (True, False):
            print(f"{'truly met' if known else 'truly not met':>27s}{table[known, True]:>13d}{table[known, False]:>17d}")
    wrong = Counter(criterion.text for criterion, known, said, _ in judged if known != said)
    total = Counter(criterion.text for criterion, *_ in judged)
    print("\nmost often wrong")
    for text, count in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:5]:
        print(f"  {count:3d} of {total[text]:3d}  {text}")
    return agreement(truth, verdicts), balanced_f1(truth, verdicts)


def check_sync(config, policy, sampler, held_out, tokenizer):
    raise NotImplementedError
