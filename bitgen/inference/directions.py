"""From the states of a text's tokens to its vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitgen.errors import BitgenError
from bitgen.inference.wants import Floats


def direction(states: Sequence[Floats]) -> Floats:
    """The mean of states float32 (hidden), summed in double precision, divided by its length.

    BitgenError for a mean of zero.
    """
    mean = np.mean(np.array(states, np.float64), axis=0)
    length = float(np.sqrt((mean**2).sum()))
    if length == 0:
        raise BitgenError("the model's state of a text is zero, which has no direction")
    vector: Floats = (mean / length).astype(np.float32)
    return vector
