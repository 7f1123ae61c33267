"""Chasing the Tail (arXiv 2509.21500): rubrics that tell great responses from merely good ones.

For each prompt, a proposer writes a rubric from the prompt alone, and a verifier checks all responses against the rubric.
The two best responses go back to the proposer, which rewrites the rubric so that it tells them apart; then the next two.

    python evaluation.py MODEL --tasks prompts.jsonl --samples 16 --output evaluations/A    (other models: B, C)
    python refine.py prompts.jsonl --responses evaluations/*/samples.jsonl --proposer-url URL
    python ruscarl.py --tasks refined/prompts/tasks.jsonl

A refinement is kept only if it separates the two responses and leaves the order of the others; docs/differences.md tells
what else differs from the official code. The same command, given again, continues.
"""

import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import combinations
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from judge import score
from plumbing.chat import ChatError
from plumbing.command_line import parse_refinement as parse_command_line
from plumbing.files import JsonLines, as_lines, claim, write_whole
from plumbing.rules import shown
from plumbing.terminal import run_command, say
from tasks import digest, got, load_tasks, read_jsonl
from tools.proposer import ChatProposer, Verifier

PATIENCE = 2  # refinements in a row that are not kept before a rubric is left as it is
KEPT = ("seed", "start", "rounds", "max_reversed", "always")  # settings that decisions depend on
DECISION = ("prompt_id", "rubric", "begun_with", "rounds", "stopped", "unknown", "failure")  # fields of progress.jsonl


class Pool:
    """The responses to one task and their verdicts. The verifier is asked for each criterion once, whatever its weight."""

    def __init__(self, task, texts, verifier):
        self.task, self.texts, self.verifier = task, texts, verifier
        self.known = {}  # {(text, tags) of a criterion: verdicts [texts]}

    def verdicts(self, rubric):
        """[texts][criteria]: True, False, or None for unknown."""
        if new := [c for c in rubric if (c.text, c.tags) not in self.known]:
            found = self.verifier.verify(self.task, new, self.texts)
            self.known.update(((c.text, c.tags), verdicts) for c, verdicts in zip(new, zip(*found)))
        return [[self.known[c.text, c.tags][i] for c in rubric] for i in range(len(self.texts))]

    def scores(self, rubric):
        """[texts]: scores; None where a verdict is unknown."""
        return [score(rubric, verdicts) for verdicts in self.verdicts(rubric)]


def refine_task(task, texts, proposer, verifier, rng, *, rounds=4, max_reversed=0.2, always=False, start=None):
    """Write a rubric for `task` and refine it on the responses `texts`.

    rng: random.Random, for ties and for which response is called A. start: first rubric (default: the proposer's). Returns
    (rubric, log); log: begun_with, rounds (of each: pair, scores, tied, kept, why), stopped (why), unknown (number of such
    verdicts), failure (of the proposer, or None). Raises ChatError where there is no first rubric.
    """
    pool, unused, log = Pool(task, texts, verifier), set(range(len(texts))), []
    begun_with = rubric = tuple(start or proposer.propose(task))
    stopped, failure = f"{rounds} rounds", None
    for _ in range(rounds):
        scores = pool.scores(rubric)
        pair, tied = best_two(scores, unused, rng)
        if pair is None:
            stopped = "all responses are used, or have no score"
            break
        if scores[pair[0]] != scores[pair[1]] and not always:
            stopped = "the best are told apart"
            break
        rng.shuffle(pair)
        try:
            rubric, why = refinement(pool, rubric, pair, proposer, max_reversed)
        except ChatError as error:  # the last rubric stays
            stopped, failure = "the proposer failed", str(error)
            break
        log.append({"pair": pair, "scores": [scores[i] for i in pair], "tied": tied, "kept": why is None, "why": why})
        unused -= set(pair)
        if len(log) >= PATIENCE and not any(entry["kept"] for entry in log[-PATIENCE:]):
            stopped = "nothing improves"
            break
    unknown = sum(verdict is None for verdicts in pool.known.values() for verdict in verdicts)
    return rubric, {"begun_with": begun_with, "rounds": log, "stopped": stopped, "unknown": unknown, "failure": failure}


def best_two(scores, unused, rng):
    """([i, j] of the two best unused responses or None, number of responses that a draw had to choose from or 0)."""
    rest = [i for i in unused if scores[i] is not None]
    if len(rest) < 2:
        return None, 0
    rng.shuffle(rest)
    rest.sort(key=lambda i: -scores[i])  # stable: the shuffle decides among equals
    equal = [i for i in rest if scores[i] == scores[rest[1]]]
    return rest[:2], len(equal) if set(equal) - set(rest[:2]) else 0


def refinement(pool, rubric, pair, proposer, max_reversed):
    """(the proposer's new rubric, None), or (`rubric`, why the new one is not kept). Raises ChatError where none came."""
    texts, verdicts = [pool.texts[i] for i in pair], pool.verdicts(rubric)
    new, better = proposer.refine(pool.task, rubric, texts, [verdicts[i] for i in pair])
    if set(new) == set(rubric):
        return rubric, "nothing new"
    before, after = pool.scores(rubric), pool.scores(new)
    first, second = (after[i] for i in pair)
    if None in (first, second):
        return rubric, "a verdict on the pair is unknown"
    if first == second:
        return rubric, "does not separate the pair"
    if better is not None and (first > second) != (better == 0):
        return rubric, "prefers the other one"
    if (share := reversed_share(before, after)) > max_reversed:
        return rubric, f"reverses {share:.0%} of the order"
    return new, None


def reversed_share(before, after):
    """Of the pairs that `before` tells apart, the share that `after` reverses. Both: scores [texts]; None is left out."""
    known = [scores for scores in zip(before, after) if None not in scores]
    told_apart = [(one, other) for one, other in combinations(known, 2) if one[0] != other[0]]
    return sum((one[0] - other[0]) * (one[1] - other[1]) < 0 for one, other in told_apart) / max(len(told_apart), 1)


# Theorem 1: what a misranking costs depends on where it is. The gold reward R of the base policy's responses is uniform on
# (0, 1), which loses nothing, as only ranks matter. The proxy u = f(R) rearranges (0, 1). The aligned policy is the base
# policy weighted by exp(u / beta); its density over u is e^(u / beta) / (beta (e^(1 / beta) - 1)).

def tail_kl(beta):
    """KL(aligned, base) in nats, the same for every proxy: E[u] / beta - log(beta (e^(1 / beta) - 1)), where E[u] is the win
    rate of the right order."""
    return max(0.0, (tail_win_rate(beta) - 1) / beta - math.log(-math.expm1(-1 / beta) * beta))


def tail_win_rate(beta, top_reversed=0.0, bottom_reversed=0.0):
    """Chance that an aligned response has a higher gold reward than one of the base policy: E[f^-1(u)], in [0, 1]. The proxy
    reverses the order within the best `top_reversed` and within the worst `bottom_reversed` of all responses."""
    if not (1e-300 < beta < math.inf and top_reversed >= 0 and bottom_reversed >= 0 and top_reversed + bottom_reversed <= 1):
        raise ValueError("beta must be above 0 and finite, shares must be at least 0 and together at most 1, got "
                         f"{beta}, {top_reversed} and {bottom_reversed}")
    win_rate, top = 0.0, 1 - top_reversed  # f^-1 is linear in each of three pieces
    for low, high, mirrored in ((0.0, bottom_reversed, True), (bottom_reversed, top, False), (top, 1.0, True)):
        x = (high - low) / beta
        mass = math.exp((high - 1) / beta) * math.expm1(-x) / math.expm1(-1 / beta)
        mean = (high - low) * (0.5 + x / 12 if x < 1e-3 else -1 / math.expm1(-x) - 1 / x)  # of u - low in this piece
        win_rate += mass * (high - mean if mirrored else low + mean)
    return win_rate


def read_responses(paths, known):
    """{task id: texts} of the files `paths`; equal texts of a task count once, empty ones not at all. known: the task ids.
    A line is {"task": id, "text": text, ...}, as evaluation.py writes it, or {"prompt_id": id, "responses": [texts]}."""
    found = {identity: {} for identity in known}  # {id: {text: None}}: a set that keeps its order
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--responses: {'a folder, not a' if Path(path).is_dir() else 'no such'} file: {path}")
        for place, record in read_jsonl(path):
            if not isinstance(record, dict):
                raise ValueError(f"{place}: must be a JSON object{got(record)}")
            key, field = ("task", "text") if "task" in record else ("prompt_id", "responses")
            identity, texts = record.get(key), record.get(field)
            if not isinstance(identity, str):
                raise ValueError(f"{place}: {key}: must be a string{got(identity)}")
            if identity not in found:
                raise ValueError(f"{place}: {key}: no prompt has this id: {shown(identity)}")
            texts = [texts] if field == "text" else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{place}: {field}: must be {'a string' if field == 'text' else 'a list of strings'}"
                                 + got(record.get(field)))
            found[identity].update(dict.fromkeys(text for text in texts if text.strip()))
    return {identity: list(texts) for identity, texts in found.items()}


class Decisions:
    """progress.jsonl. of: {prompt id: its last line, see DECISION}. errors: {prompt id: why there is no first rubric}."""

    def __init__(self, folder):
        self.lines, self.errors = JsonLines(folder / "progress.jsonl", check=itemgetter(*DECISION)), {}
        self.of = {record["prompt_id"]: record for record in self.lines.rows}

    def add(self, task, rubric, log):
        """Append the decision on a task, unless an earlier start, whose servers failed less, made a better one."""
        rubric, begun_with = ([{"criterion": c.text, "points": c.points, "tags": list(c.tags)} for c in criteria]
                              for criteria in (rubric, log["begun_with"]))
        record = {"prompt_id": task.id, "rubric": rubric, **log, "begun_with": begun_with}
        if how_far(record) >= how_far(self.of.get(task.id, record)):
            self.of[task.id] = record
            self.lines.append([record])

    def missing(self, task):
        """Why another start could do better on a task, such as a server that failed; None where it could not."""
        record = self.of.get(task.id, {"failure": self.errors.get(task.id, "not begun")})
        return record["failure"] or (f"{record['unknown']} verdicts are unknown" if record["unknown"] else None)


def how_far(record):
    """Orders decisions on the same prompt: whether the proposer failed, verdicts that are unknown, refinements kept."""
    return record["failure"] is None, -record["unknown"], sum(entry["kept"] for entry in record["rounds"])


def refine(config):
    """Refine what --output lacks and write its tasks.jsonl. Returns (tasks, Decisions, {server: its client's counts})."""
    everything = load_tasks(config.tasks, need_rubrics=config.start == "own")
    tasks = everything[: config.limit or None]
    responses = read_responses(config.responses, [task.id for task in everything])
    if few := [task.id for task in tasks if len(responses[task.id]) < 2]:
        raise ValueError(f"--responses: task {few[0]} has fewer than two different responses")
    long = {"max_tokens": 4096, "timeout": 600.0}  # a rubric is longer than a verdict
    clients = {name: client for name in ("proposer", "verifier") if (client := config.connect(name, **long))}
    verifying = clients.get("verifier", clients["proposer"])
    proposer, verifier = ChatProposer(clients["proposer"]), Verifier(verifying)
    folder, settings = Path(config.output), {name: getattr(config, name) for name in KEPT}
    settings |= {"proposer_model": clients["proposer"].model, "verifier_model": verifying.model}
    claim(folder, {**settings, "hash of the tasks and responses": digest([everything, responses])}, "progress.jsonl")
    decisions, threads = Decisions(folder), ThreadPoolExecutor(config.judge_concurrency)
    try:
        futures = {threads.submit(refine_task, task, responses[task.id], proposer, verifier,
                                  random.Random(f"{config.seed} refine {task.id}"), rounds=config.rounds,
                                  max_reversed=config.max_reversed, always=config.always,
                                  start=task.rubric if config.start == "own" else None): task
                   for task in tasks if decisions.missing(task)}
        for future in tqdm(as_completed(futures), "refining", len(futures), disable=None):
            try:
                decisions.add(futures[future], *future.result())
            except ChatError as error:  # no first rubric, so there is nothing to keep
                decisions.errors[futures[future].id] = str(error)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for client in clients.values():
            client.close()
    lines = [{"prompt_id": task.id, "prompt": task.messages, "rubrics": decisions.of[task.id]["rubric"],
              "example_tags": list(task.tags)} for task in tasks if task.id in decisions.of]
    write_whole(folder / "tasks.jsonl", as_lines(lines))
    return tasks, decisions, {server: client.counts for server, client in clients.items()}


def main(config):
    """Refine and print what came out. Returns the exit status: 1 where a prompt is not done."""
    tasks, decisions, usage = refine(config)
    done = [decisions.of[task.id] for task in tasks if task.id in decisions.of]
    rounds = [entry for record in done for entry in record["rounds"]]
    first, last = (sum(len(record[key]) for record in done) / max(len(done), 1) for key in ("begun_with", "rubric"))
    print(f"{len(done)} rubrics: {first:.1f} criteria at first, {last:.1f} now")
    print(f"{len(rounds)} refinements, {sum(entry['kept'] for entry in rounds)} kept")
    whys = [f"not kept: {entry['why']}" for entry in rounds if not entry["kept"]]
    for why, count in Counter(whys + [f"stopped: {record['stopped']}" for record in done]).most_common():
        print(f"  {count} {why}")
    for server, counts in usage.items():
        print(f"{server}: {counts['calls']} calls ({counts['failures']} failed), {counts['prompt_tokens']:,} + "
              f"{counts['completion_tokens']:,} tokens")
    print(f"{config.output}/: tasks.jsonl for ruscarl.py --tasks, progress.jsonl with every decision")
    if missing := [why for task in tasks if (why := decisions.missing(task))]:
        say(f"{len(missing)} prompts are not done; the same command continues with them. The last reason: {missing[-1]}")
    return 1 if missing else 0


if __name__ == "__main__":
    run_command("refine.py", lambda: main(parse_command_line()))
