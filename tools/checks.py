"""Two questions before a run: is the judge right (--judge-calibrate), and does the sampler follow the policy (--check-sync)?

--judge-calibrate asks the judge about 40 recorded responses to the first_aid questions, whose criteria are checked by rules:
the rules are the truth, and the judge is asked as in training, both ways of --judge-per. A rule finds advice by its phrases:
where a response gives it in other words, the judge may be right and the rule wrong.
"""

import json
import time
from collections import Counter
from contextlib import closing
from itertools import groupby
from operator import itemgetter

import numpy
import torch
from tqdm import tqdm

from grpo import sample_logprobs
from judge import ChatJudge
from plumbing import ranks
from plumbing.policy import named_weights, prompt_ids
from plumbing.rules import rule_from_tags
from plumbing.terminal import say
from sampler import SamplingParams, address_seed
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
    classes = (truth, verdicts), (~truth, ~verdicts)
    return float(numpy.mean([2 * (there & said).sum() / max(1, there.sum() + said.sum()) for there, said in classes]))


def interval(statistic, truth, verdicts, owners, draws=1000):
    """95% bootstrap interval of statistic(truth, verdicts), resampling whole responses (`owners`), with a fixed seed."""
    order, starts = numpy.argsort(owners, kind="stable"), numpy.unique(numpy.sort(owners), return_index=True)[1]
    groups, rng = numpy.split(order, starts[1:]), numpy.random.default_rng(0)
    picks = (numpy.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))]) for _ in range(draws))
    return numpy.percentile([statistic(truth[picked], verdicts[picked]) for picked in picks], [2.5, 97.5])


def equal_verdicts(truth, verdicts, owners):
    """{"agreement": share of equal verdicts, "balanced F1": `balanced_f1`}, each as (value, low, high): its 95% interval."""
    statistics = {"agreement": lambda truth, verdicts: (truth == verdicts).mean(), "balanced F1": balanced_f1}
    return {name: (float(statistic(truth, verdicts)), *interval(statistic, truth, verdicts, owners).tolist())
            for name, statistic in statistics.items()}


def calibrate_judge(config):
    """Ask the judge at --judge-url about every known case, one call a criterion and one a response; print how often it is
    right. Returns whether --judge-per gave any verdict. Raises ValueError for a server that cannot judge."""
    cases = known_cases()
    judged, columns = zip(*(ask_about(cases, config, per) for per in ("criterion", "response")))
    for name in columns[0]:
        print(f"{name:18s}" + "".join(f"{column[name]:>26s}" for column in columns))
    chosen = judged[config.judge_per == "response"]
    if chosen:
        truth = numpy.mean([known for _, known, _, _ in chosen])
        print(f"always {'met' if truth > 0.5 else 'not met'} would agree in {max(truth, 1 - truth):.3f}")
        print_mistakes(chosen, config.judge_per)
    return bool(chosen)


def ask_about(cases, config, per):
    """(judged, column) of the judge asked by `per`. judged: (criterion, truth, verdict, number of the response) where there
    is a verdict. column: {figure: its text}."""
    with closing(ChatJudge(config.connect("judge"), per)) as judge:
        start, futures = time.monotonic(), []
        for _, rows in groupby(cases, key=itemgetter(4)):  # of one response
            messages, texts, criteria, *_ = zip(*rows)
            futures += judge.submit(messages[0], texts[0], criteria)
        answers = [future.result() for future in tqdm(futures, f"one call a {per}", leave=False, disable=None)]
        seconds, counts, error = time.monotonic() - start, judge.client.counts, judge.client.last_error
    judged = [(criterion, known, said, owner) for (_, _, criterion, known, owner), said in zip(cases, answers)
              if said is not None]
    if error:
        print(f"unknown: {len(cases) - len(judged)}, one call a {per}; the last because of {error}")
    _, *columns = map(numpy.array, zip(*judged)) if judged else [()] * 4
    shares = equal_verdicts(*columns) if judged else {"agreement": None, "balanced F1": None}
    return judged, {
        "one call a": per, "verdicts": f"{len(judged)} of {len(cases)}",
        **{name: "{:.3f}  {:.3f} to {:.3f}".format(*found) if found else "-" for name, found in shares.items()},
        "calls": f"{counts['calls']:,}", "seconds": f"{seconds:.1f}",
        "tokens": f"{counts['prompt_tokens']:,} + {counts['completion_tokens']:,}"}


def print_mistakes(judged, per):
    """Print where the judge is wrong. judged: see `ask_about`."""
    print(f"\nwith one call a {per}")
    for sign, points in (("positive", 1), ("negative", -1)):
        table = Counter((known, said) for criterion, known, said, _ in judged if criterion.points * points > 0)
        print(f"\ncriteria of {sign} points   judged met   judged not met")
        for known in (True, False):
            print(f"{'truly met' if known else 'truly not met':>27s}{table[known, True]:>13d}{table[known, False]:>17d}")
    wrong = Counter(criterion.text for criterion, known, said, _ in judged if known != said)
    total = Counter(criterion.text for criterion, *_ in judged)
    print("\nmost often wrong")
    for text, count in wrong.most_common(5):
        print(f"  {count:3d} of {total[text]:3d}  {text}")


def check_sync(config, policy, sampler, held_out, tokenizer):
    """--check-sync: the sampler's log-probabilities must be far from the trainer's with other weights, equal after the sync.

    The other weights are the policy's with the rows of each tensor reversed: a tensor that is not taken over shows. Equal is
    within 1e-4 a token in float32 on a CPU, else within 0.1 in the mean. Raises ValueError if it is not so.
    """
    prompts = [prompt_ids(tokenizer, task.messages) for task in held_out][: max(8, ranks.size())]
    other, _ = sampler_gap(config, policy, sampler, prompts, ((n, w.flip(0)) for n, w in named_weights(policy)))
    mean, most = sampler_gap(config, policy, sampler, prompts, named_weights(policy))
    found = f"mean gap {other:.2g} with other weights, {mean:.2g} after the sync (max {most:.2g}) nats a token"
    exact = sampler.dtype == torch.float32 and policy.device.type == "cpu"  # GPUs may round to TF32
    if other < 0.2 or (most > 1e-4 if exact else mean > 0.1):
        raise ValueError(f"--check-sync: the sampler does not follow the policy: {found}")
    say(f"check-sync: {found}")
    sampler.sync(named_weights(policy))  # awake again


def sampler_gap(config, policy, sampler, prompts, weights):
    """(mean, maximum) of |trainer's - sampler's log-probability| over tokens of short responses, sampled with `weights`. The
    sampler sleeps afterwards: the trainer scores the responses, for which --plan counts no sampler on a GPU."""
    sampler.sync(weights)
    own = ranks.share(list(enumerate(prompts)))
    params = SamplingParams(min(32, config.max_new_tokens), config.temperature, logprobs=True)
    seeds = [address_seed(config.seed, "probe", i) for i, _ in own]
    drawn = [(own[r.index][1], r) for r in sampler.sample([ids for _, ids in own], seeds, params)]
    drawn = [pair for part in ranks.gather(drawn) for pair in part]
    sampler.sleep()
    logps = sample_logprobs(policy, [ids for ids, _ in drawn], [r.token_ids for _, r in drawn], config.token_budget,
                            config.temperature)
    gaps = torch.cat([(torch.tensor(r.logprobs) - logp).abs() for (_, r), logp in zip(drawn, logps)])
    return gaps.mean().item(), gaps.max().item()
