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
from plumbing.config import Parser
from plumbing.health import health_line
from plumbing.rules import recites
from plumbing.runs import read_groups, read_object, tally, training_health, write_whole
from tasks import load_tasks

LIMIT = 20_000_000  # bytes of a page
INDEX = 2_000_000  # of these, for markup, curves and tables
LEAST = 200_000  # compressed bytes for the rollouts of a step where not all have room: about ten groups of long responses
ROWS = 1000  # of a table, and points of a curve
CURVES = ("eval/score", "eval/score_se", "eval/recited", "reward/mean", "reward/unscaffolded", "scaffold/ratio",
          "scaffold/recited_plain", "entropy", "kl", "response/length", "response/truncated", "judge/unknown",
          "reward/zero_variance_groups", "time/sample", "time/rollout", "time/update", "time/eval", "time/total")
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
    kinds = [next((name for name in ("config.json", "samples.jsonl") if (each / name).is_file()), None) for each in folders]
    for each, kind in zip(folders, kinds):
        if kind is None:
            raise ValueError(f"{each}: neither a run nor an evaluation: no config.json, no samples.jsonl")
        if other and kind != "config.json":
            raise ValueError(f"{each}: is no run; two runs go in one page, an evaluation has a page of its own")
    read = run_part if kinds[0] == "config.json" else evaluation_part
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
    """A group of a run as the page has it: the rubric once; shown and met with a letter a criterion."""
    first = rollouts[0]
    if any(len(r["criteria"]) != len(first["criteria"]) for r in rollouts):
        raise ValueError(f"task {first['task']}: the samples of a group have different rubrics")
    return {"task": first["task"], "question": str(first.get("question", "")),
            "rubric": [[c["criterion"], c.get("points")] for c in first["criteria"]],
            "samples": [{"text": r["response"], "reward": r.get("reward"), "advantage": r.get("advantage"),
                         "tokens": r.get("tokens"), "cut": r.get("finished") is False, "recited": bool(r.get("recited")),
                         "shown": "".join("01"[bool(c.get("shown"))] for c in r["criteria"]),
                         "met": letters(c["met"] for c in r["criteria"])} for r in rollouts]}


def letters(verdicts):
    """A letter a verdict: 1 met, 0 not met, ? unknown."""
    return "".join("?" if met is None else "01"[met] for met in verdicts)


def run_part(folder, room):
    """(what the page of a run draws at once, its chunks: the rollouts of a step or an evaluation each)."""
    config, rows = read_object(folder / "config.json"), read_lines(folder / "metrics.jsonl", {"step": int})
    files, total = [], 0  # (kind, label, path, groups in it)
    for row in rows:
        for kind, label in (("eval", f"held out, after {row['step']} steps"), ("step", f"step {row['step']}")):
            if (path := folder / "rollouts" / f"{kind}_{row['step']:05d}.jsonl").is_file():
                counted = tally(path)
                row |= {f"{curve}_se": counted[name] for curve, name in ERRORS[kind].items()}
                files.append((kind, label, path, counted["groups"]))
                total += counted["rollouts"]
    found = choose(files, room)  # {index of a file: (chunk, groups, rollouts)}
    health = training_health(folder, [row["step"] for row in rows])
    steps = [sum(files[i][0] == "step" for i in part) for part in (found, range(len(files)))]
    drawn = {"kind": "run", "name": folder.resolve().name, "curves": curves(rows),
             "chunks": [{"kind": files[i][0], "label": files[i][1], "groups": found[i][1], "of": files[i][3]} for i in found],
             "share": f"{sum(kept for *_, kept in found.values()):,} of {total:,} rollouts are in this page, from "
                      f"{steps[0]} of {steps[1]} steps.",
             "tables": [before_and_after(rows), health_table(health), settings_table(config)]}
    return drawn, [chunk for chunk, *_ in found.values()]


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


def read_lines(path, kinds):
    """The objects of a JSON-lines file that a process may be writing: a last line that is not whole yet is left out. kinds:
    {field: its type}. Raises ValueError, with the line, for anything else."""
    def check(row):
        for name, kind in kinds.items():
            if type(row[name]) is not kind:
                raise ValueError(f"{name}: must be {kind.__name__}, got {str(row[name])[:40]!r}")

    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [read_object(f"{path}, line {number}", line, check) for number, line in enumerate(lines, 1)
            if number < len(lines) or line.endswith(b"\n")]


def is_number(value):
    """Whether a metric can be drawn."""
    return type(value) in (int, float) and math.isfinite(value)


def curves(rows):
    """The rows with the metrics that are drawn; of very many rows every so many, and all with an evaluation."""
    names = [*CURVES, *(f"{name}_se" for name in CURVES)]
    every = math.ceil(max(1, len(rows)) / ROWS)
    return [{"step": row["step"], **{name: row[name] for name in names if is_number(row.get(name))}}
            for i, row in enumerate(rows) if i % every == 0 or "eval/score" in row]


def table(title, head, rows, note=""):
    """A table of the page, as text. A long cell is cut, and so is a long table, which says so."""
    if len(rows) > ROWS:
        note += f" The first {ROWS:,} of {len(rows):,} rows."
    return {"title": title, "head": head, "note": note, "rows": [[str(cell)[:300] for cell in row] for row in rows[:ROWS]]}


def figure(value, error=None, form="{:+.3f}"):
    """A number, with its error where there is one, as text; a dash for what is not known."""
    text = form.format(value) if is_number(value) else "–"
    return f"{text} ± {error:.3f}" if is_number(error) else text


def settings_table(settings):
    """The settings that are not empty."""
    return table("Settings", ["setting", "value"], [item for item in settings.items() if item[1] not in ("", None)])


def before_and_after(rows):
    """The held-out figures of the first evaluation and the last four."""
    rows = [row for row in rows if is_number(row.get("eval/score"))]
    rows = [*rows[:1], *rows[1:][-4:]]
    lines = [["score", *(figure(row["eval/score"], row.get("eval/score_se")) for row in rows)]]
    for label, name, form in (("responses that recite the rubric", "eval/recited", "{:.0%}"),
                              ("length, tokens", "eval/length", "{:.0f}"),
                              ("criteria reached from nothing", "eval/reached", "{}")):
        lines.append([label, *(figure(row.get(name), form=form) for row in rows)])
    return table("Held-out questions", ["without scaffold", *(f"after {row['step']} steps" for row in rows)], lines)


def health_table(health):
    """Criterion health, what most asks for a better rubric first."""
    kinds = ("dead", "never separates", "saturated", "unknown", "")
    ordered = sorted(health.items(), key=lambda item: (kinds.index(item[1]["kind"]), item[1]["separates"] or 0))
    shares = ("met", "plain_met", "separates", "unknown")
    return table("Criterion health", ["criterion", "points", "health", "met", "met where it was not shown", "groups it separates",
                                      "unknown", "verdicts"],
                 [[text, points, found["kind"], *(figure(found[name], form="{:.0%}") for name in shares), f"{found['verdicts']:,}"]
                  for (text, points), found in ordered], health_line(health) + ".")


def evaluation_part(folder, room):
    """(what the page of an evaluation draws at once, its chunks: the responses of each side with each judge's verdicts)."""
    kinds = {"side": str, "task": str, "sample": int, "text": str, "verdicts": dict, "rewards": dict}
    settings, groups = read_object(folder / "settings.json"), {}
    for row in read_lines(folder / "samples.jsonl", kinds):  # the last line of a response counts
        groups.setdefault(row["side"], {}).setdefault(row["task"], {})[row["sample"]] = row
    tasks = {task.id: task for task in load_tasks(str(settings.get("tasks")), need_rubrics=False)}
    judges = {judge: None for side in groups.values() for of_task in side.values() for row in of_task.values()
              for judge in row["verdicts"]}
    counted, chunks, kept, total = [], [], 0, 0
    for side, judge in itertools.product(groups, judges):
        own = (judged_group(folder, tasks.get(task), judge, rows) for task, rows in groups[side].items())
        chunk, number, rollouts = pack(own, room // (len(groups) * len(judges)))
        counted.append({"kind": "eval", "label": f"{settings.get(side, side)}, judged by {judge}"[:300], "groups": number,
                        "of": len(groups[side])})
        chunks.append(chunk)
        kept, total = kept + rollouts, total + sum(map(len, groups[side].values()))
    drawn = {"tables": [], "best": []}
    if (path := folder / "results.json").is_file():
        read_object(path, check=lambda results: drawn.update(figures(results)))
    return {"kind": "evaluation", "name": folder.resolve().name, "chunks": counted, "curves": [], "best": drawn["best"],
            "tables": [*drawn["tables"], settings_table(settings)],
            "share": f"{kept:,} of {total:,} judged responses are in this page."}, chunks


def judged_group(folder, task, judge, rows):
    """The responses to one task as the page has them. rows: {number: line of samples.jsonl}."""
    verdicts = {number: row["verdicts"].get(judge) for number, row in rows.items()}
    if task is None or any(given is not None and len(given) != len(task.rubric) for given in verdicts.values()):
        raise ValueError(f"{folder}: the tasks that it was made with have changed since")
    recited, criteria, unknown = recites(5), [c.text for c in task.rubric], [None] * len(task.rubric)
    return {"task": task.id, "question": task.messages[-1]["content"], "rubric": [[c.text, c.points] for c in task.rubric],
            "samples": [{"text": row["text"], "reward": row["rewards"].get(judge), "tokens": len(row.get("token_ids", ())),
                         "cut": row.get("finished") is False, "recited": recited(row["text"], criteria),
                         "shown": "0" * len(criteria), "met": letters(verdicts[number] or unknown)}
                        for number, row in sorted(rows.items())]}


def figures(results):
    """{tables, best: [{name, points: [(N, score of the best of N, its error)]}]} of results.json."""
    models, judges, scores, best, agreement = results["models"].values(), results["judges"], [], [], []
    names = [model["name"] for model in models]
    for judge in judges:
        found = [model["judges"][judge] for model in models]
        scores += [[judge, "clipped (HealthBench)", *(figure(each["score"], each["score_se"]) for each in found)],
                   [judge, "not clipped", *(figure(each["mean"], each["mean_se"]) for each in found)]]
        best += [{"name": f"{name}, {judge}"[:100], "points": [(point["n"], point["mean"], point["se"])
                                                               for point in each["best_of_n"]]}
                 for name, each in zip(names, found)]
        for kind in ("agreement", "balanced F1") if judge != judges[0] else ():
            agreement.append([judge, kind, *("{:.3f} ({:.2f} to {:.2f})".format(*pair[kind]) if (
                pair := model["agreement"][judge]) else "–" for model in models)])
    tags = [model["judges"][judges[0]]["by_tag"] for model in models]
    by_tag = [[tag, f"{found['tasks']:,}", *(figure(*((each.get(tag) or {}).get(key) for key in ("score", "score_se")))
                                             for each in tags)] for tag, found in tags[0].items()]
    return {"best": best, "tables": [table("Scores", ["judge", "score", *names], scores),
                                     table("Scores by tag", ["tag", "tasks", *names], by_tag, f"Judged by {judges[0]}."),
                                     table("Agreement of judges", ["judge", f"with {judges[0]}, 95% interval", *names],
                                           agreement)]}


def main(argv=None):
    """Write the page that the command line asks for. Returns the exit status."""
    parser = Parser(prog="tools.page", allow_abbrev=False, description="A run, two runs or an evaluation as one HTML file.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="runs/NAME or evaluations/NAME")
    parser.add_argument("other", type=Path, metavar="RUN", nargs="?", help="a second run, for the same page")
    path = page(**vars(parser.parse_args(argv)))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    terminal.run_command("tools.page", main)
