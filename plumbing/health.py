"""Criterion health: which rubrics to refine, from the verdicts that a run has anyway.

A criterion that nearly every response meets, that none meets, or on which the responses of each group are alike, gives no
response an advantage. A group is a list of rollouts as a run's folder keeps them (dicts, see runs.py).
"""

import math
import statistics

SATURATED = 0.95  # share met above which a criterion asks for nothing new
COUNTS = ("verdicts", "known", "met", "groups", "separated", "plain", "plain_met")


def criterion_counts(groups):
    """{(criterion, points): numbers in the order of COUNTS}: verdicts, those known, met; groups with two known verdicts or
    more, those separated (both verdicts occur); known and met of the samples that were not shown the criterion."""
    found = {}
    for group in groups:
        for of_samples in zip(*(rollout["criteria"] for rollout in group)):
            known = [c["met"] for c in of_samples if c["met"] is not None]
            plain = [c["met"] for c in of_samples if c["met"] is not None and not c.get("shown")]
            separated = 0 < sum(known) < len(known)
            add(found, {(of_samples[0]["criterion"], of_samples[0].get("points")): (
                len(of_samples), len(known), sum(known), int(len(known) > 1), int(separated), len(plain), sum(plain))})
    return found


def add(total, counts):
    """Add `criterion_counts` to those in `total`."""
    for key, numbers in counts.items():
        total[key] = tuple(map(sum, zip(total[key], numbers))) if key in total else numbers


def criterion_health(counts):
    """{(criterion, points): {kind, met, plain_met, separates, unknown: shares, None of none; verdicts}}.

    counts: see `criterion_counts`. kind: "saturated" (met by more than 95%), "dead" (met by none), "never separates" (in
    each group all or none meet it), "unknown" (no verdict could be had), else "".
    """
    found = {}
    for key, numbers in counts.items():
        n = dict(zip(COUNTS, numbers))
        met, separates = share(n["met"], n["known"]), share(n["separated"], n["groups"])
        kind = ("unknown" if met is None else "dead" if met == 0 else "saturated" if met > SATURATED else
                "never separates" if separates == 0 else "")
        found[key] = {"kind": kind, "met": met, "plain_met": share(n["plain_met"], n["plain"]), "separates": separates,
                      "unknown": 1 - n["known"] / n["verdicts"], "verdicts": n["verdicts"]}
    return found


def share(part, whole):
    """part / whole; None of none."""
    return part / whole if whole else None


def health_line(health):
    """`criterion_health` in one line."""
    kinds, verdicts = [found["kind"] for found in health.values()], sum(found["verdicts"] for found in health.values())
    penalties = sum(found["kind"] == "dead" and (points or 0) < 0 for (_, points), found in health.items())
    unknown = sum(found["unknown"] * found["verdicts"] for found in health.values()) / max(1, verdicts)
    return (f"{len(kinds):,} criteria in training: {kinds.count('saturated')} saturated (met by more than {SATURATED:.0%}), "
            f"{kinds.count('dead')} dead (met by none; {penalties} of them penalties), "
            f"{kinds.count('never separates')} of the others never separate a group; "
            f"{unknown:.1%} of {verdicts:,} verdicts unknown")


def standard_error(groups, name):
    """Standard error of the mean over groups of each group's mean; None of fewer than two groups with a value."""
    known = [[rollout[name] for rollout in group if rollout.get(name) is not None] for group in groups]
    means = [sum(values) / len(values) for values in known if values]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
