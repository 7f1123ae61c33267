"""What the commands print: a progress bar and lines above it, a line a step, the table at the end of a run, errors."""

import json
import os
import re
import sys
import textwrap
from contextlib import contextmanager
from itertools import zip_longest

from tqdm import tqdm

from plumbing import ranks

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")  # all but white space that moves the cursor on
STEP = (("reward", "reward/mean", "+.3f", ""), ("plain", "reward/unscaffolded", "+.3f", ""),
        ("scaffold", "scaffold/ratio", ".2f", ""), ("loss", "loss", "+.4f", ""), ("entropy", "entropy", ".2f", ""),
        ("kl", "kl", ".4f", ""), ("length", "response/length", ".0f", ""), ("sampled", "time/sample", ".0f", " s"),
        ("updated", "time/update", ".0f", " s"))  # of a step's line: label, metric, format, unit

_bar = tqdm(disable=True)


def printable(text):
    """`text` with U+FFFD for each character that a terminal would obey, such as the escape of a sequence."""
    return CONTROL.sub("\ufffd", text)


def one_line(text):
    """`printable`, with single spaces for all white space."""
    return printable(" ".join(text.split()))


@contextmanager
def progress(total, done, unit):
    """Show a progress bar while inside; `phase` says on it what is being done, `advance` moves it on."""
    global _bar
    with tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, disable=ranks.silent()) as _bar:
        yield
    _bar = tqdm(disable=True)


def phase(text):
    """Say on the progress bar, where there is one, what is being done."""
    _bar.set_description(text)


def advance(by=1):
    """Move the progress bar on."""
    _bar.set_description("")
    _bar.update(by)


def say(line):
    """Print a line on stderr, above the progress bar; of all ranks, only the leader does."""
    if ranks.leader():
        tqdm.write(line, sys.stderr)


def error(command, message):
    """Print the one line that tells a mistake of the user's."""
    ranks.complain(f"{command}: error: {one_line(str(message))}")


def exit_status(command, main):
    """What main() returns; 2, after one line, where it raises ValueError or OSError; 130 after Ctrl-C.

    RUSCARL_TRACEBACK=1 shows where an error came from.
    """
    try:
        return main()
    except (ValueError, OSError) as mistake:
        if os.environ.get("RUSCARL_TRACEBACK"):
            raise
        error(command, mistake)
        return 2
    except KeyboardInterrupt:
        ranks.complain(f"{command}: interrupted; the same command starts again, or goes on where it keeps what is done")
        return 130


def run_command(command, main):
    """Leave with the `exit_status` of main()."""
    status = exit_status(command, main)
    sys.stdout.flush()
    if status > 2:  # interrupted: sys.exit would wait for requests that are still under way
        os._exit(status)
    sys.exit(status)


def step_line(row, rollouts, show_sample):
    """Print the numbers of a step that matter, in one line; with show_sample also the best response. Moves the bar on."""
    parts = [f"step {row['step']:3d}", *(f"{label} {row[metric]:{form}}{unit}" for label, metric, form, unit in STEP
                                         if row.get(metric) is not None)]
    if "eval/score" in row:
        parts.append(f"held out {_score(row)}")
    tqdm.write("  ".join(parts))
    advance()
    best = max((r for r in rollouts if r.reward is not None), key=lambda r: r.reward, default=None)
    if show_sample and best:
        shown = (f"\n{best.task.messages[-1]['content']}\n({len(best.shown)} of {len(best.task.rubric)} criteria shown, "
                 f"reward {best.reward:+.2f}) {best.text}\n")
        tqdm.write(textwrap.indent(printable(shown), "    | "))


def summary(run, config):
    """Print the held-out scores and pass rates before and after, and a held-out question answered before and after."""
    rows = [row for row in run.rows() if "eval/score" in row]
    both = rows[0], rows[-1]
    before, after = (row["eval/pass_rate"] for row in both)  # of criteria that many tasks have
    print(f"\nheld-out score without scaffold ({config.held_out} tasks, {config.eval_samples} responses each)\n")
    lines = [("", "before", "after"), ("score", *map(_score, both)),
             ("length, tokens", *(f"{row['eval/length']:.0f}" for row in both)),
             *((one_line(text)[:40], f"{before[text]:.0%}", f"{after[text]:.0%}") for text in before if text in after)]
    for label, *cells in lines:
        print(f"{label:42s}{cells[0]:>16s}{cells[1]:>16s}")
    texts = []
    for when, row in zip(("before", "after"), both):
        with open(run.folder / "rollouts" / f"eval_{row['step']:05d}.jsonl", encoding="utf-8") as file:
            first = json.loads(file.readline())
        points = "not judged" if first["reward"] is None else f"reward {first['reward']:+.2f}"
        texts.append(f"{when} ({points})\n\n{first['response']}")
    print(f"\n{printable(first['question'][:100])}\n")
    side_by_side(*texts)
    print(f"\n{run.folder}/: metrics.jsonl, rollouts/, curves.png, policy/")


def _score(row):
    return f"{row['eval/score']:+.3f} +- {row['eval/score_se']:.3f}"


def side_by_side(left, right, width=58):
    """Print two texts in two columns, 40 lines of each at most."""
    columns = [[part for line in printable(text).splitlines() for part in textwrap.wrap(line, width) or [""]][:40]
               for text in (left, right)]
    for one, other in zip_longest(*columns, fillvalue=""):
        print(f"{one:{width}s}  |  {other}")
