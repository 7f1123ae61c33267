"""Samples a second of VLLMSampler, TransformersSampler and model.generate on the laptop preset.

    python bench/sampling.py [--rounds 5] [--dtype bfloat16] [--output results/vllm-cpu.md]

The same 32 scaffolded prompts of one training step, 64 new tokens each with stop tokens off, interleaved rounds.
"""

import argparse
import os
import platform
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy
import torch
from transformers import GenerationConfig

from plumbing.policy import cpu_dtype, keep_freed_memory, load_policy, multiply_with_onednn, named_weights
from plumbing.transformers_sampler import TransformersSampler
from plumbing.vllm_setup import vllm_obstacle
from ruscarl import make_rollouts
from sampler import SamplingParams, VLLMSampler
from scaffold import group_ratios
from tasks import load_tasks


def main():
    """Time every way in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed, after one to warm up [5]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=str(cpu_dtype()).removeprefix("torch."))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", help="file that the table is added to")
    args = parser.parse_args()
    keep_freed_memory()
    usual = torch.backends.mkldnn.matmul.fp32_precision
    multiply_with_onednn()
    policy, tokenizer = load_policy("smollm2")
    rollouts = make_rollouts(load_tasks("first_aid", 4), group_ratios(8), tokenizer, (0, 0))
    prompts = [r.prompt_ids for r in rollouts]
    seconds = {}
    ways = make_ways(policy, tokenizer, prompts, getattr(torch, args.dtype), args.new_tokens, usual)
    for round in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.monotonic()
            tokens = way()
            assert tokens == len(prompts) * args.new_tokens, (name, tokens)
            print(f"round {round}  {name:32s} {time.monotonic() - start:6.1f} s", flush=True)
            if round > 0:  # the first is for warming up
                seconds.setdefault(name, []).append(time.monotonic() - start)
    lines = [f"## {args.dtype}", "",
             f"`python bench/sampling.py {' '.join(sys.argv[1:])}`, {date.today()}, {os.cpu_count()} cores "
             f"({platform.machine()}), no GPU, SmolLM2-135M. {len(prompts)} prompts of {min(map(len, prompts))} to "
             f"{max(map(len, prompts))} tokens, {args.new_tokens} new tokens each. {args.rounds} interleaved "
             "rounds after one to warm up.", "",
             "| way | seconds, mean (min to max) | samples a second | times TransformersSampler, round by round |",
             "|---|---|---|---|"]
    for name, times in seconds.items():
        lines.append(f"| {name} | {numpy.mean(times):.1f} ({min(times):.1f} to {max(times):.1f}) | "
                     f"{len(prompts) / numpy.mean(times):.2f} | {ratio(times, seconds['TransformersSampler'])} |")
    print("\n".join(lines))
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")


def ratio(times, others):
    """Mean and range of the speed against others', in the same round."""
    ratios = [other / mine for mine, other in zip(times, others)]
    return f"{numpy.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def make_ways(policy, tokenizer, prompts, dtype, new_tokens, usual):
    """{name: function that samples all prompts and returns the number of new tokens}, at temperature 0.7, no stops.

    usual: how torch by itself multiplies float32; model.generate gives rows of one token to every layer, for which oneDNN
    copies the weights, and would take twice as long with it.
    """
    ours = TransformersSampler(policy, [], dtype)
    theirs = TransformersSampler(policy, [], dtype).model  # a second copy, with transformers' own attention
    theirs.set_attn_implementation("sdpa")
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, temperature=0.7,
                                top_k=0, top_p=1.0, pad_token_id=2, eos_token_id=2)

    def generate():
        onednn, torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision, usual
        tokens = theirs.generate(**padded, generation_config=settings)[:, padded["input_ids"].shape[1]:].numel()
        torch.backends.mkldnn.matmul.fp32_precision = onednn
        return tokens

    def sample_with(sampler):
        params = SamplingParams(new_tokens, 0.7)
        return sum(len(r.token_ids) for r in sampler.sample(prompts, list(range(len(prompts))), params))

    ways = {"TransformersSampler": partial(sample_with, ours), "model.generate": generate}
    if vllm_obstacle("cpu") is None:
        engine = VLLMSampler(policy.config, [], dtype)
        engine.sync(named_weights(policy))
        ways["VLLMSampler"] = partial(sample_with, engine)
    return ways


if __name__ == "__main__":
    main()
