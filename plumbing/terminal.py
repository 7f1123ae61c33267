"""What a run tells the person in front of it: a line a step, a sample now and then, the table at the end."""

import json
import os
import re
import sys
import textwrap
from contextlib import contextmanager

from tqdm import tqdm

from plumbing import ranks

_bar = tqdm(disable=True)

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")  # but white space that only moves on


def printable(text):
    """`text` without what a terminal would obey instead of showing it, such as escape sequences."""
    return CONTROL.sub("\ufffd", text)


def one_line(text):
    """`printable`, with single spaces for all white space."""
    return printable(" ".join(text.split()))


@contextmanager
def progress(total, done, unit):
    """Show a progress bar while inside; `phase` says on it what is being done, `advance` moves it."""
    global _bar
    with tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, disable=ranks.silent()) as _bar:
        yield
    _bar = tqdm(disable=True)


def phase(text):
    """Say on the progress bar, if there is one, what is being done just now."""
    _bar.set_description(text)


def advance(by=1):
    """Move the progress bar."""
    _bar.set_description("")
    _bar.update(by)


def say(line):
    """A line for the person in front, above any progress bar; once, however many ranks there are."""
    if ranks.leader():
        tqdm.write(line, sys.stderr)


def error(command, message):
    """The one line that tells a mistake; of many ranks' equal mistakes only one is told."""
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
    """One line of the numbers that matter, and with show_sample the best response of the step."""
    reward, plain = ("-" if row.get(key) is None else f"{row[key]:+.3f}" for key in ("reward/mean", "reward/unscaffolded"))
    parts = [f"step {row['step']:3d}", f"reward {reward}", f"plain {plain}",
             f"scaffold {row['scaffold/ratio']:.2f}", f"loss {row['loss']:+.4f}", f"entropy {row['entropy']:.2f}"]
    if row.get("kl") is not None:
        parts.append(f"kl {row['kl']:.4f}")
    parts += [f"length {row['response/length']:.0f}", f"sampled {row['time/sample']:.0f} s",
              f"updated {row['time/update']:.0f} s"]
    if "eval/score" in row:
        parts.append(f"held out {row['eval/score']:+.3f} +- {row['eval/score_se']:.3f}")
    tqdm.write("  ".join(parts))
    advance()
    judged = [r for r in rollouts if r.reward is not None]
    if show_sample and judged:
        best = max(judged, key=lambda r: r.reward)
        shown = (f"\n{best.task.messages[-1]['content']}\n({len(best.shown)} of {len(best.task.rubric)} criteria shown, "
                 f"reward {best.reward:+.2f}) {best.text}\n")
        tqdm.write(textwrap.indent(printable(shown), "    | "))


def summary(run, config):
    """Before and after: score with its error, pass rates, and the same held-out question answered twice."""
    rows = [row for row in run.rows() if "eval/score" in row]
    before, after = rows[0], rows[-1]
    print(f"\nheld-out score without scaffold ({config.held_out} tasks, {config.eval_samples} responses each)\n")
    print(f"{'':42s}{'before':>16s}{'after':>16s}")
    for label, key in (("score", "eval/score"), ("length, tokens", "eval/length")):
        cells = [f"{row[key]:+.3f} +- {row['eval/score_se']:.3f}" if key == "eval/score" else f"{row[key]:.0f}"
                 for row in (before, after)]
        print(f"{label:42s}{cells[0]:>16s}{cells[1]:>16s}")
    for text in sorted(before["eval/pass_rate"]):
        if text in after["eval/pass_rate"]:
            print(f"{one_line(text)[:40]:42s}{before['eval/pass_rate'][text]:>16.0%}{after['eval/pass_rate'][text]:>16.0%}")
    first, last = (_first_rollout(run, row["step"]) for row in (before, after))
    print(f"\n{printable(first['question'][:100])}\n")
    side_by_side(f"before ({_points(first)})\n\n{first['response']}", f"after ({_points(last)})\n\n{last['response']}")
    print(f"\n{run.folder}/: metrics.jsonl, rollouts/, curves.png, policy/")


def _first_rollout(run, step):
    with open(run.folder / "rollouts" / f"eval_{step:05d}.jsonl", encoding="utf-8") as file:
        return json.loads(file.readline())


def _points(record):
    return "not judged" if record["reward"] is None else f"reward {record['reward']:+.2f}"


def side_by_side(left, right, width=58):
    """Print two texts as two columns."""
    columns = []
    for text in (left, right):
        lines = []
        for line in printable(text).splitlines():
            lines += textwrap.wrap(line, width) or [""]
        columns.append(lines[:40])
    for i in range(max(map(len, columns))):
        a, b = (column[i] if i < len(column) else "" for column in columns)
        print(f"{a:{width}s}  |  {b}")

