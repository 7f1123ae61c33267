"""Chasing the Tail (arXiv 2509.21500): rubrics that tell great responses from merely good ones.

For each prompt: a proposer writes a rubric from the prompt alone, a verifier checks all responses against it, and the
two best responses go back to the proposer, which rewrites the rubric so that it tells them apart; then the next two.

    python refine.py prompts.jsonl --sample-from smollm2 --proposer-url URL     -> refined/prompts/tasks.jsonl
    python ruscarl.py --tasks refined/prompts/tasks.jsonl

--output keeps the responses and, prompt by prompt, what was decided and why: the same command, given again, goes on.
"""

import os
import sys
from pathlib import Path

from refine_config import parse_command_line

if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    COMMAND_LINE = parse_command_line()

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on cores that others could use
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import hashlib
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import combinations

from tqdm import tqdm

from chat import ChatClient, ChatError
from judge import score
from prepare import first_unruled, say
from proposer import ChatProposer, RuleProposer, Verifier, rule_library
from refine_config import MAY_CHANGE, SHARED, Refinement, price
from responses import Responses, gather, read_responses
from runs import claim, whole_lines
from sampler import address_seed
from tail import tail_kl as tail_kl
from tail import tail_win_rate as tail_win_rate
from tasks import load_tasks, read_jsonl

PATIENCE = 2  # refinements in a row that are not kept before a rubric is left as it is


class Pool:
    """The responses to one task and what the verifier said of them. Every criterion is asked once, whatever its weight."""

    def __init__(self, task, texts, verifier):
        self.task, self.texts, self.verifier = task, texts, verifier
        self.known = {}  # {(text, tags) of a criterion: verdicts, one a response}

    def verdicts(self, rubric):
        """[texts][criteria]"""
        new = [c for c in rubric if (c.text, c.tags) not in self.known]
        if new:
            found = self.verifier.verify(self.task, new, self.texts)
            self.known.update(((c.text, c.tags), verdicts) for c, verdicts in zip(new, zip(*found)))
        return [[self.known[c.text, c.tags][i] for c in rubric] for i in range(len(self.texts))]

    def scores(self, rubric):
        """One a text; None where a verdict is unknown."""
        return [score(rubric, verdicts) for verdicts in self.verdicts(rubric)]


def refine_task(task, texts, proposer, verifier, rng, *, rounds=4, max_reversed=0.2, always=False, start=None):
    """Write a rubric for `task` and refine it on the responses `texts`.

    rng: random.Random, for ties and for which of two responses is called A. start: rubric to begin with (default: the
    proposer's). Returns (rubric, log): begun_with, rounds (a dict each: pair, scores, tied, kept, why), stopped, unknown
    verdicts. Raises ChatError where not even a first rubric could be had.

    Stops where the two best of the responses not used yet are told apart already (unless `always`), after PATIENCE
    refinements in a row that were not kept, or when fewer than two responses with a score are left.
    """
    pool, unused, log = Pool(task, texts, verifier), set(range(len(texts))), []
    begun_with = rubric = tuple(start or proposer.propose(task))
    stopped = f"{rounds} rounds"
    for _ in range(rounds):
        scores = pool.scores(rubric)
        pair, tied = best_two(scores, unused, rng)
        if pair is None:
            stopped = "fewer than two responses with a score are left"
            break
        if scores[pair[0]] != scores[pair[1]] and not always:
            stopped = "the best are told apart"
            break
        rng.shuffle(pair)
        better_rubric, why = refinement(pool, rubric, pair, proposer, max_reversed)
        log.append({"pair": pair, "scores": [scores[i] for i in pair], "tied": tied, "kept": why is None, "why": why})
        rubric = better_rubric if why is None else rubric
        unused -= set(pair)
        if len(log) >= PATIENCE and not any(entry["kept"] for entry in log[-PATIENCE:]):
            stopped = "nothing improves"
            break
    unknown = sum(verdict is None for verdicts in pool.known.values() for verdict in verdicts)
    return rubric, {"begun_with": begun_with, "rounds": log, "stopped": stopped, "unknown": unknown,
                    "verdicts": sum(map(len, pool.known.values()))}


def best_two(scores, unused, rng):
    """([i, j] of the two best unused responses or None, number of responses that a draw had to choose from or 0)."""
    rest = [i for i in unused if scores[i] is not None]
    if len(rest) < 2:
        return None, 0
    rng.shuffle(rest)
    rest.sort(key=lambda i: -scores[i])  # stable: the shuffle decides among equals
    second = scores[rest[1]]
    tied = sum(scores[i] == second for i in rest)
    return rest[:2], tied if tied > 2 or (tied == 2 and scores[rest[0]] != second) else 0


def refinement(pool, rubric, pair, proposer, max_reversed):
    """(the proposer's new rubric, None), or (anything, why it is not kept)."""
    texts, verdicts = [pool.texts[i] for i in pair], pool.verdicts(rubric)
    try:
        new, better = proposer.refine(pool.task, rubric, texts, [verdicts[i] for i in pair])
    except ChatError as error:
        return None, f"no rubric came: {error}"
    if set(new) == set(rubric):
        return new, "nothing new"
    before, after = pool.scores(rubric), pool.scores(new)
    first, second = (after[i] for i in pair)
    if first is None or second is None:
        return new, "a verdict on the pair could not be had"
    if first == second:
        return new, "does not separate the pair"
    if better is not None and (first > second) != (better == 0):
        return new, "prefers the other one"
    share = reversed_share(before, after)
    return new, f"reverses {share:.0%} of the order" if share > max_reversed else None


def reversed_share(before, after):
    """Share of the pairs of responses told apart in `before` whose order is the opposite in `after`; 0 for no such pair.

    Two lists of scores; responses without a score in either are left out.
    """
    known = [(a, b) for a, b in zip(before, after) if a is not None and b is not None]
    signs = [(a - other) * (b - other_b) for (a, b), (other, other_b) in combinations(known, 2) if a != other]
    return sum(sign < 0 for sign in signs) / len(signs) if signs else 0.0


def connect(config, name):
    """A checked client of the proposer or verifier. Raises ValueError for a server that cannot be used."""
    client = ChatClient(getattr(config, f"{name}_url").split(","), getattr(config, f"{name}_model"), max_tokens=4096,
                        key_variable=f"{name.upper()}_API_KEY", concurrency=config.judge_concurrency)
    try:
        client.check()
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--{name}-url: {str(error).replace('--judge-', f'--{name}-')}") from None
    return client


def refine(config):
    """Refine every prompt that --output does not have yet, write tasks.jsonl.

    Returns (records of those that are done, {prompt id: why} of those that failed, {server: counts}).

    Raises ValueError or OSError for a mistake of the user's, in one line.
    """
    tasks = load_tasks(config.tasks, config.limit or None, need_rubrics=config.start == "own" or config.proposer == "rules")
    given = read_responses(Path(config.responses), tasks) if config.responses else None
    for task in tasks if given is not None else []:
        if len(given.get(task.id, [])) < 2:
            raise ValueError(f"{config.responses}: prompt_id {task.id} has fewer than two responses")
    ruled = config.proposer == "rules"
    if ruled and not config.verifier_url and config.start == "own" and (task := first_unruled(tasks)):
        raise ValueError(f"task {task.id} has a criterion without a rule: give --verifier-url")
    clients = {name: connect(config, name) for name in ("proposer", "verifier") if getattr(config, f"{name}_url")}
    names = [name for name in (*SHARED, *Refinement.__annotations__) if name not in MAY_CHANGE]
    output = Path(config.output)
    claim(output, {**{name: getattr(config, name) for name in names},
                   **{f"{name}_model": client.model for name, client in clients.items()},
                   "hash of the prompts": hashlib.sha256(repr((tasks, given)).encode()).hexdigest()}, "progress.jsonl")
    progress = Progress(output)
    proposer = RuleProposer(rule_library(tasks)) if ruled else ChatProposer(clients["proposer"])
    verifier = Verifier(clients.get("verifier") or clients.get("proposer"), config.one_by_one)
    missing, failed = [task for task in tasks if task.id not in progress.records], {}
    if missing and given is None:
        kept = Responses(output)
        clients |= gather(config, missing, kept)
        given = {task.id: kept.of(task) for task in missing}
        failed = {task.id: "fewer than two different responses came" for task in missing if len(given[task.id]) < 2}

    def work(task):
        rng = random.Random(address_seed(config.seed, "refine", task.id))
        return refine_task(task, given[task.id], proposer, verifier, rng, rounds=config.rounds, always=config.always,
                           max_reversed=config.max_reversed, start=task.rubric if config.start == "own" else None)

    threads = ThreadPoolExecutor(config.judge_concurrency)
    try:
        futures = {threads.submit(work, task): task for task in missing if task.id not in failed}
        for future in tqdm(as_completed(futures), "refining", len(futures), disable=None):
            task = futures[future]
            try:
                progress.add(task, *future.result(), clients)
            except ChatError as error:
                failed[task.id] = str(error)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for client in clients.values():
            client.close()
    done = [task for task in tasks if task.id in progress.records]
    records = [{"prompt_id": task.id, "prompt": task.messages, "rubrics": progress.records[task.id]["rubric"],
                "example_tags": list(task.tags)} for task in done]
    (output / "tasks.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
                                        encoding="utf-8")
    return [progress.records[task.id] for task in done], failed, progress.usage


class Progress:
    """progress.jsonl in `folder`, a line a prompt that is done, and usage.json, what the servers were asked so far.

    records: {prompt_id: {prompt_id, rubric, begun_with, rounds, stopped, unknown, verdicts}}; usage: {server: counts}.
    A last line that a kill has torn is removed. Raises ValueError for another that cannot be read.
    """

    def __init__(self, folder):
        self.path, self.usage_path, self.records, self.usage = folder / "progress.jsonl", folder / "usage.json", {}, {}
        whole_lines(self.path)
        for place, record in read_jsonl(self.path) if self.path.exists() else ():
            if not isinstance(record, dict) or not {"prompt_id", "rubric", "rounds"} <= set(record):
                raise ValueError(f"{place}: not a refined prompt")
            self.records[record["prompt_id"]] = record
        if self.usage_path.exists():
            try:
                self.usage = json.loads(self.usage_path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{self.usage_path}: unreadable JSON: {error}") from None
        self.before = {name: Counter(counts) for name, counts in self.usage.items()}

    def add(self, task, rubric, log, clients):
        """Write a prompt down."""
        log = {**log, "begun_with": as_records(log["begun_with"])}
        self.records[task.id] = record = {"prompt_id": task.id, "rubric": as_records(rubric), **log}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.usage |= {name: dict(self.before.get(name, Counter()) + client.counts) for name, client in clients.items()}
        self.usage_path.write_text(json.dumps(self.usage, indent=1) + "\n", encoding="utf-8")


def as_records(rubric):
    """A rubric in the format of task files."""
    return [{"criterion": c.text, "points": c.points, "tags": list(c.tags)} for c in rubric]


def report(config, done, failed, usage):
    """Print what came out and what it cost."""
    rounds = [entry for record in done for entry in record["rounds"]]
    if done:
        first, last = (sum(len(record[key]) for record in done) / len(done) for key in ("begun_with", "rubric"))
        print(f"{len(done)} rubrics: {first:.1f} criteria at first, {last:.1f} now")
    print(f"{len(rounds)} refinements, {sum(entry['kept'] for entry in rounds)} kept")
    for why, count in Counter(entry["why"] for entry in rounds if not entry["kept"]).most_common():
        print(f"  {count} not: {why}")
    print(f"{sum(entry['tied'] > 0 for entry in rounds)} of the pairs were drawn among equals")
    for stopped, count in Counter(record["stopped"] for record in done).most_common():
        print(f"  {count} stopped: {stopped}")
    unknown, verdicts = (sum(record[key] for record in done) for key in ("unknown", "verdicts"))
    print(f"{unknown} of {verdicts} verdicts unknown")
    for name, counts in usage.items():
        counts = Counter(counts)
        tokens = [counts["prompt_tokens"], counts["completion_tokens"]]
        rates = price(config, name) if name in ("proposer", "verifier") else None
        cost = f", ${sum(n * rate for n, rate in zip(tokens, rates)):.2f}" if rates else ""
        print(f"{name}: {counts['calls']} calls ({counts['tries'] - counts['calls']} repeated tries, {counts['failures']} "
              f"failed), {tokens[0]:,} + {tokens[1]:,} tokens{cost}")
    if failed:
        say(f"{len(failed)} prompts have no rubric; the same command asks again. The last error: "
            f"{list(failed.values())[-1]}")
    print(f"{config.output}/: tasks.jsonl for ruscarl.py --tasks, progress.jsonl with every decision")


def main(config):
    """Refine and report. Returns the exit status: 2 for a mistake of the user's, 1 where a prompt has no rubric."""
    try:
        done, failed, usage = refine(config)
    except (ValueError, OSError) as error:
        print(f"refine.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    report(config, done, failed, usage)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(COMMAND_LINE))
    except KeyboardInterrupt:
        print("refine.py: interrupted; the same command continues", file=sys.stderr, flush=True)
        os._exit(130)  # not sys.exit, which would wait for requests still under way


