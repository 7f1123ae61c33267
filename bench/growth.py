"""How the update's cost grows: seconds and memory against group size, response length and vocabulary.

    python bench/growth.py --output results [--rounds 3]

One minibatch of one question, float32 on CPU, random weights: seconds to the new weights, and the memory that the update
takes beyond weights and optimizer state. Each point is a process of its own; "one by one" puts every response into a pack
of its own, so that the question is computed for each. Writes growth.jsonl, which is gone on from, growth.md and growth.png.
15 minutes on 2 cores.
"""

import argparse
import ctypes
import json
import random
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import grpo
from output import earlier, write
from plumbing.policy import keep_freed_memory, multiply_with_onednn
from step import days, machine, memory, spread

USUAL = {"vocab": 49152, "width": 576, "layers": 30,  # SmolLM2-135M's
         "question": 256, "response": 128, "group": 8, "budget": 2048}
NARROW = {"width": 64, "layers": 2}  # so that the vocabulary is what is seen
ALONE = {"budget": 1}
LENGTHS = (128, 512)  # of responses, with which a vocabulary is tried: their difference is what a token costs
POINTS = {
    "group size": [{**USUAL, "group": n, **more} for more in ({}, ALONE) for n in (1, 2, 4, 8, 16)],
    "response length": [{**USUAL, "response": n, **more} for more in ({}, ALONE) for n in (32, 64, 128, 256)],
    "vocabulary": [{**USUAL, **NARROW, "vocab": n, "response": r, "budget": 8192}
                   for n in (2_000, 8_000, 32_000, 64_000, 152_000) for r in LENGTHS],
}


def measure(point, rounds):
    """{seconds: [of each round], memory: bytes, gradients among them} of a point; in a process of its own."""
    multiply_with_onednn()
    keep_freed_memory()
    torch.manual_seed(0)
    width, rng = point["width"], random.Random(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=point["vocab"], hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=point["layers"],
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 192), head_dim=64, tie_word_embeddings=True,
        attn_implementation="sdpa")).eval()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def update():
        question = [rng.randrange(point["vocab"]) for _ in range(point["question"])]
        responses = [[rng.randrange(point["vocab"]) for _ in range(point["response"])] for _ in range(point["group"])]
        samples = [grpo.Sample(question, response, rng.gauss(0, 1), question) for response in responses]
        began = time.monotonic()
        grpo.update(model, optimizer, [samples], grpo.LossParams(), token_budget=point["budget"])
        return time.monotonic() - began

    update()  # from here on there is an optimizer state
    ctypes.CDLL(None).malloc_trim(0)  # what is free counts as memory that the update takes
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = memory("VmRSS")
    update()
    beyond = memory("VmHWM") - before
    return {"seconds": [update() for _ in range(rounds)], "memory": beyond}


def run(point, rounds):
    """`measure` in a new process."""
    done = subprocess.run([sys.executable, __file__, "--point", json.dumps(point), "--rounds", str(rounds)],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{point}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def vocabulary_costs(rows):
    """[(vocabulary, bytes that another response token takes)], from the two lengths of responses."""
    by = {(row["vocab"], row["response"]): row for row in rows}
    short, long = LENGTHS
    return [(n, (by[n, long]["memory"] - by[n, short]["memory"]) / (by[n, long]["group"] * (long - short)))
            for n in sorted({n for n, _ in by})]


def picture(found, path):
    """Three panels: group size and response length (seconds; memory dotted), and what a token costs by vocabulary."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, experiment, key in zip(axes, ("group size", "response length"), ("group", "response")):
        twin = axis.twinx()
        for budget, label, color in ((USUAL["budget"], "shared question", "#1f77b4"), (1, "one by one", "#7f7f7f")):
            rows = [row for row in found[experiment] if row["budget"] == budget]
            across = [row[key] for row in rows]
            axis.plot(across, [median(row["seconds"]) for row in rows], "o-", color=color, label=f"{label}: seconds")
            twin.plot(across, [row["memory"] / 1e9 for row in rows], "s:", color=color, label=f"{label}: GB")
        axis.set(xlabel=experiment + (", responses" if key == "group" else ", tokens"), ylabel="seconds (solid)", ylim=0)
        twin.set(ylabel="GB beyond weights and Adam (dotted)", ylim=0)
        axis.legend(frameon=False)
    costs = vocabulary_costs(found["vocabulary"])
    axes[2].plot([n / 1e3 for n, _ in costs], [cost / 1e3 for _, cost in costs], "o-", label="this update")
    axes[2].plot([n / 1e3 for n, _ in costs], [4 * n / 1e3 for n, _ in costs], "--", color="#7f7f7f",
                 label="one float32 row of logits")
    axes[2].set(xlabel="vocabulary, thousands", ylabel="KB that another response token takes", ylim=0)
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=110)


def table(found):
    """Lines of Markdown tables."""
    lines = []
    for experiment in ("group size", "response length"):
        lines += [f"## By {experiment}", "",
                  f"| {experiment} | packs | seconds: median (min to max) | GB beyond weights and Adam |",
                  "|---|---|---|---|"]
        for row in found[experiment]:
            lines.append(f"| {row['group' if experiment == 'group size' else 'response']} | "
                         f"{'one by one' if row['budget'] == 1 else 'shared question'} | "
                         f"{spread(row['seconds'], 2)} | {row['memory'] / 1e9:.2f} |")
        lines.append("")
    lines += ["## By vocabulary", "", "| vocabulary | response tokens | seconds: median (min to max) | GB beyond weights "
              "and Adam | KB that another response token takes |", "|---|---|---|---|---|"]
    costs = dict(vocabulary_costs(found["vocabulary"]))
    for row in found["vocabulary"]:
        cost = f"{costs[row['vocab']] / 1e3:.1f}" if row["response"] == LENGTHS[-1] else ""
        lines.append(f"| {row['vocab']:,} | {row['group']} x {row['response']} | "
                     f"{spread(row['seconds'], 2)} | {row['memory'] / 1e9:.2f} | {cost} |")
    return lines


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="updates that are timed at each point [3]")
    parser.add_argument("--output", help="folder for growth.jsonl, which is gone on from, growth.md and growth.png")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(json.loads(args.point), args.rounds)))
        return
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    path, known = earlier(parser, args.output, "growth.jsonl")
    known = [row for row in known if len(row.get("seconds", [])) == args.rounds]
    found = {name: [] for name in POINTS}
    points = [{"experiment": name, **point} for name, points in POINTS.items() for point in points]
    for point in tqdm(points, "points", disable=None):
        row = next((row for row in known if point.items() <= row.items()), None)
        if row is None:
            row = {**point, **run(point, args.rounds), "date": str(date.today())}
            print(json.dumps(row), flush=True)
            if path:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        found[point["experiment"]].append(row)
    measured = days([row for rows in found.values() for row in rows])
    lines = ["# How the update's cost grows", "",
             f"`{' '.join(['python bench/growth.py', *sys.argv[1:]])}`, {measured}, {machine()}, no GPU; "
             f"torch {torch.__version__}. float32, random weights. Where nothing else is said: one question of "
             f"{USUAL['question']} tokens, {USUAL['group']} responses of {USUAL['response']}, packs of at most "
             f"{USUAL['budget']:,} tokens, a model of SmolLM2-135M's shape; for the vocabularies one of width "
             f"{NARROW['width']} with {NARROW['layers']} layers.", "",
             "![growth](growth.png)", "", *table(found)]
    print("\n".join(lines))
    if path:
        write(path.with_name("growth.md"), lines)
        picture(found, path.with_name("growth.png"))


if __name__ == "__main__":
    main()
