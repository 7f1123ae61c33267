"""The laptop run with and without scaffold, several seeds: results/laptop.md and results/laptop.png.

    python bench/laptop.py [--seeds 3] [--runs runs/laptop]

Runs `python ruscarl.py` and `python ruscarl.py --decay none` in turn, about 7 minutes each on 2 cores; finished runs in
the folder are kept, so that an interrupted experiment goes on.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy

ROOT = Path(__file__).parents[1]
ARMS = {"RuscaRL": [], "no scaffold": ["--decay", "none"]}


def main():
    """Run what is missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", default="runs/laptop")
    parser.add_argument("--output", default=str(ROOT / "results"))
    args = parser.parse_args()
    results = {}
    for seed in range(args.seeds):
        for arm, flags in ARMS.items():
            folder = Path(args.runs) / f"{arm.replace(' ', '_')}-{seed}"
            if not (folder / "policy").exists():
                command = [sys.executable, str(ROOT / "ruscarl.py"), "--runs", args.runs, "--name", folder.name,
                           "--seed", str(seed), *flags]
                if folder.exists():
                    command.append("--resume")
                print(" ".join(command), flush=True)
                subprocess.run(command, check=True)
            results[arm, seed] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write(results, args)


def write(results, args):
    """Markdown and picture from {(arm, seed): rows}."""
    output = Path(args.output)
    output.mkdir(exist_ok=True)
    draw(results, output / "laptop.png")
    lines = ["# The laptop run: RuscaRL beside the same run without scaffold", "",
             f"`python bench/laptop.py --seeds {args.seeds}`: per seed `python ruscarl.py --seed S` and the same with "
             f"`--decay none`. {date.today()}, {os.cpu_count()} cores ({platform.machine()}), no GPU, Python "
             f"{platform.python_version()}.", "",
             "Score of the 16 held-out tasks without scaffold, 4 responses each, with its bootstrap standard error over "
             "tasks; minutes from the first evaluation to the last, without saving.", "",
             "| seed | arm | before | after | rise / s.e. | entropy, first and last step | minutes |",
             "|---|---|---|---|---|---|---|"]
    finals = {arm: [] for arm in ARMS}
    for (arm, seed), rows in results.items():
        first, last = rows[0], rows[-1]
        error = max(first["eval/score_se"], last["eval/score_se"])
        minutes = sum(row.get("time/step", 0) + row.get("time/eval", 0) for row in rows) / 60
        finals[arm].append(last["eval/score"])
        lines.append(f"| {seed} | {arm} | {first['eval/score']:+.3f} +- {first['eval/score_se']:.3f} | "
                     f"{last['eval/score']:+.3f} +- {last['eval/score_se']:.3f} | "
                     f"{(last['eval/score'] - first['eval/score']) / error:.1f} | "
                     f"{first['entropy']:.2f}, {rows[-2]['entropy']:.2f} | {minutes:.1f} |")
    lines += ["", "| criterion met on held-out tasks | before | " + " | ".join(f"after, {arm}" for arm in ARMS) + " |",
              "|---|---|" + "---|" * len(ARMS)]
    for text in sorted(results["RuscaRL", 0][0]["eval/pass_rate"]):
        before = numpy.mean([rows[0]["eval/pass_rate"][text] for rows in results.values()])
        after = [numpy.mean([rows[-1]["eval/pass_rate"][text] for (a, _), rows in results.items() if a == arm])
                 for arm in ARMS]
        lines.append(f"| {text} | {before:.0%} | " + " | ".join(f"{value:.0%}" for value in after) + " |")
    gaps = numpy.array(finals["RuscaRL"]) - numpy.array(finals["no scaffold"])
    spread = gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    lines += ["", f"Difference of the final scores, RuscaRL minus no scaffold, paired by seed: {gaps.mean():+.3f} "
              f"(standard error {spread:.3f} over {len(gaps)} seeds; " + ", ".join(f"{gap:+.3f}" for gap in gaps) + ").", "",
              "![held-out score over training](laptop.png)", ""]
    (output / "laptop.md").write_text("\n".join(lines))
    print("\n".join(lines))


def draw(results, path):
    """Held-out score and unscaffolded training reward over the steps, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    styles = {"RuscaRL": ("-", "o", "black"), "no scaffold": ("--", "s", "0.55")}
    for (arm, seed), rows in results.items():
        line, marker, colour = styles[arm]
        evals = [(row["step"], row["eval/score"], row["eval/score_se"]) for row in rows if "eval/score" in row]
        axes[0].errorbar(*zip(*evals), fmt=line + marker, color=colour, capsize=3, label=arm if seed == 0 else None)
        plain = [(row["step"], row["reward/unscaffolded"]) for row in rows if "reward/unscaffolded" in row]
        axes[1].plot(*zip(*plain), line, color=colour, linewidth=1, label=arm if seed == 0 else None)
    axes[0].set(xlabel="step", ylabel="score", title="held out, without scaffold (1 s.e.)")
    axes[1].set(xlabel="step", title="training, samples that saw no scaffold")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
