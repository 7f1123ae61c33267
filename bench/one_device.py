"""The update on one device against the same update of an older commit: seconds and memory, interleaved.

    python bench/one_device.py --before cee744b [--rounds 7] [--output results]

An update of SmolLM2-135M as on a laptop: 4 questions, 8 responses of 64 random tokens to each, packs of 2,048 tokens. The
older commit is checked out beside this tree (git worktree). Each tree and case is a process that holds its model; they do
their updates in turn, after one to warm up. Writes one_device.md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = {"bfloat16": ("bfloat16", 0.0), "bfloat16, KL": ("bfloat16", 1e-3), "float32": ("float32", 0.0)}
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def work(tree, dtype, kl):
    """Do an update for each line on stdin, with the code in the folder `tree`; answer seconds and largest resident set."""
    sys.path.insert(0, tree)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to what is now the standard output
    import torch

    import grpo
    from plumbing.config import Config
    from plumbing.policy import keep_freed_memory, load_policy, multiply_with_onednn

    keep_freed_memory()
    multiply_with_onednn()
    policy, dtype, reference = load_policy("smollm2")[0], getattr(torch, dtype), None
    if Path(tree, "plumbing", "optimizer.py").exists():
        from plumbing.optimizer import frozen_copy, make_optimizer

        reference = frozen_copy(policy, dtype, "cpu") if kl else None
        optimizer = make_optimizer(policy, Config(lr=1e-5), dtype=dtype)
    else:  # float32 weights under autocast
        reference = load_policy("smollm2")[0].requires_grad_(False) if kl else None
        for model in filter(None, (policy, reference)):
            model.compute_dtype = None if dtype == torch.float32 else dtype
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    rng, params = random.Random(0), grpo.LossParams(kl_coef=kl)
    for _ in sys.stdin:
        samples = []
        for _ in range(4):
            question = [rng.randrange(49_000) for _ in range(60)]
            samples += [grpo.Sample(question, [rng.randrange(49_000) for _ in range(64)], rng.gauss(0, 1), question)
                        for _ in range(8)]
        began = time.monotonic()
        stats = grpo.update(policy, optimizer, [samples], params, reference=reference, token_budget=2048)
        found = {"seconds": time.monotonic() - began, "grad_norm": stats["grad_norm"]}
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        print(json.dumps({**found, "peak": int(peak) * 1024}), file=answers, flush=True)


def start(tree, dtype, kl):
    """A process that does `work`."""
    return subprocess.Popen([sys.executable, __file__, "--work", str(tree), dtype, str(kl)], cwd=tree, text=True,
                            env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def measure(before, rounds):
    """{case: ([rows of the older tree], [rows of this tree])}, without the first round."""
    found = {}
    for case, (dtype, kl) in CASES.items():
        workers, rows = [start(tree, dtype, kl) for tree in (before, ROOT)], ([], [])
        for round in range(rounds + 1):
            for worker, own in zip(workers, rows):
                print(file=worker.stdin, flush=True)
                own.append(json.loads(worker.stdout.readline()))
            print(f"{case}, round {round}: " + ", ".join(f"{own[-1]['seconds']:.2f} s" for own in rows), flush=True)
        for worker in workers:
            worker.stdin.close()
            worker.wait()
        found[case] = tuple(own[1:] for own in rows)
    return found


def report(found, before, machine, spread):
    """Lines of one_device.md."""
    lines = ["# An update on one device, before and after", "",
             f"`{' '.join(['python bench/one_device.py', *sys.argv[1:]])}`, {date.today()}, {machine}, no GPU. "
             f"SmolLM2-135M, 4 questions x 8 responses of 64 tokens, packs of 2,048. Before: {before}. Median (range); the "
             "ratio is taken round by round. Peak: largest resident set.", "",
             "| case | seconds before | after | after / before | peak before, GB | after | gradient norm before, after |",
             "|---|---|---|---|---|---|---|"]
    for case, (old, new) in found.items():
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(old, new)]
        seconds = [spread([row["seconds"] for row in rows], 2) for rows in (old, new)]
        peaks = [f"{max(row['peak'] for row in rows) / 1e9:.2f}" for rows in (old, new)]
        lines.append(f"| {case} | {seconds[0]} | {seconds[1]} | {spread(ratios, 2)} | {peaks[0]} | {peaks[1]} | "
                     f"{old[0]['grad_norm']:.3f}, {new[0]['grad_norm']:.3f} |")
    return lines


def main():
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="HASH", help="the older commit")
    parser.add_argument("--rounds", type=int, default=7, help="timed, after one to warm up [7]")
    parser.add_argument("--output", help="folder for one_device.md")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], args.work[1], float(args.work[2]))
    if not args.before or args.rounds < 1:
        parser.error("--before HASH is needed, and --rounds of at least 1")
    sys.path.insert(0, str(ROOT))
    from output import earlier, write
    from step import machine, spread

    path, _ = earlier(parser, args.output, "one_device.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "before")
        added = subprocess.run(["git", "worktree", "add", "--detach", tree, args.before], cwd=ROOT, capture_output=True,
                               text=True)
        if added.returncode:
            parser.error(f"--before {args.before}: {added.stderr.strip().splitlines()[-1]}")
        try:
            lines = report(measure(tree, args.rounds), args.before, machine(), spread)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    print("\n".join(lines))
    if path:
        write(path.with_name("one_device.md"), lines)


if __name__ == "__main__":
    main()
