"""The figures of an evaluation, from scores, verdicts and texts.

Scores come as one matrix [tasks, K]: K responses to each task, NaN where a response has no score. All bootstrap
resamples are of tasks, 1,000 of them with a fixed seed.
"""

import math
import warnings
from functools import cache

import numpy
from sacrebleu.metrics import BLEU

from judge import score
from tools.checks import balanced_f1, interval

RULE_TAGS = ("verifier:", "function:", "parameters:")  # say how a criterion is checked, not what it is about


def resamples(tasks, draws=1000, seed=0):
    """How often each task is in each bootstrap resample: int [draws, tasks]."""
    return numpy.random.default_rng(seed).multinomial(tasks, numpy.full(tasks, 1 / tasks), size=draws)


def column_means(scores, weights):
    """Mean of each column over tasks, counted `weights` times. scores: [tasks, K]; weights: [draws, tasks].

    Returns [draws, K], NaN where a column has no known score.
    """
    known = ~numpy.isnan(scores)
    with numpy.errstate(invalid="ignore"):
        return (weights @ numpy.where(known, scores, 0.0)) / (weights @ known)


def healthbench(scores):
    """HealthBench's reported score. scores: [tasks, K], unclipped; column k is run k, one response an example.

    A run's score is the mean over its examples, clipped to [0, 1]; with several runs the mean of theirs. Its error is
    the standard deviation of that figure over bootstrap resamples of the examples. Examples without any known score are
    left out. Returns score, score_se, the same not clipped as mean, mean_se, the scores of the runs, and tasks, the
    number of examples; None for what nothing is known of.
    """
    scores = scores[~numpy.isnan(scores).all(axis=1)]
    if not len(scores):
        return {"score": None, "score_se": None, "mean": None, "mean_se": None, "runs": [], "tasks": 0}
    here = column_means(scores, numpy.ones((1, len(scores))))  # [1, K]
    drawn = column_means(scores, resamples(len(scores)))  # [draws, K]
    found = {"runs": [number(run) for run in here[0].clip(0, 1)], "tasks": len(scores)}
    for name, low, high in (("score", 0, 1), ("mean", -math.inf, math.inf)):
        found[name] = number(numpy.nanmean(here.clip(low, high)))
        found[f"{name}_se"] = number(numpy.nanmean(drawn.clip(low, high), axis=1).std())
    return found


def tag_scores(task, verdicts):
    """{tag: score} of one response, as HealthBench counts them.

    A tag of the task has the whole score; a tag of criteria has the score on these alone. Left out: what is undefined
    because no criterion is positive or a verdict is unknown, and the tags that only say which rule checks a criterion.
    """
    scores = {tag: score(task.rubric, verdicts) for tag in task.tags}
    for tag in {tag for criterion in task.rubric for tag in criterion.tags if not tag.startswith(RULE_TAGS)}:
        part = [(criterion, met) for criterion, met in zip(task.rubric, verdicts, strict=True) if tag in criterion.tags]
        scores[tag] = score([criterion for criterion, _ in part], [met for _, met in part])
    return {tag: value for tag, value in scores.items() if value is not None}


@cache
def _best_weights(count):
    """[count, count]: row N-1 holds the chance of each of `count` sorted scores to be the best of N drawn."""
    weights = numpy.zeros((count, count))
    for n in range(1, count + 1):  # C(i - 1, n - 1) / C(count, n) for the i-th, from the largest down
        chance = n / count
        for i in range(count, n - 1, -1):
            weights[n - 1, i - 1] = chance
            chance *= (i - n) / max(1, i - 1)
    return weights


def best_of_n(scores):
    """Best-of-N for N = 1..K: the expected best of N responses drawn without replacement, mean over tasks.

    scores: [tasks, K]. The unbiased estimator: over all subsets of N of a task's known scores, computed from their order.
    Returns a list of {n, mean, se, tasks}: se is the bootstrap standard error over tasks; tasks counts those with at
    least n known scores. An N that no task has enough scores for is left out.
    """
    best = numpy.full(scores.shape, numpy.nan)
    for row, of_task in zip(best, scores):
        known = numpy.sort(of_task[~numpy.isnan(of_task)])
        row[: len(known)] = _best_weights(len(known)) @ known
    counts = (~numpy.isnan(best)).sum(axis=0)
    found = []
    for n in range(1, int((counts > 0).sum()) + 1):
        column = best[~numpy.isnan(best[:, n - 1]), n - 1 : n]
        drawn = column_means(column, resamples(len(column)))
        found.append({"n": n, "mean": number(column.mean()), "se": number(drawn.std()), "tasks": len(column)})
    return found


def paired(scores, others):
    """Difference of two models on the same tasks, with its 95% bootstrap interval. Two [tasks, K], rows the same tasks.

    A task's score is the mean of its known ones; tasks that either model has none for are left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row without known scores
        differences = numpy.nanmean(scores, axis=1) - numpy.nanmean(others, axis=1)
    differences = differences[~numpy.isnan(differences)][:, None]
    if not len(differences):
        return {"difference": None, "low": None, "high": None, "tasks": 0}
    low, high = numpy.percentile(column_means(differences, resamples(len(differences))), [2.5, 97.5])
    return {"difference": number(differences.mean()), "low": number(low), "high": number(high), "tasks": len(differences)}


def novelty(log_ratios):
    """Equation 5 over responses: rho_seq = exp(mean over tokens of log pi_new - log pi_init).

    log_ratios: the mean of each response, nats a token. Returns the median of rho, the number of responses above 2, 10
    and 100, and a histogram over log10 rho. No mean of rho: a few outliers would rule it.
    """
    logs = numpy.asarray(log_ratios, dtype=float)
    counts, edges = numpy.histogram(logs / math.log(10), bins=40)
    return {"responses": len(logs), "median": number(numpy.median(numpy.exp(logs))),
            "above": {str(limit): int((logs > math.log(limit)).sum()) for limit in (2, 10, 100)},
            "histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()}}


def self_bleu(texts):
    """Mean BLEU (sacrebleu's, up to 4-grams, 0 to 1) of each text with the others as its references.

    A text shorter than 4 tokens is compared by the n-grams that it has; an empty one is like another empty one only.
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


def mean_over_tasks(values):
    """{mean, se, tasks}: mean of one value a task and its bootstrap standard error."""
    values = numpy.asarray(values, dtype=float)[:, None]
    drawn = column_means(values, resamples(len(values)))
    return {"mean": number(values.mean()), "se": number(drawn.std()), "tasks": len(values)}


def score_matrices(tasks, records):
    """{"judge": [tasks, K], "judge2": the same where there is one}: unclipped scores, NaN where there is none.

    records: [tasks][K], as answers.Samples.of returns them.
    """
    return {judge: numpy.array([[numpy.nan if record[reward] is None else record[reward] for record in of_task]
                                for of_task in records])
            for judge, reward in (("judge", "reward"), ("judge2", "reward2")) if reward in records[0][0]}


def side_figures(tasks, records, embed):
    """Everything about one model's responses but their entropy. records: [tasks][K]; embed: see answers.load_embedding."""
    flat = [record for of_task in records for record in of_task]
    found = {"length": float(numpy.mean([len(record["token_ids"]) for record in flat])),
             "truncated": float(numpy.mean([not record["finished"] for record in flat])),
             "diversity": None, "semantic_distance": None}
    for judge, scores in score_matrices(tasks, records).items():
        key = "verdicts" if judge == "judge" else "verdicts2"
        verdicts = [verdict for record in flat for verdict in record[key]]
        by_tag = {}
        for row, (task, of_task) in enumerate(zip(tasks, records)):
            for column, record in enumerate(of_task):
                for tag, value in tag_scores(task, record[key]).items():
                    by_tag.setdefault(tag, numpy.full(scores.shape, numpy.nan))[row, column] = value
        found[judge] = {**healthbench(scores), "best_of_n": best_of_n(scores),
                        "by_tag": {tag: healthbench(matrix) for tag, matrix in sorted(by_tag.items())},
                        "responses": scores.size, "unscored": int(numpy.isnan(scores).sum()),
                        "verdicts": len(verdicts), "unknown": sum(verdict is None for verdict in verdicts)}
    if "judge2" in found:
        found["agreement"] = agreement(flat)
    if len(records[0]) > 1:
        texts = [[record["text"] for record in of_task] for of_task in records]
        found["diversity"] = mean_over_tasks([1 - self_bleu(of_task) for of_task in texts])
        full = [kept for of_task in texts if len(kept := [text for text in of_task if text]) > 1]
        if embed and full:  # an empty text has no embedding
            found["semantic_distance"] = mean_over_tasks([cosine_distance(embed(t)) for t in full])
    return found


def agreement(records):
    """How far the two judges agree, on the verdicts and scores that both could give; intervals are over tasks."""
    both = [(a, b, record["task"]) for record in records for a, b in zip(record["verdicts"], record["verdicts2"])
            if a is not None and b is not None]
    found = {"verdicts": len(both), "agreement": None, "balanced_f1": None, "correlation": None}
    first, second = (numpy.array([row[i] for row in both], dtype=bool) for i in (0, 1))
    for name, statistic in (("agreement", lambda a, b: float((a == b).mean())), ("balanced_f1", balanced_f1)):
        if both:
            found[name] = statistic(first, second)
            found[f"{name}_95"] = interval(statistic, first, second, [task for _, _, task in both]).tolist()
    rewards = numpy.array([(record["reward"], record["reward2"]) for record in records
                           if None not in (record["reward"], record["reward2"])])
    if len(rewards) > 1 and rewards.std(axis=0).min() > 0:
        found["correlation"] = float(numpy.corrcoef(rewards.T)[0, 1])
    return found


def number(value):
    """A float for JSON: None where it is NaN."""
    return None if math.isnan(value) else float(value)
