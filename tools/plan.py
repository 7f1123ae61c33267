"""--plan: what a run will do and whether it fits, before any weights are loaded."""

import dataclasses
from functools import partial

import numpy
import torch
from tqdm import tqdm

from judge import judge_messages
from plumbing import memory
from plumbing.policy import load_config, prompt_ids
from plumbing.prepare import (
    check_context,
    check_judge,
    choose_device,
    choose_sampler,
    computing_dtype,
    drop_long,
    longest_prompts,
)
from plumbing.rules import rule_from_tags
from scaffold import scaffold_messages
from tasks import load_tasks, split_tasks


def print_plan(config):
    """Print the work and the memory of a run of `config`; returns whether it fits this machine (or --gpu-gb).

    Raises ValueError or OSError as the run itself would.
    """
    tasks = load_tasks(config.tasks)
    split_tasks(tasks, config.held_out)
    check_judge(config, tasks)
    device = "cuda" if config.gpu_gb else choose_device(config)
    model_config, tokenizer = load_config(config.model)
    check_context(config, model_config)
    tasks, held_out = split_tasks(drop_long(config, tasks, tokenizer), config.held_out)
    print(f"{config.model} on {config.tasks}, {config.preset} preset\n")
    for name, value in work(config, tasks, held_out, tokenizer):
        print(f"  {name:18s}{value}")
    lengths = longest_prompts(config, tasks + held_out, tokenizer)
    return print_memory(config, device, partial(parts_of_run, model_config=model_config, device=device, lengths=lengths))


def work(config, tasks, held_out, tokenizer):
    """What a run does: list of (name, line)."""
    evaluations = -(-config.steps // config.eval_every) + 1
    samples = config.steps * config.batch_size * config.group_size
    evaluated = evaluations * config.held_out * config.eval_samples
    updates = config.batch_size // config.mini_batch_size
    plain, shown, asked, read = [], [], [], []
    for task in tqdm(tasks, "measuring prompts", leave=False, disable=None):
        plain.append(len(prompt_ids(tokenizer, task.messages)))
        shown.append(len(prompt_ids(tokenizer, scaffold_messages(task.messages, task.rubric))))
        open_criteria = [c for c in task.rubric if rule_from_tags(c.tags) is None]
        asked.append(len(open_criteria))
        read += [len(prompt_ids(tokenizer, judge_messages(task.messages, "", c))) for c in open_criteria[:1]]
    lines = [
        ("tasks", f"{len(tasks):,} to train on, {len(held_out):,} held out"),
        ("steps", f"{config.steps:,}, each of {config.batch_size} questions x {config.group_size} responses and "
                  f"{updates} optimiser step{'s' if updates > 1 else ''} "
                  f"({config.steps * config.batch_size / len(tasks):.1f} epochs)"),
        ("samples", f"{samples:,} to train on, {evaluated:,} in {evaluations} evaluations"),
        ("prompt tokens", f"{numpy.mean(plain):.0f} in the mean, {numpy.mean(shown):.0f} with the whole scaffold, "
                          f"{max(shown):,} at the most"),
        ("response tokens", f"up to {config.max_new_tokens:,} each, {many(samples * config.max_new_tokens)} to train on"),
    ]
    if sum(asked):
        calls = numpy.mean(asked) * (samples + evaluated)
        each = numpy.mean(read)
        lines += [("judge calls", f"{numpy.mean(asked) * config.batch_size * config.group_size:,.0f} a step, {many(calls)} "
                                  "in all"),
                  ("judge tokens", f"{each:.0f} and the response in each call: {many(calls * each)} and up to "
                                   f"{many(calls * config.max_new_tokens)} in all")]
    else:
        lines.append(("judge calls", "none: all criteria have rules"))
    return lines


def many(number):
    """A count in words that can be read: 9,000; 1.3 million; 8.7 billion."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:,.1f}{word}"
    return f"{number:,.0f}"


def parts_of_run(config, model_config, device, lengths):
    """Parts of the run's memory (memory.parts), with what --sampler and --offload come to."""
    if device == "cuda" and not torch.cuda.is_available():  # a GPU that is not there is thought of with vllm
        vllm = config.sampler != "transformers"
    else:
        vllm = choose_sampler(config, device)[0]
    return memory.needs(config, model_config, device, vllm, computing_dtype(config, device), *lengths)[1]


def print_memory(config, device, parts_of):
    """Print the table of parts, whether they fit, and what would make them; returns whether they fit.

    parts_of: a Config to its list of memory.Part.
    """
    parts = parts_of(config)
    each = "each GPU" if memory.ranks_of(config)[0] > 1 else "GPU"
    times = [when for when in memory.TIMES if when != "loading" or any(part.when == when for part in parts)]
    print(f"\n  {'memory, GB':30s}" + "".join(f"{when:>10s}" for when in times))
    names = {"device": each if device == "cuda" else "this machine", "host": "host"}
    for place in ("device", "host"):
        rows = [part for part in parts if part.place == place]
        if rows:
            print(f"  {names[place]}")
            for part in rows:
                cells = ("" if part.when not in ("always", when) else f"{part.bytes / 1e9:.1f}"
                         for when in times)
                print(f"    {part.name:28s}" + "".join(f"{cell:>10s}" for cell in cells))
            print(f"    {'total':28s}" + "".join(f"{memory.total(parts, place, when) / 1e9:>10.1f}"
                                              for when in times))
    there = {"device": memory.device_bytes(config, device)}
    if device == "cuda" and torch.cuda.is_available():  # of a GPU that is not there, nobody knows the host
        there["host"] = memory.host_bytes()
    usable = {"device": "usable " if device == "cuda" else "", "host": ""}
    found = ", ".join(f"{memory.peak(parts, place) / 1e9:.0f} GB of {size / 1e9:.0f} GB {usable[place]}({names[place]})"
                      for place, size in there.items())
    if device == "cuda" and "host" not in there:
        found += f", and {memory.peak(parts, 'host') / 1e9:.0f} GB in the host"
    if fits(parts, there):
        print(f"\nfits: {found}")
        return True
    print(f"\ndoes not fit: {found}; {remedy(config, device, there, parts_of)}")
    return False


def fits(parts, there):
    """Whether no place is fuller than it can be."""
    return all(memory.peak(parts, place) <= there[place] for place in there)


def remedy(config, device, there, parts_of):
    """What would make a run fit: the two flags that save most, alone or together, or else other settings."""
    flags = {"--gradient-checkpointing": {"gradient_checkpointing": True}}
    if device == "cuda":
        flags["--offload yes"] = {"offload": "yes"}
    else:
        flags["--token-budget 1024"] = {"token_budget": 1024}
    for names in (*([name] for name in flags), list(flags)):
        changed = dataclasses.replace(config, **{key: value for name in names for key, value in flags[name].items()})
        if fits(parts_of(changed), there):
            return f"{' '.join(names)} would make it fit"
    return "take a smaller --model, or shorter --max-new-tokens and --max-prompt-tokens"
