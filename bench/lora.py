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
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="learning rates of LoRA beside the default")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2, for an interval")
    parser.add_argument("--samples", type=int, default=16, help="responses to each held-out question")
    parser.add_argument("--runs", type=Path, default=Path("runs/lora"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for lora.md")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of both runs, last: all that follow")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2")
    args.runs = args.runs.absolute()
    arms = {"all weights": ("full", []), f"LoRA, rank {args.rank}": ("lora", ["--lora", args.rank])}
    arms |= {f"the same, --lr {rate:g}": (f"lora-{rate:g}", ["--lora", args.rank, "--lr", rate]) for rate in args.rates}
    rows, rates = defaultdict(list), {}
    before = score("smollm2", args.runs / "before", args.samples, "--held-out", 16)
    for seed, (arm, (name, flags)) in itertools.product(range(args.seeds), arms.items()):
        folder = args.runs / f"{name}-{seed}"
        took = trained(folder, *flags, "--seed", seed, *args.flags)
        rows[arm].append(score(folder, folder / "evaluation", args.samples) | took)
        rates[arm] = read_object(folder / "config.json")["lr"]
    print("\n".join(lines := report(args, rows, before, rates)))
    write(args.output / "lora.md", lines)


def report(args, rows, before, rates):
    """Lines of Markdown. rows: {arm: [{label: number} of each seed]}, all weights first; before: of the model; rates: the
    learning rates, {arm: number}."""
    (full, of_full), *others = rows.items()
    chosen = ", ".join(f"{rate:g}" for rate in rates.values())
    labels = list(of_full[0])
    lines = ["# LoRA against training all weights", "",
             f"`python bench/lora.py {' '.join(sys.argv[1:])}`, {date.today()}, {machine()}, no GPU. SmolLM2-135M on "
             f"first_aid, the laptop preset; learning rates {chosen}. Score: mean of {args.samples} responses "
             f"to each held-out question; before training {before['score']:+.3f}, {before['recited']:.1%} recited.", "",
             "| seed | trained | " + " | ".join(labels) + " |", "|---|---|" + "---|" * len(labels)]
    for seed in range(len(of_full)):
        lines += [f"| {seed} | {arm} | " + " | ".join(f"{found[seed][label]:.3f}" for label in labels) + " |"
                  for arm, found in rows.items()]
    lines += ["", f"Over {len(of_full)} seeds; +- is the half width of a 95% t interval; differences are seed by seed.", "",
              f"| | {full} | " + " | ".join(f"{arm} | minus {full}" for arm, _ in others) + " |",
              "|---|---|" + "---|---|" * len(others)]
    for label in ("gain in score", *labels):
        name, start = ("score", before["score"]) if label == "gain in score" else (label, 0.0)
        values = [[row[name] - start for row in found] for found in rows.values()]
        cells = [values[0], *(part for own in values[1:] for part in (own, numpy.subtract(own, values[0])))]
        lines.append(f"| {label} | " + " | ".join(map(plus_minus, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
