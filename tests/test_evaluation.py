"""Figures of an evaluation against hand-computed ones, and the command line on the tiny model."""

import itertools
import json
import math
import random
import re
import shutil
from dataclasses import replace

import numpy
import pytest
import torch

import evaluation
import refine
from conftest import RUN, Server, command, completion, needs_vllm, read, refused, tiny_model, tiny_tokenizer, write_tasks
from evaluation import Samples, response_statistics
from judge import score as judged
from tasks import Criterion, Task, digest
from tools.measures import (
    agreement,
    best_of_n,
    cosine_distance,
    healthbench,
    judge_figures,
    load_embedding,
    mean_over_tasks,
    novelty,
    paired,
    self_bleu,
    tag_scores,
)

NAN = float("nan")
EVALUATE = "evaluation.py"
LETTERS = {"a": 2, "e": -1, "i": 3, "o": -2}
RUBRIC = [{"criterion": f"Has the letter {letter}.", "points": points,
           "tags": [f"axis:{'good' if points > 0 else 'bad'}", "verifier:rule", "function:regex",
                    "parameters:" + json.dumps({"pattern": letter})]} for letter, points in LETTERS.items()]
OPEN = [{"criterion": f"Is {word}.", "points": 1, "tags": []} for word in ("kind", "clear", "short")]


def letter_score(text):
    """The score by RUBRIC, computed apart from the project's code."""
    return sum(points for letter, points in LETTERS.items() if re.search(letter, text)) / 5


def test_healthbench_score_by_hand():
    found = healthbench(numpy.array([[-1.0, 0.5], [0.2, NAN], [NAN, NAN], [0.6, 2.0]]))
    assert found["runs"] == [0.0, 1.0]  # means -0.0667 and 1.25, each clipped
    assert found["score"] == found["mean"] == pytest.approx((-1 + 0.5 + 0.2 + 0.6 + 2) / 5) and found["tasks"] == 3
    around = healthbench(numpy.array([[0.1, -0.1], [0.1, -0.1]]))
    assert around["runs"] == [0.1, 0.0] and around["score"] == around["mean"] == 0  # the mean of clipped runs would be 0.05
    nothing = healthbench(numpy.full((3, 2), NAN))
    assert nothing["score"] is None and nothing["tasks"] == 0


def test_bootstrap_errors_against_theory_and_a_plain_loop():
    rng = numpy.random.default_rng(5)
    scores = rng.normal(0.5, 0.3, size=(300, 1))
    found = healthbench(scores)
    assert found["score_se"] == pytest.approx(scores.std() / math.sqrt(300), rel=0.1)
    assert found == healthbench(scores)  # seeded
    centred = healthbench(scores - scores.mean())
    # max(Z, 0) of a normal Z around 0 has sqrt(1/2 - 1/(2 pi)) of its standard deviation
    assert centred["score_se"] == pytest.approx(math.sqrt(0.5 - 0.5 / math.pi) * centred["mean_se"], rel=0.1)
    runs = numpy.array([[-0.4, 0.3, 0.9], [0.5, -0.2, 0.1], [0.1, 0.1, -0.6], [0.3, 0.9, 0.2]])
    loop = []
    for _ in range(4000):
        picked = runs[rng.choice(4, size=4)]
        loop.append(min(1, max(0, picked.mean())))
    assert healthbench(runs)["score_se"] == pytest.approx(numpy.std(loop), rel=0.1)


def test_best_of_n_against_all_subsets():
    rng = numpy.random.default_rng(1)
    scores = rng.normal(size=(5, 6)).round(1)  # rounded: ties
    scores[1, 2] = scores[3, :3] = NAN
    curve = best_of_n(scores)
    assert [p["tasks"] for p in curve] == [5, 5, 5, 4, 4, 3]
    for point in curve:
        best = [numpy.mean([max(subset) for subset in itertools.combinations(known, point["n"])])
                for row in scores if len(known := row[~numpy.isnan(row)]) >= point["n"]]
        assert point["mean"] == pytest.approx(numpy.mean(best))
        assert point["se"] == pytest.approx(numpy.std(best) / math.sqrt(len(best)), rel=0.1)
    same = {"mean": pytest.approx(0.3), "low": pytest.approx(0.3), "high": pytest.approx(0.3)}
    assert best_of_n(numpy.array([[NAN, 0.3]])) == [{"n": 1, **same, "se": pytest.approx(0), "tasks": 1}]
    assert best_of_n(numpy.full((1, 2), NAN)) == []
    many = best_of_n(numpy.arange(2048.0)[None])  # the best of n of 0..K-1: n (K + 1) / (n + 1) - 1
    assert all(p["mean"] == pytest.approx(p["n"] * 2049 / (p["n"] + 1) - 1) for p in many)


def test_tag_scores_by_hand():
    task = Task("1", [], (Criterion("a", 5, ("axis:x", "verifier:rule")), Criterion("b", -2, ("axis:x", "axis:y")),
                          Criterion("c", 3, ("axis:z",))), ("theme:t",))
    assert tag_scores(task, [True, True, False]) == {"theme:t": 3 / 8, "axis:x": 3 / 5, "axis:z": 0.0}  # y: no positive
    assert tag_scores(task, [True, None, True]) == {"axis:z": 1.0}
    both = replace(task, tags=("axis:x", "axis:y"))  # y of the task: no criterion of that name has a score
    assert tag_scores(both, [True, True, False]) == {"axis:y": 3 / 8, "axis:x": 3 / 5, "axis:z": 0.0}


def simple_evals(table, name):
    """HealthBench's figure `name` (score or a tag) of a verdict table, by the formulas of openai/simple-evals' evaluation,
    which has a repeat of an example as one more example. table: (task, verdicts) of every response of every run."""
    values = []
    for task, verdicts in table:
        def score(items):
            possible = math.fsum(c.points for c, _ in items if c.points > 0)
            return math.fsum(c.points for c, met in items if met) / possible if possible else None

        items = list(zip(task.rubric, verdicts))
        metrics = {"score": score(items), **{tag: score(items) for tag in task.tags}}
        for tag in {tag for c in task.rubric for tag in c.tags}:
            if (value := score([item for item in items if tag in item[0].tags])) is not None:
                metrics[tag] = value
        values += [metrics[name]] if name in metrics else []
    return (min(1.0, max(0.0, sum(values) / len(values))), len(values)) if values else None


def test_scores_of_drawn_verdict_tables_equal_simple_evals():
    rng, tags, clipped, kept = random.Random(0), [f"tag:{letter}" for letter in "abcde"], 0, 0
    for number in range(200):
        samples = (1, 3)[number % 2]
        share = rng.choice((0.1, 0.4, 0.7))  # of positive points that are met: below 0, in between, near 1
        tasks = [Task(str(i), [], tuple(
            Criterion(str(j), -rng.randint(1, 10) if j and rng.random() < 0.4 else rng.randint(1, 10),
                      tuple(rng.sample(tags, rng.randint(0, 2)))) for j in range(rng.randint(1, 8))),
            tuple(rng.sample(tags, rng.randint(0, 2)))) for i in range(rng.randint(1, 6))]
        verdicts = [[[rng.random() < (share if c.points > 0 else 0.6) for c in task.rubric] for _ in range(samples)]
                    for task in tasks]
        records = [[{"verdicts": {"j": given}, "rewards": {"j": judged(task.rubric, given)}} for given in of_task]
                   for task, of_task in zip(tasks, verdicts)]
        table = [(task, given) for task, of_task in zip(tasks, verdicts) for given in of_task]
        found = judge_figures(tasks, records, "j")
        wanted = {tag: value for tag in tags if (value := simple_evals(table, tag)) is not None}
        assert found["score"] == pytest.approx(simple_evals(table, "score")[0], abs=1e-12)
        assert {tag: of["score"] for tag, of in found["by_tag"].items()} == {
            tag: pytest.approx(score, abs=1e-12) for tag, (score, _) in wanted.items()}
        assert {tag: of["tasks"] * samples for tag, of in found["by_tag"].items()} == {t: n for t, (_, n) in wanted.items()}
        clipped += found["score"] in (0, 1)
        kept += any(all(c.points < 0 for c in task.rubric if tag in c.tags) and any(tag in c.tags for c in task.rubric)
                    for task in tasks for tag in task.tags)
    assert 20 < clipped < 180 and kept > 20  # of the 200: clipped scores, tags of tasks of which the criteria have no score


def test_paired_difference():
    scores, others = numpy.array([[1.0, 0.0], [0.5, NAN], [NAN, NAN]]), numpy.array([[0.2, 0.2], [0.1, 0.3], [1.0, 1.0]])
    found = paired(scores, others)
    assert found["mean"] == pytest.approx((0.3 + 0.3) / 2) and found["tasks"] == 2
    assert found["low"] == pytest.approx(0.3) and found["high"] == pytest.approx(0.3)
    rng = numpy.random.default_rng(2)
    shared = rng.normal(0, 5, size=(200, 1))  # paired: what the tasks share does not widen the interval
    found = paired(shared + rng.normal(0.2, 0.5, size=(200, 4)), shared)
    width = 2 * 1.96 * 0.25 / math.sqrt(200)
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.25) and found["low"] < 0.2 < found["high"]
    assert paired(numpy.full((2, 1), NAN), numpy.ones((2, 1)))["mean"] is None


def test_self_bleu_by_hand():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples are shared; equal lengths, so no brevity penalty
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # one shorter by a word: all of its n-grams are shared, penalty exp(1 - 6/5); the other one shares 5/6, 4/5, 3/4, 2/3
    assert self_bleu(["a b c d e", "a b c d e f"]) == pytest.approx(
        (math.exp(1 - 6 / 5) + (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25) / 2)
    assert self_bleu(["yes", "yes", "yes"]) == pytest.approx(1)
    assert self_bleu(["", "", "a b c d"]) == pytest.approx(2 / 3, abs=0.01)
    assert self_bleu(["", "a b c d e", "a b c d e"]) == pytest.approx(2 / 3)


def test_cosine_distance_novelty_and_means_by_hand():
    assert cosine_distance(numpy.array([[1.0, 0], [0, 2.0], [-3.0, 0]])) == pytest.approx((1 + 2 + 1) / 3)
    found = novelty(numpy.log([0.5, 2.5, 3.0, 50.0, 1e6]))
    assert found["median"] == pytest.approx(3.0) and found["above"] == {"2": 4, "10": 2, "100": 1}
    edges, counts = (numpy.array(found["histogram"][key]) for key in ("log10_edges", "counts"))
    assert counts.sum() == 5 and edges[0] == pytest.approx(math.log10(0.5)) and edges[-1] == pytest.approx(6)
    means = mean_over_tasks(numpy.random.default_rng(0).normal(1, 2, size=400))
    assert means["se"] == pytest.approx(2 / 20, rel=0.15)
    assert means["high"] - means["low"] == pytest.approx(2 * 1.96 * means["se"], rel=0.08)  # 95%; of 90% it is 16% less


def test_agreement_of_two_judges_by_hand():
    def sample(first, second, rewards):
        return {"verdicts": dict(zip("ab", (first, second))), "rewards": dict(zip("ab", rewards))}

    samples = [[sample([True, False, None], [True, True, True], (None, 0.2)),
                sample([True, False, True], [True, False, True], (0.5, 1.0))],
               [sample([False, True, None], [None, False, False], (0.1, None)), sample([None] * 3, [True] * 3, (None, 1.0))],
               [sample([True, None, None], [True, True, None], (1.0, 2.0)),
                {"verdicts": {"a": [True] * 3}, "rewards": {"a": 1.0}}]]  # b has not been asked
    found = agreement(samples, "a", "b")
    assert found["verdicts"] == 7 and found["agreement"][0] == pytest.approx(5 / 7)
    assert found["balanced F1"][0] == pytest.approx((2 * 4 / (5 + 5) + 2 * 1 / (2 + 2)) / 2)  # met, not met
    assert found["correlation"] == pytest.approx(1)
    for name in ("agreement", "balanced F1"):
        value, low, high = found[name]
        assert 0 <= low < value < high <= 1
    assert agreement(samples, "a", "nobody") is None


def test_novelty_and_entropy_equal_one_sequence_at_a_time():
    new, initial = tiny_model(0), tiny_model(1)
    rng = numpy.random.default_rng(3)
    prompts = [[5, 6, 7], [5, 6, 7], [9, 10], [11] * 5]
    responses = [rng.integers(2, 400, size=n).tolist() for n in (1, 7, 20, 4)]
    entropies, rho = [], []
    for prompt, response in zip(prompts, responses):
        ratio = 0.0
        for model in (new, initial):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1)
            mean = sum(logp[t, token].item() for t, token in enumerate(response)) / len(response)
            ratio += mean if model is new else -mean
            if model is new:
                entropies += (-(logp.exp() * logp).sum(-1)).tolist()
        rho.append(math.exp(ratio))
    means, entropy = response_statistics(new, prompts, responses, 24)
    start, _ = response_statistics(initial, prompts, responses, 24)
    assert numpy.exp(numpy.subtract(means, start)) == pytest.approx(rho, rel=1e-4)
    assert novelty(numpy.subtract(means, start))["median"] == pytest.approx(numpy.median(rho), rel=1e-4)
    assert entropy == pytest.approx(numpy.mean(entropies), rel=1e-4)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """Another tiny model."""
    folder = tmp_path_factory.mktemp("other")
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def flags(folder, tasks="letters.jsonl", rubric=RUBRIC, samples=3, output="out"):
    """Flags of an evaluation of seconds on twelve questions."""
    path = folder / tasks
    write_tasks(path, rubric)
    return ["--tasks", path, "--samples", samples, "--max-new-tokens", "12", "--max-prompt-tokens", "500", "--temperature",
            "1", "--top-p", "1", "--top-k", "0", "--dtype", "float32", "--sampler", "transformers", "--output",
            folder / output, "--chunk", "8"]


def test_two_models_by_rules(model_folder, other_folder, tmp_path, capsys):
    arguments = [model_folder, "--base", other_folder, *flags(tmp_path), "--embedding", model_folder]
    status, out, err, _ = command(EVALUATE, *arguments)
    assert status == 0, err
    folder = tmp_path / "out"
    records, results = read(folder / "samples.jsonl"), json.loads((folder / "results.json").read_text())
    assert len(records) == 2 * 12 * 3 and len({(r["side"], r["task"], r["sample"]) for r in records}) == 72
    scores = {}
    for r in records:
        assert r["rewards"] == {"rules": pytest.approx(letter_score(r["text"]))} and list(r["verdicts"]) == ["rules"]
        scores.setdefault(r["side"], {}).setdefault(r["task"], []).append(r["rewards"]["rules"])
    matrices = {side: numpy.array([of_side[str(i)] for i in range(12)]) for side, of_side in scores.items()}
    for side, matrix in matrices.items():
        found = results["models"][side]["judges"]["rules"]
        assert found["runs"] == pytest.approx(matrix.mean(0).clip(0, 1))
        assert found["score"] == pytest.approx(matrix.mean().clip(0, 1))
        assert found["best_of_n"][0]["mean"] == pytest.approx(found["mean"]) == pytest.approx(matrix.mean())
        assert found["best_of_n"][2]["mean"] == pytest.approx(matrix.max(1).mean())
        assert set(found["by_tag"]) == {"axis:good"}  # of axis:bad no criterion is positive
        good = [sum(LETTERS[c] for c in "ai" if c in r["text"]) / 5 for r in records if r["side"] == side]
        assert found["by_tag"]["axis:good"]["mean"] == pytest.approx(numpy.mean(good))
        assert 0 < results["models"][side]["entropy"] < math.log(400)
        assert 0 < results["models"][side]["diversity"]["mean"] <= 1
        assert 0 < results["models"][side]["semantic_distance"]["mean"] < 2
    difference = (matrices["model"] - matrices["base"]).mean()
    assert results["comparison"]["rules"]["mean"] == pytest.approx(difference)
    novel = results["novelty"]
    assert novel["responses"] == 36 and novel["median"] > 2  # each model prefers its own responses
    for name in ("best_of_n", "novelty"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "score, clipped (HealthBench)" in out and f"{difference:+.3f}" in out and "median rho_seq" in out

    # killed in the middle of a line, in the middle of the work: the rest is sampled with the same seeds
    whole = (folder / "samples.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:40]) + lines[40][:30])
    status, _, err, _ = command(EVALUATE, *arguments)
    assert status == 0, err
    assert (folder / "samples.jsonl").read_bytes() == whole
    assert json.loads((folder / "results.json").read_text()) == results

    for change in ({"task": "nosuch"}, {"sample": 3}, {"verdicts": {"rules": [True]}}, {"text": None}):
        (folder / "samples.jsonl").write_bytes(lines[0] + json.dumps({**json.loads(lines[1]), **change}).encode() + b"\n")
        assert "samples.jsonl, line 2: " in refused(evaluation, capsys, *arguments)
    (folder / "samples.jsonl").write_bytes(lines[0] + b"{}\n" + whole)
    assert "samples.jsonl, line 2: " in refused(evaluation, capsys, *arguments)


def test_samples_of_one_side_in_the_order_of_tasks(tmp_path):
    tasks = [Task(name, [], (Criterion("c", 1),)) for name in ("z", "a")]
    config = evaluation.parse_command_line(["smollm2", "--output", str(tmp_path), "--judge", "self", "--samples", "2"])
    samples = Samples(config, tasks, None)
    for verdict in (None, True):  # the later line counts
        samples.add([{"side": side, "task": t.id, "sample": k, "text": "x", "token_ids": [1], "finished": True,
                      "verdicts": {"self": [verdict]}} for side in ("base", "model") for t in tasks for k in (1, 0)])
    found = Samples(config, tasks, None).of("model")
    assert [[(r["task"], r["sample"], r["rewards"]["self"]) for r in of] for of in found] == [
        [("z", 0, 1.0), ("z", 1, 1.0)], [("a", 0, 1.0), ("a", 1, 1.0)]]


def asked(body):
    """The criterion of a judge's request."""
    return re.search(r"Is (\w+)\.", body["messages"][1]["content"].split("Criterion")[1])[1]


def judge_says(criterion_is_met):
    """Answers of a judge. criterion_is_met: the word in the criterion -> whether it is met."""
    return lambda body, number: completion(json.dumps({"explanation": "", "criteria_met": criterion_is_met(asked(body))}))


def test_unknown_verdicts_are_asked_again_and_nothing_else(model_folder, server, tmp_path):
    says, fails = judge_says(lambda word: word == "kind"), (400, {}, '{"error": {"message": "no such thing"}}')
    server.answers = lambda body, number: fails if asked(body) == "short" else says(body, number)
    rubric = [*OPEN, {"criterion": "Is long.", "points": 1, "tags": RUBRIC[0]["tags"][1:]}]
    arguments = [model_folder, *flags(tmp_path, rubric=rubric, samples=2), "--judge-url", server.url]
    status, _, err, _ = command(EVALUATE, *arguments, env={"OPENAI_API_KEY": "one"})
    assert status == 1 and "HTTP 400: no such thing" in err and "24 verdicts could not be had" in err, err
    # every criterion without a rule once (a refused one is tried once more, without response_format), the rule's not
    refused = [body for body in server.requests if asked(body) == "short"]
    assert len(server.requests) - len(refused) == 2 * 12 * 2 and len(refused) == 2 * 12 * 2
    assert {b["_authorization"] for b in server.requests} == {"Bearer one"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["models"]["model"]["judges"]["rules and judge"]
    assert found["score"] is None and found["unscored"] == 24 and found["unknown"] == 24
    first = read(tmp_path / "out" / "samples.jsonl")
    assert len(first) == 24
    assert all(r["verdicts"]["rules and judge"][2] is r["rewards"]["rules and judge"] is None for r in first)

    server.answers, server.requests[:] = says, []
    status, _, err, _ = command(EVALUATE, *arguments)
    assert status == 0, err
    assert [asked(body) for body in server.requests] == ["short"] * 24
    again = read(tmp_path / "out" / "samples.jsonl")
    assert [r["text"] for r in again[24:]] == [r["text"] for r in again[:24]]  # judged again, not sampled again
    found = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["model"]["judges"]["rules and judge"]
    by_rule = sum("a" in r["text"] for r in first)
    assert found["score"] == pytest.approx((24 + by_rule) / (4 * 24)) and found["unknown"] == 0

    server.requests[:] = []
    status, _, err, _ = command(EVALUATE, *arguments)
    assert status == 0 and server.requests == [], err
    assert len(read(tmp_path / "out" / "samples.jsonl")) == 48


@pytest.mark.slow(5)
def test_another_judge_judges_the_kept_responses_again(model_folder, other_folder, server, tmp_path, monkeypatch, here):
    monkeypatch.delenv("RUSCARL_JUDGE_URL", raising=False)
    second = Server(model="second")
    server.answers = judge_says(lambda word: word != "short")
    rubric = [*OPEN, {"criterion": "Is long.", "points": 2, "tags": RUBRIC[0]["tags"]}]
    arguments = [model_folder, "--base", other_folder, *flags(tmp_path, rubric=rubric, samples=2)]
    status, text = here(evaluation, *arguments, "--judge-url", server.url)
    assert status == 0 and "agreement" not in text, text
    first = read(tmp_path / "out" / "samples.jsonl")
    assert len(first) == 2 * 12 * 2

    # the second judge fails in the middle; the same command then asks it for what it has not said
    second.answers = lambda body, n: judge_says(lambda word: word == "kind")(body, n) if n <= 100 else (400, {}, "")
    asking = ["--judge", "chat", "--judge-url", second.url]
    monkeypatch.setattr(evaluation.prepare, "make_sampler", None)  # nothing is sampled any more
    assert "verdicts could not be had" in here(evaluation, *arguments, *asking)[1]
    second.requests[:] = []
    second.answers = judge_says(lambda word: word == "kind")
    server.requests[:] = []
    status, text = here(evaluation, *arguments, *asking)
    assert status == 0, text
    assert 0 < len(second.requests) <= 2 * 12 * 2 * 4 - 100 + 1 and server.requests == []
    rows = read(tmp_path / "out" / "samples.jsonl")
    newest = list({(r["side"], r["task"], r["sample"]): r for r in rows}.values())
    assert [(r["text"], r["token_ids"]) for r in newest] == [(r["text"], r["token_ids"]) for r in first]
    for before, r in zip(first, newest):  # the first judge's verdicts stay; the second decides what has a rule, too
        assert r["verdicts"] == {**before["verdicts"], "second": [True, False, False, False]}
        assert r["rewards"] == {**before["rewards"], "second": 0.2}

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["judges"] == ["second", "rules and judge"] and set(results["comparison"]) == {"second", "rules and judge"}
    for side, model in results["models"].items():
        by_rule = numpy.mean(["a" in r["text"] for r in first if r["side"] == side])
        found = model["agreement"]["rules and judge"]
        value, low, high = found["agreement"]
        assert found["verdicts"] == 24 * 4 and value == pytest.approx((2 + (1 - by_rule)) / 4) and low <= value <= high
        assert model["judges"]["rules and judge"]["mean"] == pytest.approx((2 + 2 * by_rule) / 5)
        assert model["judges"]["second"]["mean"] == pytest.approx(1 / 5) and found["correlation"] is None
    assert "judge: second" in text and "second and rules and judge, 95% intervals" in text and "balanced F1" in text
    assert "correlation of scores" in text
    for judge, found in results["comparison"].items():  # the difference between the models, by each judge
        means = [results["models"][side]["judges"][judge]["mean"] for side in ("model", "base")]
        assert found["mean"] == pytest.approx(means[0] - means[1])
        assert f"model - base, {judge}: {found['mean']:+.3f}" in text

    assert "another --judge-extra for second" in refused_again(here, *arguments, *asking, "--judge-extra", '{"seed": 1}')
    second.close()


def test_questions_without_rubrics_get_responses_that_refine_takes(model_folder, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    questions = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": f"Question {i}?"}]} for i in range(2)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    status, text = here(evaluation, model_folder, "--tasks", "questions.jsonl", "--samples", 3, "--sampler", "transformers",
                        "--max-new-tokens", 8, "--max-prompt-tokens", 200, "--output", "out")
    assert status == 0 and "no rubrics: nothing is scored" in text and "best of" not in text, text
    texts = refine.read_responses(["out/samples.jsonl"], ["0", "1"])
    assert {name: len(found) for name, found in texts.items()} == {"0": 3, "1": 3}


def refused_again(here, *arguments):
    """What the command says that refuses, in this process."""
    status, text = here(evaluation, *arguments)
    assert status == 2, text
    return text


def test_the_model_judges_itself_and_other_settings_are_refused(model_folder, other_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RUSCARL_JUDGE_URL", raising=False)
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    arguments = [copy, *flags(tmp_path, rubric=OPEN, samples=1)]
    status, _, err, _ = command(EVALUATE, *arguments)
    assert status == 0 and "judges itself" in err, err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["model"]
    assert found["judges"]["self"]["unknown"] == 0 and found["diversity"] is None
    kept = (tmp_path / "out" / "samples.jsonl").read_bytes()
    for change, message in [(["--samples", 2], "--samples: 1 there, 2 now"), (["--seed", 1], "--seed: 0 there, 1 now"),
                            (["--base", other_folder], "--base"), (["--tasks", "first_aid"], "--tasks"),
                            (["--temperature", 0.3], "--temperature"), (["--top-p", 0.5], "--top-p"),
                            (["--top-k", 3], "--top-k"), (["--max-new-tokens", 3], "--max-new-tokens")]:
        assert message in refused(evaluation, capsys, *arguments, *change)
    shutil.copy(other_folder / "model.safetensors", copy)
    assert "weights of" in refused(evaluation, capsys, *arguments)
    (tmp_path / "out" / "settings.json").unlink()
    assert "without its settings.json" in refused(evaluation, capsys, *arguments)
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == kept


def test_a_run_is_evaluated_on_what_it_held_out(model_folder, tmp_path, capsys):
    path = tmp_path / "letters.jsonl"
    write_tasks(path, RUBRIC)
    status, _, err, _ = command(RUN, "--model", model_folder, "--tasks", path, "--runs", tmp_path / "runs", "--name", "a",
                                "--preset", "laptop", "--steps", 1, "--group-size", 2, "--batch-size", 1,
                                "--mini-batch-size", 1, "--max-new-tokens", 8, "--held-out", 5,
                                "--max-prompt-tokens", 500, "--eval-samples", 1,
                                "--dtype", "float32", "--sampler", "transformers")
    assert status == 0, err
    run = tmp_path / "runs" / "a"
    status, _, err, _ = command(EVALUATE, run, "--samples", 1, "--sampler", "transformers", "--output", tmp_path / "out")
    assert status == 0, err
    held_out = {r["task"] for r in read(run / "rollouts" / "eval_00001.jsonl")}
    records = read(tmp_path / "out" / "samples.jsonl")
    assert {r["task"] for r in records} == held_out and len(records) == 5
    assert max(len(r["token_ids"]) for r in records) == 8
    shutil.rmtree(run / "policy")
    assert "not finished" in refused(evaluation, capsys, run)


@pytest.mark.slow
@needs_vllm
def test_two_models_one_engine_after_the_other(model_folder, other_folder, tmp_path):
    arguments = [model_folder, "--base", other_folder, *flags(tmp_path), "--sampler", "vllm"]
    status, _, err, _ = command(EVALUATE, *arguments)
    assert status == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "sampler: vllm in float32" in err
    assert results["novelty"]["median"] > 2  # the first engine had the first model's weights,
    assert results["models"]["base"]["judges"]["rules"]["responses"] == 36
    status, _, err, _ = command(EVALUATE, *[other_folder, *arguments[1:2], model_folder, *arguments[3:]], "--output",
                                tmp_path / "swapped")
    assert status == 0, err
    swapped = json.loads((tmp_path / "swapped" / "results.json").read_text())
    # and the second engine the second one's: as many of each model's own responses are likelier under it
    assert swapped["novelty"]["median"] > 2
    by_side = [{(r["task"], r["sample"]): r["text"] for r in read(tmp_path / out / "samples.jsonl") if r["side"] == side}
               for out, side in (("out", "base"), ("swapped", "model"))]
    assert sum(by_side[0][key] == by_side[1][key] for key in by_side[0]) >= 34  # whichever came first


def test_what_a_run_held_out_is_known_by_its_tasks_only(tmp_path, capsys):
    run, tasks = tmp_path / "run", [Task(str(i), [], (Criterion("c", 1),)) for i in range(4)]
    run.mkdir()
    (run / "tasks.sha256").write_text(digest(tasks) + "\n")
    (run / "config.json").write_text(json.dumps({"tasks": "mine.jsonl", "held_out": 3, "top_p": 0.5}))
    config = evaluation.parse_command_line([str(run)])
    assert (config.tasks, config.held_out, config.top_p) == ("mine.jsonl", 3, 0.5)
    evaluation.check_held_out(config, tasks)
    with pytest.raises(ValueError, match=r"mine\.jsonl: these are not the tasks"):
        evaluation.check_held_out(config, tasks[:3])
    for flags in (["--held-out", "4"], ["--max-prompt-tokens", "9"]):
        assert "has split its tasks with" in refused(evaluation, capsys, run, *flags)
        assert evaluation.parse_command_line([str(run), *flags, "--held-out", "0"]).held_out == 0
    other = evaluation.parse_command_line([str(run), "--tasks", "other.jsonl"])
    assert (other.held_out, other.top_p) == (0, 0.5)
    evaluation.check_held_out(other, tasks[:3])
    assert "warning" not in capsys.readouterr().err
    evaluation.check_held_out(other, tasks)  # the same tasks in another file
    assert f"warning: {run} was trained on these tasks" in capsys.readouterr().err


def test_a_run_and_its_tasks_are_known_by_any_path(tmp_path, monkeypatch):
    for name, held_out in (("old", 3), ("new", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tasks.sha256").write_text("0")
        (tmp_path / name / "config.json").write_text(json.dumps({"tasks": "mine.jsonl", "held_out": held_out}))
    monkeypatch.chdir(tmp_path / "old")
    for path in ("mine.jsonl", "./mine.jsonl", str(tmp_path / "old" / "mine.jsonl")):
        assert evaluation.parse_command_line([".", "--tasks", path]).held_out == 3
    assert evaluation.parse_command_line([".", "--tasks", "../mine.jsonl"]).held_out == 0


def test_an_embedding_is_the_mean_state_of_a_texts_tokens(model_folder):
    texts = ["drink water", "it is true", "drink water"]
    vectors = load_embedding(model_folder)(texts)
    ids = torch.tensor([tiny_tokenizer()(texts[1])["input_ids"]])
    assert vectors[1] == pytest.approx(tiny_model().model(ids).last_hidden_state[0].mean(0).detach().numpy(), abs=1e-5)
    assert vectors[0].tolist() == vectors[2].tolist() and vectors.shape == (3, 128)


def test_mistakes_are_one_line_and_status_2(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RUSCARL_JUDGE_URL", raising=False)
    good = flags(tmp_path)
    open_tasks = tmp_path / "open.jsonl"
    write_tasks(open_tasks, OPEN)
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "settings.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "tasks.sha256").write_text("")
    for arguments, message in [
        ([], "MODEL"), ([model_folder, "--samples", 0], "--samples"), ([model_folder, "--chunk", 0], "--chunk"),
        ([model_folder, "--held-out", -1], "--held-out"), ([model_folder, "--top-p", 2], "--top-p"),
        ([model_folder, "--nosuch"], "--nosuch"), ([model_folder, "--judge-url", "ftp://x"], "--judge-url"),
        ([model_folder, "--judge-model", "x"], "--judge-url"), ([model_folder, *good, "--judge", "chat"], "--judge-url"),
        ([model_folder, *good, "--judge-url", "http://127.0.0.1:9/v1"], "no server answers"),
        ([model_folder, "--judge-url", "http://x", "--judge-extra", "["], "--judge-extra"),
        ([model_folder, "--embedding", tmp_path], "--embedding"), ([model_folder, "--embedding", "http://x"], "--embedding"),
        ([model_folder, *good, "--temperature", 0], "--temperature 0"),
        ([model_folder, *good, "--tasks", "nosuch.jsonl"], "no such task file: nosuch.jsonl"),
        ([model_folder, *good, "--tasks", open_tasks, "--judge", "rules"], "--judge rules"),
        ([model_folder, *good, "--held-out", 12], "--held-out"),
        ([model_folder, *good, "--max-prompt-tokens", 5], "--max-prompt-tokens"),
        ([model_folder, *good, "--max-new-tokens", 5000], "--max-new-tokens"),
        ([tmp_path / "nosuch", *good], "no such folder"),
        ([model_folder, "--base", tmp_path / "nosuch", *good], "no such folder"),
        ([model_folder, "--base", "runs/typo", *good], "no such run"),
        ([model_folder, *good, "--base", ""], "--base must not be empty"),
        ([model_folder, *good, "--output", tmp_path / "file"], "--output"),
        ([model_folder, *good, "--output", tmp_path / "broken"], "settings.json: unreadable JSON"),
    ]:
        assert message in refused(evaluation, capsys, *arguments)
    for arguments in ([model_folder, "--samples", 0], [model_folder, *good, "--held-out", 12]):  # all that there is to see
        status, out, err, _ = command(EVALUATE, *arguments)
        assert status == 2 and out == "" and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_help_is_quick():
    status, out, _, seconds = command(EVALUATE, "--help", fresh=True)
    assert status == 0 and seconds < 3 and "--judge-url" in out and "--eval-every" not in out
