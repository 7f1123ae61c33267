"""Tasks: a question and its rubric, and where they come from.

A rubric is a checklist: criteria with points, negative points for what a response should not do. Sources:

    first_aid             bundled, 80 everyday health questions; code finds the advice that is wanted
    healthbench           OpenAI's HealthBench, downloaded once and kept in the cache
    some/file.jsonl       HealthBench's record format: prompt, prompt_id, rubrics [{criterion, points, tags}], example_tags
    some/file.parquet     the official RuscaRL (verl) format: prompt, reward_model.rubrics

A defect of a file is a ValueError that names file, line (row) and field; no record is dropped silently.
"""

import codecs
import hashlib
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from plumbing.config import cache_dir
from plumbing.fetch import BadAnswer, fetch
from plumbing.rules import rule_from_tags, shown
from plumbing.runs import parse_json

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
        if path.suffix.lower() not in (".jsonl", ".parquet"):
            bundled = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.jsonl")))
            raise ValueError(f"unknown tasks {str(source)!r}: give {bundled}, healthbench, or a .jsonl or .parquet file")
        if not path.is_file():
            raise FileNotFoundError(f"{'not a file' if path.exists() else 'no such task file'}: {source}")
    records = _read_parquet(path) if path.suffix.lower() == ".parquet" else read_jsonl(path)
    tasks, seen = [], {}
    for place, record in itertools.islice(records, limit):
        tasks.append(task := _parse_task(record, place, need_rubrics))
        if task.id in seen:
            raise ValueError(f"{place}: prompt_id: {task.id!r} was already used at {seen[task.id]}")
        seen[task.id] = place
    if not tasks:
        raise ValueError(f"{path}: no tasks in it")
    return tasks


def split_tasks(tasks, held_out):
    """(train, held out): the `held_out` tasks whose hashed ids come first, whatever their order in the file.

    Raises ValueError when nothing would be left to train on.
    """
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
            why = error if isinstance(error, BadAnswer) else type(error).__name__
            raise ConnectionError(f"could not download HealthBench ({why}); offline, pass a copy of the file as --tasks "
                                  f"FILE.jsonl, or put it at {path}") from None
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


def _read_parquet(path):
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ValueError(f"{path}: unreadable parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        if not isinstance(row.get("reward_model"), dict):
            raise ValueError(f"{place}: reward_model: missing")
        info = row.get("extra_info") if isinstance(row.get("extra_info"), dict) else {}
        yield place, {**row, "prompt_id": row.get("prompt_id") or info.get("prompt_id"),
                      "rubrics": row["reward_model"].get("rubrics")}


def _parse_task(record, place, need_rubrics):
    """A Task from a record in HealthBench's format; ValueError names the place and the field."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a record must be a JSON object")
    messages = _parse_messages(record.get("prompt"), place)
    rubrics = record.get("rubrics") or []
    if not isinstance(rubrics, list) or (need_rubrics and not rubrics):
        raise ValueError(f"{place}: rubrics: missing or empty")
    rubric = tuple(_parse_criterion(c, f"{place}: rubrics[{i}]") for i, c in enumerate(rubrics))
    if rubric and not any(criterion.points > 0 for criterion in rubric):
        raise ValueError(f"{place}: rubrics: no criterion has positive points, so no score is defined")
    identity = record.get("prompt_id")
    if identity is None:  # the official parquet files have none: the conversation and its rubric are its name
        identity = hashlib.sha256(json.dumps([messages, rubrics], sort_keys=True, default=str).encode()).hexdigest()[:16]
    _check_text(identity, f"{place}: prompt_id")
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in identity):  # it is shown in messages
        raise ValueError(f"{place}: prompt_id: must not have control characters, got {shown(identity)}")
    return Task(identity, messages, rubric, _parse_tags(record.get("example_tags"), f"{place}: example_tags"))


def _parse_messages(messages, place):
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: prompt: must be a list of at least one message{got(messages)}")
    for i, message in enumerate(messages):
        field = f"{place}: prompt[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{field}.role: must be system, user or assistant")
        _check_text(message.get("content"), f"{field}.content")
        if message["role"] == "system" and i > 0:
            raise ValueError(f"{field}.role: a system message must come first")
    if messages[-1]["role"] != "user":
        raise ValueError(f"{place}: prompt: the last message is from the {messages[-1]['role']}, not from the user")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _parse_criterion(record, field):
    if not isinstance(record, dict):
        raise ValueError(f"{field}: a criterion must be a JSON object")
    text, points = record.get("criterion"), record.get("points")
    _check_text(text, f"{field}.criterion")
    if isinstance(points, bool) or not isinstance(points, int | float) or not 0 < abs(points) <= 1e6:
        raise ValueError(f"{field}.points: must be a number up to a million and not 0{got(points)}")
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
    if not isinstance(tags, list):
        raise ValueError(f"{field}: must be a list of strings, got {shown(tags)}")
    for i, tag in enumerate(tags):
        _check_text(tag, f"{field}[{i}]", may_be_empty=True)
    return tuple(tags)
