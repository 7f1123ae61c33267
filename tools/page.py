"""A run, or an evaluation, as one HTML file to look at: what was asked, shown, answered, judged and learned.

    python -m tools.page runs/NAME               writes runs/NAME/page.html; the run may be still going, or old
    python -m tools.page runs/A runs/B           both in one page: runs/A/page-B.html
    python -m tools.page evaluations/NAME        scores by tag, best of N, agreement of judges, and the responses

A run writes its page itself after each evaluation. The file needs no network and no server. Everything from models and
task files is in it as compressed base64 and is shown as text: page.html (markup, style, script) makes no HTML of it, and
the page's content security policy lets no other script run and nothing be loaded.

A page has at most 20 MB. Of a longer run it holds a share of the rollouts, spread over the training, and says which share.
"""

import base64
import hashlib
import itertools
import json
import math
import re
import zlib
from pathlib import Path

from plumbing import terminal
from plumbing.command_line import Parser
from plumbing.files import check_kinds, read_lines, read_object, write_whole
from plumbing.health import health_line
from plumbing.rules import recites
from plumbing.runs import read_groups, tally, training_health
from tasks import load_tasks

LIMIT = 20_000_000  # bytes of a page
INDEX = 2_000_000  # of these, for markup, curves and tables
LEAST = 200_000  # compressed bytes for the rollouts of a step where not all have room: about ten groups of long responses
ROWS = 1000  # of a table; points of a curve
ERRORS = {"step": {"reward/mean": "reward", "reward/unscaffolded": "plain", "scaffold/recited_plain": "recited"},
          "eval": {"eval/recited": "recited"}}  # {kind of file: {curve: its standard error in the file's tally}}


def write_page(folder):
    """Write the page of a run or an evaluation. It must not end what it shows: any error is one line."""
    try:
        page(Path(folder))
    except Exception as error:
        terminal.say(f"warning: {folder}: no page.html: {type(error).__name__}: {terminal.one_line(str(error))}")


def page(folder, other=None):
    """Write the page of `folder`, or of two runs; returns its path. Raises ValueError or OSError, in one line."""
    folders = [folder, other] if other else [folder]
    for each in folders:
        if not any((each / name).is_file() for name in ("config.json", "samples.jsonl")):
            raise ValueError(f"{each}: neither a run nor an evaluation: no config.json, no samples.jsonl")
        if other and not (each / "config.json").is_file():
            raise ValueError(f"{each}: is no run; two runs go in one page, an evaluation has a page of its own")
    read = run_part if (folder / "config.json").is_file() else evaluation_part
    room = (LIMIT - INDEX) * 3 // 4 // len(folders)  # base64 makes 4 bytes of 3
    path = folder / (f"page-{other.resolve().name}.html" if other else "page.html")
    write_whole(path, document([read(each, room) for each in folders]))
    return path


def document(parts):
    """The page's text. parts: of each run (what is drawn at once, [gzip of what is drawn on demand])."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    stored = {"index": zlib.compress(as_json([drawn for drawn, _ in parts]), 9, wbits=31)}
    stored |= {f"data-{i}-{j}": chunk for i, (_, chunks) in enumerate(parts) for j, chunk in enumerate(chunks)}
    blocks = {name: f'<script type="text/plain" id="{name}">{base64.b64encode(content).decode()}</script>\n'
              for name, content in stored.items()}
    head, body, end = re.split("<!-- index -->\n|<!-- data -->\n", template.replace("{policy}", policy))
    return "".join([head, blocks.pop("index"), body, *blocks.values(), end])


def as_json(value):
    """JSON that a browser reads. Raises ValueError for a number that is not finite."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def pack(groups, room):
    """(gzip of the first groups, a line of JSON each; their number; their rollouts): as many as fit in `room` bytes."""
    stream, packed, kept, rollouts = zlib.compressobj(wbits=31), [], 0, 0
    room -= 100  # for the end
    for group in groups:
        trial = stream.copy()
        more = trial.compress(as_json(group) + b"\n") + trial.flush(zlib.Z_SYNC_FLUSH)
        if (room := room - len(more)) < 0:
            break
        stream, kept, rollouts = trial, kept + 1, rollouts + len(group["samples"])
        packed.append(more)
    return b"".join([*packed, stream.flush()]), kept, rollouts


def shown_group(rollouts):
    """A group of a run as the page has it: the rubric once; a letter a criterion for shown and met (? unknown)."""
    first = rollouts[0]
    if any(len(r["criteria"]) != len(first["criteria"]) for r in rollouts):
        raise ValueError(f"task {first['task']}: the samples of a group have different rubrics")
    return {"task": first["task"], "question": str(first.get("question", "")),
            "rubric": [[c["criterion"], c.get("points")] for c in first["criteria"]],
            "samples": [{"text": r["response"], "reward": r.get("reward"), "advantage": r.get("advantage"),
                         "tokens": r.get("tokens"), "cut": r.get("finished") is False, "recited": bool(r.get("recited")),
                         "shown": "".join("01"[bool(c.get("shown"))] for c in r["criteria"]),
                         "met": "".join("?" if c["met"] is None else "01"[c["met"]] for c in r["criteria"])}
                        for r in rollouts]}


def of_kinds(**kinds):
    """A check for `read_lines`: the fields `kinds` of a record have these types, and its numbers are finite."""
    def check(record):
        check_kinds(record, **kinds)
        if wrong := [name for name, value in record.items() if type(value) is float and not math.isfinite(value)]:
            raise ValueError(f"{wrong[0]}: must be finite")

    return check


def run_part(folder, room):
    """(what the page of a run draws at once, its chunks: the rollouts of a step or an evaluation each)."""
    config, rows = read_object(folder / "config.json"), read_lines(folder / "metrics.jsonl", of_kinds(step=int))
    rows = [{name: value for name, value in row.items() if type(value) in (int, float)} for row in rows]
    files, total = [], 0  # (kind, label, path, groups in it)
    for row in rows:
        for kind, label in (("eval", f"held out, after {row['step']} steps"), ("step", f"step {row['step']}")):
            if (path := folder / "rollouts" / f"{kind}_{row['step']:05d}.jsonl").is_file():
                counted = tally(path)
                row |= {f"{curve}_se": counted[name] for curve, name in ERRORS[kind].items()}
                files.append((kind, label, path, counted["groups"]))
                total += counted["rollouts"]
    points = [row for i, row in enumerate(rows) if i % (len(rows) // ROWS + 1) == 0 or "eval/score" in row]
    found = choose(files, room)
    steps, kept = ({i for i in part if files[i][0] == "step"} for part in (range(len(files)), found))
    chunks = [{"kind": files[i][0], "label": files[i][1], "groups": groups, "of": files[i][3]}
              for i, (_, groups, _) in found.items()]
    return {"kind": "run", "name": folder.resolve().name, "chunks": chunks, "curves": points,
            "share": f"{sum(rollouts for *_, rollouts in found.values()):,} of {total:,} rollouts are in this page, from "
                     f"{len(kept)} of {len(steps)} steps.",
            "tables": [before_and_after(rows), health_table(training_health(folder, [row["step"] for row in rows])),
                       table("Settings", ["setting", "value"], config.items())]}, [chunk for chunk, *_ in found.values()]


def choose(files, room):
    """{index of a file: (chunk, groups, rollouts)} of what is kept of `files`: (kind, label, path, groups) each.

    First and last evaluation come first, with at most a quarter of the room each; then all files in an order that spreads
    over the training wherever it ends. Where the room is short a file gets LEAST, and the last ones get nothing.
    """
    evaluations = [i for i, (kind, *_) in enumerate(files) if kind == "eval"]
    ends = dict.fromkeys(evaluations[:1] + evaluations[-1:])
    order = list(ends | dict.fromkeys(sorted(range(len(files)), key=lambda i: f"{i:032b}"[::-1])))
    found = {}
    for turn, i in enumerate(order):
        quota = max(LEAST, room // 4 if i in ends and len(order) > 4 else room // (len(order) - turn))
        if quota <= room:
            chunk, groups, rollouts = pack(map(shown_group, read_groups(files[i][2])), quota)
            if groups:
                found[i], room = (chunk, groups, rollouts), room - len(chunk)
    return dict(sorted(found.items()))


def table(title, head, rows, note=""):
    """A table of the page, as text. A long cell is cut, and so is a long table, which says so."""
    note += f" The first {ROWS:,} of {len(rows):,} rows." if len(rows) > ROWS else ""
    cut = [[str(cell)[:300] for cell in row] for row in itertools.islice(rows, ROWS)]
    return {"title": title, "head": head, "note": note, "rows": cut}


def figure(value, error=None, form="{:+.3f}"):
    """A number, with its error where there is one, as text; a dash for what is not known."""
    text = "–" if value is None else form.format(value)
    return text if error is None else f"{text} ± {error:.3f}"


def before_and_after(rows):
    """The held-out figures of the first evaluation and the last four."""
    rows = [row for row in rows if "eval/score" in row]
    rows = [*rows[:1], *rows[1:][-4:]]
    shares = {"responses that recite the rubric": ("eval/recited", "{:.0%}"), "length, tokens": ("eval/length", "{:.0f}"),
              "criteria reached from nothing": ("eval/reached", "{}")}
    lines = [["score", *(figure(row["eval/score"], row.get("eval/score_se")) for row in rows)],
             *([label, *(figure(row.get(name), form=form) for row in rows)] for label, (name, form) in shares.items())]
    return table("Held-out score", ["without scaffold", *(f"after {row['step']} steps" for row in rows)], lines)


def health_table(health):
    """Criterion health; first what most asks for another criterion."""
    kinds = ("dead", "never separates", "saturated", "unknown", "")
    ordered = sorted(health.items(), key=lambda item: (kinds.index(item[1]["kind"]), item[1]["separates"] or 0))
    shares = {"met": "met", "met where not shown": "plain_met", "groups it separates": "separates", "unknown": "unknown"}
    return table("Criterion health", ["criterion", "points", "health", *shares, "verdicts"], [
        [text, points, found["kind"], *(figure(found[name], form="{:.0%}") for name in shares.values()), found["verdicts"]]
        for (text, points), found in ordered], health_line(health) + ".")


def evaluation_part(folder, room):
    """(what the page of an evaluation draws at once, its chunks: the responses of each side with each judge's verdicts)."""
    settings, groups = read_object(folder / "settings.json"), {}
    check = of_kinds(side=str, task=str, sample=int, text=str, verdicts=dict, rewards=dict)
    for row in read_lines(folder / "samples.jsonl", check):  # the last line of a response counts
        groups.setdefault(row["side"], {}).setdefault(row["task"], {})[row["sample"]] = row
    tasks = {task.id: task for task in load_tasks(str(settings.get("tasks")), need_rubrics=False)}
    judges = dict.fromkeys(judge for side in groups.values() for rows in side.values() for row in rows.values()
                           for judge in row["verdicts"])
    columns, chunks, kept = list(itertools.product(groups, judges)), [], []
    for side, judge in columns:
        judged = (judged_group(folder, tasks.get(task), judge, rows) for task, rows in groups[side].items())
        chunk, number, rollouts = pack(judged, room // len(columns))
        chunks.append(chunk)
        kept.append({"kind": "eval", "label": f"{settings.get(side, side)}, judged by {judge}"[:300], "groups": number,
                     "of": len(groups[side]), "rollouts": rollouts})
    drawn, results = {"tables": [], "best": []}, folder / "results.json"
    if results.is_file():
        read_object(results, check=lambda found: drawn.update(figures(found)))
    total = sum(len(rows) for side, _ in columns for rows in groups[side].values())
    return {"kind": "evaluation", "name": folder.resolve().name, "chunks": kept, "curves": [], "best": drawn["best"],
            "tables": [*drawn["tables"], table("Settings", ["setting", "value"], settings.items())],
            "share": f"{sum(part['rollouts'] for part in kept):,} of {total:,} judged responses are in this page."}, chunks


def judged_group(folder, task, judge, rows):
    """The responses to one task as the page has them. rows: {number: line of samples.jsonl}."""
    count, recited = len(task.rubric) if task else -1, recites(5)
    verdicts = {number: row["verdicts"].get(judge, [None] * count) for number, row in sorted(rows.items())}
    if any(len(given) != count for given in verdicts.values()):
        raise ValueError(f"{folder}: the tasks that it was made with have changed since")
    return shown_group([{
        "task": task.id, "question": task.messages[-1]["content"], "response": rows[number]["text"],
        "reward": rows[number]["rewards"].get(judge), "tokens": len(rows[number].get("token_ids", ())),
        "finished": rows[number].get("finished"), "recited": recited(rows[number]["text"], [c.text for c in task.rubric]),
        "criteria": [{"criterion": c.text, "points": c.points, "met": met} for c, met in zip(task.rubric, given)],
    } for number, given in verdicts.items()])


def figures(results):
    """{tables, best: [{name, points: [(N, score of the best of N, its error)]}]} of results.json."""
    models, judges = list(results["models"].values()), results["judges"]
    names, scores, best, agreement = [model["name"] for model in models], [], [], []
    for judge in judges:
        found = [model["judges"][judge] for model in models]
        for label, key in (("clipped (HealthBench)", "score"), ("not clipped", "mean")):
            scores.append([judge, label, *(figure(each[key], each[f"{key}_se"]) for each in found)])
        best += [{"name": f"{name}, {judge}"[:100], "points": [[point[key] for key in ("n", "mean", "se")]
                  for point in each["best_of_n"]]} for name, each in zip(names, found)]
        pairs = [model["agreement"].get(judge) for model in models]  # with the first judge
        agreement += [[judge, kind, *("{:.3f} ({:.2f} to {:.2f})".format(*pair[kind]) if pair else "–" for pair in pairs)]
                      for kind in ("agreement", "balanced F1") if judge != judges[0]]
    by_tag = [model["judges"][judges[0]]["by_tag"] for model in models]
    tags = [[tag, each["tasks"], *(figure(found.get(tag, {}).get("score"), found.get(tag, {}).get("score_se"))
                                   for found in by_tag)] for tag, each in by_tag[0].items()]
    return {"best": best, "tables": [
        table("Scores", ["judge", "score", *names], scores),
        table("Scores by tag", ["tag", "tasks", *names], tags, f"Judged by {judges[0]}."),
        table("Agreement of judges", ["judge", f"with {judges[0]} (95% interval)", *names], agreement)]}


def main(argv=None):
    """Write the page that the command line asks for. Returns the exit status."""
    parser = Parser(prog="tools.page", allow_abbrev=False, description="A run, two runs or an evaluation as one HTML file.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="runs/NAME or evaluations/NAME")
    parser.add_argument("other", type=Path, metavar="RUN", nargs="?", help="a second run, for the same page")
    given = parser.parse_args(argv)
    if given.other and given.other.resolve() == given.folder.resolve():
        parser.error(f"{given.other}: the same run twice")
    path = page(given.folder, given.other)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    terminal.run_command("tools.page", main)
