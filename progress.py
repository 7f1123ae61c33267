"""What refine.py keeps of its prompts, and what it tells in the end."""

import json
from collections import Counter

from plumbing.prepare import say
from plumbing.runs import whole_lines, write_whole
from refine_config import price
from tasks import read_jsonl


def unfinished(record):
    """Why a prompt's rubric could become better on another start: servers failed. None where they did not."""
    unknown = f"{record['unknown']} of {record['verdicts']} verdicts could not be had" if record["unknown"] else None
    return record["failure"] or unknown


def how_far(record):
    """What compares two records of a prompt: servers may have failed one of them more than the other."""
    kept = sum(entry["kept"] for entry in record["rounds"])
    return record["responses"], record["failure"] is None, -record["unknown"], kept


class Progress:
    """progress.jsonl in `folder`, a line a prompt (where an id stands twice, the later one counts), and usage.json, what the
    servers were asked in all starts together.

    records: {prompt_id: {prompt_id, rubric, responses (their number), begun_with, rounds, stopped, verdicts, unknown,
    failure}}. clients: {server: ChatClient}. A last line that a kill has torn is removed. Raises ValueError for another that
    cannot be read.
    """

    def __init__(self, folder, clients):
        self.path, self.usage_path, self.clients = folder / "progress.jsonl", folder / "usage.json", clients
        self.records, self.before = {}, {}
        whole_lines(self.path)
        for place, record in read_jsonl(self.path) if self.path.exists() else ():
            if isinstance(record, dict):
                record.setdefault("responses", 0)  # not known of older ones, which are made again
            keys = {"prompt_id", "rubric", "responses", "begun_with", "rounds", "stopped", "verdicts", "unknown", "failure"}
            if not isinstance(record, dict) or set(record) != keys or not isinstance(record["prompt_id"], str):
                raise ValueError(f"{place}: not a refined prompt")
            self.records[record["prompt_id"]] = record
        if self.usage_path.exists():
            try:
                self.before = {name: Counter(counts) for name, counts in json.loads(self.usage_path.read_text()).items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{self.usage_path}: unreadable: {error}") from None

    def done(self, task, texts):
        """Whether nothing is left to ask for a task with these responses."""
        record = self.records.get(task.id)
        return record is not None and record["responses"] == len(texts) and unfinished(record) is None

    def add(self, task, texts, rubric, log):
        """Write a prompt down, unless what an earlier start made of it, from as many responses, is better."""
        log = {**log, "begun_with": as_records(log["begun_with"])}
        record = {"prompt_id": task.id, "rubric": as_records(rubric), "responses": len(texts), **log}
        if how_far(record) >= how_far(self.records.get(task.id, record)):
            self.records[task.id] = record
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        write_whole(self.usage_path, json.dumps(self.usage(), indent=1) + "\n")

    def usage(self):
        """{server: counts}, of all starts."""
        now = {name: Counter(client.usage()) for name, client in self.clients.items()}
        return {name: dict(self.before.get(name, Counter()) + now.get(name, Counter())) for name in self.before | now}

    def close(self):
        """Write down the usage, give up what still waits to be sent."""
        write_whole(self.usage_path, json.dumps(self.usage(), indent=1) + "\n")
        for client in self.clients.values():
            client.close()


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
        say(f"{len(failed)} prompts are not done; the same command goes on with them. The last reason: "
            f"{list(failed.values())[-1]}")
    print(f"{config.output}/: tasks.jsonl for ruscarl.py --tasks, progress.jsonl with every decision")
