"""RuscaRL: rubric-scaffolded reinforcement learning (arXiv 2508.16949), from scratch.

A rubric is a checklist with points. While a group of responses is sampled, part of the rubric is shown to the model as
a scaffold: more to the first sample, nothing to the last, and less to all of them as training goes on. A judge decides
each criterion; the points met are the reward; GRPO updates the policy as if the plain question had been asked, so that
what needed prompting becomes habit.

    python ruscarl.py                                      a 135M model on this machine, in minutes
    python ruscarl.py --decay none                         the same without scaffold: plain rubric GRPO
    python ruscarl.py --model Qwen/Qwen2.5-7B-Instruct     the paper's settings

`train` is the algorithm. Where it differs from the paper and from the official code: docs/differences.md.
"""

import sys

from plumbing.command_line import parse_training as parse_command_line

if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    ACTION, COMMAND_LINE = parse_command_line()

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy
import torch

import grpo
from judge import score
from plumbing import ranks, terminal
from plumbing.policy import named_weights, prompt_ids, save_policy
from plumbing.prepare import set_up
from plumbing.rules import recites
from plumbing.runs import Stopped
from sampler import SamplingParams, address_seed
from scaffold import choose_criteria, scaffold_messages, scaffold_ratios
from tasks import Task
from tools.checks import calibrate_judge, check_sync
from tools.page import write_page
from tools.plan import print_plan


def train(config, policy, reference, tokenizer, optimizer, sampler, judge, tasks, held_out, run):
    """Algorithm 1 of the paper. Each pass through the loop: scaffold, sample, judge, compare, update, sync."""
    for step in run.steps():
        row = evaluate(config, step, sampler, judge, tokenizer, held_out, run) if step % config.eval_every == 0 else {}

        # Scaffold: of a group's G prompts the first shows most of the rubric, the last nothing; over training all fade.
        ratios = scaffold_ratios(step, config.steps, config.group_size, **fading(config))
        rollouts = make_rollouts(tasks_of_step(config, step, tasks), ratios, tokenizer, (config.seed, step))

        # Sample a response to each prompt. Each is judged, criterion by criterion, while others are still being sampled.
        rollouts, judged = sample_and_judge(rollouts, sampler, judge, tokenizer, sampling(config), config.max_unknown,
                                            config.recite_words)
        sampler.sleep()  # leaves the GPU to the update

        # Compare: how much better is each response than the others to its question?
        set_advantages(rollouts, config.group_size, config.punish_recited)

        # Update on the plain question, as if nobody had shown the rubric.
        began, samples = time.monotonic(), [as_sample(rollout, config.ratio) for rollout in rollouts]
        updated = grpo.update(policy, optimizer, mini_batches(config, samples), loss_params(config), reference=reference,
                              max_grad_norm=config.max_grad_norm, token_budget=config.token_budget)
        sampler.sync(named_weights(policy))

        row |= judged | updated | rollout_metrics(rollouts, config.group_size)
        row |= {"scaffold/ratio": sum(ratios) / len(ratios), "time/update": time.monotonic() - began}
        run.finish_step(step, row, rollouts, policy, optimizer)
    run.log({"step": config.steps, **evaluate(config, config.steps, sampler, judge, tokenizer, held_out, run)})


def as_sample(rollout, ratio):
    """What the update conditions on: the prompts in numerator and denominator of pi(response | .) / pi_old(response | .).

    The response was sampled from the scaffolded prompt. The paper's Table 9 compares three choices; RuscaRL is "plain".
    """
    question, scaffolded = rollout.plain_ids, rollout.prompt_ids
    numerator, denominator = {"plain": (question, question), "unbiased": (question, scaffolded),
                              "scaffolded": (scaffolded, scaffolded)}[ratio]
    return grpo.Sample(numerator, rollout.response_ids, rollout.advantage, denominator, scaffolded, rollout.sampled_logp)


@dataclass
class Rollout:
    """One response from question to advantage. A group is known by its number, never by its prompt."""

    task: Task
    group: int
    sample: int  # 0..G-1; the first sees most of the scaffold, the last nothing
    seed: int  # of the response
    shown: list  # the criteria in the scaffold
    prompt_ids: list  # what the response is sampled from
    plain_ids: list  # the question without scaffold
    response_ids: list = field(default_factory=list)
    sampled_logp: list = field(default_factory=list)  # of each response token, as the sampler saw it
    text: str = ""
    finished: bool = False
    recited: bool = False  # whether the text repeats words of the rubric
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
            rollouts.append(Rollout(task, group, sample, address_seed(*address, group, sample), shown, prompt, plain))
    return rollouts


def sample_and_judge(rollouts, sampler, judge, tokenizer, params, max_unknown=1.0, recite_words=5):
    """Fill in response, verdicts and reward of each rollout: (all rollouts, metrics). Each rank does its share.

    recite_words: a response that repeats so many consecutive words of a criterion recites its rubric. Raises Stopped where
    more than max_unknown of the verdicts could not be had: the rest would be a matter of luck.
    """
    with ranks.together():
        own, times = sample_and_judge_share(ranks.share(rollouts), sampler, judge, tokenizer, params)
        for rollout in own:
            rollout.recited = recites(recite_words)(rollout.text, [c.text for c in rollout.task.rubric])
    parts, times, errors = zip(*ranks.gather((own, times, judge.counts()[2])))
    rollouts = [rollout for part in parts for rollout in part]
    verdicts = [verdict for rollout in rollouts for verdict in rollout.verdicts]
    unknown = sum(verdict is None for verdict in verdicts) / max(1, len(verdicts))  # tasks may be without rubrics
    if unknown > max_unknown:
        reason = next(filter(None, errors), None)
        raise Stopped(f"{unknown:.0%} of the verdicts could not be had (limit {max_unknown:.0%}, --max-unknown)"
                      + (f"; the last error: {reason}" if reason else ""))
    return rollouts, {"judge/unknown": unknown, "judge/unscored": sum(r.reward is None for r in rollouts) / len(rollouts),
                      **{name: max(part[name] for part in times) for name in times[0]}}


def sample_and_judge_share(rollouts, sampler, judge, tokenizer, params):
    """`sample_and_judge` for one rank's share. Judging goes on while the next responses are sampled."""
    start, first, verdicts, (calls, seconds, _) = time.monotonic(), None, {}, judge.counts()
    for response in sampler.sample([r.prompt_ids for r in rollouts], [r.seed for r in rollouts], params):
        rollout = rollouts[response.index]
        rollout.response_ids, rollout.sampled_logp = response.token_ids, response.logprobs
        rollout.finished = response.finished
        rollout.text = tokenizer.decode(response.token_ids, skip_special_tokens=True).strip()
        verdicts[response.index] = judge.submit(rollout.task, rollout.text)  # futures, one a criterion
        first = first or time.monotonic()
        terminal.phase(f"sampling {len(verdicts)}/{len(rollouts)}")
    sampled = time.monotonic()
    terminal.phase("judging")
    judge.finish()
    for i, rollout in enumerate(rollouts):
        rollout.verdicts = [verdict.result() for verdict in verdicts[i]]
        rollout.reward = score(rollout.task.rubric, rollout.verdicts)
    end, (calls_now, seconds_now, _) = time.monotonic(), judge.counts()
    return rollouts, {"time/sample": sampled - start, "time/judge": end - (first or end), "time/rollout": end - start,
                      "judge/seconds_per_call": (seconds_now - seconds) / max(1, calls_now - calls)}


def set_advantages(rollouts, group_size, punish_recited=False):
    """Group-relative advantages; a response without a reward gets 0 and does not count in its group.

    punish_recited: compare a response that recites its rubric as if it had the rubric's lowest score.
    """
    rewards = [r.reward if r.reward is None or not (punish_recited and r.recited) else
               score(r.task.rubric, [c.points < 0 for c in r.task.rubric]) for r in rollouts]
    rewards = torch.tensor([torch.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
    advantages = grpo.group_advantages(rewards.view(-1, group_size))  # [groups, G]
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
        rollout.advantage = advantage


def tasks_of_step(config, step, tasks):
    """The batch_size tasks of a step: a fresh shuffle of all tasks each epoch, known from seed and step alone."""
    batch, orders = [], {}
    for position in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, index = divmod(position, len(tasks))
        if epoch not in orders:
            orders[epoch] = list(range(len(tasks)))
            random.Random(address_seed(config.seed, "epoch", epoch)).shuffle(orders[epoch])
        batch.append(tasks[orders[epoch][index]])
    return batch


def mini_batches(config, samples):
    """`samples` in lists of mini_batch_size questions, G samples each."""
    size = config.mini_batch_size * config.group_size
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def sampling(config):
    """How responses are drawn. Filtered by top-p or top-k, the sampler's log-probabilities are not the policy's."""
    return SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k,
                          logprobs=config.top_p == 1 and config.top_k == 0)


def fading(config):
    """The settings of the scaffold that `scaffold_ratios` takes."""
    return {name: getattr(config, name) for name in ("decay", "pattern", "midpoint", "steepness", "power", "full_samples")}


def loss_params(config):
    """The settings of the loss."""
    return grpo.LossParams(config.kl, config.clip_low, config.clip_high, config.dual_clip, config.temperature, config.tis)


def evaluate(config, step, sampler, judge, tokenizer, held_out, run):
    """Score of the policy on the held-out tasks without scaffold: mean over tasks and its bootstrap standard error.

    Every evaluation of a run draws with the same seeds. The score is not clipped, so that progress below 0 can be seen.
    """
    began = time.monotonic()
    rollouts = make_rollouts(held_out, [0.0] * config.eval_samples, tokenizer, (config.seed, "eval"))
    rollouts, _ = sample_and_judge(rollouts, sampler, judge, tokenizer, sampling(config), config.max_unknown,
                                   config.recite_words)
    run.save_rollouts(f"eval_{step:05d}", rollouts)
    by_task = defaultdict(list)
    for r in rollouts:
        if r.reward is not None:
            by_task[r.group].append(r.reward)
    if not by_task:
        raise Stopped("no held-out response could be scored: each had a verdict that could not be had")
    scores = numpy.array([numpy.mean(rewards) for rewards in by_task.values()])
    rates, wanted = pass_rates(rollouts), {c.text for task in held_out for c in task.rubric if c.points > 0}
    draws = numpy.random.default_rng(0).integers(len(scores), size=(1000, len(scores)))
    error = float(scores[draws].mean(axis=1).std()) if len(scores) > 1 else None  # of one task nothing is known
    return {"eval/score": float(scores.mean()), "eval/score_se": error,
            "eval/length": float(numpy.mean([len(r.response_ids) for r in rollouts])), "eval/recited": recited(rollouts),
            "eval/reached": run.reached({text: rate for text, rate in rates.items() if text in wanted}),
            "eval/pass_rate": rates, "time/eval": time.monotonic() - began}


def rollout_metrics(rollouts, group_size):
    """Rewards, lengths and pass rates of a step's rollouts."""
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    plain = [r.reward for r in rollouts if r.reward is not None and not r.shown]
    recited_by = {shown: recited([r for r in rollouts if bool(r.shown) == shown]) for shown in (True, False)}
    spreads = [numpy.ptp(known) for group in groups
               if len(known := [r.reward for r in group if r.reward is not None]) > 1]
    return {
        "reward/mean": float(numpy.mean(rewards)) if rewards else None,
        "reward/std": float(numpy.std(rewards)) if rewards else None,
        "reward/unscaffolded": float(numpy.mean(plain)) if plain else None,
        "reward/zero_variance_groups": float(numpy.mean([spread < 1e-9 for spread in spreads])) if spreads else None,
        "scaffold/recited": recited_by[True],
        "scaffold/recited_plain": recited_by[False],
        "response/length": float(numpy.mean([len(r.response_ids) for r in rollouts])),
        "response/truncated": float(numpy.mean([not r.finished for r in rollouts])),
        "pass_rate": pass_rates(rollouts),
    }


def recited(rollouts):
    """The share of the rollouts that recite their rubric; None of none."""
    return float(numpy.mean([r.recited for r in rollouts])) if rollouts else None


def pass_rates(rollouts):
    """{criterion: share of the responses that meet it}, for criteria that more than one task of the batch has."""
    verdicts, owners = defaultdict(list), defaultdict(set)
    for r in rollouts:
        for criterion, met in zip(r.task.rubric, r.verdicts):
            if met is not None:
                verdicts[criterion.text].append(met)
                owners[criterion.text].add(r.task.id)
    return {text: sum(met) / len(met) for text, met in sorted(verdicts.items()) if len(owners[text]) > 1}


def main(action, config):
    """Train, plan or calibrate. Returns the exit status: 1 for a run that had to stop, or does not fit."""
    if action != "train":
        answer = print_plan if action == "plan" else calibrate_judge
        return 0 if not ranks.leader() or answer(config) else 1  # of many ranks, one answer is enough
    parts = set_up(config, write_page)
    try:
        if config.check_sync:
            check_sync(config, parts["policy"], parts["sampler"], parts["held_out"], parts["tokenizer"])
        parts["run"].open()
        status = train_and_save(config, parts)  # all ranks come out of it together
        parts["sampler"].close()
        ranks.leave()
        return status
    except (OSError, RuntimeError) as error:  # OSError: a full disk
        lost, full = ranks.lost(error), isinstance(error, torch.OutOfMemoryError)
        if lost is None and not full and not isinstance(error, OSError):
            raise
        reason = lost or ("the GPU is out of memory: an update takes less with a lower --token-budget" if full else error)
        stopped(reason, config, every_rank=full or lost is not None)
        return 1
    finally:
        parts["judge"].close()


def train_and_save(config, parts):
    """Train; write the policy and the summary, or a checkpoint where training has to stop. Returns the exit status."""
    run, policy = parts["run"], parts["policy"]
    terminal.say(f"{run.folder}: {config.model} on {config.tasks}, {config.preset} preset, "
                 f"{config.steps - run.steps_done} steps{f' on {ranks.size()} ranks' if ranks.size() > 1 else ''}")
    ranks.listen()
    try:
        train(config, **parts)
    except (Stopped, ranks.Interrupted) as error:
        run.save_checkpoint(policy, parts["optimizer"])
        stopped(error, config)
        return error.status if isinstance(error, ranks.Interrupted) else 1
    save_policy(policy, parts["tokenizer"], run.folder / "policy", parts["optimizer"])
    if ranks.leader():
        run.draw_curves()
        terminal.summary(run, config)
    ranks.meet()  # while the leader writes, the others keep the process group
    return 0


def stopped(reason, config, every_rank=False):
    """Say why a run stopped and how it goes on."""
    if every_rank or ranks.leader():
        print(f"ruscarl.py: stopped: {reason}; continue with --resume --runs {config.runs} --name {config.name}",
              file=sys.stderr, flush=True)


if __name__ == "__main__":
    terminal.run_command("ruscarl.py", lambda: main(ACTION, COMMAND_LINE))
