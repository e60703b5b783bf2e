"""From weights to text: the engine over a kernel library, its scheduler, sampling, chat."""

from __future__ import annotations

from typing import cast

from bitgen.spec import SMALL

FEW = cast("int", SMALL.n_max)  # tokens of a forward pass up to which kernels are made for latency
