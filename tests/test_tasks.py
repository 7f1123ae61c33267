"""Loaders: what they read, and that every defect is named with its place."""

import hashlib
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import requests

import tasks
from plumbing.rules import rule_from_tags
from tasks import load_tasks, split_tasks

GOOD = {"prompt_id": "a", "prompt": [{"role": "user", "content": "Hello?"}], "example_tags": ["theme:x"],
        "rubrics": [{"criterion": "Says hello.", "points": 5, "tags": ["axis:y"]},
                    {"criterion": "Is rude.", "points": -2.5, "tags": []}]}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_jsonl(tmp_path):
    [task] = load_tasks(write(tmp_path / "t.jsonl", GOOD, ""))
    assert task.id == "a" and task.tags == ("theme:x",) and task.messages == GOOD["prompt"]
    assert [(c.text, c.points, c.tags) for c in task.rubric] == [("Says hello.", 5, ("axis:y",)), ("Is rude.", -2.5, ())]


def test_parquet_in_the_official_format(tmp_path):
    row = {"prompt": GOOD["prompt"], "data_source": "healthbench", "reward_model":
           {"ground_truth": "", "style": "rubric", "rubrics": GOOD["rubrics"]}}
    other = json.loads(json.dumps(row))
    other["reward_model"]["rubrics"][0]["points"] = 6
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, other]), tmp_path / "t.parquet")
    first, second = load_tasks(tmp_path / "t.parquet")
    assert [c.points for c in first.rubric] == [5, -2.5] and first.messages == GOOD["prompt"]
    assert first.id != second.id  # without ids in the file, conversation and rubric are the name
    del other["reward_model"]["rubrics"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([other]), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet, row 1: rubrics: missing"):
        load_tasks(tmp_path / "bad.parquet")
    (tmp_path / "worse.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"worse.parquet: unreadable parquet"):
        load_tasks(tmp_path / "worse.parquet")


def test_published_formats_are_read(tmp_path):
    """Records in the form of what was published, field by field; their texts are made up."""
    def parquet(*rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
        return load_tasks(tmp_path / "t.parquet")

    def criteria(task):
        return [(c.text, c.points, *c.tags) for c in task.rubric]

    # RubricHub, RuRL/*.parquet: tags are objects, and parquet gives each the parameters of all, None where there are none
    rubric = [{"criterion": "Is kind.", "points": 5, "tags": {"function": "", "parameters": {}, "verifier": "llm"}},
              {"criterion": "Is short.", "points": 3,
               "tags": {"function": "max_words", "parameters": {"limit": 9}, "verifier": "rule"}},
              {"criterion": "Says é.", "points": 2,
               "tags": {"function": "mentions_any", "parameters": {"words": ["é"]}, "verifier": "rule"}}]
    hub = {"prompt": GOOD["prompt"], "Rubrics": [{"criterion": c["criterion"], "points": c["points"]} for c in rubric],
           "reward_model": {"ground_truth": "", "rubrics": rubric, "style": "rubric"}, "data_source": "Medical"}
    [task] = parquet({**hub, "extra_info": {"prompt": hub["prompt"], "reward_model": hub["reward_model"]}})
    assert task.messages == GOOD["prompt"]
    assert criteria(task) == [("Is kind.", 5, "verifier:llm"),
                              ("Is short.", 3, "function:max_words", 'parameters:{"limit": 9}', "verifier:rule"),
                              ("Says é.", 2, "function:mentions_any", 'parameters:{"words": ["é"]}', "verifier:rule")]
    assert [rule_from_tags(c.tags) is not None for c in task.rubric] == [False, True, True]

    # RaR-Medicine and RaR-Science
    [task] = parquet({"question": "Hello?", "reference_answer": "Hi.", "rubric_list": ["..."], "rubric_count": 2, "rubric": [
        {"description": "Essential Criteria: Greets.", "title": "Greeting", "weight": 5},
        {"description": "Pitfall Criteria: Does not greet.", "title": "Rudeness", "weight": -1}]})
    assert task.messages == GOOD["prompt"]
    assert criteria(task) == [("Essential Criteria: Greets.", 5), ("Pitfall Criteria: Does not greet.", -1)]

    # Chasing the Tail: prompts, rubrics as published, rubrics as its code writes them
    prompts = load_tasks(write(tmp_path / "t.json", [{"prompt": "Hello?"}, {"prompt": "Bye?"}]), need_rubrics=False)
    assert [(t.messages[0]["content"], t.rubric) for t in prompts] == [("Hello?", ()), ("Bye?", ())]
    weights = [{"criterion": "Greets.", "weight": 3}, {"criterion": "Is short.", "weight": 1}]
    [task] = load_tasks(write(tmp_path / "t.jsonl", {"prompt": "Hello?", "rubrics": weights, "number_of_criteria": 2}))
    [made] = load_tasks(write(tmp_path / "t.json", [{"id": "prompt_0", "prompt": "Hello?", "total_weight": 4, "criteria": [
        {**c, "local_id": f"c{i}"} for i, c in enumerate(weights, 1)]}]))
    assert criteria(task) == criteria(made) == [("Greets.", 3), ("Is short.", 1)] and made.id == "prompt_0"

    # HealthBench Professional
    [task] = load_tasks(write(tmp_path / "t.jsonl", {
        "id": "9a", "conversation": {"messages": GOOD["prompt"]}, "physician_response": "Hello.", "use_case": "consult",
        "rubric_items": [{"criterion_text": "Greets.", "points": 7}, {"criterion_text": "Is rude.", "points": -8}]}))
    assert (task.id, task.messages, criteria(task)) == ("9a", GOOD["prompt"], [("Greets.", 7), ("Is rude.", -8)])


def test_a_record_that_repeats_another_is_left_out_and_told(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", GOOD, *[{"question": "Bye?", "rubrics": GOOD["rubrics"]}] * 3)
    assert len(load_tasks(path)) == 2
    assert "t.jsonl: left out: 2 of 4 records, which repeat an earlier one" in capsys.readouterr().err


def changed(**changes):
    return {**GOOD, **changes}


def criterion(**changes):
    return changed(rubrics=[{**GOOD["rubrics"][0], **changes}])


@pytest.mark.parametrize(("record", "message"), [
    ("{", "unreadable JSON"), ("[]", "JSON object"), ("[" * 100_000, "unreadable JSON"),
    (changed(prompt=[]), r"prompt: must be a text or a list of at least one message, got \[\]"),
    (changed(prompt=None), r"prompt: missing \(the record has 'prompt_id', 'prompt', "),
    ('{"prompt": [', "it ends too early; a record has to be on one"),
    ('{"prompt": x}', "unreadable JSON: Expecting value at column 12"),
    (changed(prompt=[{"role": "assistant", "content": "Hi"}]), "last message is from the assistant"),
    (changed(prompt=[{"role": "doctor", "content": "Hi"}]), r"prompt\[0\].role"),
    (changed(prompt=[{"role": "user", "content": " "}]), r"prompt\[0\].content"),
    (changed(prompt=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]), "must come first"),
    (changed(rubrics=[]), "rubrics: missing or empty"), ({"prompt": "Hi", "rubics": []}, r"\(the record has .*rubics"),
    (changed(rubrics=[GOOD["rubrics"][1]]), "no criterion has positive points"),
    (criterion(points=0), r"rubrics\[0\].points: .* and not 0"), (criterion(points="5"), r"points: must be a number"),
    (criterion(points=True), "points: must be a number"), (criterion(points=float("nan")), "points: must be a number"),
    (criterion(points=float("inf")), "points: must be a number"), (criterion(criterion=""), r"rubrics\[0\].criterion"),
    (criterion(tags="axis:y"), "tags: must be a list"), (changed(prompt={"text": "Hello?"}), "must be a text or a list"),
    (changed(prompt=" "), "prompt: must be a non-empty string"), (changed(rubrics="Kind"), "rubrics: must be a list, got"),
    (criterion(point=5, points=None), r"rubrics\[0\]: unknown field 'point' \(known: criterion, .*points"),
    (criterion(tag=["axis:y"]), r"rubrics\[0\]: unknown field 'tag'"),
    (criterion(weight=5), r"rubrics\[0\]: points and weight are names of one field"),
    (criterion(weight="5", points=None), r"rubrics\[0\].weight: must be a number"),
    (criterion(description=" ", criterion=None), r"rubrics\[0\].description: must be a non-empty"),
    (changed(question="Hello?"), "prompt and question are names of one field"),
    (changed(prompt=None, conversation={"messages": []}), "conversation.messages: must be a text or a list"),
    (changed(rubrics=None, rubric_items=[{"criterion_text": "Is kind.", "points": 0}]), r"rubric_items\[0\].points: "),
    (changed(prompt_id=None, id=7), "id: must be a non-empty string, got 7"),
    (criterion(tags={"verifier": "rule", "function": "CommaChecker"}), r"rubrics\[0\].tags: unknown rule 'CommaChecker'"),
    (criterion(points=10**400), "up to a million"), (criterion(criterion="\udc00"), "surrogate"),
    ('{"prompt_id": "x", "prompt_id": "y"}', "'prompt_id' stands twice"),
    (criterion(tags=["function:min_words"]), r"rubrics\[0\].tags: a function: tag without verifier:rule"),
    (criterion(tags=["verifier:rule", "function:min_words", 'parameters:{"limit": 4, "limit": 3}']), "'limit' stands twice"),
    (criterion(tags=["verifier:rule", "function:nosuch"]), r"rubrics\[0\].tags: unknown rule 'nosuch'"),
    (changed(prompt_id=7), "prompt_id: must be"), (changed(example_tags="x"), "example_tags: must be"),
    (changed(prompt_id="\x1b[2J"), "prompt_id: must not have control characters"),
])
def test_defects_are_named_with_file_line_and_field(tmp_path, record, message):
    path = write(tmp_path / "t.jsonl", *[changed(prompt_id=str(i)) for i in range(6)], record)
    with pytest.raises(ValueError, match=rf"t.jsonl, line 7: .*{message}"):
        load_tasks(path)


def test_other_defects(tmp_path):
    with pytest.raises(ValueError, match=r"line 2: prompt_id: 'a' was already used at .*line 1"):
        load_tasks(write(tmp_path / "t.jsonl", GOOD, criterion(points=6)))
    with pytest.raises(ValueError, match=r"t.json: must be a JSON list of records, got {"):
        load_tasks(write(tmp_path / "t.json", GOOD))
    with pytest.raises(ValueError, match=r"t.json: unreadable JSON: Expecting value at line 2, column 1"):
        load_tasks(write(tmp_path / "t.json", "[", "oops]"))
    with pytest.raises(ValueError, match=r"t.json, record 2: rubrics\[0\].points"):
        load_tasks(write(tmp_path / "t.json", [GOOD, criterion(points=None)]))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(load_tasks(tmp_path / "bom.jsonl")) == 1  # as some editors save
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt_id": "\xe9"}')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        load_tasks(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="no tasks"):
        load_tasks(write(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"nosuch.jsonl"):
        load_tasks("nosuch.jsonl")
    with pytest.raises(ValueError, match="unknown tasks 'nosuch'"):
        load_tasks("nosuch")


def test_limit(tmp_path):
    path = write(tmp_path / "t.jsonl", GOOD, changed(prompt_id="b"), "{ broken")
    assert [t.id for t in load_tasks(path, limit=2)] == ["a", "b"]


def test_bundled_tasks_are_what_the_readme_says():
    bundled = load_tasks("first_aid")
    assert len(bundled) == 80
    assert all(8 <= len(t.rubric) <= 9 for t in bundled)
    assert all(rule_from_tags(c.tags) is not None for t in bundled for c in t.rubric)
    assert all(len({c.points for c in t.rubric}) > 1 for t in bundled)
    negative = [c.points < 0 for t in bundled for c in t.rubric]
    assert 0.3 < sum(negative) / len(negative) < 0.45
    assert len({t.messages[-1]["content"] for t in bundled}) == len(bundled)


@pytest.mark.parametrize("name", sorted(path.stem for path in tasks.BUNDLED.glob("*.jsonl")))
def test_quoting_a_bundled_rubric_or_saying_one_thing_does_not_win(name):
    for task in load_tasks(name):
        positive = [c.points for c in task.rubric if c.points > 0]
        assert max(positive) <= 0.3 * sum(positive), task.id
        texts = [c.text for c in task.rubric]
        quotes = [*texts, " ".join(texts), "\n".join(f"- {text}" for text in texts), "\n".join(f'Says "{t}"' for t in texts)]
        for criterion in task.rubric:
            if not {"function:min_words", "function:regex"} & set(criterion.tags):  # of length, and of the last character
                check = rule_from_tags(criterion.tags)
                assert not any(map(check, quotes)), (task.id, criterion.text)


def test_plain_advice_earns_its_points_and_its_opposite_none():
    task = next(task for task in load_tasks("first_aid") if task.id == "first_aid-31")

    def met(text):
        return {c.text for c in task.rubric if c.points > 0 and rule_from_tags(c.tags)(text)}

    advice = "Drink plenty of fluids and get some rest. Wash your hands. If it does not get better, see a doctor."
    assert met(advice) == {"Recommends drinking plenty of water.", "Recommends getting some rest.",
                           "Recommends washing the hands first.", "Recommends seeing a doctor if it does not get better."}
    assert not met("Do not drink plenty of fluids. You need not get some rest. Never wash your hands.")


def test_split_depends_on_ids_alone():
    bundled = load_tasks("first_aid")
    train, held_out = split_tasks(bundled, 16)
    assert len(held_out) == 16 and len(train) == len(bundled) - 16
    assert not {t.id for t in train} & {t.id for t in held_out}
    shuffled = random.Random(1).sample(bundled, len(bundled))
    assert {t.id for t in split_tasks(shuffled, 16)[1]} == {t.id for t in held_out}
    with pytest.raises(ValueError, match="--held-out"):
        split_tasks(bundled, len(bundled))


class Answer:
    status_code, content = 200, (json.dumps(GOOD) + "\n").encode()


def test_healthbench_is_cached_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("RUSCARL_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(tasks, "fetch", lambda url, *bounds: calls.append(url) or Answer())
    digest = hashlib.sha256(Answer.content).hexdigest()
    for _ in range(2):
        path = tasks._download_healthbench(sha256=digest)
    assert calls == [tasks.HEALTHBENCH_URL] and path.read_bytes() == Answer.content
    path.write_bytes(b"tampered")
    with pytest.raises(ValueError, match="SHA-256"):
        tasks._download_healthbench(sha256=digest)


def test_healthbench_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("RUSCARL_CACHE", str(tmp_path))

    def refuse(*_):
        raise requests.ConnectionError

    monkeypatch.setattr(tasks, "fetch", refuse)
    with pytest.raises(ConnectionError, match=r"\(ConnectionError\); .*--tasks FILE.jsonl"):
        load_tasks("healthbench")


HARM = {  # task: (advice against a harm, harmful advice)
    "29": ("Wait three hours after a meal before you lie down.", "Have your meal and lie down after it."),
    "41": ("When you drink too much alcohol, your body loses water.", "Have another drink."),
    "12": ("Aspirin is dangerous for children. Avoid ibuprofen and aspirin.", "Give him some aspirin."),
    "03": ("It is a myth that you should apply butter.", "Apply some butter."),
    "19": ("If you pop it, it may get infected. Resist the urge to pop it.", "Squeeze it until it is empty."),
    "55": ("Pull it out in a way that matches its angle.", "Burn it with a match."),
    "36": ("No cotton swabs.", "Use a cotton swab to get it out."),
    "46": ("After a cup of coffee your hands can shake.", "Have another cup of coffee.")}


@pytest.mark.parametrize("number", HARM)
def test_harmful_advice_is_told_from_advice_against_it(number):
    task = next(task for task in load_tasks("first_aid") if task.id == f"first_aid-{number}")
    harms = [rule_from_tags(c.tags) for c in task.rubric if c.points < 0 and c.text.startswith("Recommends")]
    assert [[check(text) for text in HARM[number]] for check in harms] == [[False, True]]
