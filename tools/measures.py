"""Figures of an evaluation, from scores, verdicts, texts and their embeddings; the same as a table and as pictures.

Scores come as one matrix [tasks, K]: K responses to each task, NaN where a response has no score. All errors are of a
bootstrap over tasks: 1,000 resamples with a fixed seed.
"""

import math
from functools import lru_cache

import numpy
import torch
from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU
from transformers import AutoModel, AutoTokenizer

from judge import score
from plumbing.policy import why_refused
from plumbing.rules import recites
from plumbing.terminal import one_line
from tools.checks import equal_verdicts

RULE_TAGS = ("verifier:", "function:", "parameters:")  # say how a criterion is checked, not what it is about


def known_means(scores):
    """Mean of each column's known scores, NaN where none is known. scores: [rows, K]."""
    with numpy.errstate(invalid="ignore"):
        return numpy.nansum(scores, axis=0) / (~numpy.isnan(scores)).sum(axis=0)


@lru_cache(4)
def resamples(tasks):
    """How often each of `tasks` tasks is in each of 1,000 bootstrap resamples: [1000, tasks]."""
    return numpy.random.default_rng(0).multinomial(tasks, numpy.full(tasks, 1 / tasks), size=1000)


def mean_over_tasks(values):
    """{mean, se, low, high, tasks} of one value a task, low to high being the 95% interval. NaN is left out."""
    values = numpy.asarray(values, dtype=float)
    values = values[~numpy.isnan(values)]
    if not len(values):
        return {"mean": None, "se": None, "low": None, "high": None, "tasks": 0}
    drawn = resamples(len(values)) @ values / len(values)
    low, high = numpy.percentile(drawn, [2.5, 97.5]).tolist()
    return {"mean": float(values.mean()), "se": float(drawn.std()), "low": low, "high": high, "tasks": len(values)}


def healthbench(scores):
    """HealthBench's reported score: the mean of all known scores, of all runs together, clipped to [0, 1]. scores:
    [tasks, K], not clipped; column k is run k. Returns score and mean (not clipped), their errors score_se and mean_se, runs
    (the score of each alone), tasks (those with a known score); None where nothing is known."""
    scores = scores[~numpy.isnan(scores).all(axis=1)]
    if not len(scores):
        return {"score": None, "score_se": None, "mean": None, "mean_se": None, "runs": [], "tasks": 0}
    mean, weights = numpy.nanmean(scores), resamples(len(scores))  # a task is drawn with its K responses
    drawn = (weights @ numpy.nansum(scores, axis=1)) / (weights @ (~numpy.isnan(scores)).sum(axis=1))
    return {"score": float(mean.clip(0, 1)), "score_se": float(drawn.clip(0, 1).std()),
            "mean": float(mean), "mean_se": float(drawn.std()), "tasks": len(scores),
            "runs": [None if math.isnan(run) else float(run) for run in known_means(scores).clip(0, 1)]}


def tag_scores(task, verdicts):
    """{tag: score} of one response as in HealthBench: the score on the criteria that have the tag; where these have none, a
    tag of the task has the whole score. Tags that name a criterion's rule are left out."""
    scores = dict.fromkeys(task.tags, score(task.rubric, verdicts))
    for tag in {tag for criterion in task.rubric for tag in criterion.tags if not tag.startswith(RULE_TAGS)}:
        part = [(criterion, met) for criterion, met in zip(task.rubric, verdicts, strict=True) if tag in criterion.tags]
        if (value := score(*zip(*part))) is not None:
            scores[tag] = value
    return {tag: value for tag, value in scores.items() if value is not None}


def best_of_n(scores):
    """Best-of-N, N = 1..K: the mean of the best over all subsets of N of a task's known scores. scores: [tasks, K]. Returns
    `mean_over_tasks` for each n. The i-th smallest of k scores is the best in comb(i - 1, n - 1) of comb(k, n) cases."""
    best = numpy.full(scores.shape, numpy.nan)
    for row, of_task in zip(best, scores):
        known = numpy.sort(of_task[~numpy.isnan(of_task)])
        below, chances = numpy.arange(len(known)), numpy.ones(len(known)) / max(1, len(known))  # of each to be the best of n
        for n in range(1, len(known) + 1):
            row[n - 1] = chances @ known
            chances *= (n + 1) / n * (below - n + 1) / max(1, len(known) - n)
    return [{"n": n, **mean_over_tasks(column)} for n, column in enumerate(best.T, 1) if not numpy.isnan(column).all()]


def paired(scores, others):
    """`mean_over_tasks` of the difference of two models, each with its mean of a task's known scores. Two [tasks, K]."""
    return mean_over_tasks(known_means(scores.T) - known_means(others.T))


def novelty(log_ratios):
    """Equation 5, rho_seq = exp(mean over tokens of log pi_new - log pi_init). log_ratios: that mean of each response."""
    logs = numpy.asarray(log_ratios, dtype=float)
    counts, edges = numpy.histogram(logs / math.log(10), bins=40)
    return {"responses": len(logs), "median": float(numpy.median(numpy.exp(logs))),
            "above": {str(limit): int((logs > math.log(limit)).sum()) for limit in (2, 10, 100)},
            "histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()}}


def self_bleu(texts):
    """Mean BLEU (sacrebleu's, up to 4-grams, 0 to 1) of each text with the other texts as its references."""
    bleu = BLEU(effective_order=True)  # a short text is compared by the n-grams that it has
    others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
    return float(numpy.mean([1.0 if text in rest else bleu.sentence_score(text, rest).score / 100
                             for text, rest in zip(texts, others)]))


def load_embedding(folder):
    """A function texts -> float32 [texts, width], by the transformers model in `folder`: the mean of its last layer's states
    over a text's tokens. Raises ValueError where there is no such model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    except Exception as error:  # a file that is not a model can raise anything in the libraries that read it
        raise ValueError(f"--embedding: cannot load {folder}: {why_refused(error)}") from None
    longest = min(getattr(model.config, "max_position_embeddings", None) or 512, 8192)

    @torch.no_grad()
    def embed(texts):
        rows = []
        for text in texts:  # one by one: some embedding models have no padding token
            ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
            rows.append(model(input_ids=ids).last_hidden_state[0].float().mean(0))  # [width]
        return torch.stack(rows).numpy()

    return embed


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


def model_figures(tasks, records, judges, embed, recite_words):
    """All figures of one model's responses but their entropy. records: [tasks][K]. judges: names; the first is compared with
    each of the others. embed: texts -> [texts, width], or None. recite_words: see rules.recites."""
    recited = [recites(recite_words)(record["text"], [c.text for c in task.rubric])
               for task, of_task in zip(tasks, records) for record in of_task]
    flat = [record for of_task in records for record in of_task]
    texts = [[record["text"] for record in of_task] for of_task in records]
    full = [kept for of_task in texts if len(kept := [text for text in of_task if text]) > 1]  # an empty text has no vector
    diversity = mean_over_tasks([1 - self_bleu(of_task) for of_task in texts]) if len(texts[0]) > 1 else None
    return {"length": float(numpy.mean([len(record["token_ids"]) for record in flat])),
            "truncated": float(numpy.mean([not record["finished"] for record in flat])), "diversity": diversity,
            "recited": float(numpy.mean(recited)),
            "semantic_distance": mean_over_tasks([cosine_distance(embed(t)) for t in full]) if embed and full else None,
            "judges": {judge: judge_figures(tasks, records, judge) for judge in judges},
            "agreement": {other: agreement(records, judges[0], other) for other in judges[1:]}}


def agreement(records, judge, other):
    """How far two judges agree where both gave a verdict: `equal_verdicts`, resampled by task; verdicts, their number;
    correlation of scores, None where one judge's are all equal. records: [tasks][K]. None without a verdict of both."""
    both = [(a, b, task) for task, of_task in enumerate(records) for record in of_task
            for a, b in zip(record["verdicts"].get(judge, []), record["verdicts"].get(other, [])) if None not in (a, b)]
    if not both:
        return None
    found = {"verdicts": len(both), "correlation": None, **equal_verdicts(*map(numpy.array, zip(*both)))}
    scores = numpy.stack([score_matrix(records, name).flatten() for name in (judge, other)], axis=1)  # [responses, 2]
    scores = scores[~numpy.isnan(scores).any(axis=1)]
    if len(scores) > 1 and scores.std(axis=0).min() > 1e-9:
        found["correlation"] = float(numpy.corrcoef(scores.T)[0, 1])
    return found


def print_table(results):
    """One column a model, then comparison, novelty and tags. results: what results.json holds."""
    models, (judge, *others) = list(results["models"].values()), results["judges"]
    _line("", [model["name"] if len(model["name"]) <= 20 else "..." + model["name"][-17:] for model in models])
    for name in (judge, *others):
        columns = [model["judges"][name] for model in models]
        if not columns[0]["verdicts"]:
            print("no rubrics: nothing is scored")
            continue
        print(f"judge: {one_line(name)}")
        _row("  score, clipped (HealthBench)", columns, "score", "score_se")
        _row("  score, not clipped", columns, "mean", "mean_se")
        n = max(len(column["best_of_n"]) for column in columns)
        _row(f"  best of {n}", [dict(enumerate(column["best_of_n"], 1)).get(n) for column in columns], "mean", "se")
        _line("  responses without a score", [f"{column['unscored']} of {column['responses']}" for column in columns])
    for other in others:
        print(f"{one_line(judge)} and {one_line(other)}, 95% intervals")
        columns = [model["agreement"][other] for model in models]
        for key in ("agreement", "balanced F1"):
            _line(f"  {key}", ["{:.3f} ({:.2f} to {:.2f})".format(*c[key]) if c else "-" for c in columns])
        _row("  correlation of scores", columns, "correlation")
    _row("diversity, 1 - Self-BLEU", [model["diversity"] for model in models], "mean", "se")
    _row("semantic distance", [model["semantic_distance"] for model in models], "mean", "se")
    _row("entropy, nats", models, "entropy")
    _line("responses that recite", [f"{model['recited']:.0%}" for model in models])
    _line("length, tokens (cut off)", [f"{model['length']:.0f} ({model['truncated']:.0%})" for model in models])
    for name, found in results["comparison"].items():
        if found["tasks"]:
            print(f"model - base, {one_line(name)}: {found['mean']:+.3f} (95% {found['low']:+.3f} to {found['high']:+.3f})")
    if found := results["novelty"]:
        above = ", ".join(f"{count} above {limit}" for limit, count in found["above"].items())
        print(f"novelty: median rho_seq {found['median']:.3f}; {above}, of {found['responses']}")
    by_tag = [model["judges"][judge]["by_tag"] for model in models]
    for tag in list(by_tag[0])[:30]:  # clipped scores, by the judge of now
        _row(f"tag {one_line(tag)} ({by_tag[0][tag]['tasks']})", [tags.get(tag) for tags in by_tag], "score", "score_se")


def _line(label, cells):
    print(f"{label[:46]:46s}" + "".join(f"{cell:>22s}" for cell in cells))


def _row(label, columns, key, error=""):
    """A line with what each column (a dict or None) has under `key`, and its error."""
    form = "{:+.3f} +- {:.3f}" if error else "{:.3f}"
    _line(label, [form.format(c[key], c.get(error)) if c and c[key] is not None else "-" for c in columns])


def draw(results, folder):
    """best_of_n.png, where something was scored, and novelty.png, where there is a base, in `folder`."""
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for model in results["models"].values():
        for judge, found in model["judges"].items():
            n, means, errors = ([point[key] for point in found["best_of_n"]] for key in ("n", "mean", "se"))
            name = one_line(f"{model['name']}, {judge}").replace("$", r"\$")  # a dollar sign would begin a formula
            axes.errorbar(n, means, errors, fmt="o-", markersize=3, capsize=2, label=name)
    axes.set(xlabel="N", ylabel="score of the best of N (not clipped)")
    axes.set_xscale("log", base=2)
    axes.legend()
    if any(found["best_of_n"] for model in results["models"].values() for found in model["judges"].values()):
        figure.savefig(folder / "best_of_n.png", dpi=150)
    if novelty := results["novelty"]:
        figure = Figure((6, 4), layout="constrained")
        axes = figure.subplots()
        axes.stairs(novelty["histogram"]["counts"], novelty["histogram"]["log10_edges"], fill=True, alpha=0.6)
        axes.set(xlabel="log10 of rho_seq", ylabel="responses", title=f"MODEL to base: median {novelty['median']:.2f}")
        figure.savefig(folder / "novelty.png", dpi=150)
