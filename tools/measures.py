"""Figures of an evaluation, from scores, verdicts and texts; the same as a table and as pictures.

Scores come as one matrix [tasks, K]: K responses to each task, NaN where a response has no score. All errors are of a
bootstrap over tasks: 1,000 resamples with a fixed seed.
"""

import math
from functools import cache

import numpy
from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU

from judge import score
from plumbing.rules import rule_from_tags
from plumbing.terminal import one_line
from tools.checks import balanced_f1, interval

RULE_TAGS = ("verifier:", "function:", "parameters:")  # say how a criterion is checked, not what it is about


def known_means(scores, weights):
    """Weighted mean of each column's known scores, NaN where none is known. scores: [rows, K]; weights: [..., rows]."""
    known = ~numpy.isnan(scores)
    with numpy.errstate(invalid="ignore"):
        return (weights @ numpy.where(known, scores, 0.0)) / (weights @ known)


def bootstrap(scores, draws=1000):
    """`known_means` of each resample of the tasks: [draws, K]. scores: [tasks, K]."""
    tasks = len(scores)
    return known_means(scores, numpy.random.default_rng(0).multinomial(tasks, numpy.full(tasks, 1 / tasks), size=draws))


def mean_over_tasks(values):
    """{mean, se, low, high, tasks} of one value a task, low to high being the 95% interval; None for what no task has."""
    values = numpy.asarray(values, dtype=float)[:, None]
    if not len(values):
        return {"mean": None, "se": None, "low": None, "high": None, "tasks": 0}
    drawn = bootstrap(values)
    low, high = numpy.percentile(drawn, [2.5, 97.5]).tolist()
    return {"mean": float(values.mean()), "se": float(drawn.std()), "low": low, "high": high, "tasks": len(values)}


def healthbench(scores):
    """HealthBench's reported score. scores: [tasks, K], not clipped; column k is run k, one response an example.

    A run's score is the mean over its examples, clipped to [0, 1]; with several runs, the mean of theirs. Its error is the
    standard deviation of that figure over bootstrap resamples. Examples without any known score are left out. Returns
    score, score_se, mean and mean_se (not clipped), runs (their scores), tasks (examples); None where nothing is known.
    """
    scores = scores[~numpy.isnan(scores).all(axis=1)]
    if not len(scores):
        return {"score": None, "score_se": None, "mean": None, "mean_se": None, "runs": [], "tasks": 0}
    means, drawn = known_means(scores, numpy.ones(len(scores))), bootstrap(scores)  # [K], [draws, K]
    found = {"runs": [None if math.isnan(run) else float(run) for run in means.clip(0, 1)], "tasks": len(scores)}
    for name, low, high in (("score", 0, 1), ("mean", -math.inf, math.inf)):
        found[name] = float(numpy.nanmean(means.clip(low, high)))
        found[f"{name}_se"] = float(numpy.nanmean(drawn.clip(low, high), axis=1).std())
    return found


def tag_scores(task, verdicts):
    """{tag: score} of one response, as HealthBench counts them. Tags that name a criterion's rule are left out.

    A tag of the task has the whole score; a tag of criteria has the score on these criteria alone. Left out where undefined.
    """
    scores = {tag: score(task.rubric, verdicts) for tag in task.tags}
    for tag in {tag for criterion in task.rubric for tag in criterion.tags if not tag.startswith(RULE_TAGS)}:
        part = [(criterion, met) for criterion, met in zip(task.rubric, verdicts, strict=True) if tag in criterion.tags]
        scores[tag] = score([criterion for criterion, _ in part], [met for _, met in part])
    return {tag: value for tag, value in scores.items() if value is not None}


@cache
def _best_weights(count):
    """[count, count]: row N-1 holds the chance of each of `count` scores, in ascending order, to be the best of N drawn."""
    return numpy.array([[math.comb(i, n - 1) / math.comb(count, n) for i in range(count)] for n in range(1, count + 1)])


def best_of_n(scores):
    """Best-of-N for N = 1..K: the expected best of N responses drawn without replacement, mean over tasks.

    scores: [tasks, K]. The unbiased estimator: over all subsets of N of a task's known scores, computed from their order.
    Returns a list of `mean_over_tasks` with n, over the tasks that have n known scores; an n that no task has is left out.
    """
    best = numpy.full(scores.shape, numpy.nan)
    for row, of_task in zip(best, scores):
        known = numpy.sort(of_task[~numpy.isnan(of_task)])
        row[: len(known)] = _best_weights(len(known)) @ known
    columns = [column[~numpy.isnan(column)] for column in best.T]
    return [{"n": n, **mean_over_tasks(column)} for n, column in enumerate(columns, 1) if len(column)]


def paired(scores, others):
    """`mean_over_tasks` of the difference of two models on the same tasks. Two [tasks, K], rows the same tasks.

    A task's score is the mean of its known scores; tasks for which either model has none are left out.
    """
    first, second = (known_means(each.T, numpy.ones(each.shape[1])) for each in (scores, others))  # [tasks]
    differences = first - second
    return mean_over_tasks(differences[~numpy.isnan(differences)])


def novelty(log_ratios):
    """Equation 5 over responses: rho_seq = exp(mean over tokens of log pi_new - log pi_init).

    log_ratios: the mean of each response, nats a token. Returns the median of rho, the number of responses above 2, 10
    and 100, and a histogram over log10 rho. No mean of rho, which a few outliers would decide.
    """
    logs = numpy.asarray(log_ratios, dtype=float)
    counts, edges = numpy.histogram(logs / math.log(10), bins=40)
    return {"responses": len(logs), "median": float(numpy.median(numpy.exp(logs))),
            "above": {str(limit): int((logs > math.log(limit)).sum()) for limit in (2, 10, 100)},
            "histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()}}


def self_bleu(texts):
    """Mean BLEU (sacrebleu's, up to 4-grams, 0 to 1) of each text with the other texts as its references.

    A text shorter than 4 tokens is compared by the n-grams that it has; an empty text equals other empty texts only.
    """
    bleu, values = BLEU(effective_order=True), []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1 :]
        values.append(bleu.sentence_score(text, others).score / 100 if text.strip() else
                      float(any(not other.strip() for other in others)))
    return float(numpy.mean(values))


def cosine_distance(vectors):
    """Mean cosine distance over all pairs of rows. vectors: [texts, width], at least two, none of them 0."""
    unit = vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = numpy.triu_indices(len(unit), k=1)
    return float(1 - (unit @ unit.T)[pairs].mean())


def score_matrix(records, judge):
    """The scores that `judge` gave: [tasks, K], not clipped, NaN where there is none. records: [tasks][K]."""
    return numpy.array([[record["rewards"].get(judge) for record in of_task] for of_task in records], dtype=float)


def judge_figures(tasks, records, judge):
    """Scores by one judge, over all and by tag (the most frequent tags first), Best-of-N, and what is unknown."""
    scores, by_tag, verdicts = score_matrix(records, judge), {}, []
    for row, (task, of_task) in enumerate(zip(tasks, records)):
        for column, record in enumerate(of_task):
            given = record["verdicts"].get(judge, [None] * len(task.rubric))
            verdicts += given
            for tag, value in tag_scores(task, given).items():
                by_tag.setdefault(tag, numpy.full(scores.shape, numpy.nan))[row, column] = value
    by_tag = {tag: healthbench(by_tag[tag]) for tag in sorted(by_tag)}
    return {**healthbench(scores), "best_of_n": best_of_n(scores),
            "by_tag": dict(sorted(by_tag.items(), key=lambda item: -item[1]["tasks"])),
            "responses": scores.size, "unscored": int(numpy.isnan(scores).sum()),
            "verdicts": len(verdicts), "unknown": verdicts.count(None)}


def model_figures(tasks, records, judges, embed):
    """All figures of one model's responses but their entropy. records: [tasks][K].

    judges: names; the first is compared with each of the others. embed: texts -> [texts, width] for the semantic distance.
    """
    flat = [record for of_task in records for record in of_task]
    texts = [[record["text"] for record in of_task] for of_task in records]
    full = [kept for of_task in texts if len(kept := [text for text in of_task if text]) > 1]  # an empty text has no vector
    diversity = mean_over_tasks([1 - self_bleu(of_task) for of_task in texts]) if len(texts[0]) > 1 else None
    return {"length": float(numpy.mean([len(record["token_ids"]) for record in flat])),
            "truncated": float(numpy.mean([not record["finished"] for record in flat])), "diversity": diversity,
            "semantic_distance": mean_over_tasks([cosine_distance(embed(t)) for t in full]) if embed and full else None,
            "judges": {judge: judge_figures(tasks, records, judge) for judge in judges},
            "agreement": {other: agreement(tasks, records, judges[0], other) for other in judges[1:]}}


def agreement(tasks, records, judge, other):
    """How far two judges agree where both gave a verdict: verdicts (their number), agreement (share of equal verdicts),
    balanced_f1, both with a 95% interval over tasks as ..._95, correlation (of scores); None for what is undefined. Criteria
    that rules decided for both judges are left out."""
    by_rules = judge.startswith("rules and ") and other.startswith("rules and ")
    both = [(a, b, row) for row, (task, of_task) in enumerate(zip(tasks, records)) for record in of_task
            for a, b, criterion in zip(record["verdicts"].get(judge, []), record["verdicts"].get(other, []), task.rubric)
            if None not in (a, b) and not (by_rules and rule_from_tags(criterion.tags))]
    found = {"verdicts": len(both), "agreement": None, "balanced_f1": None, "correlation": None}
    if both:
        first, second, owners = map(numpy.array, zip(*both))
        for name, statistic in (("agreement", lambda a, b: float((a == b).mean())), ("balanced_f1", balanced_f1)):
            found |= {name: statistic(first, second), f"{name}_95": interval(statistic, first, second, owners).tolist()}
    scores = numpy.stack([score_matrix(records, name).flatten() for name in (judge, other)], axis=1)  # [responses, 2]
    scores = scores[~numpy.isnan(scores).any(axis=1)]
    if len(scores) > 1 and scores.std(axis=0).min() > 1e-9:
        found["correlation"] = float(numpy.corrcoef(scores.T)[0, 1])
    return found


def print_table(results):
    """One column a model, then the comparison, novelty and the tags. results: what results.json holds."""
    models, (judge, *others) = list(results["models"].values()), results["judges"]
    _line("", [model["name"] if len(model["name"]) <= 20 else "..." + model["name"][-17:] for model in models])
    for name in (judge, *others):
        print(f"judge: {one_line(name)}")
        columns = [model["judges"][name] for model in models]
        _row("  score, clipped (HealthBench)", columns, "score", "score_se")
        _row("  score, not clipped", columns, "mean", "mean_se")
        curves = [{point["n"]: point for point in column["best_of_n"]} for column in columns]
        for n in sorted({2**i for i in range(1, 12)} & {n for curve in curves for n in curve}):
            _row(f"  best of {n}", [curve.get(n) for curve in curves], "mean", "se")
        _line("  unknown verdicts", [f"{column['unknown']} of {column['verdicts']}" for column in columns])
        _line("  responses without a score", [f"{column['unscored']} of {column['responses']}" for column in columns])
    for other in others:
        print(f"agreement of {one_line(judge)} with {one_line(other)}, 95% intervals")
        columns = [model["agreement"][other] for model in models]
        for key, label in (("agreement", "  share of equal verdicts"), ("balanced_f1", "  balanced F1")):
            cells = ["{:.3f} ({:.2f} to {:.2f})".format(c[key], *c[f"{key}_95"]) if c["verdicts"] else "-" for c in columns]
            _line(label, cells)
        _row("  correlation of scores", columns, "correlation")
    for key, label in (("diversity", "diversity, 1 - Self-BLEU"), ("semantic_distance", "semantic distance")):
        if any(model[key] for model in models):
            _row(label, [model[key] for model in models], "mean", "se")
    _row("entropy, nats", models, "entropy")
    _line("length, tokens", [f"{model['length']:.0f}" for model in models])
    _line("cut off", [f"{model['truncated']:.0%}" for model in models])
    for name, found in results["comparison"].items():
        if found["mean"] is not None:
            print(f"\nmodel - base, {one_line(name)}: {found['mean']:+.3f} (95% {found['low']:+.3f} to "
                  f"{found['high']:+.3f}, {found['tasks']} tasks)")
    if found := results["novelty"]:
        above = ", ".join(f"{count} above {limit}" for limit, count in found["above"].items())
        print(f"novelty: median rho_seq {found['median']:.3f}; {above}, of {found['responses']}")
    by_tag = [model["judges"][judge]["by_tag"] for model in models]
    if by_tag[0]:
        print(f"\nby tag, clipped ({one_line(judge)})")
    for tag in list(by_tag[0])[:30]:
        _row(f"  {one_line(tag)} ({by_tag[0][tag]['tasks']})", [tags.get(tag) for tags in by_tag], "score", "score_se")


def _line(label, cells):
    print(f"{label[:46]:46s}" + "".join(f"{cell:>22s}" for cell in cells))


def _row(label, columns, key, error=""):
    """A line with what each column (a dict or None) has under `key`, and its error."""
    form = "{:+.3f} +- {:.3f}" if error else "{:.3f}"
    _line(label, [form.format(c[key], c.get(error)) if c and c[key] is not None else "-" for c in columns])


def draw(results, folder):
    """best_of_n.png and, where there is a base, novelty.png in `folder`."""
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for model in results["models"].values():
        for judge, found in model["judges"].items():
            n, means, errors = ([point[key] for point in found["best_of_n"]] for key in ("n", "mean", "se"))
            name = one_line(f"{model['name']}, {judge}").replace("$", r"\$")  # a dollar sign would begin a formula
            axes.errorbar(n, means, errors, fmt="o-", markersize=3, capsize=2, label=name)
    axes.set(xlabel="N", ylabel="score of the best of N (not clipped)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend()
    figure.savefig(folder / "best_of_n.png", dpi=150)
    if novelty := results["novelty"]:
        figure = Figure((6, 4), layout="constrained")
        axes = figure.subplots()
        axes.stairs(novelty["histogram"]["counts"], novelty["histogram"]["log10_edges"], fill=True, alpha=0.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="log10 of rho_seq", ylabel="responses", title=f"MODEL to base: median {novelty['median']:.2f}")
        figure.savefig(folder / "novelty.png", dpi=150)
