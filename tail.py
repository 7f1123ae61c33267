"""Theorem 1 of Chasing the Tail (arXiv 2509.21500): what a misranking costs depends on where it is.

The gold reward R of the base policy's responses is uniform on (0, 1): only its ranks matter, so any continuous one can be
brought to this. The proxy is f(R), with f a rearrangement of (0, 1), so that it is uniform, too. The aligned policy is the
base policy weighted by exp(proxy / beta): over the proxy u its density is e^(u / beta) / (beta (e^(1 / beta) - 1)).
"""

import math


def tail_kl(beta):
    """KL(aligned, base) in nats: the same for every proxy, because f only moves responses around. beta: above 0.

    KL = E[u] / beta - log(beta (e^(1 / beta) - 1)), the expectation under the aligned policy. Raises ValueError for a beta
    that is not above 0.
    """
    _check(beta, 0.0, 0.0)
    x = 1 / beta
    if x < 1e-3:  # the difference of nearly equal numbers: its series instead
        return x**2 / 24
    return x * (_mean(x) - 1) - math.log(-math.expm1(-x) / x)


def tail_win_rate(beta, top_reversed=0.0, bottom_reversed=0.0):
    """Chance that an aligned response has a higher gold reward than one of the base policy, in [0, 1].

    The proxy reverses the order within the best `top_reversed` of all responses, and within the worst `bottom_reversed`;
    both are shares in [0, 1] with a sum of at most 1. Raises ValueError for anything else.
    win rate = integral of f^-1(u) e^(u / beta) du / (beta (e^(1 / beta) - 1)): f^-1 is linear in each of three pieces.
    """
    _check(beta, top_reversed, bottom_reversed)
    top = 1 - top_reversed
    gold = 0.0
    for low, high, mirrored in ((0.0, bottom_reversed, True), (bottom_reversed, top, False), (top, 1.0, True)):
        mass = math.exp((high - 1) / beta) * math.expm1((low - high) / beta) / math.expm1(-1 / beta)
        mean = (high - low) * _mean((high - low) / beta)  # of the proxy, from `low` upwards
        gold += mass * (high - mean if mirrored else low + mean)
    return gold


def _check(beta, top_reversed, bottom_reversed):
    if not 1e-300 < beta < math.inf:
        raise ValueError(f"beta must be above 0 (1e-300) and finite, got {beta}")
    if not (top_reversed >= 0 and bottom_reversed >= 0 and top_reversed + bottom_reversed <= 1):
        raise ValueError(f"top_reversed and bottom_reversed must be shares with a sum of at most 1, got {top_reversed} "
                         f"and {bottom_reversed}")


def _mean(x):
    """Mean of the density on (0, 1) that is proportional to e^(x u)."""
    return 0.5 + x / 12 if x < 1e-3 else -1 / math.expm1(-x) - 1 / x
