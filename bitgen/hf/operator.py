"""What PyTorch sees of a kernel library: one operator, over tables that this process opened.

::

    bitgen::linear(Tensor x, Tensor packed, int m, int scales, str library, int threads) -> Tensor

x float32 (..., k) -> y float32 (..., m): quantise each token, multiply exactly, scale; or x int8 (..., k) ->
int32 (..., m), the exact sums alone. ``packed`` uint8 holds the packed weights and behind them ``scales``
float32 values (0: they lie among the weights, in groups); one buffer of bytes, so that no change of a model's
dtype touches it. ``threads`` 0 is one a physical core. A table belongs to its process: after a fork the child
opens its own.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitgen.abi import ffi
from bitgen.errors import BitgenError
from bitgen.runtime import KernelTable, load

_ALIGNMENT = 64
_SCHEMA = "linear(Tensor x, Tensor packed, int m, int scales, str library, int threads) -> Tensor"


class _Shared:
    """A table that the threads of this process take turns with."""

    def __init__(self, library: str, threads: int) -> None:
        self.table = load(library, threads or None)
        self._lock = threading.Lock()
        self._ffi, self._lib, self._context = self.table.native

    def multiply(self, x: torch.Tensor, packed: torch.Tensor, m: int, scales: int) -> torch.Tensor:
        """The operator for x (n, k)."""
        n, k = x.shape
        exact = x.dtype == torch.int8
        y = torch.empty((n, m), dtype=torch.int32 if exact else torch.float32)
        if n == 0:
            return y
        if packed.data_ptr() % _ALIGNMENT:  # a mapped file, a slice
            packed = packed.clone()
        cast, lib = self._ffi.cast, self._lib
        weights = cast("uint8_t *", packed.data_ptr())
        with self._lock:
            if exact:
                code = lib.bitgen_accumulate(
                    self._context, weights, cast("int8_t *", x.data_ptr()), n, m, k,
                    cast("int32_t *", y.data_ptr()),
                )  # fmt: skip
            else:
                values = cast("float *", packed.data_ptr() + packed.numel() - 4 * scales)
                code = lib.bitgen_matmul(
                    self._context, weights, values if scales else ffi.NULL, scales,
                    cast("float *", x.data_ptr()), n, m, k, cast("float *", y.data_ptr()),
                )  # fmt: skip
        if code == lib.BITGEN_ERROR_NOT_FINITE:
            return self._not_finite(x, packed, m, scales)
        self.table.check(code)
        return y

    def _not_finite(self, x: torch.Tensor, packed: torch.Tensor, m: int, scales: int) -> torch.Tensor:
        """As PyTorch has it: a token with NaN or infinity gives NaN, the others what they give."""
        good = x.isfinite().all(dim=1, keepdim=True)
        y = self.multiply(torch.where(good, x, 0.0), packed, m, scales)
        return torch.where(good, y, float("nan"))


_tables: dict[tuple[str, int], _Shared] = {}
_opening = threading.Lock()


def table_of(library: str, threads: int) -> KernelTable:
    """The table that the operator uses in this process."""
    return _shared(library, threads).table


def _shared(library: str, threads: int) -> _Shared:
    found = _tables.get((library, threads))
    if found is None:
        with _opening:
            found = _tables.get((library, threads)) or _Shared(library, threads)
            _tables[library, threads] = found
    return found


def _start_over() -> None:
    """In the child of a fork: its parent's tables have no threads here."""
    global _opening
    _tables.clear()
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_start_over)


def _linear(
    x: torch.Tensor, packed: torch.Tensor, m: int, scales: int, library: str, threads: int
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _shared(library, threads).multiply(rows, packed, m, scales).view(*x.shape[:-1], m)


def _shape_of(
    x: torch.Tensor, packed: torch.Tensor, m: int, scales: int, library: str, threads: int
) -> torch.Tensor:
    del packed, scales, library, threads
    return x.new_empty((*x.shape[:-1], m), dtype=torch.int32 if x.dtype == torch.int8 else torch.float32)


class WithoutGradient(torch.autograd.Function):
    """The operator where a gradient is asked for: a backward pass says that there is none.

    A gradient registered with the operator itself would take 20 us of each call, also of those without one.
    """

    @staticmethod
    def forward(context: Any, *arguments: Any) -> torch.Tensor:
        del context
        y: torch.Tensor = torch.ops.bitgen.linear(*arguments)
        return y

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> None:
        del context, gradients
        raise BitgenError("bitgen's kernels have no gradients: model.train(), or bitgen.hf.restore(model)")


_library = torch.library.Library("bitgen", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("linear", _linear, "CPU")
torch.library.register_fake("bitgen::linear", _shape_of, lib=_library)


def bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of two dimensions, uint8 (rows, bytes of a row); no copy if it is contiguous."""
    flat: NDArray[np.uint8] = tensor.detach().contiguous().view(torch.uint8).numpy()
    return flat
