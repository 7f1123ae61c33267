"""From a Config to the parts of a run: tasks, judge, policy, sampler, optimizer. What can be checked early is.

A user's mistake is a ValueError or OSError of one line.
"""

import copy

import numpy
import torch
from tqdm import tqdm

from judge import ChatJudge, Judge, SelfJudge
from plumbing import lora, memory, ranks
from plumbing.architectures import examine
from plumbing.optimizer import frozen_copy, make_optimizer
from plumbing.policy import (
    cast,
    checkpoint_gradients,
    choose_kernels,
    cpu_dtype,
    keep_freed_memory,
    load_config,
    load_on_ranks,
    load_policy,
    named_weights,
    prompt_ids,
    shard,
    stop_ids,
)
from plumbing.rules import rule_from_tags
from plumbing.runs import Run
from plumbing.terminal import say
from plumbing.transformers_sampler import TransformersSampler
from plumbing.vllm_setup import vllm_obstacle
from sampler import SamplingParams, VLLMSampler
from scaffold import scaffold_messages
from tasks import digest, load_tasks, split_tasks

JUDGE_ROOM = 1024  # tokens of instructions and a criterion, for a policy that judges itself


def computing_dtype(config, device):
    """What sampler, policy and reference compute in; the master weights are always float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device == "cpu":
        return cpu_dtype()
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)  # vLLM has no bfloat16 for these
    return torch.float32 if old else torch.bfloat16


def first_unruled(tasks):
    """The first task with a criterion that has no rule, or None."""
    return next((task for task in tasks for c in task.rubric if rule_from_tags(c.tags) is None), None)


def check_judge(config, tasks):
    """Raise ValueError for a --judge that does not fit the tasks or lacks its server."""
    if config.judge == "chat" and not config.judge_url:
        raise ValueError("--judge chat needs --judge-url (or $RUSCARL_JUDGE_URL)")
    if config.judge == "rules" and (task := first_unruled(tasks)):
        raise ValueError(f"--judge rules: task {task.id} has a criterion without a rule")


def self_judged(config, tasks):
    """Whether the policy judges itself: no server is given for criteria without a rule."""
    return not config.judge_url and first_unruled(tasks) is not None


def make_judge(client, tasks, tokenizer, sampler, context, per="criterion"):
    """Rules for criteria that have rules; for the others the server behind `client`, or else the policy itself.

    context: tokens that the policy may read when it judges. per: what the server is asked about in one call.
    """
    if first_unruled(tasks) is None:
        return Judge()
    if client is not None:
        return Judge(ChatJudge(client, per))
    say("warning: the policy judges itself: its scores may mean nothing (the paper's judge: Qwen3-32B, by --judge-url)")
    prefix, true, false = (tokenizer.encode(text, add_special_tokens=False)
                           for text in ('{"criteria_met":', " true", " false"))
    if true[0] == false[0]:
        raise ValueError("--judge self: this tokenizer begins true and false with the same token; use --judge-url")
    params = SamplingParams(1, temperature=0, allowed_token_ids=(true[0], false[0]))
    return Judge(SelfJudge(lambda messages: prompt_ids(tokenizer, messages), prefix, true[0], false[0],
                           lambda prompts: sampler.sample(prompts, [0] * len(prompts), params), context - 1))


def drop_long(config, tasks, tokenizer):
    """(tasks whose question with the whole rubric fits in max_prompt_tokens, their lengths); says how many do not fit.

    lengths: int [tasks, 2], tokens of each question without and with the whole scaffold.
    """
    measured = tqdm(tasks, "measuring prompts", leave=False, disable=None if ranks.leader() else True)
    lengths = numpy.array([[len(prompt_ids(tokenizer, scaffold_messages(task.messages, shown)))
                            for shown in ((), task.rubric)] for task in measured])
    fits = lengths[:, 1] <= config.max_prompt_tokens
    if not fits.any():
        raise ValueError(f"--tasks {config.tasks}: no task fits in --max-prompt-tokens {config.max_prompt_tokens}; with its "
                         f"whole rubric the shortest has {lengths[:, 1].min()}")
    if not fits.all():
        say(f"{(~fits).sum()} of {len(tasks)} tasks dropped: longer than --max-prompt-tokens {config.max_prompt_tokens} "
            "with the scaffold")
    return [task for task, fit in zip(tasks, fits) if fit], lengths[fits]


def check_context(config, model_config):
    """How many tokens a policy that judges itself may read: the longest prompt, its response, and what a judge is told.

    Says so where responses cannot share their question's row in the update, which costs time. Raises ValueError where the
    model's context is shorter than the longest prompt with its response.
    """
    context = getattr(model_config, "max_position_embeddings", None) or 2**31 - 1
    longest = config.max_prompt_tokens + config.max_new_tokens
    if longest > context:
        raise ValueError(f"--max-prompt-tokens and --max-new-tokens add up to {longest}, but the model's context is "
                         f"{context} tokens")
    if longest > (limit := examine(model_config).limit):
        say(f"{model_config.model_type}: {f'sequences of more than {limit:,} tokens' if limit else 'responses'} have a "
            "row each in the update, with the question again: this architecture does not let them share one")
    return min(context, longest + longest // 4 + JUDGE_ROOM)  # a judge reads it as JSON, with quotes and line ends escaped


def choose_device(config):
    """"cpu" or "cuda". With --gpu-gb there is a GPU to plan for."""
    gpu = torch.cuda.is_available() or config.gpu_gb > 0
    if config.device == "cuda" and not gpu:
        raise ValueError("--device cuda: no CUDA device is available to torch")
    device = "cuda" if gpu and config.device != "cpu" else "cpu"
    if device == "cpu" and config.offload == "yes":
        raise ValueError("--offload yes: there is no GPU, the policy is in the host's memory already")
    if config.offload == "yes" and config.lora:
        raise ValueError("--offload yes: with --lora there is next to nothing to keep in the host's memory")
    if config.offload == "yes" and memory.ranks_of(config)[0] > 1:
        raise ValueError("--offload yes is for one GPU: several divide master weights and optimizer state among them")
    return device


def choose_sampler(config, device):
    """(whether vLLM samples, why). It does where it runs, and on the GPU of --gpu-gb; --sampler insists on one."""
    if config.sampler == "transformers":
        return False, "--sampler transformers"
    obstacle = None if config.gpu_gb else vllm_obstacle(device)
    if obstacle and config.sampler == "vllm":
        raise ValueError(f"--sampler vllm: {obstacle}")
    return not obstacle, obstacle or f"it is installed and runs on {device}"


def make_sampler(config, policy, tokenizer, **limits):
    """The sampler, announced; `sync` gives it the weights. limits: max_model_len, max_num_seqs, gpu_memory of VLLMSampler.

    On a CPU with --sampler auto, transformers samples where vLLM refuses the model.
    """
    device, stops = choose_device(config), stop_ids(policy, tokenizer)
    dtype, (vllm, why) = computing_dtype(config, device), choose_sampler(config, device)
    precision = str(dtype).removeprefix("torch.")
    choose_kernels(device)
    if vllm:
        try:
            sampler = VLLMSampler(policy.config, stops, dtype, **limits)
            say(f"sampler: vllm in {precision} ({why})")
            return sampler
        except ValueError as error:
            if config.sampler == "vllm" or device == "cuda" or ranks.size() > 1:  # all ranks must have the same
                raise
            why = str(error)
    say(f"sampler: transformers in {precision} ({why})")
    sampler = TransformersSampler(policy, stops, dtype, device=device)
    if sampler.cached_to < limits["max_model_len"]:
        say(f"sampler: without batches and cache, and slow: transformers' are not right for {policy.config.model_type}"
            f"{f' above {sampler.cached_to:,} tokens' * (sampler.cached_to > 0)} (--sampler vllm has its own)")
    return sampler


def set_up(config, after_evaluation):
    """The arguments of `train` after config, as a dict. What can be checked without the model is checked first.
    after_evaluation: see Run.

    Under torchrun this makes the process one of its ranks. Raises ValueError or OSError, in one line, for a mistake of the
    user's.
    """
    device = choose_device(config)
    ranks.join(device)
    config.name = ranks.gather(config.name)[0]  # it may have the time in it
    tasks = load_tasks(config.tasks)
    split_tasks(tasks, config.held_out)
    check_judge(config, tasks)
    client = config.connect("judge", ranks.size())
    if client is not None:
        config.judge_model = client.model  # the run stays with it when it is continued
    run = Run(config, digest(tasks), after_evaluation)
    vllm, dtype = choose_sampler(config, device)[0], computing_dtype(config, device)
    if len(set(ranks.gather((vllm, dtype)))) > 1:
        raise ValueError("machines differ in whether vllm runs, or in their precision: give --sampler and --dtype")
    model_config, tokenizer = load_config(config.model)
    context = check_context(config, model_config)
    tasks, lengths = drop_long(config, tasks, tokenizer)
    tasks, held_out = split_tasks(tasks, config.held_out)
    layout, gpu_memory = choose_layout(config, model_config, device, vllm, dtype, lengths)
    itself = self_judged(config, tasks + held_out)  # what a judge reads is longer than what it judges
    limits = {"max_model_len": context if itself else config.max_prompt_tokens + config.max_new_tokens,
              "gpu_memory": gpu_memory, **({} if itself else {"max_num_seqs": memory.samples_at_once(config)})}
    keep_freed_memory()
    load = load_on_ranks if ranks.size() > 1 else load_policy
    policy, tokenizer, *weights = load(config.model, dtype if config.lora else torch.float32)
    sampler = make_sampler(config, policy, tokenizer, **limits)
    sampler.sleep()  # until the sync: a policy that is put on a GPU, or dealt out, takes room there
    ranks.meet()  # engines start at their own pace, and collectives have time-outs
    if config.lora:  # after the sampler, which copies the plain model
        lora.add_adapters(policy, config.lora, config.seed)
    reference = make_reference(config, policy, dtype, device, *weights) if config.kl > 0 else None
    if weights:
        shard(policy, device, dtype, layout.each_pack, weights.pop())
    optimizer = make_optimizer(policy, config, "cpu" if layout.on_host else device, device, dtype)
    if config.resume:
        run.load_checkpoint(policy, optimizer)
    if config.gradient_checkpointing:
        checkpoint_gradients(policy)
    sampler.sync(named_weights(policy))
    judge = make_judge(client, tasks + held_out, tokenizer, sampler, context, config.judge_per)
    return dict(policy=policy, reference=reference, tokenizer=tokenizer, optimizer=optimizer, sampler=sampler,
                judge=judge, tasks=tasks, held_out=held_out, run=run)


def choose_layout(config, model_config, device, vllm, dtype, lengths):
    """(memory.Layout, the share of the GPU's memory that vLLM may take). Raises ValueError for a run that does not fit."""
    def needs(config):
        return memory.needs(config, model_config, device, vllm, dtype, lengths.max(axis=0).tolist())

    layout, parts = needs(config)
    memory.refuse(config, device, parts, lambda config: needs(config)[1])
    layout = max(ranks.gather(layout))  # GPUs may differ
    if layout != memory.Layout():
        say(layout.sentence)
    return layout, memory.vllm_share(config, parts) if vllm and device == "cuda" else 0.0


def make_reference(config, policy, dtype, device, weights=None):
    """The frozen model that the KL is measured to: the policy as it is now, in the computing dtype; with --lora the policy
    itself, without its adapters. weights: of a policy that is to be divided among ranks (policy.shard), as is the reference.
    """
    if config.lora:
        return lora.AdaptersOff(policy)
    if weights is None:
        return frozen_copy(policy, dtype, device)
    return shard(cast(copy.deepcopy(policy), dtype).requires_grad_(False), device, dtype, weights=weights)
