"""Fair shares in exact fractions, and whole things dealt by them; equal inputs give equal results on every machine."""

import math
from fractions import Fraction


def level_out(loads: list[Fraction], weights: list[Fraction], amount: Fraction) -> list[Fraction]:
    """Pour `amount` over the ranks so that (load + poured) / weight is level wherever anything was poured."""
    active = list(range(len(loads)))
    while True:
        level = (amount + sum(loads[i] for i in active)) / sum(weights[i] for i in active)
        below = [i for i in active if loads[i] <= level * weights[i]]
        if len(below) == len(active):
            break
        active = below
    poured = [Fraction(0)] * len(loads)
    for i in active:
        poured[i] = level * weights[i] - loads[i]
    return poured


def at_least_one(count: int, weights: list[Fraction]) -> list[Fraction]:
    """Shares of `count` in proportion to the weights, with none below one."""
    ones = [Fraction(1)] * len(weights)
    return [1 + extra for extra in level_out(ones, weights, Fraction(count - len(weights)))]


def deal(count: int, shares: list[Fraction]) -> list[range]:
    """Contiguous runs that cover range(count), each within one of its share and never below floor(share).

    The *running sum* of the shares is rounded, half up: borders fall on group borders where shares allow.
    """
    assert sum(shares) == count, f"shares add up to {sum(shares)}, not {count}"
    runs, start, total = [], 0, Fraction(0)
    for share in shares:
        total += share
        stop = math.floor(total + Fraction(1, 2))
        runs.append(range(start, stop))
        start = stop
    return runs
