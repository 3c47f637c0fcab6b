"""How the next token is drawn from logits: temperature, then top-k, then top-p, then one draw.

What is kept is everything at least as likely as a threshold, so ties are kept together. The draw is Gumbel's: the
kept token with the largest `logit / temperature - log(-log u)`, where u depends on seed, position and token alone
(Philox 4x32-10; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). So it needs no order among tokens,
and one definition serves every device. This is the reference, in NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenpak.errors import InputError, UsageError

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True)
class Sampling:
    """What is drawn from. The default is greedy: the most likely token, always.

    Raises:
        UsageError: A value that makes no sense.
    """

    #: What logits are divided by; 0 takes the most likely token.
    temperature: float = 0.0
    #: Only as many of the most likely tokens; 0 for all.
    top_k: int = 0
    #: Only the most likely tokens that together have this probability; 1 for all.
    top_p: float = 1.0
    #: The same seed gives the same tokens.
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature} makes no sense; give 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} makes no sense; give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} makes no sense; give more than 0 and at most 1 (all)")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed} is out of range; give 0 to 2**64 - 1")


def choose(logits: NDArray[Any], sampling: Sampling, position: int) -> int:
    """The token that follows, from the logits [vocab] of position `position` of the sequence.

    Raises:
        InputError: Logits are NaN or infinite.
    """
    x = np.asarray(logits, np.float32)
    if not np.isfinite(x).all():
        raise InputError(f"the model computes NaN or infinity at position {position}")
    if sampling.temperature == 0:
        return int(x.argmax())
    # The largest becomes 0 first, so that no temperature, however low, overflows upwards.
    with np.errstate(over="ignore"):
        x = (x - x.max()) / np.float32(sampling.temperature)
    kept = _kept(x, sampling)
    if len(kept) == 1:
        return int(kept[0])
    return int(kept[(x[kept] + gumbel(kept, position, sampling.seed)).argmax()])


def gumbel(tokens: NDArray[Any], position: int, seed: int) -> NDArray[np.float32]:
    """Gumbel noise for tokens at a position, FP32 of the tokens' shape."""
    words = philox(tokens, position, seed)
    # 24 bits and a half: never 0, never 1.
    uniform = ((words >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24
    return (-np.log(-np.log(uniform))).astype(np.float32)


def philox(tokens: NDArray[Any], position: int, seed: int) -> NDArray[np.uint32]:
    """The first word of Philox 4x32-10 with counter (token, position, position's high word, 0) and the seed as key."""
    a = np.asarray(tokens).astype(np.uint64)
    b = np.full_like(a, position & 0xFFFFFFFF)
    c = np.full_like(a, position >> 32)
    d = np.zeros_like(a)
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _HALF) ^ b ^ np.uint64(low),
            second & _LOW,
            (first >> _HALF) ^ d ^ np.uint64(high),
            (first & _LOW),
        )
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return a.astype(np.uint32)


def _kept(x: NDArray[np.float32], sampling: Sampling) -> NDArray[np.intp]:
    """Which tokens top-k and top-p leave, in ascending order; `x` are logits over temperature, the largest 0."""
    threshold = np.float32(-np.inf)
    if 0 < sampling.top_k < len(x):
        threshold = np.partition(x, len(x) - sampling.top_k)[len(x) - sampling.top_k]
    if sampling.top_p < 1:
        left = np.sort(x[x >= threshold])[::-1]
        mass = np.cumsum(np.exp(left, dtype=np.float64))
        # The first at which the most likely ones together have enough.
        enough = int(np.searchsorted(mass, sampling.top_p * mass[-1]))
        threshold = left[min(enough, len(left) - 1)]
    return np.flatnonzero(x >= threshold)
