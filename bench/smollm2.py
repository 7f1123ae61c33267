"""Does RuscaRL do better than plain rubric GRPO on a real model? SmolLM2-135M on first_aid, several seeds.

    python bench/smollm2.py --seeds 3 --output results     on 2 cores about 8 minutes a run; goes on where it stopped

Per seed `python ruscarl.py` and `python ruscarl.py --decay none`, and of each trained model an evaluation with 16
responses to each held-out question, against the untrained model.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy
from matplotlib.figure import Figure

from lab import ROOT
from lab_report import plus_minus
from output import write
from plumbing.policy import default_model_folder

ARMS = {"RuscaRL": ([], "-", "o", "black"), "plain rubric GRPO": (["--decay", "none"], "--", "s", "0.55")}


def train_and_evaluate(arm, seed, runs, flags):
    """(rows of metrics.jsonl, results of the evaluation) of one run; what is already there is not done again."""
    folder = runs / f"{arm.replace(' ', '_')}-{seed}"
    if not (folder / "policy" / "config.json").exists():
        command = ["ruscarl.py", "--runs", str(runs), "--name", folder.name]
        start(*command, *(["--resume"] if folder.exists() else ["--seed", str(seed), *ARMS[arm][0], *flags]))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 2 GB a run
    output = folder / "evaluation"
    if not (output / "results.json").exists():
        start("evaluation.py", str(folder), "--base", "smollm2", "--samples", "16", "--embedding",
              str(default_model_folder()), "--output", str(output))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((output / "results.json").read_text())


def start(*command):
    """One of the project's commands, shown."""
    print("python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def figures_of(rows, results, side):
    """{label: value} of one model of an evaluation. side: model or base."""
    model, novelty = results["models"][side], results["novelty"]
    best = {point["n"]: point["mean"] for point in model["judges"]["rules"]["best_of_n"]}
    found = {"score (mean of 16, not clipped)": best[1], **{f"best of {n}": best[n] for n in (2, 4, 8, 16)},
             "1 - Self-BLEU": model["diversity"]["mean"], "semantic distance": model["semantic_distance"]["mean"],
             "entropy, nats a token": model["entropy"], "response, tokens": model["length"]}
    if side == "model":
        found |= {"novelty: median of rho_seq": novelty["median"],
                  **{f"novelty: share above {n}": novelty["above"][n] / novelty["responses"] for n in ("2", "10")},
                  "reward/unscaffolded, last 4 steps": numpy.mean([r["reward/unscaffolded"] for r in rows[-5:-1]])}
    return found


def report(found, seeds):
    """The Markdown lines: arms side by side, and criterion by criterion."""
    columns = {arm: [figures_of(*found[arm, seed], "model") for seed in range(seeds)] for arm in ARMS}
    before = figures_of(*found["RuscaRL", 0], "base")
    first, second = columns.values()
    lines = ["| on the held-out questions | before | " + " | ".join(ARMS) + " | difference |", "|---|---|---|---|---|"]
    for label in first[0]:
        values = [[run[label] for run in column] for column in (first, second)]
        cells = [f"{before[label]:.3f}" if label in before else "", *[plus_minus(v) for v in values],
                 plus_minus(numpy.subtract(*values))]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", "Every run by itself, score of the evaluation: " + "; ".join(
        f"{arm} " + ", ".join(f"{run['score (mean of 16, not clipped)']:+.3f}" for run in column)
        for arm, column in columns.items()) + ".", "",
        "| share of held-out responses, 4 to each question, that meet the criterion | before | " + " | ".join(ARMS) + " |",
        "|---|---|---|---|"]
    rates = {key: (rows[0]["eval/pass_rate"], rows[-1]["eval/pass_rate"]) for key, (rows, _) in found.items()}
    for text in sorted(rates["RuscaRL", 0][0]):
        cells = [numpy.mean([start[text] for start, _ in rates.values()]),
                 *(numpy.mean([rates[arm, seed][1][text] for seed in range(seeds)]) for arm in ARMS)]
        lines.append(f"| {text} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |")
    return lines


def draw(found, path):
    """Score, unscaffolded reward and entropy over training, and Best-of-N after it; a line a run."""
    figure = Figure((11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for (arm, seed), (rows, results) in found.items():
        _, line, marker, colour = ARMS[arm]
        style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "label": arm if seed == 0 else None}
        for axis, name in zip(axes.flat, ("eval/score", "reward/unscaffolded", "entropy")):
            axis.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row]), **style)
        curve = results["models"]["model"]["judges"]["rules"]["best_of_n"]
        axes[1, 1].plot([p["n"] for p in curve], [p["mean"] for p in curve], **style)
    curve = found["RuscaRL", 0][1]["models"]["base"]["judges"]["rules"]["best_of_n"]
    axes[1, 1].plot([p["n"] for p in curve], [p["mean"] for p in curve], ":", color="black", label="before training")
    axes[1, 1].set_xscale("log", base=2)
    axes[1, 1].xaxis.set_major_formatter("{x:.0f}")
    axes[0, 0].set(xlabel="step", ylabel="score", title="held-out questions, asked plainly")
    axes[0, 1].set(xlabel="step", ylabel="score", title="training, samples that saw no scaffold")
    axes[1, 0].set(xlabel="step", ylabel="nats a token", title="entropy of the policy on the plain question")
    axes[1, 1].set(xlabel="N", ylabel="score", title="best of N responses, held-out questions")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def main():
    """Run what is missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", default="runs/smollm2", help="folder of the runs")
    parser.add_argument("--output", default="results", help="folder for smollm2.md and smollm2.png")
    parser.add_argument("flags", nargs="*", help="after --: flags for ruscarl.py")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs two runs")
    runs, output = Path(args.runs).absolute(), Path(args.output)
    known = runs / "flags.json"
    made_with = json.loads(known.read_text()) if known.exists() else [] if runs.exists() else args.flags
    if made_with != args.flags:
        parser.error(f"{runs} was made with {' '.join(made_with) or 'no flags'}; give another --runs")
    output.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(args.flags))
    found = {(arm, seed): train_and_evaluate(arm, seed, runs, args.flags) for seed in range(args.seeds) for arm in ARMS}
    draw(found, output / "smollm2.png")
    settings = found["RuscaRL", 0][1]["settings"]
    lines = ["# SmolLM2-135M on first_aid: RuscaRL against plain rubric GRPO", "",
             f"`{' '.join(['python bench/smollm2.py', *sys.argv[1:]])}`, {date.today()}, {os.cpu_count()} cores "
             f"({platform.machine()}), no GPU; sampler: {settings['sampler']} in {settings['dtype']}. {args.seeds} runs an "
             "arm; +- is the half width of a 95% t interval over them, differences are taken seed by seed.", "",
             *report(found, args.seeds), "", "![score, reward, entropy, best of N](smollm2.png)"]
    write(output / "smollm2.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
