"""The page of a run or an evaluation: what is in the file, and what a real browser makes of it."""

import base64
import gzip
import json
import random
import re

import numpy
import pytest

import ruscarl
from browser import CHROMIUM, DRIVER, Browser
from conftest import LETTERS, read, write_tasks
from plumbing import health, ranks, runs, terminal
from plumbing.config import Config
from tasks import load_tasks
from tools import measures, page

needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                   reason="no Chromium with its driver (apt-get install chromium chromium-driver)")
HOSTILE = ["<script>window.hacked = 1</script>", '"><img src=x onerror="window.hacked = 1">',
           "</script><script>window.hacked = 1", "<!-- index -->\n<!-- data -->", "\u202eright to left\u2066 \u0007 \u200f",
           "x" * 2**20, "{{policy}} {policy} ${1+1}", "\ud800 half a pair"]


def rollout(group, sample, text="some text", met=(True, False), shown=(False, False), **changes):
    """A line of a file of rollouts; the rubric has a criterion a verdict."""
    criteria = [{"criterion": f"Criterion {'ab'[i]}.", "points": (2, -1)[i], "shown": s, "met": m}
                for i, (m, s) in enumerate(zip(met, shown))]
    return {"task": f"task {group}", "group": group, "sample": sample, "question": f"Question {group}?", "response": text,
            "finished": True, "tokens": 3, "reward": 0.5, "advantage": -0.25, "recited": False, "criteria": criteria,
            **changes}


def make_run(folder, steps=4, texts=(), groups=3, every=2):
    """A run of `steps` steps, evaluated every so many; the step 0 has `texts` as its responses."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": "<b>model</b>", "steps": steps, "name": ""}))
    rows, draw = [], random.Random(0)

    def write(name, records):
        text = "".join(json.dumps(record) + "\n" for record in records)  # with \ud800 as it comes
        (folder / "rollouts" / f"{name}.jsonl").write_text(text)

    for step in range(steps + 1):
        row = {"step": step}
        if step % every == 0:
            row |= {"eval/score": step / 10, "eval/score_se": 0.01, "eval/recited": 0.0, "eval/length": 3.0,
                    "eval/reached": 1, "time/eval": 1.0, "eval/pass_rate": {"Criterion a.": 0.5}}
            write(f"eval_{step:05d}", [rollout(g, s, f"held out {step} {g} {s}", advantage=0.0)
                                       for g in range(groups) for s in (0, 1)])
        if step < steps:
            row |= {"reward/mean": 0.1 * step, "reward/unscaffolded": 0.1, "scaffold/ratio": 0.5, "entropy": 1.0,
                    "time/sample": 2.0, "time/rollout": 3.0, "time/update": 4.0, "time/total": 9.0,
                    "scaffold/recited_plain": 0.25}
            records = [rollout(g, s, f"step {step} {g} {s} {draw.random()}", met=(s == 0, False), shown=(s == 0, False))
                       for g in range(groups) for s in (0, 1)]
            if step == 0:
                records += [rollout(groups, s, text, recited=s == 1) for s, text in enumerate(texts)]
            write(f"step_{step:05d}", records)
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def blocks(path):
    """{id: text} of the compressed blocks of a page."""
    found = re.findall(r'<script type="text/plain" id="([^"]*)">([A-Za-z0-9+/=]*)</script>', path.read_text())
    return {name: gzip.decompress(base64.b64decode(content)).decode() for name, content in found}


def groups_in(path):
    """{label: groups} of the first run in a page."""
    found = blocks(path)
    return {chunk["label"]: [json.loads(line) for line in found[f"data-0-{i}"].splitlines()]
            for i, chunk in enumerate(json.loads(found["index"])[0]["chunks"])}


def refused(capsys, *arguments):
    """The line with which the command refuses."""
    try:
        status = terminal.exit_status("tools.page", lambda: page.main(list(map(str, arguments))))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and len(err.splitlines()) == 1, err
    return err


def test_criterion_health():
    verdicts = {"all": [[True] * 4, [True] * 4], "none": [[False] * 4, [False, None, False, False]],
                "between": [[True] * 4, [False] * 4], "within": [[True, False, None, True], [False] * 4],
                "nobody knows": [[None] * 4, [None] * 4]}
    groups = [[{"criteria": [{"criterion": name, "points": -1 if name == "none" else 1, "shown": sample == 0,
                              "met": of_groups[g][sample]} for name, of_groups in verdicts.items()]}
               for sample in range(4)] for g in range(2)]
    found = {name: each for (name, _), each in health.criterion_health(health.criterion_counts(groups)).items()}
    assert {name: each["kind"] for name, each in found.items()} == {
        "all": "saturated", "none": "dead", "between": "never separates", "within": "", "nobody knows": "unknown"}
    assert found["within"] == {"kind": "", "met": 2 / 7, "plain_met": 1 / 5, "separates": 0.5, "unknown": 1 / 8,
                               "verdicts": 8}
    assert found["nobody knows"]["met"] is None and found["none"]["unknown"] == 1 / 8
    assert health.health_line(health.criterion_health(health.criterion_counts(groups))) == (
        "5 criteria in training: 1 saturated (met by more than 95%), 1 dead (met by none; 1 of them penalties), "
        "1 of the others never separate a group; 25.0% of 40 verdicts unknown")


def test_counts_of_parts_add_up_to_those_of_the_whole():
    draw = random.Random(0)
    groups = [[{"criteria": [{"criterion": draw.choice("xyz"), "points": 1, "shown": draw.random() < 0.5,
                              "met": draw.choice([True, False, None])}] * 2} for _ in range(3)] for _ in range(20)]
    total = {}
    for group in groups:
        health.add(total, health.criterion_counts([group]))
    assert total == health.criterion_counts(groups)
    assert sum(numbers[0] for numbers in total.values()) == 20 * 3 * 2
    assert health.health_line({}).startswith("0 criteria")


def test_standard_error_is_over_groups():
    groups = [[{"reward": 1.0}, {"reward": 3.0}], [{"reward": 5.0}, {"reward": None}], [{"reward": None}]]
    assert health.standard_error(groups, "reward") == pytest.approx(numpy.std([2.0, 5.0], ddof=1) / 2**0.5)
    assert health.standard_error(groups[1:], "reward") is None


def test_a_page_holds_all_of_a_short_run(tmp_path):
    folder = make_run(tmp_path / "run", texts=HOSTILE)
    path = page.page(folder)
    assert path == folder / "page.html" and list(folder.glob("*.part")) == []
    found = groups_in(path)
    for label, name in (("step 0", "step_00000"), ("step 3", "step_00003"), ("held out, after 4 steps", "eval_00004")):
        records = read(folder / "rollouts" / f"{name}.jsonl")
        samples = [sample for group in found[label] for sample in group["samples"]]
        assert [s["text"] for s in samples] == [r["response"].replace("\ud800", "?") for r in records]
        assert [s["met"] for s in samples] == ["".join("01"[c["met"]] for c in r["criteria"]) for r in records]
        assert [s["shown"] for s in samples] == ["".join("01"[c["shown"]] for c in r["criteria"]) for r in records]
    (index,) = json.loads(blocks(path)["index"])
    assert index["share"] == "50 of 50 rollouts are in this page, from 4 of 4 steps."
    assert index["curves"][0]["eval/score_se"] == 0.01 and index["curves"][1]["reward/mean_se"] == 0.0
    assert index["curves"][0]["scaffold/recited_plain_se"] > 0 and "eval/pass_rate" not in index["curves"][0]
    rows = next(table for table in index["tables"] if table["title"] == "Criterion health")["rows"]
    assert [row[:5] for row in rows] == [["Criterion b.", "-1", "dead", "0%", "0%"], ["Criterion a.", "2", "", "62%", "40%"]]


def test_nothing_of_the_data_is_markup(tmp_path):
    text = page.page(make_run(tmp_path / "run", texts=HOSTILE)).read_text()
    assert "hacked" not in text and "half a pair" not in text and "<b>model" not in text
    assert "innerHTML" not in text and "http-equiv" in text and text.count("<script") == text.count("</script>") == 2 + 4 + 3
    assert len(re.findall(r"https?://", text)) == 1 and "http://www.w3.org/2000/svg" in text  # a name, which nothing loads


def test_a_long_run_is_in_part_in_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 70_000)
    monkeypatch.setattr(page, "INDEX", 40_000)
    monkeypatch.setattr(page, "LEAST", 1_200)
    folder = make_run(tmp_path / "run", steps=64, groups=40, every=16)
    path = page.page(folder)
    assert path.stat().st_size <= 70_000
    (index,) = json.loads(blocks(path)["index"])
    kept, of, steps = re.fullmatch(r"([\d,]+) of ([\d,]+) rollouts are in this page, from (\d+) of 64 steps.",
                                   index["share"]).groups()
    assert of == f"{(64 + 5) * 80:,}" and 4 < int(steps) < 64
    found = groups_in(path)
    assert sum(len(group["samples"]) for groups in found.values() for group in groups) == int(kept.replace(",", ""))
    assert {"held out, after 0 steps", "held out, after 64 steps"} <= set(found)
    numbers = [int(label.split()[1]) for label in found if label.startswith("step")]
    assert numbers == sorted(numbers) and max(numpy.diff([0, *numbers, 64])) <= 32
    assert [chunk["of"] for chunk in index["chunks"]] == [40] * len(found)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("config.json", "{", "config.json: unreadable JSON"), ("config.json", None, "neither a run nor an evaluation"),
    ("metrics.jsonl", '{"step": 0}\ngarbage\n{"step": 2}\n', "metrics.jsonl, line 2: unreadable JSON"),
    ("metrics.jsonl", '{"loss": 0}\n', "metrics.jsonl, line 1: step: missing"),
    ("metrics.jsonl", '{"step": "1"}\n', "metrics.jsonl, line 1: step: must be int, got '1'"),
    ("metrics.jsonl", '{"step": 1, "entropy": NaN}\n', "metrics.jsonl, line 1: entropy: must be finite"),
    ("rollouts/step_00001.jsonl", '{"task": "a", "gro', "step_00001.jsonl, line 1: unreadable JSON"),
    ("rollouts/step_00001.jsonl", '{"task": "a", "group": 0, "response": "x"}', "line 1: criteria: missing"),
    ("rollouts/step_00001.jsonl", json.dumps(rollout(0, 0, met=("yes", True))), "criteria: each needs a criterion and"),
    ("rollouts/step_00001.jsonl", json.dumps(rollout(0, 0, reward="high")), "reward: must be a number or null"),
    ("rollouts/step_00001.jsonl", "".join(json.dumps(rollout(0, 0, met=[True] * n)) + "\n" for n in (1, 2)),
     "different rubrics"),
])
def test_damaged_runs_are_told_in_one_line(tmp_path, capsys, file, content, message):
    folder = make_run(tmp_path / "run")
    (folder / file).write_text(content) if content is not None else (folder / file).unlink()
    assert message in refused(capsys, folder)
    assert not (folder / "page.html").exists()


def test_wrong_folders_are_told_in_one_line(tmp_path, capsys):
    run, evaluation = make_run(tmp_path / "run"), make_evaluation(tmp_path)
    assert "nosuch: neither a run nor" in refused(capsys, tmp_path / "nosuch")
    assert "two runs go in one page" in refused(capsys, run, evaluation)
    assert "unrecognized arguments" in refused(capsys, run, run, run)
    assert "FOLDER" in refused(capsys)


def test_a_run_that_is_still_going(tmp_path, capsys):
    folder = make_run(tmp_path / "run", steps=2)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rewa')  # being written just now
    before = (folder / "metrics.jsonl").read_bytes()
    assert page.main([str(folder)]) == 0 and re.search(r"page\.html: 0\.0\d MB\n", capsys.readouterr().out)
    assert (folder / "metrics.jsonl").read_bytes() == before
    (folder / "metrics.jsonl").unlink()  # the first step is not done yet
    assert page.main([str(folder)]) == 0
    assert json.loads(blocks(folder / "page.html")["index"])[0]["share"].startswith("0 of 0 rollouts")


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    before = page.page(folder).read_bytes()
    (folder / "rollouts" / "step_00000.jsonl").write_text("garbage\n")
    page.write_page(folder)
    assert (folder / "page.html").read_bytes() == before
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "no page.html: ValueError" in err and "step_00000.jsonl, line 1" in err


@pytest.mark.slow(5)
def test_a_run_writes_its_page_and_survives_one_that_cannot_be_written(flags, here, tmp_path, monkeypatch):
    written, real = [], page.page

    def once(folder):
        written.append(len(read(folder / "metrics.jsonl")))
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        return real(folder)

    monkeypatch.setattr(page, "page", once)
    status, printed = here(ruscarl, *flags, "--steps", "1", "--eval-every", "1", "--name", "run")
    assert status == 0 and written == [1, 2], printed
    assert printed.count("no page.html: OSError: [Errno 28] No space left on device") == 1
    assert "4 criteria in training: " in printed
    assert set(groups_in(tmp_path / "runs" / "run" / "page.html")) == {"held out, after 0 steps", "step 0"}
    assert (tmp_path / "runs" / "run" / "policy").is_dir()


def test_only_the_leader_writes_a_page(tmp_path, monkeypatch):
    called = []
    run = runs.Run(Config(runs=str(tmp_path), name="run"), "digest", called.append)
    run.open()
    run.log({"step": 0, "loss": 1.0})
    assert called == []
    run.log({"step": 1, "eval/score": 1.0})
    assert called == [tmp_path / "run"]
    monkeypatch.setattr(ranks, "leader", lambda: False)
    run.log({"step": 2, "eval/score": 1.0})
    assert len(called) == 1


RESULTS = {}  # of make_evaluation, which are always the same


def make_evaluation(folder):
    """An evaluation of two models by two judges, three samples to each of four questions, with its results."""
    write_tasks(folder / "letters.jsonl", LETTERS)
    tasks, output, judges = load_tasks(str(folder / "letters.jsonl"))[:4], folder / "evaluation", ["rules", "other judge"]
    output.mkdir()
    rows = [{"side": side, "task": task.id, "sample": k, "text": f"{side} says {HOSTILE[k]}", "token_ids": [1, 2],
             "finished": k > 0, "verdicts": {"rules": [k > 0, True, None if k == 2 else False, True],
                                             "other judge": [k > 1, True, False, True]},
             "rewards": {"rules": None if k == 2 else 0.25 * k, "other judge": 0.25 * k}}
            for side in ("model", "base") for task in tasks for k in range(3)]
    (output / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [dict(rows[0], text="old"), *rows]))
    settings = {"model": "m", "base": "b", "tasks": str(folder / "letters.jsonl")}
    (output / "settings.json").write_text(json.dumps(settings))
    for side in ("model", "base") if not RESULTS else ():
        records = [[row for row in rows if row["side"] == side and row["task"] == task.id] for task in tasks]
        RESULTS[side] = {"name": side[0], **measures.model_figures(tasks, records, judges, None, 5)}
    (output / "results.json").write_text(json.dumps({"judges": judges, "models": RESULTS}))
    return output


def test_the_page_of_an_evaluation(tmp_path, capsys):
    folder = make_evaluation(tmp_path)
    assert page.main([str(folder)]) == 0
    (index,) = json.loads(blocks(folder / "page.html")["index"])
    assert [chunk["label"] for chunk in index["chunks"]] == [
        f"{side}, judged by {judge}" for side in "mb" for judge in ("rules", "other judge")]
    assert index["share"] == "48 of 48 judged responses are in this page."
    first = groups_in(folder / "page.html")["m, judged by rules"][0]
    assert [sample["met"] for sample in first["samples"]] == ["0101", "1101", "11?1"]
    assert [sample["reward"] for sample in first["samples"]] == [0.0, 0.25, None]
    assert first["samples"][0]["text"] == f"model says {HOSTILE[0]}"
    tables = {table["title"]: table["rows"] for table in index["tables"]}
    assert tables["Scores"][0] == ["rules", "clipped (HealthBench)", "+0.125 ± 0.000", "+0.125 ± 0.000"]
    assert tables["Agreement of judges"][0][:2] == ["other judge", "agreement"]
    assert tables["Agreement of judges"][0][2].startswith("0.909 (")  # 40 of 44 verdicts that both gave
    assert [point[1] for point in index["best"][0]["points"]] == pytest.approx([0.125, 0.25])


@pytest.mark.parametrize(("file", "content", "message"), [
    ("settings.json", None, "settings.json"), ("results.json", "[]", "results.json: must be a JSON object"),
    ("results.json", '{"judges": ["rules"], "models": {"model": {"name": "m"}}}', "results.json: judges: missing"),
    ("samples.jsonl", '{"side": 1}\n', "samples.jsonl, line 1: side: must be str"),
    ("samples.jsonl", '[]\n{}\n', "samples.jsonl, line 1: must be a JSON object"),
    ("../letters.jsonl", None, "no such task file"),
    ("../letters.jsonl", json.dumps({"prompt": "Other?", "rubrics": []}) + "\n", "have changed since"),
])
def test_damaged_evaluations_are_told_in_one_line(tmp_path, capsys, file, content, message):
    folder = make_evaluation(tmp_path)
    (folder / file).write_text(content) if content is not None else (folder / file).unlink()
    assert message in refused(capsys, folder)


@pytest.fixture(scope="module")
def browser():
    """A browser for the tests of this file."""
    browser = Browser()
    yield browser
    browser.close()


def opened(browser, path):
    """Open a page and wait until its lists of questions are filled."""
    browser.logs("performance")
    browser.open(path)
    sections = browser.until("document.querySelectorAll('article').length && document.querySelectorAll('section').length")
    browser.until(f"document.querySelectorAll('.list').length === {sections - 1}"
                  " && [...document.querySelectorAll('.list')].every((list) => list.children.length)")
    assert browser.script("return document.getElementById('failed').textContent") == ""


def choose(browser, section, label, text):
    """Choose an option, or type into a field, of the labelled control of a section (from 0)."""
    browser.script("""
        const label = [...document.querySelectorAll('#rollouts section')[arguments[0]].querySelectorAll('label')]
            .find((label) => label.textContent.startsWith(arguments[1]));
        const control = label.control, option = [...(control.options || [])].find((one) => one.textContent === arguments[2]);
        control.value = option ? option.value : arguments[2];
        control.dispatchEvent(new Event('change'));""", section, label, text)
    browser.until("!document.querySelectorAll('[role=status]')[arguments[0]].textContent.startsWith('unpacking')", section)


def status(browser, section):
    return browser.script("return document.querySelectorAll('[role=status]')[arguments[0]].textContent", section)


def cards(browser, section, marked=False):
    """The texts of the responses that a section shows; of those that a filter has found."""
    selector = ".match pre" if marked else "article pre"
    return browser.script("return [...document.querySelectorAll('#rollouts section')[arguments[0]].querySelectorAll("
                          "arguments[1])].map((one) => one.textContent)", section, selector)


@needs_browser
@pytest.mark.slow(5)
def test_a_rollout_is_found_by_clicking(browser, tmp_path):
    opened(browser, page.page(make_run(tmp_path / "my run")))
    assert browser.script("return document.title") == "my run"
    assert cards(browser, 0) == [f"held out {step} 0 {s}" for step in (0, 4) for s in (0, 1)]  # before beside after
    browser.click("#rollouts section:nth-of-type(2) li:nth-child(2) button")
    texts = cards(browser, 1)
    assert [text.rsplit(" ", 1)[0] for text in texts] == ["step 3 1 0", "step 3 1 1"]
    assert browser.script("""return [...document.querySelectorAll('#rollouts section')[1].querySelectorAll('tbody tr')]
        .map((row) => [...row.children].map((cell) => cell.textContent))""") == [
            ["1. Criterion a. (2)", "✓met, shown", "✗not met"], ["2. Criterion b. (-1)", "✗not met", "✗not met"],
            ["reward", "+0.50", "+0.50"], ["advantage", "−0.25", "−0.25"]]
    browser.click("#rollouts section:nth-of-type(2) thead th:nth-child(3) button")
    assert browser.script("return document.activeElement.querySelector('pre').textContent") == texts[1]
    choose(browser, 1, "Show", "step 1")
    assert cards(browser, 1)[0].startswith("step 1 0 0") and status(browser, 1) == "3 of 3 questions"
    choose(browser, 1, "beside", "step 2")
    assert [text[:10] for text in cards(browser, 1)] == ["step 1 0 0", "step 1 0 1", "step 2 0 0", "step 2 0 1"]
    assert [entry for entry in browser.logs() if entry["level"] != "DEBUG"] == []


@needs_browser
@pytest.mark.slow(5)
def test_filters(browser, tmp_path):
    opened(browser, page.page(make_run(tmp_path / "run", texts=["one", "two recites", "three"])))
    choose(browser, 1, "Filter", "responses that recite")
    assert status(browser, 1) == "0 of 3 questions" and cards(browser, 1) == []
    choose(browser, 1, "Show", "everything")
    assert status(browser, 1) == "1 of 13 questions"
    assert cards(browser, 1) == ["one", "two recites", "three"] and cards(browser, 1, marked=True) == ["two recites"]
    choose(browser, 1, "Filter", "criterion met only with scaffold")
    assert status(browser, 1) == "12 of 13 questions"  # in the group of three all meet it, and none was shown it
    assert len(cards(browser, 1, marked=True)) == 1
    for criterion, count in (("1", 12), ("2", 0), ("CRITERION A", 12), ("3", 0), ("no such", 0)):
        choose(browser, 1, "Criterion", criterion)
        assert status(browser, 1) == f"{count} of 13 questions", criterion
    choose(browser, 1, "Filter", "criterion met")
    choose(browser, 1, "Criterion", "criterion a")
    assert status(browser, 1) == "13 of 13 questions"


@needs_browser
@pytest.mark.slow(6)
def test_texts_of_models_run_nothing_and_load_nothing(browser, server, tmp_path):
    questions = [*HOSTILE[:3], "x"]
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>", texts=HOSTILE)
    path = folder / "rollouts" / "step_00000.jsonl"
    records = [dict(record, question=questions[record["group"]]) for record in read(path)]
    records[-1]["criteria"][0]["criterion"] = HOSTILE[1]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    opened(browser, page.page(folder))
    choose(browser, 1, "Show", "step 0")
    browser.click("#rollouts section:nth-of-type(2) li:last-child button")
    texts = cards(browser, 1)
    assert texts[:4] == HOSTILE[:4] and texts[6] == HOSTILE[6]
    assert texts[4] == "⟨U+202e⟩right to left⟨U+2066⟩ ⟨U+0007⟩ ⟨U+200f⟩" and texts[5] == "x" * 5000
    browser.script("document.querySelectorAll('article button')[0].scrollIntoView()")
    browser.click("article button")
    assert "x" * 2**20 in cards(browser, 1)
    assert browser.script("return document.documentElement.scrollWidth <= innerWidth")  # it is wrapped
    assert browser.script("return document.querySelectorAll('main img, main script').length") == 0
    requests = [json.loads(entry["message"])["message"] for entry in browser.logs("performance")]
    sent = [one["params"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    own = (folder / "page.html").as_uri()
    assert {one["request"]["url"] for one in sent if one["documentURL"] == own} == {own}  # not the first tab
    browser.script("""
        const script = document.createElement('script'), image = document.createElement('img');
        script.textContent = 'window.hacked = 1';
        image.src = arguments[0];
        image.setAttribute('onerror', 'window.hacked = 1');
        document.body.append(script, image);
        return fetch(arguments[0]).catch(() => null);""", server.url)  # even so: the policy of the page forbids it
    assert browser.script("return window.hacked === undefined") and server.requests == []


@needs_browser
@pytest.mark.slow(6)
def test_keyboard_names_and_contrast(browser, tmp_path):
    opened(browser, page.page(make_run(tmp_path / "run")))
    assert browser.script("""return [...document.querySelectorAll('select, input')].every((one) => one.labels.length === 1)
        && [...document.querySelectorAll('button')].every((one) => one.textContent.trim())
        && [...document.querySelectorAll('svg[role=img], [role=region], section')].every((one) =>
            one.getAttribute('aria-label') || one.querySelector('h2'))""")
    assert browser.script("return document.documentElement.lang") == "en"
    browser.script("document.querySelectorAll('.list button')[0].focus()")
    browser.press("\ue004", "\ue007")  # tab, enter
    assert browser.script("return document.activeElement === document.querySelectorAll('.list button')[1]"
                          " && document.activeElement.getAttribute('aria-current') === 'true'")
    assert cards(browser, 0)[0] == "held out 0 1 0"
    assert browser.script("const style = getComputedStyle(document.activeElement); return style.outlineStyle") != "none"
    for scheme in ("light", "dark"):
        browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colors = browser.script("""const style = getComputedStyle(document.documentElement);
            return Object.fromEntries(arguments[0].map((name) => [name, style.getPropertyValue('--' + name).trim()]))""",
            ["back", "panel", "text", "faint", "good", "bad", "match", "focus", "c0", "c1", "c2", "c3"])
        pairs = [("text", ("back", "panel", "good", "bad", "match"), 4.5), ("faint", ("back", "panel", "match"), 4.5),
                 *((line, ("back", "panel"), 3.0) for line in ("focus", "c0", "c1", "c2", "c3"))]
        for text, backs, least in pairs:
            assert all(contrast(colors[text], colors[back]) >= least for back in backs), (scheme, text, colors)
    for width in (1400, 400):
        browser.size(width, 900)
        assert browser.script("return document.documentElement.scrollWidth <= innerWidth"), width


def contrast(one, other):
    """Contrast of two colours #rgb or #rrggbb, as the accessibility guidelines (WCAG 2) define it."""
    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        return sum(weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
                   for weight, part in zip((0.2126, 0.7152, 0.0722), parts))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@needs_browser
@pytest.mark.slow(5)
def test_two_runs_in_one_page(browser, tmp_path, capsys):
    first, second = make_run(tmp_path / "A", steps=4), make_run(tmp_path / "B", steps=6)
    assert page.main([str(first), str(second)]) == 0 and "page-B.html" in capsys.readouterr().out
    opened(browser, first / "page-B.html")
    assert browser.script("return document.title") == "A and B"
    keys = browser.script("return [...document.querySelectorAll('figure .key')].slice(0, 2).map((one) => one.textContent)")
    assert keys == ["A: eval/score", "B: eval/score"]
    assert cards(browser, 0) == [f"held out 4 0 {s}" for s in (0, 1)] * 2  # the last evaluation of both
    heads = browser.script("return [...document.querySelectorAll('th[scope=colgroup]')].map((one) => one.textContent)")
    assert heads == ["A: held out, after 4 steps", "B: held out, after 4 steps"]
    other = make_run(tmp_path / "C", steps=5, every=5)  # evaluated at other steps, but for the first
    opened(browser, page.page(first, other))
    assert cards(browser, 0) == [f"held out {step} 0 {s}" for step in (4, 5) for s in (0, 1)]
    assert [entry for entry in browser.logs() if entry["level"] != "DEBUG"] == []


@needs_browser
@pytest.mark.slow(5)
def test_an_evaluation_in_the_browser(browser, tmp_path):
    opened(browser, page.page(make_evaluation(tmp_path)))
    assert browser.script("return [...document.querySelectorAll('figcaption, summary')].map((one) => one.textContent)") == [
        "Score of the best of N", "Scores", "Agreement of judges", "Settings"]  # these tasks have no tags
    choose(browser, 0, "beside", "m, judged by other judge")
    assert cards(browser, 0)[0].startswith("model says <script>") and len(cards(browser, 0)) == 6
    choose(browser, 0, "Filter", "criterion unknown")
    assert status(browser, 0) == "4 of 4 questions" and len(cards(browser, 0, marked=True)) == 1
    choose(browser, 0, "Filter", "responses cut off")
    assert len(cards(browser, 0, marked=True)) == 1
    assert [entry for entry in browser.logs() if entry["level"] != "DEBUG"] == []
