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
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import combinations

from tqdm import tqdm

from judge import score
from plumbing.chat import ChatClient, ChatError
from plumbing.prepare import first_unruled
from plumbing.runs import claim, write_whole
from progress import Progress, report, unfinished
from refine_config import MAY_CHANGE, SHARED, Refinement, extra
from responses import Responses, gather, open_sources, read_responses
from sampler import address_seed
from tail import tail_kl as tail_kl
from tail import tail_win_rate as tail_win_rate
from tasks import load_tasks
from tools.proposer import ChatProposer, RuleProposer, Verifier, rule_library

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
    proposer's). Returns (rubric, log): begun_with, rounds (a dict each: pair, scores, tied, kept, why), stopped, verdicts,
    unknown (how many of them), failure (why the proposer could not be asked, or None). Raises ChatError where not even a
    first rubric could be had.

    Stops where the two best of the responses not used yet are told apart already (unless `always`), after PATIENCE
    refinements in a row that were not kept, when fewer than two responses with a score are left, or when the proposer fails.
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
            better_rubric, why = refinement(pool, rubric, pair, proposer, max_reversed)
        except ChatError as error:  # the rubric stays
            stopped, failure = "the proposer failed", str(error)
            break
        log.append({"pair": pair, "scores": [scores[i] for i in pair], "tied": tied, "kept": why is None, "why": why})
        rubric = better_rubric if why is None else rubric
        unused -= set(pair)
        if len(log) >= PATIENCE and not any(entry["kept"] for entry in log[-PATIENCE:]):
            stopped = "nothing improves"
            break
    unknown = sum(verdict is None for verdicts in pool.known.values() for verdict in verdicts)
    return rubric, {"begun_with": begun_with, "rounds": log, "stopped": stopped, "unknown": unknown,
                    "verdicts": sum(map(len, pool.known.values())), "failure": failure}


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
    """(the proposer's new rubric, None), or (that rubric, why it is not kept). Raises ChatError where none came."""
    texts, verdicts = [pool.texts[i] for i in pair], pool.verdicts(rubric)
    new, better = proposer.refine(pool.task, rubric, texts, [verdicts[i] for i in pair])
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
                        key_variable=f"{name.upper()}_API_KEY", concurrency=config.judge_concurrency,
                        extra=extra(config, name))
    try:
        client.check(hint=f"--{name}-model")
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--{name}-url: {error}") from None
    return client


def refine(config):
    """Refine every prompt that --output does not have yet, write tasks.jsonl.

    Returns (records of those that have a rubric, {prompt id: why} of those that are not done, {server: counts}).
    Raises ValueError or OSError for a mistake of the user's, in one line.
    """
    everything = load_tasks(config.tasks, need_rubrics=config.start == "own" or config.proposer == "rules")
    tasks = everything[: config.limit or None]
    given = read_responses(Path(config.responses), everything, tasks) if config.responses else None
    if config.proposer == "rules" and config.start == "own" and not config.verifier_url and (task := first_unruled(tasks)):
        raise ValueError(f"task {task.id} has a criterion without a rule: give --verifier-url")
    clients = {name: connect(config, name) for name in ("proposer", "verifier") if getattr(config, f"{name}_url")}
    sources = open_sources(config, tasks) if given is None else {}
    settings = {name: getattr(config, name) for name in (*SHARED, *Refinement.__annotations__) if name not in MAY_CHANGE}
    settings |= {f"{name}_model": client.model for name, client in clients.items()}
    output = Path(config.output)
    claim(output, {**settings, "hash of the prompts": hashlib.sha256(repr((everything, given)).encode()).hexdigest()},
          "progress.jsonl")
    progress = Progress(output, clients | {name: one for name, one in sources.items() if isinstance(one, ChatClient)})
    lacking = {}
    try:
        if given is None:
            kept = Responses(output)
            gather(config, tasks, sources, kept)
            given = {task.id: kept.of(task) for task in tasks}
            lacking = {task.id: f"{n} responses could not be had" for task in tasks
                       if (n := sum(config.samples - len(kept.texts[source, task.id]) for source in sources))}
        work = [(task, given[task.id]) for task in tasks if not progress.done(task, given[task.id])]
        failed = lacking | refine_all(config, work, clients, rule_library(everything), progress)
    finally:
        progress.close()
    records = [progress.records[task.id] for task in tasks if task.id in progress.records]
    failed |= {record["prompt_id"]: why for record in records if (why := unfinished(record))}
    by_id = {task.id: task for task in tasks}
    lines = [{"prompt_id": record["prompt_id"], "prompt": by_id[record["prompt_id"]].messages, "rubrics": record["rubric"],
              "example_tags": list(by_id[record["prompt_id"]].tags)} for record in records]
    write_whole(output / "tasks.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return records, failed, progress.usage()


def refine_all(config, work, clients, library, progress):
    """refine_task for each (task, texts) of `work`, many at a time, each written down as it is done.

    Returns {prompt id: why} of those that have no rubric.
    """
    proposer = RuleProposer(library) if config.proposer == "rules" else ChatProposer(clients["proposer"])
    verifier = Verifier(clients.get("verifier") or clients.get("proposer"), config.one_by_one)
    texts_of = {task.id: texts for task, texts in work}
    failed = {task.id: "fewer than two different responses came" for task, texts in work if len(texts) < 2}

    def one(task, texts):
        rng = random.Random(address_seed(config.seed, "refine", task.id))
        return refine_task(task, texts, proposer, verifier, rng, rounds=config.rounds, always=config.always,
                           max_reversed=config.max_reversed, start=task.rubric if config.start == "own" else None)

    threads = ThreadPoolExecutor(config.judge_concurrency)
    try:
        futures = {threads.submit(one, task, texts): task for task, texts in work if task.id not in failed}
        for future in tqdm(as_completed(futures), "refining", len(futures), disable=None):
            task = futures[future]
            try:
                progress.add(task, texts_of[task.id], *future.result())
            except ChatError as error:
                failed[task.id] = str(error)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    return failed


def main(config):
    """Refine and report. Returns the exit status: 2 for a mistake of the user's, 1 where a prompt is not done."""
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


