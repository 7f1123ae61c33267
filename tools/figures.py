"""An evaluation's results as a table on the console and as pictures. `results` is what results.json holds."""

from matplotlib.figure import Figure

from plumbing.terminal import one_line

JUDGES = ("judge", "judge2")


def draw(results, folder):
    """best_of_n.png, tags.png where there are tags, novelty.png where there is a base, in `folder`; returns their names."""
    drawn = {"best_of_n.png": _best_of_n(results["models"])}
    if results["models"]["model"]["judge"]["by_tag"]:
        drawn["tags.png"] = _tags(results["models"])
    if results["novelty"]:
        drawn["novelty.png"] = _novelty(results["novelty"])
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=150)
    return list(drawn)


def _best_of_n(models):
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for model in models.values():
        for judge, style in zip(JUDGES, ("o-", "s--")):
            if judge in model:
                curve = model[judge]["best_of_n"]
                axes.errorbar([p["n"] for p in curve], [p["mean"] for p in curve], [p["se"] for p in curve], fmt=style,
                              markersize=3, capsize=2, label=f"{model['name']}, {judge}")
    axes.set(xlabel="N", ylabel="score of the best of N (not clipped)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    _legend(axes)
    return figure


def _tags(models):
    """Scores by tag under the first judge, one row a tag; the 30 tags with the most examples."""
    first = models["model"]["judge"]["by_tag"]
    tags = sorted(first, key=lambda tag: (-first[tag]["tasks"], tag))[:30][::-1]
    figure = Figure((8, 1.5 + 0.3 * len(tags)), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(models.values()):
        found = [(row, model["judge"]["by_tag"][tag]) for row, tag in enumerate(tags) if tag in model["judge"]["by_tag"]]
        found = [(row, scores) for row, scores in found if scores["score"] is not None]
        axes.errorbar([s["score"] for _, s in found], [row - 0.15 * i for row, _ in found],
                      xerr=[s["score_se"] for _, s in found], fmt="os"[i], capsize=2, label=model["name"])
    axes.set_yticks(range(len(tags)), [f"{one_line(tag)[:60]} ({first[tag]['tasks']})" for tag in tags], parse_math=False)
    axes.set(xlabel="score, clipped, and its bootstrap error (examples in brackets)", xlim=(-0.02, 1.02))
    _legend(axes)
    return figure


def _legend(axes):
    """A legend whose names stay as they are, dollar signs included."""
    for text in axes.legend().get_texts():
        text.set_parse_math(False)


def _novelty(novelty):
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    axes.stairs(novelty["histogram"]["counts"], novelty["histogram"]["log10_edges"], fill=True, alpha=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="log10 of rho_seq, the ratio to the base (mean over tokens)", ylabel="responses",
             title=f"median of rho_seq {novelty['median']:.2f}")
    return figure


def print_table(results):
    """One column a model, then the comparison, novelty and the tags."""
    models = list(results["models"].values())
    _row("", *[_short(model["name"]) for model in models])
    for judge in JUDGES:
        if judge not in models[0]:
            continue
        print(f"{judge}: {one_line(results['judges'][judge])}")
        columns = [model[judge] for model in models]
        _row("  score, clipped (HealthBench)", *[_pm(c["score"], c["score_se"]) for c in columns])
        _row("  score, not clipped", *[_pm(c["mean"], c["mean_se"]) for c in columns])
        curves = [{p["n"]: p for p in c["best_of_n"]} for c in columns]
        for n in sorted({2**i for i in range(1, 12)} & {n for curve in curves for n in curve}):
            _row(f"  best of {n}", *[_pm(curve[n]["mean"], curve[n]["se"]) if n in curve else "-" for curve in curves])
        _row("  unknown verdicts", *[f"{c['unknown']} of {c['verdicts']}" for c in columns])
        _row("  responses without a score", *[f"{c['unscored']} of {c['responses']}" for c in columns])
    for key, label in (("agreement", "agreement of the judges"), ("balanced_f1", "  balanced F1"),
                       ("correlation", "  correlation of scores")):
        if "judge2" in models[0]:
            _row(label, *[_plain(model["agreement"][key]) for model in models])
    for key, label in (("diversity", "diversity, 1 - Self-BLEU"), ("semantic_distance", "semantic distance")):
        if any(model[key] for model in models):
            _row(label, *[_pm(model[key]["mean"], model[key]["se"]) if model[key] else "-" for model in models])
    _row("entropy, nats", *[_plain(model["entropy"]) for model in models])
    _row("length, tokens", *[f"{model['length']:.0f}" for model in models])
    _row("cut off", *[f"{model['truncated']:.0%}" for model in models])
    for judge, found in results["comparison"].items():
        if found["difference"] is not None:
            print(f"\nmodel - base, {judge}: {found['difference']:+.3f} (95% {found['low']:+.3f} to {found['high']:+.3f}, "
                  f"{found['tasks']} tasks)")
    if results["novelty"]:
        found = results["novelty"]
        above = ", ".join(f"{count} above {limit}" for limit, count in found["above"].items())
        print(f"novelty: median rho_seq {found['median']:.3f}; {above}, of {found['responses']}")
    tags = [model["judge"]["by_tag"] for model in models]
    if tags[0]:
        print("\nby tag, clipped (first judge)")
    for tag in sorted(tags[0], key=lambda tag: (-tags[0][tag]["tasks"], tag))[:30]:
        cells = [_pm(t[tag]["score"], t[tag]["score_se"]) if tag in t else "-" for t in tags]
        _row(f"  {one_line(tag)} ({tags[0][tag]['tasks']})", *cells)


def _row(label, *cells):
    print(f"{label[:46]:46s}" + "".join(f"{cell:>22s}" for cell in cells))


def _short(name):
    return name if len(name) <= 20 else "..." + name[-17:]


def _plain(value):
    return "-" if value is None else f"{value:.3f}"


def _pm(value, error):
    return "-" if value is None else f"{value:+.3f} +- {error:.3f}"
