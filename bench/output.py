"""The folder of a bench script: rows that the next start goes on from, and a report with a part written by hand."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from plumbing.files import JsonLines

READING = "## Reading"  # what stands below this line of a report was written by hand, and stays


def earlier(parser, folder, name):
    """(path of the file `name` in `folder`, which is made; its rows so far); (None, []) where no folder is given.

    A mistake ends the command as one of `parser`'s."""
    if not folder:
        return None, []
    path = Path(folder, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path, JsonLines(path).rows
    except OSError as error:
        parser.error(f"--output {folder}: cannot write there ({error.strerror})")
    except ValueError as error:
        parser.error(str(error))


def write(path, lines):
    """Write a report; the reading below its line READING is kept."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    reading = "\n" + old[old.index(READING) :] if READING in old else ""
    path.write_text("\n".join(lines) + "\n" + reading, encoding="utf-8")
