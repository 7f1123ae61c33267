"""Peak memory of short runs on this machine beside what --plan predicts.

    python bench/peak_memory.py [--output results/memory.md]

Each run is a process of its own; its peak is the largest resident set that the system has seen.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
BASE = ["--steps", "2", "--held-out", "2", "--eval-samples", "1"]
CASES = ["--sampler transformers", "--sampler vllm", "--sampler vllm --kl 0.001 --token-budget 512",
         "--sampler transformers --gradient-checkpointing --dtype float32", "--sampler vllm --gradient-checkpointing",
         "--sampler vllm --group-size 32"]
PEAK = ("import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)")


def measured(flags):
    """Peak bytes of a run."""
    with tempfile.TemporaryDirectory() as runs:
        done = subprocess.run([sys.executable, "-c", PEAK, sys.executable, "ruscarl.py", *BASE, *flags, "--runs", runs],
                              cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def predicted(flags):
    """The larger total of --plan, in bytes."""
    done = subprocess.run([sys.executable, "ruscarl.py", *BASE, *flags, "--plan"], cwd=ROOT, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if "total" in line)
    return max(map(float, line.split()[1:])) * 1e9


def main():
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="file for the table")
    args = parser.parse_args()
    lines = ["# Memory: what --plan predicts, and what runs took", "",
             f"`python bench/peak_memory.py {' '.join(sys.argv[1:])}`, {date.today()}, {platform.machine()}, no GPU. "
             f"SmolLM2-135M on first_aid, the laptop preset with {' '.join(BASE)} and:", "",
             "| flags | predicted, GB | measured peak, GB | predicted / measured |", "|---|---|---|---|"]
    for case in tqdm(CASES, "runs", disable=None):
        plan, peak = predicted(case.split()), measured(case.split())
        lines.append(f"| `{case}` | {plan / 1e9:.1f} | {peak / 1e9:.2f} | {plan / peak:.2f} |")
    print("\n".join(lines))
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
