"""Judging while sampling, against one after the other: seconds of a step's rollouts, same responses, interleaved.

    python bench/overlap.py --tasks TASKS --judge-url http://127.0.0.1:8123/v1 [--rounds 4] [--output results/overlap.md]

vLLM samples in this process, an OpenAI-compatible server judges. To be a fair picture of two machines, sampler and server
need cores (or GPUs) of their own: `taskset -c 0` for this and `taskset -c 1` for the server, each with OMP_NUM_THREADS=1.
The server's prefix cache must be off (--no-enable-prefix-caching): the same responses are judged twice.
"""

import argparse
import dataclasses
import os
import platform
import sys
from concurrent.futures import Future
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy
from tqdm import tqdm

from judge import ChatJudge, Judge
from plumbing.chat import ChatClient
from plumbing.policy import cpu_dtype, load_policy, named_weights, stop_ids
from ruscarl import make_rollouts, sample_and_judge
from sampler import SamplingParams, VLLMSampler
from tasks import load_tasks


class Afterwards:
    """A judge that begins when everything is sampled."""

    def __init__(self, judge):
        self.judge, self.counts = judge, judge.counts
        self._kept = []

    def submit(self, task, text):
        futures = [Future() for _ in task.rubric]
        self._kept.append((task, text, futures))
        return futures

    def finish(self):
        started = [(self.judge.submit(task, text), futures) for task, text, futures in self._kept]
        self._kept = []
        for verdicts, futures in started:
            for verdict, future in zip(verdicts, futures):
                future.set_result(verdict.result())
        self.judge.finish()


def main():
    """Time both ways in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--judge-url", required=True)
    parser.add_argument("--rounds", type=int, default=4, help="timed, of each way [4]")
    parser.add_argument("--responses", type=int, default=8, help="to each of two questions")
    parser.add_argument("--criteria", type=int, default=3, help="judged of each rubric")
    parser.add_argument("--new-tokens", type=int, default=384)
    parser.add_argument("--output", help="file for the table")
    args = parser.parse_args()
    policy, tokenizer = load_policy("smollm2")
    sampler = VLLMSampler(policy.config, stop_ids(policy, tokenizer), cpu_dtype(), 4096)
    sampler.sync(named_weights(policy))
    client = ChatClient([args.judge_url], "")
    client.check()
    judge = Judge(ChatJudge(client))
    tasks = [dataclasses.replace(t, rubric=t.rubric[: args.criteria]) for t in load_tasks(args.tasks, 2 * args.rounds)]
    params = SamplingParams(args.new_tokens, 0.7)
    lines = ["# Judging while sampling", "",
             f"`OMP_NUM_THREADS=1 taskset -c 0 python bench/overlap.py --tasks {Path(args.tasks).name} "
             f"--judge-url {args.judge_url} --rounds {args.rounds}`, {date.today()}, {os.cpu_count()} cores "
             f"({platform.machine()}), no GPU: one "
             "core for vLLM as the sampler, the other for vLLM's server as the judge, SmolLM2-135M in both, HealthBench "
             "questions. Seconds; the same responses in both ways.", "",
             "| round | sampling | judging after it | one after the other | overlapped | overlapped / longer of the two |",
             "|---|---|---|---|---|---|"]
    ratios = []
    with tqdm(total=2 * args.rounds, disable=None) as bar:
        for round in range(args.rounds):
            rows = {}
            for way, used in (("apart", Afterwards(judge)), ("overlapped", judge)):
                rollouts = make_rollouts(tasks[2 * round : 2 * round + 2], [0.0] * args.responses, tokenizer, (0, round))
                rows[way] = sample_and_judge(rollouts, sampler, used, tokenizer, params)[1]
                bar.update()
            sampling, whole = rows["apart"]["time/sample"], rows["apart"]["time/rollout"]
            both = rows["overlapped"]["time/rollout"]
            ratios.append(both / max(sampling, whole - sampling))
            seconds = (sampling, whole - sampling, whole, both)
            lines.append(f"| {round} | {' | '.join(f'{s:.1f}' for s in seconds)} | {ratios[-1]:.2f} |")
    lines.append(f"| mean | | | | | {numpy.mean(ratios):.2f} |")
    judge.close()
    print("\n".join(lines))
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
