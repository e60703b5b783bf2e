"""NVFP4 in safetensors, as compressed-tensors and modelopt write it: FP4 in groups of 16 along k.

==============  =======================  =================  ==============================================
of a matrix     compressed-tensors       modelopt
==============  =======================  =================  ==============================================
codes           weight_packed            weight             uint8 (m, k / 2): k = 2 j in the low nibble of
                                                            byte j, 2 j + 1 in the high one
scales          weight_scale             weight_scale       F8_E4M3 (m, k / 16)
of all of it    weight_global_scale, g   weight_scale_2, s  F32, one number
of activations  input_global_scale       input_scale        left out: they are int8 in groups of 16 here
==============  =======================  =================  ==============================================

A weight is F[q] * scale / g, or F[q] * scale * s. Scales of keys and values in 8 bits (k_scale, v_scale) are
left out too. Kernels multiply twice F (`FP4`), so the scale of a group is half of that product, a float32
rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError
from bitgen.families.base import Codes
from bitgen.formats.coded import CODED, UE4M3
from bitgen.formats.config import Floats
from bitgen.formats.source import Bytes, Settings, read_json, short
from bitgen.formats.stored_matrix import CodedMatrix
from bitgen.spec import Shape, WeightKind

TYPE = CODED["nvfp4"]
KIND = WeightKind(TYPE.kind, TYPE.group)
_CT, _MODELOPT = "compressed-tensors", "modelopt"
_BESIDE = "hf_quant_config.json"  # modelopt's, where config.json says nothing


@dataclass(frozen=True)
class Nvfp4:
    """The names of a writer: of the codes, of what scales all of a matrix, and whether that divides."""

    codes: str
    factor: str
    divides: bool
    unread: tuple[str, ...]


_WRITERS = {
    _CT: Nvfp4("weight_packed", "weight_global_scale", True, ("input_global_scale", "k_scale", "v_scale")),
    _MODELOPT: Nvfp4("weight", "weight_scale_2", False, ("input_scale", "k_scale", "v_scale")),
}
METHODS = tuple(_WRITERS)
# The key that says which type it is, and those that are read; of modelopt's two the weights are the same.
_KNOWN = {_CT: ("format", ("nvfp4-pack-quantized",)), _MODELOPT: ("quant_algo", ("NVFP4", "W4A16_NVFP4"))}


def nvfp4_of(quantization: Settings, folder: Path) -> Nvfp4 | None:
    """How a checkpoint's NVFP4 is named; None: it is not quantised, or by another method.

    ``quantization``: what config.json says of it. FileError for other types of the same two programs.
    """
    method = quantization.get("quant_method")
    if method is None and (folder / _BESIDE).is_file():
        beside = Settings(folder / _BESIDE, read_json(folder / _BESIDE))
        method, quantization = _MODELOPT, beside.section("quantization")
    if not isinstance(method, str) or method not in _WRITERS:
        return None
    key, known = _KNOWN[method]
    if (found := quantization.get(key)) not in known:
        raise quantization.error(key, f"is {short(found)}; of {method} {' and '.join(known)} are supported")
    return _WRITERS[method]


def nvfp4_matrix(
    name: str, shape: Shape, codes: Bytes, scales: Bytes, factor: Floats, *, divides: bool
) -> CodedMatrix:
    """The matrix of ``codes`` (m, k / 2) and ``scales`` (m, k / 16), bytes of E4M3."""
    table = None if TYPE.table is None else np.array([TYPE.table], np.int8)

    def read(begin: int, end: int) -> Codes:
        packed = codes[begin:end]
        found: NDArray[np.uint8] = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), shape.k)
        with np.errstate(over="ignore", invalid="ignore"):
            halves = E4M3_HALVES[scales[begin:end]]
            scaled: Floats = halves / factor if divides else halves * factor
        return Codes(found, scaled, None, table)

    return CodedMatrix.make(name, shape, TYPE.kind, TYPE.group, read)


def check_factor(name: str, factor: Floats) -> Floats:
    """FileError where the scale of all of a matrix is none."""
    if not (np.isfinite(factor).all() and (factor > 0).all()):
        raise FileError(f"{name} is zero, negative, NaN or infinite; the file is damaged")
    return factor


def _e4m3_halves() -> Floats:
    """Half of what each byte means as E4M3: UE4M3 with a sign, but 127 and 255 are NaN."""
    plus = UE4M3[:128].copy()
    plus[127] = np.nan
    return np.concatenate([plus, -plus])


E4M3_HALVES = _e4m3_halves()
