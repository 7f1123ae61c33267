"""What came out of the lab, as a table beside the paper's figures and as pictures."""

from functools import cache

import numpy
from matplotlib.figure import Figure

OTHERS = "41.1 to 44.0"
PAPER = {  # HealthBench-500 after training Qwen2.5-7B-Instruct, arXiv 2508.16949
    "a. scaffold": {"RuscaRL": "56.4 (midpoint 0.2)", "no scaffold": "52.0", "whole rubric always": "36.8",
                    "binary, 4 of 8": "46.0", "binary, 8 of 8": "44.7"},
    "b. decay": {"RuscaRL": "56.4", "constant": OTHERS, "linear": OTHERS, "power 2": OTHERS, "power 3": OTHERS,
                 "power 5": OTHERS},
    "c. steepness": {"RuscaRL": "56.4 at 125; 47.0 at 0, 54.1 at 1000 (350 steps)"},
    "c. midpoint": {"RuscaRL": "48.0 (0.4)", "midpoint 0.2": "56.4"},
    "d. ratio": {"RuscaRL": "56.4", "unbiased": "44.8", "scaffolded": "45.7"},
    "e. noisy rubrics": {"RuscaRL": "56.4", "no scaffold": "52.0", "half removed": "48.1",
                         "half removed, no scaffold": "43.2", "negated": "8.2", "negated, no scaffold": "4.3",
                         "inverse": "11.9", "inverse, no scaffold": "8.4"},
}


@cache
def t_quantile(n):
    """97.5% quantile of Student's t for n values, by simulation, to half a percent."""
    return numpy.quantile(numpy.random.default_rng(0).standard_t(n - 1, 1_000_000), 0.975)


def interval(values):
    """(mean, half width of the 95% t interval) of independent values."""
    n = len(values)
    return numpy.mean(values), t_quantile(n) * numpy.std(values, ddof=1) / n**0.5


def plus_minus(values):
    """`interval` as text."""
    mean, half = interval(values)
    return f"{mean:+.3f} +- {half:.3f}"


def mean_score(run):
    """Mean of a run's held-out scores over training: higher for what learns faster, even where all end at the top."""
    return numpy.mean([score for _, score in run["curve"][1:]])


def table(found):
    """Lines of a Markdown table. found: {experiment: {arm: its runs, a {start, end, curve} each}}; every arm beside the
    paper's figure and the difference to the experiment's first arm."""
    lines = ["| experiment | arm | before | after, 95% interval | minus the first arm, seed by seed "
             "| the same, mean over the run | the paper's |", "|---|---|---|---|---|---|---|"]
    for experiment, arms in found.items():
        first = next(iter(arms.values()))
        for arm, runs in arms.items():
            ends = [run["end"] - other["end"] for run, other in zip(runs, first)]
            means = [mean_score(run) - mean_score(other) for run, other in zip(runs, first)]
            cells = [experiment, arm, f"{numpy.mean([run['start'] for run in runs]):+.3f}",
                     plus_minus([run["end"] for run in runs]),
                     *(("", "") if runs is first else (plus_minus(ends), plus_minus(means))),
                     PAPER.get(experiment, {}).get(arm, "")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw_arms(found, path):
    """Every arm's score after training with its interval, one row an arm."""
    rows = [row for experiment, arms in found.items() for row in [(experiment, None), *arms.items()]]
    figure = Figure((8, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (_, runs) in enumerate(rows):
        if runs is not None:
            mean, half = interval([run["end"] for run in runs])
            axes.plot([run["end"] for run in runs], [y] * len(runs), ".", color="0.7", markersize=4)
            axes.errorbar(mean, y, xerr=half, fmt="o", color="black", markersize=4, capsize=3)
    axes.set_yticks(range(len(rows)), [name if runs is None else f"   {name}" for name, runs in rows], fontsize=8)
    for label, (_, runs) in zip(axes.get_yticklabels(), rows):
        label.set_fontweight("bold" if runs is None else "normal")
    axes.set(xlabel="held-out score after training: mean, 95% interval, every run",
             ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def draw_curves(found, path):
    """Held-out score over training of the arms of experiment a; after training, over the base rate, of i's (and a's)."""
    figure = Figure((11, 4.2), layout="constrained")
    curves, sweep = figure.subplots(1, 2)
    for (arm, runs), line in zip(found["a. scaffold"].items(), ("o-", "s--", "^:", "v-.", "d-")):
        steps = [step for step, _ in runs[0]["curve"]]
        columns = [interval(column) for column in zip(*([score for _, score in run["curve"]] for run in runs))]
        curves.errorbar(steps, *zip(*columns), fmt=line, markersize=4, capsize=2, label=arm)
    curves.set(xlabel="step", ylabel="held-out score, asked plainly (95% interval)")
    curves.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    rates = {name.split()[-1]: arms for name, arms in found.items() if "base rate" in name} | {"0.5%": found["a. scaffold"]}
    rates = dict(sorted(rates.items(), key=lambda item: float(item[0].rstrip("%"))))
    for place, (label, line) in enumerate((("RuscaRL", "o-"), ("no scaffold", "s--"))):
        points = [(float(rate.rstrip("%")), *interval([run["end"] for run in list(arms.values())[place]]))
                  for rate, arms in rates.items()]
        sweep.errorbar(*zip(*points), fmt=line, markersize=4, capsize=2, label=label)
    sweep.set(xlabel="rare words among those said unasked, before training (%)", ylabel="held-out score after training",
              xscale="log")
    sweep.xaxis.set_major_formatter("{x:g}")
    sweep.legend()
    for axes in (curves, sweep):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
