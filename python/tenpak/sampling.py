"""Chooses the next token: temperature, the k likeliest, of these the likeliest that hold the part p, then chance.

Chance comes from a counter-based generator (Philox 4x64, Salmon et al. 2011), so that the token at a position depends
on the seed and the position alone, not on what was asked before or where it is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenpak.errors import InputError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        UsageError: A number outside its range.
    """

    #: Scores are divided by this; 0 always takes the likeliest token.
    temperature: float = 0.8
    #: Only so many of the likeliest tokens are considered; 0 for all.
    top_k: int = 0
    #: Only the likeliest tokens that together hold this part of the probability are considered (Holtzman et al. 2020).
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_is_real(self.temperature) and math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature!r} is no number from 0 on")
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k {self.top_k!r} is no whole number from 0 on; 0 considers all tokens")
        if not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p {self.top_p!r} is not above 0 and at most 1")
        checked_seed(self.seed)


def checked_seed(seed: int) -> int:
    """A seed, or UsageError."""
    if not _is_integer(seed) or not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed!r} is no whole number from 0 to 2^64 - 1")
    return int(seed)


def checked_count(name: str, count: int) -> int:
    """A number of tokens from 1 on, or UsageError."""
    if not _is_integer(count) or count < 1:
        raise UsageError(f"{name} {count!r} is no whole number from 1 on")
    return int(count)


def _is_integer(x: object) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _is_real(x: object) -> bool:
    return _is_integer(x) or isinstance(x, float | np.floating)


def uniform(seed: int, position: int) -> float:
    """The number from 0 to below 1 that decides the token at a position."""
    key, counter = np.array([[seed, 0, 0, 0], [position, 0, 0, 0]], np.uint64)
    bits = int(np.random.Philox(key=key[:2], counter=counter).random_raw())
    return (bits >> 11) * 2.0**-53


def choose(logits: NDArray[Any], sampling: Sampling, position: int) -> int:
    """The token at a position.

    Args:
        logits: Scores of all tokens, [vocab].
        sampling: How it is chosen.
        position: Counted from the start of the sequence, prompt included.

    Raises:
        InputError: A score is NaN or +infinity.
    """
    scores = np.asarray(logits, np.float64)
    if np.isnan(scores).any() or scores.max() == np.inf:
        raise InputError(f"the model's scores at position {position} are not finite; its weights may be damaged")
    if sampling.temperature == 0:
        return int(scores.argmax())
    # Descending; of equal ones the lower token first.
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp((scores[order] - scores[order[0]]) / sampling.temperature)
    sums = np.cumsum(weights)
    # The token that reaches the part p is still considered.
    kept = int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1
    sums = sums[:kept]
    drawn = int(np.searchsorted(sums, uniform(sampling.seed, position) * sums[-1], side="right"))
    return int(order[min(drawn, len(sums) - 1)])
