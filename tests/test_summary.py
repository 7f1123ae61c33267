"""The table at the end of a run."""

import json

import pytest

from plumbing import config, files, runs, terminal

LONG = "Recommends seeing a doctor if it does not get better within a week or so."


def sample(task, reward, text="Rest. Then drink.", met=(True, False)):
    criteria = [{"criterion": LONG, "points": 3, "met": met[0]}, {"criterion": "Is rude.", "points": -4, "met": met[1]}]
    return {"task": task, "question": f"What about {task}?", "response": text, "reward": reward, "criteria": criteria}


def test_the_change_of_the_score_and_its_error():
    before = [sample("a", 0.0), sample("a", 0.2), sample("b", 0.1), sample("c", None)]
    after = [sample("a", 0.5), sample("b", 0.2), sample("b", None), sample("c", 0.9)]
    # a: 0.1 -> 0.5, b: 0.1 -> 0.2, c has no score before: changes 0.4 and 0.1, standard error 0.15
    assert "+0.250 +- 0.150: not more than two standard errors" in terminal.change(before, after)
    assert "+1.000 +- 0.000: more than two" in terminal.change([sample("a", 0.0), sample("b", 0.0)],
                                                               [sample("a", 1.0), sample("b", 1.0)])
    assert "Too few questions" in terminal.change(before, [sample("a", 1.0)])


def test_the_median_response():
    assert terminal.median_response([sample("a", r) for r in (0.9, 0.1, 0.5, 0.3)])["reward"] == 0.3
    assert terminal.median_response([sample("a", r) for r in (0.9, None, 0.5, 0.3)])["reward"] == 0.5
    assert terminal.median_response([sample("a", None)])["reward"] is None


def test_wanted_and_unwanted_criteria_stand_apart():
    rows = terminal.rates_table({LONG: 0.5, "Is rude.": 1.0, "Of one step only.": 1.0}, {LONG: 1.0, "Is rude.": 0.0},
                                [sample("a", 0.0)])
    assert [row[0] for row in rows] == ["responses that meet what is wanted (points)",
                                        "  Recommends seeing a doctor if it does... (+3)",
                                        "responses that do what is unwanted", "  Is rude. (-4)"]
    assert rows[1][1:] == ("50%", "100%") and rows[3][1:] == ("100%", "0%")


@pytest.fixture
def run(tmp_path):
    run = runs.Run(config.Config(runs=str(tmp_path), name="r", held_out=2, eval_samples=2), "digest")
    (run.folder / "rollouts").mkdir(parents=True)
    rates = {LONG: 1.0, "Is rude.": 0.0}
    shares = dict.fromkeys(("eval/recited", "scaffold/recited_plain", "response/truncated", "clip_fraction"), 0.0)
    rows = [{"step": step, "eval/score": score, "eval/score_se": 0.01, "eval/length": 9.0, "eval/reached": 1,
             "eval/pass_rate": rates, "reward/mean": score, **shares} for step, score in ((0, 0.1), (2, 0.4))]
    run.metrics.write_text(files.as_lines(rows))
    for step, (score, text) in {0: (0.1, "First.\x1b[2J"), 2: (0.4, "Second. More.")}.items():
        samples = [sample(task, score + i / 10, text) for task in ("a", "b") for i in range(2)]
        (run.folder / "rollouts" / f"eval_{step:05d}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return run


def test_summary(run, capsys):
    terminal.summary(run, run.config)
    printed = capsys.readouterr().out
    for text in ("score (at most 1)", "+0.400 +- 0.010", "distinct first sentences", "25%", "What about a?", "What about b?",
                 "changed by +0.300 +- 0.000: more", "before, median (+0.10)", "after, median (+0.40)", "Second. More."):
        assert text in printed
    assert "\x1b" not in printed


def test_one_question_has_no_standard_error(run, capsys):
    rows = [{name: value for name, value in row.items() if name != "eval/score_se"} for row in run.rows()]
    run.metrics.write_text(files.as_lines(rows))
    terminal.summary(run, run.config)
    assert "+0.400\n" in capsys.readouterr().out
    run.draw_curves()


def test_curves_do_not_hide_lines_at_zero(run, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    run.draw_curves()
    [labels] = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in drawn[0].axes
                if axis.get_ylabel() == "share"]
    assert labels == ["0 throughout: eval/recited,\nscaffold/recited_plain,\nresponse/truncated,\nclip_fraction"]
