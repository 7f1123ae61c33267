"""Which wording of the scaffold lifts most, and is copied least?

    python bench/scaffold_wording.py [--model smollm2] [--limit 80] [--samples 2] [--output results/scaffold_wording.md]

Half of each rubric is shown. Lift: the share of the shown positive criteria that are met, less the share of the same ones on
the plain question. Recites: five words in a row as they stand in a criterion, which plain advice may have, too ("if it does
not get better"); from its first word: the first five as they begin it (or all, where it is shorter), which advice has not.
"""

import argparse
import os
import random
import shlex
import statistics
import sys
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import regex
from first_aid_lift import fastest_sampler

from judge import Judge, score
from plumbing.policy import load_policy, prompt_ids
from plumbing.rules import normalize, recites
from sampler import SamplingParams, address_seed
from scaffold import choose_criteria
from tasks import load_tasks

REPLY = ("A good reply:", "A good reply is never like this:", "Write a good reply to the user.")
NURSE = ("You are a helpful nurse. Follow these rules. The answer:", "Never give an answer that:", "")
MEETS = ("Your answer should meet these requirements:", "Your answer should not be like this:", "")
THIS = ("Your answer should include this:", "Your answer should avoid this:", "")
SHORT = (*THIS[:2], "Answer in a few short sentences.")
BRIEF = "You answer questions in a few short sentences."
SILENT = "Do not mention these notes."


def write(messages, criteria, place, heads, note=""):
    """The scaffold as text in a system message, below the last user message (with a system message of its own: both) or
    above it (first)."""
    if not criteria:
        return messages
    parts = ["\n".join([head, *(f"- {c.text}" for c in criteria if c.points * sign > 0)])
             for head, sign in zip(heads, (1, -1)) if any(c.points * sign > 0 for c in criteria)]
    text = "\n\n".join(filter(None, [*parts, f"{heads[2]} {note}".strip()]))
    if place == "system":
        return [{"role": "system", "content": text}, *messages]
    question = messages[-1]["content"]
    asked = f"{text}\n\n{question}" if place == "first" else f"{question}\n\n{text}"
    system = [{"role": "system", "content": BRIEF}] if place == "both" else []
    return [*system, *messages[:-1], {"role": "user", "content": asked}]


# "system, reply, silent" was the first version's scaffold_messages, "user, meets, silent" is today's.
CASES = [("system", "reply", REPLY), ("system", "nurse", NURSE), ("system", "meets", MEETS), ("system", "short", SHORT),
         ("user", "reply", REPLY), ("user", "meets", MEETS), ("user", "this", THIS), ("user", "short", SHORT),
         ("first", "this", THIS), ("first", "short", SHORT), ("both", "meets", MEETS), ("both", "this", THIS)]
WORDINGS = {
    f"{place}, {name}{', silent' if note else ''}": partial(write, place=place, heads=heads, note=note)
    for place, name, heads in CASES for note in ("", SILENT)}


def words(text):
    """Lower-case words without punctuation."""
    return regex.findall(r"[\w']+", normalize(text))


def begins(text, texts, run=5):
    """Whether the first `run` words, or all, of one of the criteria `texts` are in `text`."""
    line = f" {' '.join(words(text))} "
    return any(f" {' '.join(words(criterion)[:run])} " in line for criterion in texts)


def measure(wording, share, tasks, args, sample, judge):
    """A row a sample: task id, {shown positive criterion: verdict} (share 0: of all), score, recites, begins, words."""
    jobs = [(task, choose_criteria(task.rubric, share, random.Random(address_seed(task.id, i))))
            for task in tasks for i in range(args.samples)]
    rows = []
    for (task, shown), text in zip(jobs, sample([wording(task.messages, shown) for task, shown in jobs])):
        verdicts = [future.result() for future in judge.submit(task, text)]
        met = {c: verdict for c, verdict in zip(task.rubric, verdicts) if c.points > 0 and (c in shown or not share)}
        texts = [c.text for c in task.rubric]
        copied = recites()(text, texts), begins(text, texts)
        rows.append((task.id, met, score(task.rubric, verdicts), *copied, len(text.split())))
    return rows


def lift(rows, plain):
    """(mean over tasks of the lift, its standard error). plain: {(task id, criterion): share met on the plain question}."""
    of_task = {}
    for identity, met, *_ in rows:
        of_task.setdefault(identity, []).extend(verdict - plain[identity, c] for c, verdict in met.items())
    means = [statistics.mean(found) for found in of_task.values() if found]
    return statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5


def main():
    """Sample with every wording, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", default="first_aid")
    parser.add_argument("--limit", type=int, help="only so many tasks")
    parser.add_argument("--samples", type=int, default=2, help="responses per task")
    parser.add_argument("--wordings", nargs="*", default=list(WORDINGS), choices=WORDINGS, metavar="WORDING")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="what it runs on, for the head of the table")
    parser.add_argument("--output", help="file that the table is added to")
    args = parser.parse_args()
    model, tokenizer = load_policy(args.model)
    sampler, tasks, judge = fastest_sampler(model, tokenizer), load_tasks(args.tasks, args.limit), Judge()
    del model

    def sample(conversations):
        prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
        seeds = [address_seed("wording", i) for i in range(len(prompts))]
        found = {r.index: r.token_ids for r in sampler.sample(prompts, seeds, SamplingParams(64, 0.7))}
        return [tokenizer.decode(found[i], skip_special_tokens=True) for i in range(len(prompts))]

    before = measure(lambda messages, shown: messages, 0, tasks, args, sample, judge)
    plain = {(identity, c): [] for identity, met, *_ in before for c in met}
    for identity, met, *_ in before:
        for c, verdict in met.items():
            plain[identity, c].append(verdict)
    plain = {key: statistics.mean(found) for key, found in plain.items()}
    command = [word for word in sys.argv[1:] if word not in ("--machine", args.machine)]
    lines = [f"## {Path(args.model).name}", "",
             f"`python bench/scaffold_wording.py {shlex.join(command)}`, {date.today()}, {args.machine}. "
             f"{len(tasks)} tasks, {args.samples} responses each, T = 0.7, 64 tokens.", "",
             "| wording | lift | score | recites | from its first word | words |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    for name, rows in [("plain question", before), *((name, None) for name in args.wordings)]:
        shown = rows is None
        rows = rows or measure(WORDINGS[name], 0.5, tasks, args, sample, judge)
        mean, error = lift(rows, plain)
        means = [statistics.mean(column) for column in list(zip(*rows))[2:]]
        cells = [f"{mean:+.3f} +- {error:.3f}" if shown else "", f"{means[0]:+.3f}", *(f"{m:.0%}" for m in means[1:3]),
                 f"{means[3]:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
