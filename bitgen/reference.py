"""The oracle, in plain numpy: what every kernel must equal.

``y[n, m] = (float)acc[n, m] * (x_scale[n] * w_scale[m])`` with ``acc[n, m] = sum_k w[m, k] * xq[n, k]``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError
from bitgen.packing import check_ternary


def quantize_activations(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise x float32 (n, k) -> (xq int8 (n, k), x_scale float32 (n,)).

    For each token ``s = 127 / max(absmax, 1e-5)``, ``xq = clamp(round_half_even(x * s), -128, 127)`` and
    ``x_scale = 1 / s``, all in float32. Raises on NaN and infinity.
    """
    if x.dtype != np.float32 or x.ndim != 2:
        raise BitgenError(f"activations must be float32 (n, k), not {x.dtype} {x.shape}")
    if not np.isfinite(x).all():
        raise BitgenError("activations hold NaN or infinity")
    absmax = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
    s = np.float32(127) / absmax
    xq = np.clip(np.rint(x * s), -128, 127).astype(np.int8)
    return xq, (np.float32(1) / s)[:, 0]


def ternary_matmul(xq: NDArray[np.int8], w: NDArray[np.int8]) -> NDArray[np.int32]:
    """Multiply exactly: acc int32 (n, m) = xq int8 (n, k) times w int8 (m, k) transposed.

    float64 holds every partial sum exactly (|sum| <= 128 k < 2^53), so BLAS may be used in any order.
    """
    check_ternary(w)
    if xq.dtype != np.int8 or xq.ndim != 2 or xq.shape[1] != w.shape[1]:
        raise BitgenError(f"xq must be int8 (n, {w.shape[1]}), not {xq.dtype} {xq.shape}")
    return (xq.astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32)


def scale_output(
    acc: NDArray[np.int32], x_scale: NDArray[np.float32], w_scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scale to y float32 (n, m) = (float)acc * (x_scale * w_scale), w_scale (m,) or (1,); in this order."""
    return acc.astype(np.float32) * (x_scale[:, None] * w_scale[None, :])


def linear(x: NDArray[np.float32], w: NDArray[np.int8], w_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The whole BitLinear product: quantise, multiply exactly, scale."""
    xq, x_scale = quantize_activations(x)
    return scale_output(ternary_matmul(xq, w), x_scale, w_scale)
