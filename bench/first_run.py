"""A first result: RuscaRL and plain rubric GRPO with SmolLM2 on first_aid, tuned over one grid, then several seeds.

    python bench/first_run.py grid                           every setting of GRID once, for both arms: about 40 minutes
    python bench/first_run.py final --output results         both arms with their best settings, --seeds each
    python bench/first_run.py judge --judge-url URL          the quality of the responses, by another judge
    python bench/first_run.py plain --output results         plain GRPO with the preset's learning rate, --seeds runs

The plan is results/first_run_plan.md. Each command goes on where it stopped.
"""

import argparse
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from contextlib import closing
from datetime import date
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from judge import ChatJudge, score
from lab import ROOT
from lab_report import plus_minus
from output import write
from plumbing.chat import Server
from plumbing.files import JsonLines, read_object
from tasks import Criterion, load_tasks

ARMS = {"RuscaRL": [], "plain GRPO": ["--decay", "none"]}
STYLES = {"RuscaRL": ("-", "black"), "plain GRPO": ("--", "0.5")}
GRID = {"--lr": ("2e-5", "5e-5"), "--temperature": ("0.7", "1.0")}
GRID_SEED = 100  # of no run that is reported
QUALITY = [Criterion("Answers the question that was asked.", 3), Criterion("Is coherent from beginning to end.", 2),
           Criterion("Gives advice that could harm the person.", -4),
           Criterion("Repeats itself or consists of stock phrases.", -2)]


def start(*command):
    """One of the project's commands, shown."""
    print("python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def train(folder, *flags):
    """The rows of metrics.jsonl of a run in `folder`, which is trained unless it is there."""
    if not (folder / "curves.png").exists():
        again = ["--resume"] if (folder / "config.json").exists() else flags
        start("ruscarl.py", "--runs", folder.parent, "--name", folder.name, *again)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 2 GB a run
    return JsonLines(folder / "metrics.jsonl").rows


def grid(args):
    """Train every arm with every setting; print and return ({arm: its best flags}, lines of the table)."""
    found = defaultdict(dict)
    for arm, values in itertools.product(ARMS, itertools.product(*GRID.values())):
        flags = [word for pair in zip(GRID, values) for word in pair]
        for steps in args.steps:
            name = f"grid-{arm.replace(' ', '_')}-{'-'.join(values)}-{steps}"
            rows = train(args.runs / name, *ARMS[arm], *flags, "--steps", steps, "--seed", GRID_SEED)
            found[arm][(*flags, "--steps", str(steps))] = rows[-1]
    lines = ["| settings | " + " | ".join(f"{arm}: score, recited, reached" for arm in ARMS) + " |",
             "|---|" + "---|" * len(ARMS)]
    for flags in next(iter(found.values())):
        cells = (f"{row['eval/score']:+.3f} +- {row['eval/score_se']:.3f}, {row['eval/recited']:.0%}, {row['eval/reached']}"
                 for row in (found[arm][flags] for arm in ARMS))
        lines.append(f"| `{' '.join(flags)}` | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    return {arm: max(rows, key=lambda flags: rows[flags]["eval/score"]) for arm, rows in found.items()}, lines


def evaluate(model, output, *flags):
    """(samples, results) of an evaluation of `model`, 16 responses to each held-out question."""
    if not (output / "results.json").exists():
        start("evaluation.py", model, "--samples", 16, "--output", output, *flags)
    return JsonLines(output / "samples.jsonl").rows, read_object(output / "results.json")


def met_rates(samples, tasks):
    """{criterion of positive points that several tasks have: share of the responses that meet it}. tasks: by id."""
    met, owners = defaultdict(list), defaultdict(set)
    for sample in samples:
        for criterion, verdict in zip(tasks[sample["task"]].rubric, sample["verdicts"]["rules"]):
            if criterion.points > 0:
                met[criterion.text].append(verdict)
                owners[criterion.text].add(sample["task"])
    return {text: float(numpy.mean(found)) for text, found in sorted(met.items()) if len(owners[text]) > 1}


def figures(samples, results, rates, before):
    """{label: value} of an evaluation. rates, before: `met_rates` of it, and of the one before training."""
    model, texts = results["models"]["model"], [sample["text"] for sample in samples]
    best = {point["n"]: point["mean"] for point in model["judges"]["rules"]["best_of_n"]}
    return {"score, mean of 16, not clipped": best[1], "best of 16": best[16], "recited": model["recited"],
            "criteria reached from nothing": sum(rates[text] > 0.1 for text, rate in before.items() if rate == 0),
            "length, tokens": model["length"], "entropy, nats a token": model["entropy"],
            "distinct first sentences": len({re.split(r"[.!?\n]", text)[0] for text in texts}) / len(texts)}


def pairs(before, after, tasks, number=10):
    """Markdown of the response with the median score, before and after, to the first questions. tasks: by id."""
    lines = []
    for task in sorted({sample["task"] for sample in after})[:number]:
        lines += [f"**{tasks[task].messages[-1]['content']}**", ""]
        for name, samples in (("before", before), ("after", after)):
            own = sorted((s for s in samples if s["task"] == task), key=lambda s: (s["rewards"]["rules"], s["sample"]))
            median = own[(len(own) - 1) // 2]
            lines.append(f"- {name} ({median['rewards']['rules']:+.2f}): {' '.join(median['text'].split())}")
        lines.append("")
    return lines


def final(args):
    """Both arms with their best settings of the grid, args.seeds each: writes first_run.md."""
    best, grid_lines = grid(args)
    tasks = {task.id: task for task in load_tasks("first_aid")}
    before, columns, rates, samples, curves = {}, defaultdict(list), defaultdict(list), {}, defaultdict(list)
    for arm in ARMS:  # before training, at this arm's temperature
        temperature = temperature_in(best[arm])
        found, results = evaluate("smollm2", args.runs / f"before-{temperature}", "--held-out", 16,
                                  "--temperature", temperature)
        before[arm] = found, met_rates(found, tasks), figures(found, results, {}, {})
    for seed, arm in itertools.product(range(args.seeds), ARMS):
        folder = args.runs / run_name(arm, seed)
        curves[arm].append(train(folder, *ARMS[arm], *best[arm], "--seed", seed))
        found, results = evaluate(folder, folder / "evaluation")
        rates[arm].append(met_rates(found, tasks))
        columns[arm].append(figures(found, results, rates[arm][-1], before[arm][1]))
        samples.setdefault(arm, found)
    chosen = "; ".join(f"{arm} `{' '.join(best[arm])}`" for arm in ARMS)
    lines = [*header(args, results), *grid_lines, "", f"Best: {chosen}", "", "## After training", "",
             "| held-out questions, 16 responses each | " + " | ".join(f"before | {arm}" for arm in ARMS)
             + " | difference, seed by seed |", "|---|" + "---|---|" * len(ARMS) + "---|"]
    for label in columns["RuscaRL"][0]:
        values = [[run[label] for run in columns[arm]] for arm in ARMS]
        cells = (f"{before[arm][2][label]:.3f} | {plus_minus(column)}" for arm, column in zip(ARMS, values))
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {plus_minus(numpy.subtract(*values))} |")
    lines += ["", "| share of responses that meet | " + " | ".join(f"before | {arm}, by seed" for arm in ARMS) + " |",
              "|---|" + "---|---|" * len(ARMS)]
    for text in before["RuscaRL"][1]:
        cells = (f"{before[arm][1][text]:.0%} | " + ", ".join(f"{run[text]:.0%}" for run in rates[arm]) for arm in ARMS)
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    lines += ["", "![held-out score, reward and entropy over training](first_run.png)", *quality(args, best)]
    for arm in ARMS:
        lines += ["", f"## Before and after: {arm}, seed 0, the median response", "",
                  *pairs(before[arm][0], samples[arm], tasks)]
    write(args.output / "first_run.md", lines)
    draw(curves, args.output / "first_run.png")


def plain(args):
    """Plain GRPO as `--decay none` with the preset's settings has it, args.seeds runs: writes first_run_plain.md."""
    tasks, columns, curves = {task.id: task for task in load_tasks("first_aid")}, [], {"plain GRPO": []}
    start_samples, start_results = evaluate("smollm2", args.runs / "before-0.7", "--held-out", 16, "--temperature", 0.7)
    before, rates = met_rates(start_samples, tasks), []
    for seed in range(args.seeds):
        folder = args.runs / f"preset-plain_GRPO-{seed}"
        curves["plain GRPO"].append(train(folder, "--decay", "none", "--seed", seed))
        found, results = evaluate(folder, folder / "evaluation")
        rates.append(met_rates(found, tasks))
        columns.append(figures(found, results, rates[-1], before))
    lines = ["# Plain GRPO with the preset's learning rate: SmolLM2-135M on first_aid", "", *about(args, results), "",
             "| held-out questions, 16 responses each | before | plain GRPO | by seed |", "|---|---|---|---|"]
    for label, first in figures(start_samples, start_results, before, {}).items():
        values = [run[label] for run in columns]
        lines.append(f"| {label} | {first:.3f} | {plus_minus(values)} | {', '.join(f'{value:.3g}' for value in values)} |")
    lines += ["", "| share of responses that meet | before | by seed |", "|---|---|---|"]
    lines += [f"| {text} | {rate:.0%} | {', '.join(f'{run[text]:.0%}' for run in rates)} |" for text, rate in before.items()]
    write(args.output / "first_run_plain.md", [*lines, "", "![held-out score, reward and entropy](first_run_plain.png)"])
    draw(curves, args.output / "first_run_plain.png")


def draw(curves, path):
    """Held-out score, reward of the samples without scaffold, and entropy over training; a line a run."""
    figure = Figure((12, 3.6), layout="constrained")
    panels = {"eval/score": ("score", "held-out questions"), "entropy": ("nats a token", "entropy"),
              "reward/unscaffolded": ("score", "training, samples without scaffold")}
    for axis, (name, (label, title)) in zip(figure.subplots(1, 3), panels.items()):
        for arm, runs in curves.items():
            for seed, rows in enumerate(runs):
                line, colour = STYLES[arm]
                points = [(row["step"], row[name]) for row in rows if name in row]
                axis.plot(*zip(*points), line, color=colour, linewidth=1.3, label=None if seed else arm,
                          marker="o" if name == "eval/score" else None, markersize=3)
        axis.set(xlabel="step", ylabel=label, title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def header(args, results):
    """The first lines of the report."""
    return ["# A first result: SmolLM2-135M on first_aid", "", *about(args, results), "", "## The grid, one seed", ""]


def about(args, results):
    """The line that says how the figures came about."""
    settings = results["settings"]
    return [f"`python bench/first_run.py {' '.join(sys.argv[1:])}`, {date.today()}, {os.cpu_count()} cores "
            f"({platform.machine()}), no GPU; sampler: {settings['sampler']} in {settings['dtype']}. {args.seeds} runs an "
            "arm; +- is the half width of a 95% t interval over them. [The plan](first_run_plan.md) was written first."]


def judge(args):
    """Have the server at --judge-url answer QUALITY about responses of every final run and of the models before them; then
    write the report. The first responses are read to every held-out question: 2 from before training, one of each run."""
    tasks = {task.id: task for task in load_tasks("first_aid")}
    store = JsonLines(args.runs / "quality.jsonl")
    done = {(row["model"], row["task"], row["sample"]) for row in store.rows}
    with closing(ChatJudge(Server.checked("judge", args.judge_url).connect(32))) as asked:
        for folder in sorted([*args.runs.glob("before-*"), *args.runs.glob("final-*/evaluation")]):
            name = folder.parent.name if folder.name == "evaluation" else folder.name
            number = 1 if folder.name == "evaluation" else 2
            waiting = [(sample, asked.submit(tasks[sample["task"]].messages, sample["text"], QUALITY))
                       for sample in JsonLines(folder / "samples.jsonl").rows if sample["sample"] < number
                       and (name, sample["task"], sample["sample"]) not in done]
            for sample, verdicts in tqdm(waiting, name, disable=None):
                store.append([{"model": name, "task": sample["task"], "sample": sample["sample"],
                               "verdicts": [verdict.result() for verdict in verdicts]}])
    final(args)


def quality(args, best):
    """Lines of the table of what `judge` was told, [] before it was asked. best: {arm: flags} of the grid."""
    if not (args.runs / "quality.jsonl").exists():
        return []
    by_model = defaultdict(list)
    for row in JsonLines(args.runs / "quality.jsonl").rows:
        if None not in row["verdicts"]:
            by_model[row["model"]].append([*row["verdicts"], score(QUALITY, row["verdicts"])])
    means = {name: numpy.mean(found, axis=0) for name, found in by_model.items()}
    lines = ["", "## Quality, by a judge that no training has seen", "", "Qwen2.5-Coder-1.5B-Instruct, a call a criterion; "
             f"{sum(map(len, by_model.values()))} responses with all verdicts.", "",
             "| share of the responses | " + " | ".join(f"before | {arm} | change" for arm in ARMS) + " | of arms |",
             "|---|" + "---|---|---|" * len(ARMS) + "---|"]
    for i, label in enumerate([*(c.text for c in QUALITY), "score of the four"]):
        cells, values = [], []
        for arm in ARMS:
            before = means[f"before-{temperature_in(best[arm])}"][i]
            values.append([means[run_name(arm, seed)][i] for seed in range(args.seeds)])
            cells.append(f"{before:.3f} | {plus_minus(values[-1])} | {plus_minus(numpy.subtract(values[-1], before))}")
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {plus_minus(numpy.subtract(*values))} |")
    return lines


def temperature_in(flags):
    """The value of --temperature in `flags`, a text."""
    return flags[flags.index("--temperature") + 1]


def run_name(arm, seed):
    """The folder's name of a final run."""
    return f"final-{arm.replace(' ', '_')}-{seed}"


def main():
    """Do one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("grid", "final", "judge", "plain"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[24], help="lengths of a run that are in the grid")
    parser.add_argument("--runs", type=Path, default=Path("runs/first_run"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for first_run.md")
    parser.add_argument("--judge-url", help="with judge")
    args = parser.parse_args()
    if args.part == "judge" and not args.judge_url:
        parser.error("judge needs --judge-url")
    args.runs = args.runs.absolute()
    args.runs.mkdir(parents=True, exist_ok=True)
    {"grid": grid, "final": final, "judge": judge, "plain": plain}[args.part](args)


if __name__ == "__main__":
    main()
