"""Chasing the Tail, tried out: the theorem in figures, and over-optimisation in the lab.

    python bench/overoptimisation.py --seeds 8 --output results     about 8 minutes on 2 cores

The lab's tiny model is trained, without scaffold, on a rubric that is only a proxy for a gold rubric: the first two
criteria of the gold one (truncated), or that rubric after refine.refine_task has seen responses of the untrained model
(good pairs), or responses of the model when it is shown parts of the gold rubric (great and diverse pairs). The proposer
by rules can only add what the gold rubric has. Nobody trains on the gold rubric but the last arm, for comparison.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import LlamaForCausalLM

import lab
from judge import Judge, score
from lab_report import interval, plus_minus
from output import write
from plumbing.policy import prompt_ids
from plumbing.rules import rule_from_tags
from plumbing.transformers_sampler import TransformersSampler
from refine import refine_task, tail_kl, tail_win_rate
from rule_proposer import RuleProposer
from sampler import SamplingParams, address_seed
from scaffold import choose_criteria, scaffold_messages
from tasks import Criterion, split_tasks
from tools.proposer import Verifier

BASE_RATE, STEPS, POOL = 0.03, 100, 16
ARMS = ("truncated", "good pairs", "great and diverse pairs", "gold")
LINES = dict(zip(ARMS, ("v-.", "s--", "o-", "^:")))
BETAS = (1, 0.25, 0.1, 0.05, 0.02)


def gold_rubric(task):
    """What is really wanted: the five rare words, two habits of the topic, and none of three vices."""
    topic = task.id.rsplit("-", 1)[0]
    own = {c.text[5:-1] for c in task.rubric}
    foreign = json.dumps({"words": [word for word in lab.RARE if word not in own]})
    return (*(c for c in task.rubric if c.points > 0), *(lab.says(word, 2) for word in lab.habits(topic)[1:3]),
            lab.says(lab.habits(topic)[0], -2),
            Criterion("Is longer than 11 words.", -3, ("verifier:rule", "function:min_words", 'parameters:{"limit": 12}')),
            Criterion("Says a rare word of another topic.", -3,
                      ("verifier:rule", "function:mentions_any", f"parameters:{foreign}")))


def gold_score(rubric, text):
    """Score by rules."""
    return score(rubric, [rule_from_tags(c.tags)(text) for c in rubric])


def sample_pools(folder, tasks):
    """{"good": [tasks][POOL] texts of the model asked plainly, "great": the same where it is shown a part of the words}."""
    tokenizer, model = lab.make_tokenizer(), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampler, params = TransformersSampler(model, [1]), SamplingParams(lab.SETTINGS["max_new_tokens"])
    pools = {}
    for kind in ("good", "great"):
        prompts, seeds = [], []
        for task in tasks:
            words = [c for c in task.rubric if c.text.startswith("Says ") and c.points > 0][:5]
            for k in range(POOL):
                rng = random.Random(address_seed("pool", task.id, k))
                shown = choose_criteria(words, rng.choice((0.4, 0.6, 0.8, 1.0)), rng) if kind == "great" else ()
                prompts.append(prompt_ids(tokenizer, scaffold_messages(task.messages, shown)))
                seeds.append(address_seed("pool", kind, task.id, k))
        texts = [""] * len(prompts)
        for response in sampler.sample(prompts, seeds, params):
            texts[response.index] = tokenizer.decode(response.token_ids, skip_special_tokens=True)
        pools[kind] = [texts[i : i + POOL] for i in range(0, len(texts), POOL)]
    return pools


def make_proxies(tasks, pools):
    """{arm: tasks with its rubric}. tasks: with the gold rubric."""
    proposer = RuleProposer(lambda task: task.rubric)
    proxies = {"truncated": [replace(task, rubric=proposer.propose(task)) for task in tasks], "gold": tasks}
    for arm, kind in (("good pairs", "good"), ("great and diverse pairs", "great")):
        refined = []
        for task, texts in zip(tasks, pools[kind]):
            rng = random.Random(address_seed("refine", arm, task.id))
            texts = list(dict.fromkeys(text for text in texts if text))
            refined.append(replace(task, rubric=refine_task(task, texts, proposer, Verifier(), rng, always=True)[0]))
        proxies[arm] = refined
    return proxies


def ranking_accuracy(gold, proxy, pools):
    """(high tail, low tail): share of pairs of responses that the proxy orders as gold does, ties counting half.

    Over all pairs of different gold score among the best quarter of each task's responses, and among the worst quarter; what
    is equal by gold stands in the order of the alphabet, the same for every proxy.
    """
    right = {"high": [], "low": []}
    for true, used, *texts in zip(gold, proxy, *pools.values()):
        scored = sorted(((gold_score(true.rubric, t), gold_score(used.rubric, t)) for t in sorted({*texts[0], *texts[1]})),
                        key=lambda pair: pair[0])
        quarter = max(1, len(scored) // 4)
        for tail, part in (("low", scored[:quarter]), ("high", scored[-quarter:])):
            right[tail] += [0.5 if a[1] == b[1] else float((a[1] < b[1]) == (a[0] < b[0]))
                            for a, b in combinations(part, 2) if a[0] != b[0]]
    return numpy.mean(right["high"]), numpy.mean(right["low"])


def read_curves(run, gold):
    """[[step, proxy, gold], ...] of the held-out responses of a run. gold: {task id: rubric}."""
    curves = []
    for path in sorted((run.folder / "rollouts").glob("eval_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        curves.append([int(path.stem.split("_")[1]), float(numpy.mean([row["reward"] for row in rows])),
                       float(numpy.mean([gold_score(gold[row["task"]], row["response"]) for row in rows]))])
    return curves


def train_arm(arm, seed, folder, proxy, gold, steps):
    """One run on the rubrics of `proxy`; see read_curves."""
    tasks, held_out = split_tasks(proxy, lab.SETTINGS["held_out"])
    settings = {"decay": "none", "steps": steps, "seed": seed}
    rubrics = {task.id: task.rubric for task in gold}
    return arm, seed, lab.train(settings, folder, tasks, held_out, Judge(), lambda run: read_curves(run, rubrics))


def theory():
    """Lines of the table of Theorem 1."""
    cases = [(0, 0), (0.25, 0), (0.5, 0), (0, 0.5), (0, 0.9)]
    lines = ["| beta | KL, nats | right order | best 25% reversed | best 50% | worst 50% | worst 90% |",
             "|---|---|---|---|---|---|---|"]
    for beta in BETAS:
        rates = [f"{tail_win_rate(beta, top, bottom):.3f}" for top, bottom in cases]
        lines.append(f"| {beta:g} | {tail_kl(beta):.4f} | " + " | ".join(rates) + " |")
    return lines


def draw_theory(path):
    """Win rate against KL."""
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    betas = numpy.geomspace(0.005, 20, 200)
    kl = [tail_kl(beta) for beta in betas]
    for label, line, case in (("right order", "-", (0, 0)), ("worst 50% reversed", "--", (0, 0.5)),
                              ("worst 90% reversed", ":", (0, 0.9)), ("best 10% reversed", "--", (0.1, 0)),
                              ("best 25% reversed", "-.", (0.25, 0)), ("best 50% reversed", ":", (0.5, 0))):
        axes.plot(kl, [tail_win_rate(beta, *case) for beta in betas], line, color="0.6" if case[1] else "black", label=label)
    axes.set(xlabel="KL(aligned policy, base policy), nats", ylabel="win rate against the base policy (gold)", xlim=(0, 4))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def draw_curves(curves, path):
    """Proxy and gold over training, mean over seeds with intervals. curves: {arm: [seeds][evaluations][3]}."""
    figure = Figure((11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for column, (axes, title) in enumerate(zip(panels, ("the rubric trained on", "the gold rubric")), 1):
        for arm, runs in curves.items():
            steps = [point[0] for point in runs[0]]
            points = [interval([run[i][column] for run in runs]) for i in range(len(steps))]
            axes.errorbar(steps, *zip(*points), fmt=LINES[arm], markersize=4, capsize=2, label=arm)
        axes.set(xlabel="step", title=f"{title}, held-out tasks")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="score (mean, 95% interval)")
    panels[1].legend()
    figure.savefig(path, dpi=110)


def table(curves, accuracy, proxies):
    """Lines of the table of the lab's arms."""
    lines = ["| rubric trained on | criteria | high-tail accuracy | low-tail | proxy, after | gold: before | best | after | "
             "after minus truncated |", "|---|---|---|---|---|---|---|---|---|"]
    for arm, runs in curves.items():
        ends = [run[-1][2] for run in runs]
        paired = [end - other[-1][2] for end, other in zip(ends, curves["truncated"])]
        cells = [arm, f"{numpy.mean([len(task.rubric) for task in proxies[arm]]):.1f}", *(f"{x:.1%}" for x in accuracy[arm]),
                 plus_minus([run[-1][1] for run in runs]), f"{numpy.mean([run[0][2] for run in runs]):+.3f}",
                 plus_minus([max(point[2] for point in run) for run in runs]), plus_minus(ends),
                 "" if arm == "truncated" else plus_minus(paired)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main():
    """Run everything, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="of each arm [8]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training [{STEPS}]")
    parser.add_argument("--output", help="folder for tail.md and its pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time [one a core]")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2")
    gold = [replace(task, rubric=gold_rubric(task)) for task in lab.make_tasks()]
    with tempfile.TemporaryDirectory() as cache:
        folder = lab.base_model(BASE_RATE, cache)
        pools = sample_pools(folder, gold)
        proxies = make_proxies(gold, pools)
        accuracy = {arm: ranking_accuracy(gold, proxies[arm], pools) for arm in ARMS}
        curves = {arm: [None] * args.seeds for arm in ARMS}
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(train_arm, arm, seed, folder, proxies[arm], gold, args.steps)
                       for seed in range(args.seeds) for arm in ARMS]
            for future in tqdm(as_completed(futures), "runs", len(futures), disable=None):
                arm, seed, curve = future.result()
                curves[arm][seed] = curve
    lines = ["# Chasing the Tail", "", f"`{' '.join(['python bench/overoptimisation.py', *sys.argv[1:]])}`, {date.today()}, "
             f"{os.cpu_count()} cores ({platform.machine()}), no GPU.", "", "## Theorem 1", "",
             "Win rate against the base policy where the proxy reverses the order of a part of the responses:", "",
             *theory(), "", "![win rate against KL](tail-theory.png)", "", "## Over-optimisation in the lab", "",
             f"{args.seeds} seeds, {args.steps} steps, plain GRPO without scaffold; +- is the half width of a 95% interval.",
             "",
             *table(curves, accuracy, proxies), "", "![proxy and gold over training](tail-curves.png)"]
    print("\n".join(lines))
    if args.output:
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        draw_theory(output / "tail-theory.png")
        draw_curves(curves, output / "tail-curves.png")
        write(output / "tail.md", lines)


if __name__ == "__main__":
    main()
