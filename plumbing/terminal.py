"""What a command prints: messages, a progress bar, a line a step, a sample now and then, the table at the end."""

import json
import os
import re
import sys
import textwrap
from contextlib import contextmanager
from itertools import zip_longest

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
    """What main() returns; 2, after one line, where it raises ValueError or OSError.

    RUSCARL_TRACEBACK=1 shows where an error came from.
    """
    try:
        return main()
    except (ValueError, OSError) as mistake:
        if os.environ.get("RUSCARL_TRACEBACK"):
            raise
        ranks.complain(f"{command}: error: {one_line(str(mistake))}")
        return 2


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
    """Before and after: score with its error, pass rates, and the same held-out question answered twice."""
    rows = [row for row in run.rows() if "eval/score" in row]
    before, after = rows[0], rows[-1]
    print(f"\nresponses to held-out questions, without scaffold ({config.held_out} tasks, {config.eval_samples} to each)\n")
    table = [("", "before", "after"),
             ("score", *(f"{row['eval/score']:+.3f} +- {row['eval/score_se']:.3f}" for row in (before, after))),
             ("length, tokens", *(f"{row['eval/length']:.0f}" for row in (before, after))),
             ("criteria reached from nothing", "", f"{after['eval/reached']}"),
             ("responses that recite the rubric", *(f"{row['eval/recited']:.0%}" for row in (before, after))),
             ("responses that meet", "", ""),
             *(("  " + one_line(text)[:38], f"{rate:.0%}", f"{after['eval/pass_rate'][text]:.0%}")
               for text, rate in sorted(before["eval/pass_rate"].items()) if text in after["eval/pass_rate"])]
    for label, *cells in table:
        print(f"{label:42s}{cells[0]:>16s}{cells[1]:>16s}")
    columns = []
    for name, row in (("before", before), ("after", after)):
        with open(run.folder / "rollouts" / f"eval_{row['step']:05d}.jsonl", encoding="utf-8") as file:
            first = json.loads(file.readline())
        reward = "not judged" if first["reward"] is None else f"reward {first['reward']:+.2f}"
        columns.append(f"{name} ({reward})\n\n{first['response']}")
    print(f"\n{printable(first['question'][:100])}\n")
    side_by_side(*columns)
    print(f"\n{run.health()}")
    print(f"{run.folder}/: page.html, metrics.jsonl, rollouts/, curves.png, policy/")


def side_by_side(left, right, width=58):
    """Print two texts as two columns."""
    columns = []
    for text in (left, right):
        lines = [part for line in printable(text).splitlines() for part in textwrap.wrap(line, width) or [""]]
        columns.append(lines[:40])
    for a, b in zip_longest(*columns, fillvalue=""):
        print(f"{a:{width}s}  |  {b}")
