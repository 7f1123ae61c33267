"""ruscarl.py with the scaffold message of the first version, for the recorded metrics of test_loop.py."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def scaffold_messages(messages, criteria):
    """A frozen copy: `criteria` in one system message."""
    if not criteria:
        return list(messages)
    wanted = [f"- {c.text}" for c in criteria if c.points > 0]
    unwanted = [f"- {c.text}" for c in criteria if c.points < 0]
    parts = []
    if wanted:
        parts.append("\n".join(["A good reply:", *wanted]))
    if unwanted:
        parts.append("\n".join(["A good reply is never like this:", *unwanted]))
    parts.append("Write a good reply to the user. Do not mention these notes.")
    system = "\n\n".join(parts)
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": messages[0]["content"] + "\n\n" + system}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import scaffold

    scaffold.scaffold_messages = scaffold_messages  # before the modules that import it
    runpy.run_path(str(ROOT / "ruscarl.py"), run_name="__main__")
