"""Rotary embedding stretched to longer contexts: what scales the frequencies, as divisors of each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071) by ``factor`` for a model that was trained on ``original_context`` positions.

    Frequencies that turn more than ``beta_fast`` times in the original context stay, those that turn less
    than ``beta_slow`` times are divided by ``factor``, with a linear ramp between. Cosines and sines are
    multiplied by ``attention``; None: 1 + ln(factor) / 10. FileError when the numbers make no sense.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float | None = None

    def __post_init__(self) -> None:
        numbers = (self.factor, self.original_context, self.beta_fast, self.beta_slow, self.scale)
        if not all(0 < n < math.inf for n in numbers) or self.factor < 1 or self.beta_slow > self.beta_fast:
            raise FileError("the numbers of the yarn RoPE scaling make no sense")

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by."""
        default = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
        return default if self.attention is None else self.attention

    def divisors(self, theta: float, head_dim: int) -> Floats:
        """Of the frequencies, float32 (head_dim / 2)."""

        def pair(turns: float) -> float:
            """The (fractional) pair that turns so often in the original context."""
            turned = math.log(self.original_context / (turns * 2 * math.pi))
            return head_dim * turned / (2 * math.log(theta)) if theta != 1 else 0.0

        low = max(math.floor(pair(self.beta_fast)), 0)
        high = min(math.ceil(pair(self.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return (1 / (ramp / self.factor + 1 - ramp)).astype(np.float32)


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original_context: float
) -> Floats:
    """Llama 3.1's divisors of the RoPE frequencies, float32 (head_dim / 2).

    Wavelengths above original_context / low are stretched by ``factor``, those below original_context / high
    stay, and between them 1 / f falls linearly.
    """
    if min(theta, factor, low, high, original_context) <= 0 or head_dim < 2 or low == high:
        raise FileError("the numbers of the llama3 RoPE scaling make no sense")
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original_context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
