"""The data types that `bitgen quantize` writes: the values that codes may stand for.

A weight is a value of a table times the scale of its row and group. BitMoD (Chen and others, HPCA 2025) gives
the code of FP4's and FP3's second zero to one of four special values, chosen for each group: 5, -5, 8 or -8
of FP4, 3, -3, 6 or -6 of FP3. The other values are symmetric, so that a negative scale makes the special
value negative: two tables do, and each row has the sign it wants even where 16 rows share a table. FP4 is
doubled here, so that all values are integers. Codebooks are learned from the weights of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitgen.formats.coded import FP4
from bitgen.formats.quants import IQ4_NL
from bitgen.quantize.fit import Sign

Table = tuple[int, ...]
_FP3 = (0, 1, 2, 4, 0, -1, -2, -4)


@dataclass(frozen=True)
class DataType:
    """Tables of 2^bits values, or how many are ``learned`` for each matrix.

    A scale begins as the largest weight of its group over the largest value. Its ``sign`` is "plus", or
    "largest": that weight becomes that value, sign included; or "free": whichever has the smaller error.
    ``fitted``: whether scales of least squares, uncalibrated, keep a model nearer (docs/guide/quantising.md).
    ``gguf``: the type is one of GGUF's, in blocks of 32.
    """

    name: str
    title: str
    bits: int
    tables: tuple[Table, ...] = ()
    learned: int = 0
    sign: Sign = "plus"
    fitted: bool = True
    gguf: bool = False

    def arrays(self) -> NDArray[np.int8]:
        """The tables, int8 (tables, 2^bits)."""
        return np.array(self.tables, np.int8)


def _special(table: Table, *values: int) -> tuple[Table, ...]:
    """The tables whose second zero is one of ``values``."""
    at = len(table) // 2
    return tuple((*table[:at], value, *table[at + 1 :]) for value in values)


_RECORDS = (
    DataType("bitmod4", "BitMoD-FP4", 4, _special(FP4, 10, 16), sign="free", fitted=False),
    DataType("bitmod3", "BitMoD-FP3", 3, _special(_FP3, 3, 6), sign="free"),
    DataType("codebook4", "four learned tables of 16", 4, learned=4, sign="largest"),
    DataType("codebook3", "four learned tables of 8", 3, learned=4, sign="largest"),
    DataType("fp4", "FP4 (E2M1)", 4, (FP4,), fitted=False),
    DataType("fp3", "FP3", 3, (_FP3,)),
    DataType("int4", "INT4, -7 .. 7", 4, ((*range(-7, 8), 0),), fitted=False),
    DataType("nl4", "IQ4_NL's values", 4, (IQ4_NL,), sign="largest"),
    DataType("int3", "INT3, -3 .. 3", 3, ((*range(-3, 4), 0),)),
    DataType("q4_0", "GGUF's Q4_0", 4, (tuple(range(-8, 8)),), sign="largest", gguf=True),
    DataType("iq4_nl", "GGUF's IQ4_NL", 4, (IQ4_NL,), sign="largest", gguf=True),
)
TYPES = {record.name: record for record in _RECORDS}
