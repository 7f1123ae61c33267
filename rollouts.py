"""Rollouts: one response each, from question to reward.

The scaffold is in the prompt that a response is sampled from; the plain question is kept beside it, for the update.
"""

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy

from judge import score
from plumbing import ranks
from plumbing.policy import prompt_ids
from sampler import address_seed
from scaffold import choose_criteria, scaffold_messages
from tasks import Task


@dataclass
class Rollout:
    """One response from question to advantage. A group is known by its number, never by its prompt."""

    task: Task
    group: int
    sample: int  # 0..G-1; the first sees most of the scaffold, the last nothing
    shown: list  # the criteria in the scaffold
    prompt_ids: list  # what was sampled from
    plain_ids: list  # the question without scaffold
    response_ids: list = field(default_factory=list)
    sampled_logp: list = field(default_factory=list)  # of each response token, as the sampler saw it
    text: str = ""
    finished: bool = False
    verdicts: list = field(default_factory=list)
    reward: float | None = None
    advantage: float = 0.0


def make_rollouts(batch, ratios, tokenizer, address):
    """One empty Rollout for each sample of each task of `batch`, with its own draw of criteria in its prompt.

    ratios: share of the rubric that each sample of a group sees. address: (seed, step), completed by group and sample.
    """
    rollouts = []
    for group, task in enumerate(batch):
        plain = prompt_ids(tokenizer, task.messages)
        for sample, ratio in enumerate(ratios):
            rng = random.Random(address_seed("scaffold", *address, group, sample))
            shown = choose_criteria(task.rubric, ratio, rng)
            prompt = prompt_ids(tokenizer, scaffold_messages(task.messages, shown)) if shown else plain
            rollouts.append(Rollout(task, group, sample, shown, prompt, plain))
    return rollouts


def sample_and_judge(rollouts, address, sampler, judge, tokenizer, params, bar):
    """Fill in response, verdicts and reward; each response goes to the judge while others are still sampled.

    address: prefix of the seeds, completed by group and sample. Each rank does its share, and then has all. Returns times,
    unknown verdicts and judge latency.
    """
    with ranks.together():
        found, times = _own_share(ranks.share(rollouts), address, sampler, judge, tokenizer, params, bar)
    parts = [part for part in ranks.gather((found, times)) if part[0]]  # of a team, only one speaks
    for rollout, values in zip(rollouts, [values for found, _ in parts for values in found], strict=True):
        (rollout.response_ids, rollout.sampled_logp, rollout.text, rollout.finished, rollout.verdicts,
         rollout.reward) = values
    verdicts = [verdict for rollout in rollouts for verdict in rollout.verdicts]
    calls, seconds = (sum(times[name] for _, times in parts) for name in ("calls", "seconds"))
    return {
        "judge/unknown": sum(verdict is None for verdict in verdicts) / len(verdicts),
        "judge/unscored": sum(rollout.reward is None for rollout in rollouts) / len(rollouts),
        "judge/seconds_per_call": seconds / calls if calls else None,
        **{name: max(times[name] for _, times in parts) for name in ("time/sample", "time/judge", "time/rollout")},
    }


def _own_share(rollouts, address, sampler, judge, tokenizer, params, bar):
    """([what `sample_and_judge` fills in, for each of `rollouts`], times and counts of calls to the judge)."""
    start = time.monotonic()
    calls, seconds, _ = judge.counts()
    responses, futures, first = [None] * len(rollouts), [None] * len(rollouts), start
    seeds = [address_seed(*address, r.group, r.sample) for r in rollouts]
    for done, response in enumerate(sampler.sample([r.prompt_ids for r in rollouts], seeds, params), 1):
        if not ranks.speaks():
            continue
        text = tokenizer.decode(response.token_ids, skip_special_tokens=True).strip()
        first = time.monotonic() if done == 1 else first
        responses[response.index] = (response.token_ids, response.logprobs, text, response.finished)
        futures[response.index] = judge.submit(rollouts[response.index].task, text)
        bar.set_description(f"sampling {done}/{len(rollouts)}")
    sampled = time.monotonic()
    bar.set_description("judging")
    judge.finish()
    found = []
    for rollout, response, asked in zip(rollouts, responses, futures) if ranks.speaks() else ():
        verdicts = [verdict.result() for verdict in asked]
        found.append((*response, verdicts, score(rollout.task.rubric, verdicts)))
    calls_after, seconds_after, _ = judge.counts()
    return found, {
        "calls": calls_after - calls, "seconds": seconds_after - seconds,
        "time/sample": sampled - start,
        "time/judge": time.monotonic() - first,  # from the first response on: overlaps time/sample
        "time/rollout": time.monotonic() - start,  # both together
    }


def rollout_metrics(rollouts, group_size):
    """Rewards, lengths and pass rates of a step's rollouts."""
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    plain = [r.reward for r in rollouts if r.reward is not None and not r.shown]
    spreads = [numpy.ptp(known) for group in groups
               if len(known := [r.reward for r in group if r.reward is not None]) > 1]
    return {
        "reward/mean": float(numpy.mean(rewards)) if rewards else None,
        "reward/std": float(numpy.std(rewards)) if rewards else None,
        "reward/unscaffolded": float(numpy.mean(plain)) if plain else None,
        "reward/zero_variance_groups": float(numpy.mean([spread < 1e-9 for spread in spreads])) if spreads else None,
        "response/length": float(numpy.mean([len(r.response_ids) for r in rollouts])),
        "response/truncated": float(numpy.mean([not r.finished for r in rollouts])),
        "pass_rate": pass_rates(rollouts),
    }


def pass_rates(rollouts):
    """{criterion: share of the responses that meet it}, for criteria that more than one task of the batch has."""
    verdicts, owners = defaultdict(list), defaultdict(set)
    for r in rollouts:
        for criterion, met in zip(r.task.rubric, r.verdicts):
            if met is not None:
                verdicts[criterion.text].append(met)
                owners[criterion.text].add(r.task.id)
    return {text: sum(met) / len(met) for text, met in sorted(verdicts.items()) if len(owners[text]) > 1}
