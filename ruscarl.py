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

from config import Config, judge_extra, parse_command_line

if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    COMMAND_LINE = parse_command_line()

import hashlib
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on cores that others could use

import random
import time
from collections import defaultdict

import numpy
import torch
from tqdm import tqdm

import grpo
import report
from chat import ChatClient
from judge import ChatJudge, Judge, SelfJudge
from policy import cpu_dtype, keep_freed_memory, load_policy, prompt_ids, save_policy, stop_ids
from rollouts import make_rollouts, pass_rates, rollout_metrics, sample_and_judge
from rules import rule_from_tags
from runs import Run
from sampler import SamplingParams, TransformersSampler, address_seed
from scaffold import scaffold_messages, scaffold_ratios
from tasks import load_tasks, split_tasks


class Stopped(RuntimeError):
    """The run cannot go on; the message says why."""


def train(config, policy, reference, tokenizer, optimizer, sampler, judge, tasks, held_out, run, start=0):
    """Algorithm 1 of the paper. Each pass through the loop: scaffold, sample, judge, advantage, update, sync."""
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k, logprobs=True)
    with tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=None) as bar:
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
            row |= update_policy(config, rollouts, policy, reference, optimizer, bar)
            sampler.sync(policy)

            row |= {"scaffold/ratio": sum(ratios) / len(ratios), **rollout_metrics(rollouts, config.group_size)}
            row["time/step"] = time.monotonic() - stepped
            row["tokens_per_second"] = sum(len(r.response_ids) for r in rollouts) / row["time/step"]
            row["time/total"] = time.monotonic() - began
            run.log(row)
            run.save_rollouts(f"step_{step:05d}", rollouts)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                bar.set_description("saving")
                run.save_checkpoint(step + 1, policy, optimizer)
            report.step_line(bar, row, rollouts, show_sample=step % config.eval_every == 0)
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
        reason = judge.counts()[2]
        raise Stopped(f"{unknown:.0%} of the verdicts could not be had (limit {config.max_unknown:.0%}, --max-unknown)"
                      + (f"; the last error: {reason}" if reason else ""))


def set_advantages(rollouts, group_size):
    """Group-relative advantages; a response without a reward gets 0 and does not count in its group."""
    rewards = torch.tensor([float("nan") if r.reward is None else r.reward for r in rollouts], dtype=torch.float64)
    advantages = grpo.group_advantages(rewards.view(-1, group_size))  # [groups, G]
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
        rollout.advantage = advantage


def update_policy(config, rollouts, policy, reference, optimizer, bar):
    """Hand the rollouts to GRPO as (prompt, response, advantage): on the plain question, unless --ratio says otherwise."""
    samples = [grpo.Sample(prompt_ids=r.prompt_ids if config.ratio == "scaffolded" else r.plain_ids,
                           old_prompt_ids=r.plain_ids if config.ratio == "plain" else r.prompt_ids,
                           response_ids=r.response_ids, advantage=r.advantage) for r in rollouts]
    size = config.mini_batch_size * config.group_size
    params = grpo.LossParams(config.kl, config.clip_low, config.clip_high, config.dual_clip or None, config.temperature)
    start = time.monotonic()
    bar.set_description("updating")
    stats = grpo.update(policy, optimizer, [samples[i : i + size] for i in range(0, len(samples), size)], params,
                        reference=reference, max_grad_norm=config.max_grad_norm, token_budget=config.token_budget,
                        autocast=autocast_dtype(config, policy.device),
                        progress=lambda done: bar.set_description(f"updating {done}/{len(samples)}"))
    row = {**stats, "time/update": time.monotonic() - start}
    if config.top_p == 1 and config.top_k == 0:  # else the sampler renormalises over fewer tokens
        gaps = [(torch.tensor(r.sampled_logp) - s.old_logp).abs() for r, s in zip(rollouts, samples)
                if s.old_prompt_ids == r.prompt_ids]
        if gaps:
            row |= {"gap/mean": torch.cat(gaps).mean().item(), "gap/max": torch.cat(gaps).max().item()}
    return row


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


def autocast_dtype(config, device):
    """What the update computes in: None for the weights' own float32."""
    if config.dtype == "auto":
        dtype = cpu_dtype() if device.type == "cpu" else torch.bfloat16
    else:
        dtype = getattr(torch, config.dtype)
    return None if dtype == torch.float32 else dtype


def first_unruled(tasks):
    """The first task with a criterion that has no rule, or None."""
    return next((task for task in tasks for c in task.rubric if rule_from_tags(c.tags) is None), None)


def make_chat_client(config, tasks):
    """A checked ChatClient for --judge-url, or None without one.

    Raises ConnectionError or ValueError for a server that cannot judge, ValueError for a --judge that does not fit.
    """
    if config.judge == "chat" and not config.judge_url:
        raise ValueError("--judge chat needs --judge-url (or $RUSCARL_JUDGE_URL)")
    if config.judge == "rules" and (task := first_unruled(tasks)):
        raise ValueError(f"--judge rules: task {task.id} has a criterion without a rule")
    if not config.judge_url or config.judge in ("rules", "self"):
        return None
    client = ChatClient(config.judge_url.split(","), config.judge_model, concurrency=config.judge_concurrency,
                        extra=judge_extra(config))
    client.check()
    return client


def make_judge(config, client, tasks, tokenizer, sampler):
    """Rules for what has rules; for the rest the server, or the policy itself."""
    if first_unruled(tasks) is None:
        return Judge()
    if client is not None:
        return Judge(ChatJudge(client))
    tqdm.write("warning: the policy judges itself; the paper used Qwen3-32B behind a server (--judge-url)", sys.stderr)
    prefix, true, false = (tokenizer.encode(text, add_special_tokens=False)
                           for text in ('{"criteria_met":', " true", " false"))
    if true[0] == false[0]:
        raise ValueError("--judge self: this tokenizer begins true and false with the same token; use --judge-url")
    params = SamplingParams(1, temperature=0, allowed_token_ids=(true[0], false[0]))
    return Judge(SelfJudge(lambda messages: prompt_ids(tokenizer, messages), prefix, true[0], false[0],
                           lambda prompts: sampler.sample(prompts, [0] * len(prompts), params)))


def drop_long(config, tasks, tokenizer):
    """Tasks whose question, with the whole rubric shown, fits in max_prompt_tokens; says how many do not."""
    kept = [task for task in tqdm(tasks, "measuring prompts", leave=False, disable=None)
            if len(prompt_ids(tokenizer, scaffold_messages(task.messages, task.rubric))) <= config.max_prompt_tokens]
    if len(kept) < len(tasks):
        tqdm.write(f"{len(tasks) - len(kept)} of {len(tasks)} tasks dropped: longer than --max-prompt-tokens "
                   f"{config.max_prompt_tokens} with the scaffold", sys.stderr)
    if not kept:
        raise ValueError(f"no task fits in --max-prompt-tokens {config.max_prompt_tokens}")
    return kept


def set_up(config):
    """The arguments of `train` after config, as a dict. What can be checked without the model is checked first.

    Raises ValueError or OSError for a mistake of the user's, in one line.
    """
    tasks = load_tasks(config.tasks)
    split_tasks(tasks, config.held_out)
    client = make_chat_client(config, tasks)
    run = Run(config, hashlib.sha256(repr(tasks).encode()).hexdigest())
    keep_freed_memory()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available to torch")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    policy, tokenizer = load_policy(config.model, device)
    context = getattr(policy.config, "max_position_embeddings", None)
    if context and config.max_prompt_tokens + config.max_new_tokens > context:
        raise ValueError(f"--max-prompt-tokens and --max-new-tokens add up to "
                         f"{config.max_prompt_tokens + config.max_new_tokens}, but the model's context is {context} tokens")
    reference = load_policy(config.model, device)[0].requires_grad_(False) if config.kl > 0 else None
    tasks, held_out = split_tasks(drop_long(config, tasks, tokenizer), config.held_out)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    start = run.load_checkpoint(policy, optimizer) if config.resume else 0
    precision = autocast_dtype(config, policy.device) or torch.float32
    sampler = TransformersSampler(policy, stop_ids(policy, tokenizer), precision)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()  # transformers checkpoints only in training mode
    judge = make_judge(config, client, tasks + held_out, tokenizer, sampler)
    run.open()
    return dict(policy=policy, reference=reference, tokenizer=tokenizer, optimizer=optimizer, sampler=sampler,
                judge=judge, tasks=tasks, held_out=held_out, run=run, start=start)


def main(config: Config):
    """Set up, train, report. Returns the exit status: 2 for a mistake of the user's, 1 for a run that had to stop."""
    try:
        parts = set_up(config)
    except (ValueError, OSError) as error:
        print(f"ruscarl.py: error: {error}", file=sys.stderr)
        return 2
    run = parts["run"]
    print(f"{run.folder}: {config.model} on {config.tasks}, {config.preset} preset, {config.steps - parts['start']} steps")
    try:
        train(config, **parts)
    except Stopped as error:
        run.save_checkpoint(run.steps_done(), parts["policy"], parts["optimizer"])
        print(f"ruscarl.py: stopped: {error}; continue with --resume --runs {config.runs} --name {config.name}",
              file=sys.stderr)
        return 1
    finally:
        parts["judge"].close()
    save_policy(parts["policy"], parts["tokenizer"], run.folder / "policy")
    run.draw_curves()
    report.summary(run, config)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(COMMAND_LINE))
    except KeyboardInterrupt:
        print(f"ruscarl.py: interrupted; continue with --resume --runs {COMMAND_LINE.runs} --name {COMMAND_LINE.name}",
              file=sys.stderr, flush=True)
        os._exit(130)  # not sys.exit, which would wait for judge requests still under way
