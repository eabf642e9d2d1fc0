"""How often tokens come, against how probable they are: Pearson's chi-square test."""

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from torch import Tensor

FALSE_ALARMS = 1e-6
"""Share of the seeds for which a correct sampler fails one test. Seeds are fixed, so that a test passes always or never."""


def chi_square(tokens: npt.NDArray[np.int64], probs: Tensor) -> float:
    """Pearson's statistic of `tokens`, each an index of `probs` [K] float64."""
    expected = probs.numpy() * len(tokens)
    assert expected.min() > 5, "too few expected for the approximation"
    counts = np.bincount(tokens, minlength=len(expected))
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_limit(num_outcomes: int) -> float:
    """What the statistic stays below but for FALSE_ALARMS: Wilson and Hilferty's approximation of the quantile."""
    freedom = num_outcomes - 1
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS)
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def follows(tokens: npt.NDArray[np.int64], probs: Tensor) -> bool:
    """True when `tokens` come as often as `probs` [V] float64 says, those of probability 0 never."""
    possible = probs > 0
    places = np.cumsum(possible.numpy()) - 1
    if not possible[tokens].all():
        return False
    return chi_square(places[tokens], probs[possible]) < chi_square_limit(int(possible.sum()))
