"""This project's side of step.py, in a process of its own: steps, or the loss of fixed samples."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import grpo
from judge import Judge
from plumbing.config import Config
from plumbing.optimizer import make_optimizer
from plumbing.policy import checkpoint_gradients, keep_freed_memory, load_policy, multiply_with_onednn, named_weights
from plumbing.transformers_sampler import TransformersSampler
from ruscarl import as_sample, make_rollouts, sample_and_judge, set_advantages
from sampler import SamplingParams, VLLMSampler, address_seed
from step import FIXED, LR, MICRO_BATCH, TEMPERATURE, Pipe, Work, make_tasks

PARAMS = grpo.LossParams(temperature=TEMPERATURE)
TOKEN_BUDGET = 2048  # the laptop preset's


def steps(pipe, work, engine):
    """A step of the loop in ruscarl.py whenever one is wanted."""
    keep_freed_memory()
    multiply_with_onednn()
    policy, tokenizer = load_policy("smollm2")
    if work.prompt_tokens + work.group_size * work.new_tokens > MICRO_BATCH:  # it would take more memory than TRL's do
        checkpoint_gradients(policy)
    dtype = getattr(torch, work.dtype)
    sampler = (VLLMSampler(policy.config, [], dtype, work.prompt_tokens + work.new_tokens, max_num_seqs=work.samples)
               if engine == "vllm" else TransformersSampler(policy, [], dtype))
    optimizer = make_optimizer(policy, Config(lr=LR, weight_decay=0.0), dtype=dtype)
    sampler.sync(named_weights(policy))
    tasks, judge = make_tasks(tokenizer, work), Judge()
    params = SamplingParams(work.new_tokens, TEMPERATURE, logprobs=True)
    pipe.ready()
    while pipe.wait():
        began = time.monotonic()
        rollouts = make_rollouts(tasks, [0.0] * work.group_size, tokenizer, ("step", pipe.steps))
        rollouts, _ = sample_and_judge(rollouts, sampler, judge, tokenizer, params)
        sampled = time.monotonic()
        set_advantages(rollouts, work.group_size)
        sampler.sleep()
        samples = [as_sample(rollout, "plain") for rollout in rollouts]
        grpo.update(policy, optimizer, [samples], PARAMS, token_budget=TOKEN_BUDGET)
        sampler.sync(named_weights(policy))
        pipe.answer(sample=sampled - began, update=time.monotonic() - sampled,
                    tokens=sum(len(r.response_ids) for r in rollouts), prompts=sum(len(r.plain_ids) for r in rollouts))
    judge.close()


def losses(pipe, folder):
    """Draw samples; write them to `folder`, with advantages, perturbed old log-probabilities and the gradients they give."""
    multiply_with_onednn()
    policy, tokenizer = load_policy("smollm2")
    work = Work("fixed", 60, 48, 4, 2, "float32")
    prompts = [r.plain_ids for r in make_rollouts(make_tasks(tokenizer, work), [0.0] * work.group_size, tokenizer, (0,))]
    sampled = TransformersSampler(policy, []).sample(prompts, [address_seed(i) for i in range(work.samples)],
                                                     SamplingParams(work.new_tokens, TEMPERATURE))
    responses = [r.token_ids[: work.new_tokens - 5 * r.index] for r in sorted(sampled, key=lambda r: r.index)]
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(work.samples, generator=generator).tolist()
    old = [logp + 0.3 * torch.randn(len(logp), generator=generator)
           for logp in grpo.sample_logprobs(policy, prompts, responses, TOKEN_BUDGET, TEMPERATURE)]
    fixed = {"prompts": prompts, "responses": responses, "advantages": advantages, "old": [logp.tolist() for logp in old]}
    Path(folder, "samples.json").write_text(json.dumps({"work": vars(work), **fixed}))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    for name, old_logps in zip(FIXED, ([None] * work.samples, old)):
        hook = optimizer.register_step_pre_hook(lambda *_, name=name: torch.save(
            [parameter.grad for parameter in policy.parameters()], Path(folder, f"{name}.pt")))
        samples = [grpo.Sample(*parts, old_logp=old_logp)
                   for *parts, old_logp in zip(prompts, responses, advantages, prompts, old_logps)]
        row = grpo.update(policy, optimizer, [samples], PARAMS, max_grad_norm=float("inf"), token_budget=TOKEN_BUDGET)
        hook.remove()
        pipe.answer(**{key: row[key] for key in ("loss", "grad_norm", "clip_fraction")})


if __name__ == "__main__":
    if sys.argv[1] == "losses":
        losses(Pipe(), sys.argv[2])
    else:
        steps(Pipe(), Work(**json.loads(sys.argv[2])), sys.argv[3])
