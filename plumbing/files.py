"""Files that a process may leave half written and another one reads: JSON, JSON lines, whole files, whole folders, locks."""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from plumbing.rules import unique_keys
from plumbing.terminal import one_line, say

_locks = {}  # {folder: its lock, open}: held until this process ends, however it ends


def read_object(place, text=None, check=lambda found: None):
    """The JSON object in the bytes `text`, or else in the file `place`, as a dict. Raises ValueError, which names the place,
    for anything else and for what `check` refuses."""
    try:
        found = parse_json(place.read_bytes() if text is None else text)
        if not isinstance(found, dict):
            raise ValueError("must be a JSON object")
        check(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{place}: {error.args[0]}: missing") from None
    return found


def parse_json(content, early="it ends too early"):
    """What is in `content`, bytes of JSON. Raises ValueError, in one line, for anything else; a key may not stand twice.
    early: what is said of JSON that breaks off."""
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()):
            why = early
        else:
            why = f"{error.msg} at {f'line {error.lineno}, ' if error.lineno > 1 else ''}column {error.colno}"
        raise ValueError(f"unreadable JSON: {why}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"unreadable JSON: {error}") from None


def write_whole(path, text):
    """Write beside `path` and rename: a kill in between leaves the old file whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextlib.contextmanager
def new_folder(folder):
    """Write in the folder that this yields, which takes the place of `folder` at the end. Raises OSError, in one line."""
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot save {folder}: {one_line(str(error))}") from None
    shutil.rmtree(folder, ignore_errors=True)  # that of a run which is continued after its end
    part.rename(folder)


class JsonLines:
    """A file of JSON objects, one a line, that is read when it is opened and then only appended to.

    rows: the records. check: a function that raises ValueError for a record that does not belong there. Opening repairs a
    last line that a kill cut off, and says so. Raises ValueError, with file and line, for any other line that is no record.
    """

    def __init__(self, path, check=lambda record: None):
        self.path = Path(path)
        self.rows = read_lines(self.path, check, self._mend)

    def _mend(self, content, begin):
        try:
            json.loads(content[begin:])
            with open(self.path, "ab") as file:  # the line lacks only its line break
                file.write(b"\n")
            return content
        except ValueError:
            os.truncate(self.path, begin)
            say(f"{self.path}: its last line was cut off, and is removed")
            return content[:begin]

    def append(self, records):
        """Add records to the end of the file."""
        self.rows += records
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(as_lines(records))


def read_lines(path, check=lambda record: None, mend=None):
    """The objects of a JSON-lines file that a process may be writing: a last one that is not whole yet is left out, or goes
    through `mend`. Raises ValueError, with file and line, for anything else and for what `check` refuses."""
    content = path.read_bytes() if path.exists() else b""
    begin = content.rfind(b"\n") + 1
    if content[begin:].startswith(b"{"):  # else nothing, or no record, which is refused below
        if mend is None:
            say(f"{path}: its last line is not whole, and is left out")
        content = mend(content, begin) if mend else content[:begin]
    return [read_object(f"{path}, line {number}", line, check) for number, line in enumerate(content.splitlines(), 1)]


def check_kinds(record, **kinds):
    """Raise ValueError, which names the field, where a field of `record` is not of the type that `kinds` has for it."""
    for name, kind in kinds.items():
        if type(record[name]) is not kind:
            raise ValueError(f"{name}: must be {kind.__name__}, got {str(record[name])[:40]!r}")


def as_lines(records):
    """The text of a JSON-lines file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def claim(folder, settings, kept):
    """Add `settings` to settings.json in `folder`, made if need be: the file there named `kept` was made with these. Raises
    ValueError where settings.json says something else or is missing."""
    path = folder / "settings.json"
    saved = read_object(path) if path.exists() else {}
    if not saved and (folder / kept).exists():
        raise ValueError(f"--output {folder}: there is a {kept} without its settings.json")
    for name, value in settings.items():
        if saved.get(name, value) != value:
            label = name if " " in name else "--" + name.replace("_", "-")
            raise ValueError(f"--output {folder} was made with another {label}: {saved[name]!r} there, {value!r} now; "
                             "give another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**saved, **settings}, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot write there ({error.strerror})") from None


def lock(folder):
    """Make this process the only one that writes in `folder`. Raises ValueError where another one is."""
    if folder.resolve() in _locks:
        return
    file = open(folder / "lock", "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is at work on this run: end it first, or wait for it") from None
    except OSError:
        say(f"{folder}: this file system has no locks, so that a second process here would not be noticed")
    _locks[folder.resolve()] = file
