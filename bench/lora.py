"""LoRA against training all weights: SmolLM2 on first_aid, the laptop preset, by turns and seed by seed.

    python bench/lora.py --output results

A run or an evaluation that is there already is not made again.
"""

import argparse
import itertools
import json
import shutil
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).parents[1]))

from first_command import measure
from first_run import evaluate

from lab_report import plus_minus
from output import write
from plumbing.files import read_object, write_whole
from step import machine


def trained(folder, *flags):
    """{label: number} of a run in `folder`: what training took, and what it leaves on the disk."""
    found = measure(folder, *flags)
    sizes = folder / "sizes.json"
    if not sizes.exists():
        newest = max((folder / "checkpoints").iterdir())
        write_whole(sizes, json.dumps({"checkpoint, MB": megabytes(newest), "adapter, MB": megabytes(folder / "adapter")}))
        shutil.rmtree(folder / "checkpoints")  # 2 GB a run
    return {"minutes": found["minutes"], "peak memory, GB": found["gigabytes"], **read_object(sizes)}


def megabytes(folder):
    """Size of the files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.glob("*")) / 1e6


def score(model, output, samples, *flags):
    """{label: number} of the responses of `model` to the held-out questions, so many to each."""
    found = evaluate(model, output, "--samples", samples, *flags)[1]["models"]["model"]
    return {"score": found["judges"]["rules"]["best_of_n"][0]["mean"], "recited": found["recited"]}  # best of 1: the mean


def main():
    """Train and evaluate both, every seed; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2, for an interval")
    parser.add_argument("--samples", type=int, default=16, help="responses to each held-out question")
    parser.add_argument("--runs", type=Path, default=Path("runs/lora"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for lora.md")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of both runs, last: all that follow")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2")
    args.runs = args.runs.absolute()
    arms, rows = {"all weights": [], f"LoRA, rank {args.rank}": ["--lora", args.rank]}, defaultdict(list)
    before = score("smollm2", args.runs / "before", args.samples, "--held-out", 16)
    for seed, (arm, flags) in itertools.product(range(args.seeds), arms.items()):
        folder = args.runs / f"{'lora' if flags else 'full'}-{seed}"
        took = trained(folder, *flags, "--seed", seed, *args.flags)
        rows[arm].append(score(folder, folder / "evaluation", args.samples) | took)
    rates = [read_object(args.runs / f"{name}-0" / "config.json")["lr"] for name in ("full", "lora")]
    print("\n".join(lines := report(args, rows, before, rates)))
    write(args.output / "lora.md", lines)


def report(args, rows, before, rates):
    """Lines of Markdown. rows: {arm: [{label: number} of each seed]}; before: of the model; rates: learning rates."""
    (full, _), (lora, _) = arms = list(rows.items())
    labels = list(rows[full][0])
    lines = ["# LoRA against training all weights", "",
             f"`python bench/lora.py {' '.join(sys.argv[1:])}`, {date.today()}, {machine()}, no GPU. SmolLM2-135M on "
             f"first_aid, the laptop preset; learning rates {rates[0]:g} and {rates[1]:g}. Score: mean of {args.samples} "
             f"responses to each held-out question; before training {before['score']:+.3f}, {before['recited']:.1%} "
             "recited.", "",
             "| seed | trained | " + " | ".join(labels) + " |", "|---|---|" + "---|" * len(labels)]
    for seed in range(len(rows[full])):
        lines += [f"| {seed} | {arm} | " + " | ".join(f"{found[seed][label]:.3f}" for label in labels) + " |"
                  for arm, found in arms]
    lines += ["", f"Over {len(rows[full])} seeds; +- is the half width of a 95% t interval.", "",
              f"| | {full} | {lora} | difference, seed by seed |", "|---|---|---|---|"]
    for label in labels:
        values = [[row[label] for row in rows[arm]] for arm in (full, lora)]
        cells = [*values, numpy.subtract(values[1], values[0])]
        lines.append(f"| {label} | " + " | ".join(map(plus_minus, cells)) + " |")
    gains = [[row["score"] - before["score"] for row in rows[arm]] for arm in (full, lora)]
    return [*lines, f"| gain in score | {plus_minus(gains[0])} | {plus_minus(gains[1])} | |"]


if __name__ == "__main__":
    main()
