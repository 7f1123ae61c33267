"""Scaffold: how much of the rubric each sample of a group sees, and the message that shows it (RuscaRL, section 3.2).

Two ratios multiply. Inside a group of G samples the first sees most and the last nothing, so that the group contrasts
scaffolded with plain attempts. Over training everything fades, so that the policy must learn to do without:

    lambda_S,i = lambda_step(t) * lambda_group,i         |R_S,i| = round(lambda_S,i * |R|)
"""

import math


def group_ratios(group_size, pattern="linear", full_samples=1):
    """In-group ratios lambda_group, one a sample, first to last; in [0, 1].

    linear: (G - i) / (G - 1) for i = 1..G. binary: 1 for the first `full_samples` (all, if there are fewer), 0 for the
    others. none: all 0.
    The lone sample of a group of one sees nothing: there is no plain sample beside it to learn from.
    Raises ValueError for an unknown pattern, group_size < 1 or full_samples < 0.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r} (known: {', '.join(PATTERNS)})")
    if full_samples < 0:
        raise ValueError(f"full_samples must not be negative, got {full_samples}")
    if pattern == "none" or group_size == 1:
        return [0.0] * group_size
    if pattern == "binary":
        return [1.0 if i < full_samples else 0.0 for i in range(group_size)]
    return [(group_size - i) / (group_size - 1) for i in range(1, group_size + 1)]


def step_ratio(progress, decay="sigmoid", midpoint=0.2, steepness=125.0, power=2.0):
    """Inter-step ratio lambda_step at `progress` in [0, 1]; in [0, 1].

    sigmoid: 1 / (1 + exp(steepness * (progress - midpoint))): from 99% to 1% takes 9.19 / steepness of the run.
    constant: 1. linear: 1 - progress. power: (1 - progress) ** power. none: 0.
    Raises ValueError for an unknown decay or a progress outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be between 0 and 1, got {progress}")
    if decay == "sigmoid":
        x = steepness * (progress - midpoint)
        return math.exp(-x) / (1 + math.exp(-x)) if x > 0 else 1 / (1 + math.exp(x))  # no overflow on either side
    if decay == "constant":
        return 1.0
    if decay == "linear":
        return 1 - progress
    if decay == "power":
        return (1 - progress) ** power
    if decay == "none":
        return 0.0
    raise ValueError(f"unknown decay {decay!r} (known: {', '.join(DECAYS)})")


def scaffold_ratios(step, total_steps, group_size, *, decay="sigmoid", midpoint=0.2, steepness=125.0, power=2.0,
                    pattern="linear", full_samples=1):
    """The share of the rubric that each sample of a group sees at `step` (from 0): a list of group_size ratios.

    progress = step / (total_steps - 1); a run of one step is at progress 0.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be between 0 and total_steps - 1 = {total_steps - 1}, got {step}")
    progress = step / (total_steps - 1) if total_steps > 1 else 0.0
    fade = step_ratio(progress, decay, midpoint, steepness, power)
    return [fade * ratio for ratio in group_ratios(group_size, pattern, full_samples)]


def choose_criteria(rubric, ratio, rng):
    """round(ratio * len(rubric)) criteria of `rubric`, drawn without replacement by `rng` (random.Random), order kept."""
    chosen = rng.sample(range(len(rubric)), round(ratio * len(rubric)))
    return [rubric[i] for i in sorted(chosen)]


def scaffold_messages(messages, criteria):
    """`messages` with `criteria` shown below the last one, the user's; unchanged when there are none to show.

    A system message and earlier turns stay as they are. Points are not shown: they would say how to be scored, not what to
    write. The wording was chosen by what it lifts (results/scaffold_wording.md).
    """
    if not criteria:
        return list(messages)
    parts = [messages[-1]["content"]]
    if wanted := [f"- {c.text}" for c in criteria if c.points > 0]:
        parts.append("\n".join(["Your answer should meet these requirements:", *wanted]))
    if unwanted := [f"- {c.text}" for c in criteria if c.points < 0]:
        parts.append("\n".join(["Your answer should not be like this:", *unwanted]))
    parts.append("Do not mention these notes.")
    return [*messages[:-1], {**messages[-1], "content": "\n\n".join(parts)}]


PATTERNS = ("linear", "binary", "none")
DECAYS = ("sigmoid", "constant", "linear", "power", "none")
