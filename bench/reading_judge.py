"""A model that reads, as judge and as proposer: Qwen2.5-Coder-1.5B behind vLLM's server, with real HealthBench questions.

    python bench/reading_judge.py respond --tasks FILE --models smollm2 QWEN_FOLDER     before the server is started
    python bench/reading_judge.py calibrate --judge-url URL [--beside URL_OF_SMOLLM2]
    python bench/reading_judge.py refine --judge-url URL
    python bench/reading_judge.py train --tasks FILE --judge-url URL

FILE has HealthBench's tasks. respond: 8 responses of each model to 12 questions, for refine. calibrate and train write
their sections of judge.md, refine writes refine.md.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lab import ROOT
from output import write
from plumbing.files import JsonLines, as_lines
from step import machine
from tasks import load_tasks

PROMPTS, EACH, SHOWN = 12, 8, (0, 5, 10)  # questions, responses of each model, numbers of the questions that are printed


def run(*command):
    """(what one of the project's commands printed, minutes); its progress goes to stderr as always."""
    print("python", *command, flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    print(done.stdout, f"status {done.returncode}", flush=True)
    return done.stdout.strip(), (time.monotonic() - began) / 60


def short_tasks(path, most=600):
    """The tasks of `path` that consist of one message of at most so many characters."""
    return [task for task in load_tasks(path) if len(task.messages) == 1 and len(task.messages[0]["content"]) <= most]


def respond(args):
    """Responses of each model to the first PROMPTS short questions."""
    chosen = [{"prompt_id": task.id, "prompt": task.messages} for task in short_tasks(args.tasks)[:PROMPTS]]
    (args.work / "prompts.jsonl").write_text(as_lines(chosen), encoding="utf-8")
    for i, model in enumerate(args.models):
        run("evaluation.py", model, "--tasks", args.work / "prompts.jsonl", "--samples", EACH, "--max-new-tokens", 200,
            "--temperature", 0.7, "--output", args.work / f"responses-{i}")


def calibrate(args):
    """Section of judge.md: what --judge-calibrate prints."""
    lines = ["## Against known truth", ""]
    for name, url in (("Qwen2.5-Coder-1.5B-Instruct", args.judge_url), ("SmolLM2-135M-Instruct", args.beside)):
        if url:
            printed, minutes = run("ruscarl.py", "--judge-calibrate", "--judge-url", url,
                                   "--judge-concurrency", args.at_once)
            lines += [f"{name}, {args.at_once} calls at a time, {minutes:.0f} minutes:", "", "```", printed, "```", ""]
    section(args, "calibrate", lines)


def train(args):
    """Section of judge.md: a few steps of SmolLM2 on HealthBench questions, judged with one call a response."""
    folder = args.work / "runs" / "healthbench"
    chosen = args.work / "short.jsonl"
    chosen.write_text(as_lines({"prompt_id": task.id, "prompt": task.messages, "example_tags": list(task.tags), "rubrics": [
        {"criterion": c.text, "points": c.points, "tags": list(c.tags)} for c in task.rubric]} for task in
        short_tasks(args.tasks) if len(task.rubric) <= 12), encoding="utf-8")
    flags = ["--tasks", chosen, "--judge-per", "response", "--steps", 3, "--batch-size", 2, "--mini-batch-size", 2,
             "--held-out", 4, "--eval-samples", 2, "--eval-every", 3, "--max-prompt-tokens", 1024, "--max-new-tokens", 128]
    _, minutes = run("ruscarl.py", *flags, "--judge-url", args.judge_url, "--judge-concurrency", args.at_once,
                     "--runs", folder.parent, "--name", folder.name)
    rows = JsonLines(folder / "metrics.jsonl").rows
    names = ("reward/mean", "reward/zero_variance_groups", "judge/unknown", "judge/seconds_per_call", "time/sample",
             "time/judge", "time/rollout", "time/update", "time/step")
    lines = ["## A run judged by it", "", f"`python ruscarl.py {' '.join(map(str, ['--tasks', 'short.jsonl', *flags[2:]]))} "
             f"--judge-url URL`: {len(load_tasks(chosen))} tasks, {minutes:.0f} minutes.", "",
             "| step | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {row['step']} | " + " | ".join(f"{row[name]:.3g}" if name in row else "" for name in names) + " |"
              for row in rows if "reward/mean" in row]
    scores = ", ".join(f"{row['eval/score']:+.3f} +- {row['eval/score_se']:.3f}" for row in rows if "eval/score" in row)
    section(args, "train", [*lines, "", f"Held-out score before and after: {scores}."])


def section(args, name, lines):
    """Keep a section, and write judge.md from all that are there."""
    (args.work / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = [(args.work / f"{part}.md").read_text(encoding="utf-8") for part in ("calibrate", "train")
             if (args.work / f"{part}.md").exists()]
    write(args.output / "judge.md", ["# A judge that reads: Qwen2.5-Coder-1.5B", "", about("calibrate", "train"), "",
                                     "\n".join(found).rstrip()])


def about(*parts):
    """The line that says how the figures came about."""
    commands = " and ".join(f"`python bench/reading_judge.py {part}`" for part in parts)
    return (f"{commands}, {date.today()}, {machine()}, no GPU; the model (4-bit weights, dequantised) behind "
            "vLLM's server in bfloat16, on the same cores.")


def refine(args):
    """refine.md: rubrics for the questions of `respond`, written and checked by the server's model."""
    folder = args.work / "refined"
    files = sorted(args.work.glob("responses-*/samples.jsonl"))
    printed, minutes = run("refine.py", args.work / "prompts.jsonl", "--responses", *files, "--proposer-url", args.judge_url,
                           "--judge-concurrency", args.at_once, "--output", folder)
    last = {record["prompt_id"]: record for record in JsonLines(folder / "progress.jsonl").rows}
    tasks = load_tasks(args.work / "prompts.jsonl", need_rubrics=False)
    stops = Counter(record["stopped"] for record in last.values())
    lines = ["# Refinement by a 1.5B proposer", "", about("refine"), "",
             f"{len(tasks)} HealthBench questions, {EACH} responses of each of {len(files)} models, {minutes:.0f} minutes. "
             "`python refine.py prompts.jsonl --responses ... --proposer-url URL` printed:", "", "```",
             printed.replace(f"{folder}/", "refined/"), "```", "",
             "Prompts by how they ended: " + "; ".join(f"{count} {why}" for why, count in stops.most_common()) + ".", ""]
    for number in SHOWN:
        if (record := last.get(tasks[number].id)) is not None:
            lines += [f"## Prompt {number + 1}", "", "> " + " ".join(tasks[number].messages[-1]["content"].split()), "",
                      *rubric_lines("first rubric", record["begun_with"]), *rubric_lines("last rubric", record["rubric"]),
                      "rounds: " + (json.dumps([{key: entry[key] for key in ("scores", "tied", "kept", "why")}
                                                for entry in record["rounds"]]) if record["rounds"] else "none"), ""]
    write(args.output / "refine.md", lines)


def rubric_lines(title, rubric):
    """Markdown of a rubric, a criterion a line."""
    return [f"{title}:", "", *(f"- {c['points']:g}: {c['criterion']}" for c in rubric), ""]


def main():
    """Do one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("respond", "calibrate", "refine", "train"))
    parser.add_argument("--tasks", help="HealthBench's tasks, for respond and train")
    parser.add_argument("--models", nargs="+", default=["smollm2"], help="for respond")
    parser.add_argument("--judge-url", help="of the model that reads")
    parser.add_argument("--beside", help="of SmolLM2, for calibrate")
    parser.add_argument("--at-once", type=int, default=16, help="calls at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/reading_judge"), help="folder of what is kept between")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.work, args.output = args.work.absolute(), args.output.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    {"respond": respond, "calibrate": calibrate, "refine": refine, "train": train}[args.part](args)


if __name__ == "__main__":
    main()
