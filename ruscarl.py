"""RuscaRL: rubric-scaffolded reinforcement learning (arXiv 2508.16949), from scratch.

A rubric is a checklist with points. While a group of responses is sampled, part of the rubric is shown to the model as
a scaffold: more to the first sample, nothing to the last, and less to all of them as training goes on. A judge decides
each criterion; the points met are the reward; GRPO updates the policy as if the plain question had been asked, so that
what needed prompting becomes habit.

    python ruscarl.py                                      a 135M model on this machine, in minutes
    python ruscarl.py --decay none                         the same without scaffold: plain rubric GRPO
    python ruscarl.py --model Qwen/Qwen2.5-7B-Instruct     the paper's settings

`train` is the algorithm; the functions below it are its steps.
"""

import sys

from plumbing.config import Config, parse_command_line

if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    ACTION, COMMAND_LINE = parse_command_line()

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on cores that others could use
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import random
import time
from collections import defaultdict

import numpy
import torch
from tqdm import tqdm

import grpo
from plumbing import ranks, terminal
from plumbing.policy import named_weights, prompt_ids, save_policy
from plumbing.prepare import choose_device, say, set_up
from rollouts import make_rollouts, pass_rates, rollout_metrics, sample_and_judge
from sampler import SamplingParams, address_seed
from scaffold import scaffold_ratios
from tools.checks import calibrate_judge
from tools.plan import print_plan


class Stopped(RuntimeError):
    """The run cannot go on; the message says why."""


def train(config, policy, reference, tokenizer, optimizer, sampler, judge, tasks, held_out, run, start=0, autocast=None):
    """Algorithm 1 of the paper. Each pass through the loop: scaffold, sample, judge, advantage, update, sync."""
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k,
                            logprobs=unfiltered(config))
    with tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=ranks.silent()) as bar:
        skipped = 0  # steps in a row
        for step in range(start, config.steps):
            began = time.monotonic()
            row = {"step": step}
            if step % config.eval_every == 0:
                row |= evaluate(config, step, sampler, judge, tokenizer, held_out, params, run, bar)
            stepped = time.monotonic()

            batch = tasks_of_step(config, step, tasks)
            ratios = scaffold_ratios(step, config.steps, config.group_size, decay=config.decay, pattern=config.pattern,
                                     midpoint=config.midpoint, steepness=config.steepness, power=config.power,
                                     full_samples=config.full_samples)
            rollouts = make_rollouts(batch, ratios, tokenizer, (config.seed, step))
            row |= sample_and_judge(rollouts, (config.seed, step), sampler, judge, tokenizer, params, bar)
            stop_if_unjudged(config, row["judge/unknown"], judge)
            set_advantages(rollouts, config.group_size)
            probes = [] if unfiltered(config) else sample_probes(config, sampler, [r.plain_ids for r in rollouts])
            sampler.sleep()
            row |= update_policy(config, rollouts, probes, policy, reference, optimizer, autocast, bar)
            sampler.sync(named_weights(policy))

            row |= {"scaffold/ratio": sum(ratios) / len(ratios), **rollout_metrics(rollouts, config.group_size)}
            row["time/step"] = time.monotonic() - stepped
            row["tokens_per_second"] = sum(len(r.response_ids) for r in rollouts) / row["time/step"]
            row["time/total"] = time.monotonic() - began
            run.save_rollouts(f"step_{step:05d}", rollouts)
            run.log(row)
            skipped = skipped + 1 if row["skipped_steps"] else 0
            stop_if_skipped(config, skipped)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                bar.set_description("saving")
                run.save_checkpoint(policy, optimizer)
            if ranks.leader():
                terminal.step_line(bar, row, rollouts, show_sample=step % config.eval_every == 0)
        scores = evaluate(config, config.steps, sampler, judge, tokenizer, held_out, params, run, bar)
        run.log({"step": config.steps, **scores})


def tasks_of_step(config, step, tasks):
    """The batch_size tasks of a step: a fresh shuffle of all tasks each epoch, known from seed and step alone."""
    batch, order, shuffled = [], None, None
    for position in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, index = divmod(position, len(tasks))
        if epoch != shuffled:
            order, shuffled = list(range(len(tasks))), epoch
            random.Random(address_seed(config.seed, "epoch", epoch)).shuffle(order)
        batch.append(tasks[order[index]])
    return batch


def stop_if_unjudged(config, unknown, judge):
    """Raise Stopped when too many verdicts could not be had: training on the rest would be training on luck."""
    if unknown > config.max_unknown:
        reason = next(filter(None, ranks.gather(judge.counts()[2])), None)
        raise Stopped(f"{unknown:.0%} of the verdicts could not be had (limit {config.max_unknown:.0%}, --max-unknown)"
                      + (f"; the last error: {reason}" if reason else ""))


def stop_if_skipped(config, steps):
    """Raise Stopped after `steps` in a row whose gradient was not finite: it will not become so by itself."""
    if steps >= config.max_skipped:
        raise Stopped(f"the gradient was not finite in {steps} steps in a row (limit --max-skipped); lower --lr, or look at "
                      "the last rollouts")


def set_advantages(rollouts, group_size):
    """Group-relative advantages; a response without a reward gets 0 and does not count in its group."""
    rewards = torch.tensor([float("nan") if r.reward is None else r.reward for r in rollouts], dtype=torch.float64)
    advantages = grpo.group_advantages(rewards.view(-1, group_size))  # [groups, G]
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
        rollout.advantage = advantage


def update_policy(config, rollouts, probes, policy, reference, optimizer, autocast, bar):
    """Hand the rollouts to GRPO as (prompt, response, advantage): on the plain question, unless --ratio says otherwise."""
    start = time.monotonic()
    bar.set_description("updating")
    samples = [grpo.Sample(prompt_ids=r.prompt_ids if config.ratio == "scaffolded" else r.plain_ids,
                           old_prompt_ids=r.plain_ids if config.ratio == "plain" else r.prompt_ids,
                           response_ids=r.response_ids, advantage=r.advantage) for r in rollouts]
    pairs = score_probes(config, policy, probes, autocast)
    row = weigh_tokens(config, rollouts, samples, policy, autocast) if config.tis else {}
    size = config.mini_batch_size * config.group_size
    params = grpo.LossParams(config.kl, config.clip_low, config.clip_high, config.dual_clip or None, config.temperature)
    row |= grpo.update(policy, optimizer, [samples[i : i + size] for i in range(0, len(samples), size)], params,
                       reference=reference, max_grad_norm=config.max_grad_norm, token_budget=config.token_budget,
                       autocast=autocast, progress=lambda done: bar.set_description(f"updating {done}/{len(samples)}"))
    if unfiltered(config):  # then the samples themselves tell, where both saw the same prompt
        pairs = [(torch.tensor(r.sampled_logp), s.old_logp) for r, s in zip(rollouts, samples)
                 if s.old_prompt_ids == r.prompt_ids]
    return {**row, **gap(pairs), "time/update": time.monotonic() - start}


def weigh_tokens(config, rollouts, samples, policy, autocast):
    """Truncated importance sampling: give each token of `samples` its weight, which corrects for the sampler's rounding."""
    logps = grpo.sample_logprobs(policy, [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts],
                                 config.token_budget, config.temperature, autocast)
    for rollout, sample, logp in zip(rollouts, samples, logps):
        sample.importance = grpo.truncated_importance(logp, torch.tensor(rollout.sampled_logp), config.tis)
        if sample.old_prompt_ids == rollout.prompt_ids:
            sample.old_logp = logp  # need not be computed again
    weights = torch.cat([sample.importance for sample in samples])
    return {"tis/mean": weights.mean().item(), "tis/capped": (weights >= config.tis).float().mean().item()}


def unfiltered(config):
    """Whether samples come from the whole distribution, so that the sampler's log-probabilities are the trainer's."""
    return config.top_p == 1 and config.top_k == 0


def sample_probes(config, sampler, prompts):
    """(prompt, Response) of 8 short unfiltered samples, by which sampler and trainer are compared; more for more ranks."""
    probes = max(8, ranks.size())
    prompts = ranks.share(list(enumerate(prompts[:: max(1, len(prompts) // probes)][:probes])))
    params = SamplingParams(min(32, config.max_new_tokens), config.temperature, logprobs=True)
    seeds = [address_seed(config.seed, "probe", i) for i, _ in prompts]
    responses = sampler.sample([prompt for _, prompt in prompts], seeds, params)
    own = [(prompts[response.index][1], response) for response in responses]
    return [probe for part in ranks.gather(own if ranks.speaks() else []) for probe in part]


def score_probes(config, policy, probes, autocast):
    """(sampler's, trainer's) log-probabilities of each probe: list of pairs of float32 [response tokens]."""
    logps = grpo.sample_logprobs(policy, [prompt for prompt, _ in probes], [r.token_ids for _, r in probes],
                                 config.token_budget, config.temperature, autocast)
    return [(torch.tensor(response.logprobs), logp) for (_, response), logp in zip(probes, logps)]


def gap(pairs):
    """How far sampler and trainer are apart: |log-probability difference| a token, mean and maximum; empty for none."""
    if not pairs:
        return {}
    gaps = torch.cat([(sampled - trained).abs() for sampled, trained in pairs])
    return {"gap/mean": gaps.mean().item(), "gap/max": gaps.max().item()}


def check_sync(config, policy, sampler, held_out, tokenizer, autocast):
    """Give the sampler other weights, then the policy's: its log-probabilities must be far from the trainer's, then equal.

    The other weights are the policy's own with the rows of each tensor in reverse order: a tensor that stays at them, or
    at the arbitrary weights that vLLM starts from, shows. Equal: within 1e-4 a token in float32 on a CPU; else within 0.1 in
    the mean, which bfloat16's rounding stays under. Raises ValueError if it is not so.
    """
    prompts = [prompt_ids(tokenizer, task.messages) for task in held_out]

    def gap_with(weights):
        sampler.sync(weights)
        return gap(score_probes(config, policy, sample_probes(config, sampler, prompts), autocast))

    other = gap_with((name, weight.flip(0)) for name, weight in named_weights(policy))
    same = gap_with(named_weights(policy))
    exact = sampler.dtype == torch.float32 and choose_device(config) == "cpu"  # GPUs may round to TF32
    found = (f"mean gap {other['gap/mean']:.2g} with other weights, {same['gap/mean']:.2g} after the sync "
             f"(max {same['gap/max']:.2g})")
    if other["gap/mean"] < 0.2 or (same["gap/max"] > 1e-4 if exact else same["gap/mean"] > 0.1):
        raise ValueError(f"--check-sync: the sampler does not follow the policy: {found} nats a token")
    say(f"check-sync: {found} nats a token")


def evaluate(config, step, sampler, judge, tokenizer, held_out, params, run, bar):
    """Score of the policy on the held-out tasks without scaffold: mean over tasks and its bootstrap standard error.

    Every evaluation of a run draws with the same seeds. Not clipped, so that progress below 0 can be seen.
    """
    began = time.monotonic()
    address = (config.seed, "eval")
    rollouts = make_rollouts(held_out, [0.0] * config.eval_samples, tokenizer, address)
    judged = sample_and_judge(rollouts, address, sampler, judge, tokenizer, params, bar)
    stop_if_unjudged(config, judged["judge/unknown"], judge)
    run.save_rollouts(f"eval_{step:05d}", rollouts)
    by_task = defaultdict(list)
    for r in rollouts:
        if r.reward is not None:
            by_task[r.group].append(r.reward)
    if not by_task:
        raise Stopped("no held-out response could be scored: each had a verdict that could not be had")
    scores = numpy.array([numpy.mean(rewards) for rewards in by_task.values()])
    draws = numpy.random.default_rng(0).integers(len(scores), size=(1000, len(scores)))
    return {"eval/score": float(scores.mean()), "eval/score_se": float(scores[draws].mean(axis=1).std()),
            "eval/length": float(numpy.mean([len(r.response_ids) for r in rollouts])),
            "eval/pass_rate": pass_rates(rollouts), "time/eval": time.monotonic() - began}


def main(action, config: Config):
    """Train, plan or calibrate. Returns the exit status: 2 for a mistake of the user's, 1 for a run that had to stop."""
    if action != "train" and os.environ.get("RANK", "0") != "0":
        return 0  # one answer is enough
    try:
        if action == "plan":
            return 0 if print_plan(config) else 1
        if action == "calibrate":
            return 0 if calibrate_judge(config) else 1
        parts = set_up(config)
        if config.check_sync:
            check_sync(config, **{name: parts[name] for name in ("policy", "sampler", "held_out", "tokenizer", "autocast")})
    except (ValueError, OSError) as error:
        ranks.complain(f"ruscarl.py: error: {error}")
        return 2
    try:
        status = train_and_save(config, parts)  # all ranks come out of it together
        parts["sampler"].close()
        ranks.leave()
        return status
    except (ranks.Lost, OSError) as error:  # OSError: a disk that is full
        if ranks.leader() or isinstance(error, ranks.Lost):
            say_stopped(error, config)
        return 1
    except RuntimeError:
        if (lost := ranks.lost()) is None:
            raise
        say_stopped(lost, config)
        return 1
    finally:
        parts["judge"].close()


def train_and_save(config, parts):
    """Train; write the policy and the summary, or a checkpoint where training has to stop. Returns the exit status."""
    run, policy = parts["run"], parts["policy"]
    if ranks.leader():
        print(f"{run.folder}: {config.model} on {config.tasks}, {config.preset} preset, {config.steps - parts['start']} "
              f"steps{f' on {ranks.size()} ranks' if ranks.size() > 1 else ''}")
    ranks.listen()
    try:
        train(config, **parts)
    except (Stopped, ranks.Interrupted) as error:
        run.save_checkpoint(policy, parts["optimizer"])
        if ranks.leader():
            say_stopped(error, config)
        return error.status if isinstance(error, ranks.Interrupted) else 1
    save_policy(policy, parts["tokenizer"], run.folder / "policy")
    if ranks.leader():
        run.draw_curves()
        terminal.summary(run, config)
    return 0


def say_stopped(reason, config):
    """Why a run stopped and how it goes on."""
    print(f"ruscarl.py: stopped: {reason}; continue with --resume --runs {config.runs} --name {config.name}",
          file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        STATUS = main(ACTION, COMMAND_LINE)
        sys.stdout.flush()
        if STATUS > 2:  # interrupted
            os._exit(STATUS)  # not sys.exit, which would wait for judge requests still under way
        sys.exit(STATUS)
    except KeyboardInterrupt:
        if ranks.leader():
            print("ruscarl.py: interrupted before training began", file=sys.stderr, flush=True)
        os._exit(130)
