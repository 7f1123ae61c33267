"""What a command prints: messages, a progress bar, a line a step, a sample now and then, the table at the end."""

import json
import os
import re
import sys
import textwrap
from contextlib import contextmanager
from itertools import zip_longest
from statistics import fmean, stdev

from tqdm import tqdm

from plumbing import ranks

_bar = tqdm(disable=True)


def printable(text):
    """`text` without control characters, which a terminal would obey; tabs and line breaks stay."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)", "\ufffd", text)


def one_line(text):
    """`printable`, with single spaces for all white space."""
    return printable(" ".join(text.split()))


@contextmanager
def progress(total, done, unit):
    """Show a progress bar while inside; `phase` says on it what is being done, `advance` moves it."""
    global _bar
    with tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, disable=None if ranks.leader() else True) as _bar:
        try:
            yield
        finally:
            _bar = tqdm(disable=True)


def phase(text):
    """Say on the progress bar, if there is one, what is being done just now."""
    _bar.set_description(text)


def advance(by=1):
    """Move the progress bar."""
    _bar.set_description("")
    _bar.update(by)


def say(line):
    """Print a line on stderr, above any progress bar, by the leader only."""
    if ranks.leader():
        tqdm.write(line, sys.stderr)


def exit_status(command, main):
    """What main() returns; after one line, 2 where it raises ValueError or OSError, 1 where a GPU is out of memory.

    RUSCARL_TRACEBACK=1 shows where an error came from.
    """
    try:
        return main()
    except (ValueError, OSError) as mistake:
        if os.environ.get("RUSCARL_TRACEBACK"):
            raise
        ranks.complain(f"{command}: error: {one_line(str(mistake))}")
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get("RUSCARL_TRACEBACK"):  # torch's
            raise
        ranks.complain(f"{command}: stopped: {one_line(str(error))}")
        return 1


def uncaught(command, kind, error, trace):
    """A sys.excepthook under which Ctrl-C ends `command` with one line, during imports as well."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    ranks.complain(f"{command}: interrupted; the same command {'starts again' if command == 'ruscarl.py' else 'goes on'}")
    sys.stdout.flush()
    os._exit(130)  # a normal exit would wait for requests that are still under way


def run_command(command, main):
    """Leave with the `exit_status` of main()."""
    status = exit_status(command, main)
    sys.stdout.flush()
    if status > 2:  # interrupted
        os._exit(status)
    sys.exit(status)


def step_line(row, rollouts, show_sample):
    """One line of the numbers that matter, and with show_sample the best response of the step."""
    shown = {"step": "step {:3d}", "reward/mean": "reward {:+.3f}", "reward/unscaffolded": "plain {:+.3f}",
             "scaffold/ratio": "scaffold {:.2f}", "loss": "loss {:+.4f}", "entropy": "entropy {:.2f}", "kl": "kl {:.4f}",
             "response/length": "length {:.0f}", "time/sample": "sampled {:.0f} s", "time/update": "updated {:.0f} s",
             "scaffold/recited_plain": "recited {:.0%}", "eval/score": "held out {:+.3f}", "eval/score_se": "+- {:.3f}"}
    parts = [words.format(row[name]) for name, words in shown.items() if row.get(name) is not None]
    tqdm.write("  ".join(parts).replace("  +-", " +-"))
    advance()
    judged = [r for r in rollouts if r.reward is not None]
    if show_sample and judged:
        best = max(judged, key=lambda r: r.reward)
        text = (f"\n{best.task.messages[-1]['content']}\n({len(best.shown)} of {len(best.task.rubric)} criteria shown, "
                f"reward {best.reward:+.2f}) {best.text}\n")
        tqdm.write(textwrap.indent(printable(text), "    | "))


def summary(run, config):
    """Before and after: score, its change, pass rates, and two held-out questions answered twice."""
    rows = [row for row in run.rows() if "eval/score" in row]
    ends = rows[0], rows[-1]
    samples = [held_out_samples(run, row["step"]) for row in ends]
    print(f"\nThe {config.held_out} held-out questions, asked without scaffold; responses to each: {config.eval_samples}\n")
    table = [("", "before", "after"),
             ("score (at most 1)", *(score_of(row) for row in ends)),
             ("length, tokens", *(f"{row['eval/length']:.0f}" for row in ends)),
             ("distinct first sentences", *(f"{distinct_first_sentences(some):.0%}" for some in samples)),
             ("responses that recite the rubric", *(f"{row['eval/recited']:.0%}" for row in ends)),
             ("criteria reached from nothing", "", f"{ends[1]['eval/reached']}"),
             *rates_table(*(row["eval/pass_rate"] for row in ends), samples[0])]
    for label, *cells in table:
        print(f"{label:50s}{cells[0]:>16s}{cells[1]:>16s}")
    print(f"\n{change(*samples)}")
    for task in list(dict.fromkeys(sample["task"] for sample in samples[0]))[:2]:
        medians = [median_response([sample for sample in some if sample["task"] == task]) for some in samples]
        print(f"\n{printable(medians[0]['question'][:200])}\n")
        side_by_side(*(f"{name} ({'not judged' if one['reward'] is None else format(one['reward'], '+.2f')})\n\n"
                       f"{one['response']}" for name, one in zip(("before, median", "after, median"), medians)))
    print(f"\n{run.health()}")
    print(f"{run.folder}/: page.html, metrics.jsonl, rollouts/, curves.png, policy/{', adapter/' if config.lora else ''}")


def score_of(row):
    """The score of an evaluation and its standard error, which one question does not have."""
    return f"{row['eval/score']:+.3f}" + (f" +- {row['eval/score_se']:.3f}" if "eval/score_se" in row else "")


def held_out_samples(run, step):
    """The records of the evaluation before `step`, in the order of tasks."""
    with open(run.folder / "rollouts" / f"eval_{step:05d}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def distinct_first_sentences(samples):
    """Number of distinct first sentences over the number of responses."""
    return len({re.split(r"[.!?\n]", sample["response"])[0] for sample in samples}) / len(samples)


def rates_table(before, after, samples):
    """Rows of what is wanted and what is not: criterion and points, and the share of responses that meet it at both ends."""
    points = {c["criterion"]: c["points"] for sample in samples for c in sample["criteria"]}
    rows = []
    for title, sign in (("responses that meet what is wanted (points)", 1), ("responses that do what is unwanted", -1)):
        shared = [text for text in sorted(before) if text in after and sign * points[text] > 0]
        found = [(f"  {textwrap.shorten(one_line(text), 40, placeholder='...')} ({points[text]:+g})",
                  f"{before[text]:.0%}", f"{after[text]:.0%}") for text in shared]
        rows += [(title, "", ""), *found] if found else []
    return rows


def change(before, after):
    """A line on the change of the score from samples `before` to `after`, and whether it is more than chance."""
    means = []
    for some in (before, after):
        tasks = {task: [s["reward"] for s in some if s["task"] == task and s["reward"] is not None]
                 for task in dict.fromkeys(s["task"] for s in some)}
        means.append({task: sum(rewards) / len(rewards) for task, rewards in tasks.items() if rewards})
    changes = [means[1][task] - mean for task, mean in means[0].items() if task in means[1]]
    if len(changes) < 2:
        return "Too few questions have a score before and after to tell a change from chance."
    if not any(changes):
        return "No question's score has changed."
    error = stdev(changes) / len(changes) ** 0.5
    verdict = "more" if abs(fmean(changes)) > 2 * error else "not more"
    return (f"The score changed by {fmean(changes):+.3f} +- {error:.3f}: {verdict} than two standard errors. Each +- is one "
            "standard error over\nthe questions; how far from here another --seed would end, it does not say.")


def median_response(samples):
    """The sample with the median reward of those that have one, the lower one of two."""
    judged = sorted((s for s in samples if s["reward"] is not None), key=lambda s: s["reward"])
    return judged[(len(judged) - 1) // 2] if judged else samples[0]


def side_by_side(left, right, width=58):
    """Print two texts as two columns."""
    columns = [[part for line in printable(text).splitlines() for part in textwrap.wrap(line, width) or [""]][:40]
               for text in (left, right)]
    for a, b in zip_longest(*columns, fillvalue=""):
        print(f"{a:{width}s}  |  {b}")
