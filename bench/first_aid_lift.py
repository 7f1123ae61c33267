"""What a scaffold lifts: how often each criterion of a task set is met with 0, 50 and 100% of the rubric shown.

    python bench/first_aid_lift.py [--model smollm2] [--tasks first_aid] [--samples 4] [--output results/first_aid_lift.md]

A criterion whose rate does not move when it is shown teaches nothing that a scaffold could help with.
"""

import argparse
import os
import random
import shlex
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from judge import Judge, score
from plumbing.policy import cpu_dtype, load_policy, multiply_with_onednn, named_weights, prompt_ids, stop_ids
from plumbing.transformers_sampler import TransformersSampler
from plumbing.vllm_setup import vllm_obstacle
from sampler import SamplingParams, VLLMSampler, address_seed
from scaffold import choose_criteria, scaffold_messages
from tasks import load_tasks


def main():
    """Sample, judge, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", default="first_aid")
    parser.add_argument("--samples", type=int, default=4, help="responses per task and share shown")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="what it runs on, for the head of the table")
    parser.add_argument("--output", help="also write the table to this file")
    args = parser.parse_args()
    model, tokenizer = load_policy(args.model)
    tasks = load_tasks(args.tasks)
    sampler = fastest_sampler(model, tokenizer)
    judge = Judge()
    jobs = []  # (share, task, shown criteria, prompt ids)
    for share in (0.0, 0.5, 1.0):
        for task in tasks:
            for sample in range(args.samples):
                rng = random.Random(address_seed(share, task.id, sample))
                shown = choose_criteria(task.rubric, share, rng)
                jobs.append((share, task, shown, prompt_ids(tokenizer, scaffold_messages(task.messages, shown))))
    rates = defaultdict(list)  # (criterion text, condition) -> verdicts
    scores = defaultdict(list)
    params = SamplingParams(args.max_new_tokens, args.temperature)
    with tqdm(total=len(jobs), unit="response") as bar:
        for start in range(0, len(jobs), 128):
            part = jobs[start : start + 128]
            seeds = [address_seed("lift", start + i) for i in range(len(part))]
            for response in sampler.sample([job[3] for job in part], seeds, params):
                share, task, shown, _ = part[response.index]
                text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
                verdicts = [future.result() for future in judge.submit(task, text)]
                scores[share].append(score(task.rubric, verdicts))
                for criterion, met in zip(task.rubric, verdicts):
                    condition = f"{share:.0%}" + (" shown" if criterion in shown else "")
                    rates[criterion.text, criterion.points > 0, condition].append(met)
                bar.update()
    write_table(rates, scores, args)


def fastest_sampler(model, tokenizer):
    """vLLM where it runs on this CPU, else transformers, with the weights of `model`."""
    multiply_with_onednn()
    if vllm_obstacle("cpu"):
        return TransformersSampler(model, stop_ids(model, tokenizer), cpu_dtype())
    sampler = VLLMSampler(model.config, stop_ids(model, tokenizer), cpu_dtype(), max_model_len=1024)
    sampler.sync(named_weights(model))
    return sampler


def write_table(rates, scores, args):
    """Markdown: a row a criterion, most frequent first."""
    columns = ["0%", "50%", "50% shown", "100% shown"]  # "50%": while half is shown, but not this criterion
    criteria = defaultdict(int)
    for (text, good, _), verdicts in rates.items():
        criteria[text, good] += len(verdicts)
    command = [word for word in sys.argv[1:] if word not in ("--machine", args.machine)]
    lines = [f"# How often each criterion of {args.tasks} is met, by the share of the rubric shown", "",
             f"`python bench/first_aid_lift.py {shlex.join(command)}`, {date.today()}, {args.machine}. {args.samples} "
             f"responses per task and share, T = {args.temperature}, {args.max_new_tokens} tokens.", "",
             "Mean score: " + ", ".join(f"{sum(s) / len(s):.3f} at {share:.0%}" for share, s in sorted(scores.items())), "",
             "| criterion | points | n | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for (text, good), count in sorted(criteria.items(), key=lambda item: -item[1]):
        cells = []
        for column in columns:
            verdicts = rates.get((text, good, column))
            cells.append(f"{sum(verdicts) / len(verdicts):.2f}" if verdicts else "")
        lines.append(f"| {text} | {'+' if good else '-'} | {count} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    print(table)
    if args.output:
        Path(args.output).write_text(table)


if __name__ == "__main__":
    main()
