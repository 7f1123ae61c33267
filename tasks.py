"""Tasks: a question and its rubric, and where they come from.

A rubric is a checklist: criteria with points, negative points for what a response should not do. Sources:

    first_aid             bundled, 80 everyday health questions; code finds the advice that is wanted
    healthbench           OpenAI's HealthBench, downloaded once and kept in the cache
    some/file             .jsonl, a record a line; .json, a list of records; .parquet, a record a row

A record has HealthBench's fields: prompt, prompt_id, rubrics [{criterion, points, tags}], example_tags. In place of these,
what other publishers write is read:

    prompt                a text, which the user says; question (RaR), conversation.messages (HealthBench Professional)
    prompt_id             id, extra_info.prompt_id; without any, a hash of conversation and rubric
    rubrics               reward_model.rubrics (official RuscaRL, RubricHub), rubric (RaR), criteria (Chasing the Tail),
                          rubric_items (HealthBench Professional)
    criterion             description (RaR), criterion_text (HealthBench Professional)
    points                weight (RaR, Chasing the Tail)
    tags                  an object (RubricHub): each key and value is a tag key:value, empty ones are left out

A criterion's title (RaR) and local_id (Chasing the Tail) are not read. Any other field of a criterion is a defect: it may be
a misspelt one. A defect of a file is a ValueError that names file, line (row, record) and field; no record is dropped
silently.
"""

import codecs
import hashlib
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from plumbing.config import cache_dir
from plumbing.fetch import BadAnswer, fetch, why_failed
from plumbing.files import parse_json
from plumbing.rules import rule_from_tags, shown
from plumbing.terminal import say

# The names of a field, the first one HealthBench's; a record has one of them.
PROMPT = ("prompt", "question", "conversation", "conversation.messages")
IDENTITY = ("prompt_id", "id", "extra_info.prompt_id")
RUBRICS = ("rubrics", "reward_model.rubrics", "rubric", "criteria", "rubric_items")
CRITERION, POINTS = ("criterion", "description", "criterion_text"), ("points", "weight")
CRITERION_FIELDS = (*CRITERION, *POINTS, "tags", "title", "local_id")

BUNDLED = Path(__file__).parent / "rubrics"
HEALTHBENCH_URL = "https://openaipublic.blob.core.windows.net/simple-evals/healthbench/2025-05-07-06-14-12_oss_eval.jsonl"
HEALTHBENCH_SHA256 = "e99dd3c6372c10d6fcc5e385c5fae69d0dd40392dae56836ef9493ae324ecd2f"


@dataclass(frozen=True)
class Criterion:
    """One line of a rubric. points: positive for what is wanted, negative for what is not, never 0."""

    text: str
    points: float
    tags: tuple = ()


@dataclass(frozen=True)
class Task:
    """A conversation that ends with the user's turn, and the rubric its answer is judged by."""

    id: str
    messages: list  # [{"role": "system" | "user" | "assistant", "content": str}]
    rubric: tuple  # of Criterion
    tags: tuple = ()


def load_tasks(source, limit=None, need_rubrics=True):
    """The first `limit` tasks of `source` (see the module's docstring). need_rubrics: whether a record must have rubrics.

    Raises ValueError for a defective file, FileNotFoundError for a missing one, ConnectionError for a failed download.
    """
    path = _download_healthbench() if source == "healthbench" else BUNDLED / f"{source}.jsonl"
    if not path.is_file():
        path = Path(source)
        if path.suffix.lower() not in READERS and not path.is_dir():
            bundled = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.jsonl")))
            raise ValueError(f"unknown tasks {str(source)!r}: give {bundled}, healthbench, or a {', '.join(READERS)} file")
        if not path.is_file():
            raise FileNotFoundError(f"{'tasks: a folder, not a file' if path.is_dir() else 'no such task file'}: {source}")
    tasks, places, repeated = {}, {}, 0
    for place, record in itertools.islice(READERS[path.suffix.lower()](path), limit):
        task = _parse_task(record, place, need_rubrics)
        if tasks.setdefault(task.id, task) != task:
            raise ValueError(f"{place}: prompt_id: {task.id!r} was already used at {places[task.id]}")
        repeated += task.id in places
        places.setdefault(task.id, place)
    if not tasks:
        raise ValueError(f"{path}: no tasks in it")
    if repeated:  # one of the two could be trained on and the other held out
        say(f"{path}: left out: {repeated} of {repeated + len(tasks)} records, which repeat an earlier one in everything")
    return list(tasks.values())


def split_tasks(tasks, held_out):
    """(train, held out): the `held_out` tasks whose hashed ids come first, whatever their order in the file.

    Raises ValueError when nothing would be left to train on.
    """
    if len(tasks) < 2:
        raise ValueError("one task alone cannot be held out and trained on: give at least two")
    if held_out >= len(tasks):
        raise ValueError(f"cannot hold out {held_out} of {len(tasks)} tasks and train on the rest: lower --held-out "
                         "(the paper's settings, which --model brings, hold out 500; --preset laptop 16)")
    order = sorted(tasks, key=lambda task: hashlib.sha256(task.id.encode()).hexdigest())
    chosen = {task.id for task in order[:held_out]}
    return [t for t in tasks if t.id not in chosen], [t for t in tasks if t.id in chosen]


def digest(tasks):
    """SHA-256 of tasks: what a run or an evaluation was made with."""
    return hashlib.sha256(repr(tasks).encode()).hexdigest()


def _download_healthbench(url=HEALTHBENCH_URL, sha256=HEALTHBENCH_SHA256, seconds=1800, most=100_000_000):
    path = cache_dir() / "healthbench.jsonl"
    if not path.is_file():
        try:
            answer = fetch(url, seconds, most)
            if answer.status_code != 200:
                raise BadAnswer(f"HTTP {answer.status_code}")
        except (OSError, BadAnswer) as error:
            raise ConnectionError(f"could not download HealthBench ({why_failed(error)}); offline, pass a copy of the file "
                                  f"as --tasks FILE.jsonl, or put it at {path}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        part.write_bytes(answer.content)
        part.replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: SHA-256 is {found}, expected {sha256}: delete the file to download it again")
    return path


def read_jsonl(path):
    """(place, record) of every line that is not blank. Raises ValueError with file and line for what is not JSON."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() not in (b"", codecs.BOM_UTF8):
                    record = parse_json(line, early="it ends too early; a record has to be on one line")
                    yield f"{path}, line {number}", record
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _read_json(path):
    try:
        records = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a JSON list of records{got(records)}")
    yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))


def _read_parquet(path):
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())  # few at a time
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ValueError(f"{path}: unreadable parquet file: {str(error).splitlines()[0]}") from None


READERS = {".jsonl": read_jsonl, ".json": _read_json, ".parquet": _read_parquet}  # of each: (place, record) of every record


def _field(record, names, place):
    """(name, value) of the one of `names` that `record` has, of the first one where it has none: None is no value."""
    found = [name for name in names if record.get(name) is not None] or names[:1]
    if len(found) > 1:
        raise ValueError(f"{place}: {' and '.join(found)} are names of one field, give one of them")
    return found[0], record.get(found[0])


def _parse_task(record, place, need_rubrics):
    """A Task from a record as described above; ValueError names the place and the field."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a record must be a JSON object")
    for outer in ("reward_model", "extra_info", "conversation"):
        if isinstance(record.get(outer), dict):
            record = {**record, outer: None, **{f"{outer}.{name}": value for name, value in record[outer].items()}}
    there = ", ".join(shown(key) for key in list(record)[:8])
    name, messages = _field(record, PROMPT, place)
    if messages is None:
        raise ValueError(f"{place}: {name}: missing (the record has {there})")
    messages = _parse_messages(messages, f"{place}: {name}")
    name, rubrics = _field(record, RUBRICS, place)
    if not isinstance(rubrics, list | None) or (need_rubrics and not rubrics):
        raise ValueError(f"{place}: {name}: " + (f"must be a list{got(rubrics)}" if rubrics else
                                                 f"missing or empty (the record has {there})"))
    rubric = tuple(_parse_criterion(c, f"{place}: {name}[{i}]") for i, c in enumerate(rubrics or []))
    if rubric and not any(criterion.points > 0 for criterion in rubric):
        raise ValueError(f"{place}: {name}: no criterion has positive points, so no score is defined")
    name, identity = next(((n, record[n]) for n in IDENTITY if record.get(n) not in (None, "")), ("prompt_id", None))
    if identity is None:
        identity = hashlib.sha256(json.dumps([messages, rubrics], sort_keys=True, default=str).encode()).hexdigest()[:16]
    _check_text(identity, f"{place}: {name}")
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in identity):  # it is shown in messages
        raise ValueError(f"{place}: {name}: must not have control characters, got {shown(identity)}")
    return Task(identity, messages, rubric, _parse_tags(record.get("example_tags"), f"{place}: example_tags"))


def _parse_messages(messages, place):
    if isinstance(messages, str):
        _check_text(messages, place)
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: must be a text or a list of at least one message{got(messages)}")
    for i, message in enumerate(messages):
        field = f"{place}[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{field}.role: must be system, user or assistant")
        _check_text(message.get("content"), f"{field}.content")
        if message["role"] == "system" and i > 0:
            raise ValueError(f"{field}.role: a system message must come first")
    if messages[-1]["role"] != "user":
        raise ValueError(f"{place}: the last message is from the {messages[-1]['role']}, not from the user")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _parse_criterion(record, field):
    if not isinstance(record, dict):
        raise ValueError(f"{field}: a criterion must be a JSON object")
    if unknown := [name for name, value in record.items() if name not in CRITERION_FIELDS and value is not None]:
        raise ValueError(f"{field}: unknown field {shown(unknown[0])} (known: {', '.join(CRITERION_FIELDS)})")
    name, text = _field(record, CRITERION, field)
    _check_text(text, f"{field}.{name}")
    name, points = _field(record, POINTS, field)
    if isinstance(points, bool) or not isinstance(points, int | float) or not 0 < abs(points) <= 1e6:
        raise ValueError(f"{field}.{name}: must be a number up to a million and not 0{got(points)}")
    tags = _parse_tags(record.get("tags"), f"{field}.tags")
    try:
        rule_from_tags(tags)
    except ValueError as error:
        raise ValueError(f"{field}.tags: {error}") from None
    return Criterion(text, points, tags)


def got(value):
    """The end of an error message about a field of a record."""
    return ", but is missing" if value is None else f", got {shown(value)}"


def _check_text(text, field, may_be_empty=False):
    if not isinstance(text, str) or not (text.strip() or may_be_empty):
        raise ValueError(f"{field}: must be a non-empty string{got(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field}: half a surrogate pair is not text") from None


def _parse_tags(tags, field):
    tags = [] if tags is None else tags
    if isinstance(tags, dict):  # parquet gives every object the fields of all, so that those it lacks are None
        known = {key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
                 for key, value in tags.items()}
        tags = [f"{key}:{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}"
                for key, value in known.items() if value not in (None, "", {}, [])]
    if not isinstance(tags, list):
        raise ValueError(f"{field}: must be a list of strings or an object, got {shown(tags)}")
    for i, tag in enumerate(tags):
        _check_text(tag, f"{field}[{i}]", may_be_empty=True)
    return tuple(tags)
