"""README's first command, timed: score before and after, minutes, peak memory, seed by seed.

    python bench/first_command.py --seeds 0 1 2 --output results

--sampler transformers is what a machine without vLLM has. A run that is there already is not made again.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lab import ROOT
from output import write
from plumbing.files import JsonLines, write_whole
from plumbing.policy import cpu_dtype


def measure(folder, *flags):
    """{minutes, gigabytes} of a run in `folder`, which is made unless it is there: its time and its peak memory."""
    kept = folder / "measured.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a run that was interrupted
        began = time.monotonic()
        run = subprocess.Popen([sys.executable, "ruscarl.py", *map(str, flags), "--runs", folder.parent, "--name",
                                folder.name], cwd=ROOT)
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            raise SystemExit(f"{folder.name}: ended with status {os.waitstatus_to_exitcode(status)}")
        found = {"minutes": (time.monotonic() - began) / 60, "gigabytes": usage.ru_maxrss * 1024 / 1e9}
        write_whole(kept, json.dumps(found) + "\n")
    return json.loads(kept.read_text(encoding="utf-8"))


def main():
    """Measure every seed; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sampler", default="transformers")
    parser.add_argument("--runs", type=Path, default=Path("runs/first_command"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    lines = ["# README's first command", "", f"`python bench/first_command.py {' '.join(sys.argv[1:])}`: `python ruscarl.py "
             f"--seed SEED --sampler {args.sampler}`, {date.today()}, {os.cpu_count()} cores ({platform.machine()}, "
             f"{str(cpu_dtype()).removeprefix('torch.')}), no GPU. +- is a standard error over the held-out questions.", "",
             "| seed | score before | after | recite after | criteria reached from nothing | minutes | peak, GB |",
             "|---|---|---|---|---|---|---|"]
    for seed in args.seeds:
        folder = args.runs.absolute() / f"seed-{seed}"
        found = measure(folder, "--seed", seed, "--sampler", args.sampler)
        ends = [row for row in JsonLines(folder / "metrics.jsonl").rows if "eval/score" in row]
        scores = " | ".join(f"{row['eval/score']:+.3f} +- {row['eval/score_se']:.3f}" for row in (ends[0], ends[-1]))
        lines.append(f"| {seed} | {scores} | {ends[-1]['eval/recited']:.1%} | {ends[-1]['eval/reached']} | "
                     f"{found['minutes']:.1f} | {found['gigabytes']:.1f} |")
    print("\n".join(lines))
    write(args.output / "first_command.md", lines)


if __name__ == "__main__":
    main()
