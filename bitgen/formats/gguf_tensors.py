"""A tensor of a GGUF model by its name, where it is there with the shape and a type that is wanted."""

from __future__ import annotations

import numpy as np

from bitgen.errors import BitgenError, FileError
from bitgen.formats.config import Floats
from bitgen.formats.gguf import BY_ID, GgufFile, TensorInfo
from bitgen.formats.quants import dequantize

_VECTOR_TYPES = ("f32", "f16", "bf16")
_WHY = {
    "tl1": " (a packing for one kernel of bitnet.cpp; use the file's I2_S sister)",
    "tl2": " (a packing for one kernel of bitnet.cpp; use the file's I2_S sister)",
    "iq1_bn": " (ik_llama.cpp's own packing; use an I2_S or TQ file of the model)",
    "iq2_bn": " (ik_llama.cpp's own packing; use an I2_S or TQ file of the model)",
    "iq2_bn_r4": " (ik_llama.cpp's own packing; use an I2_S or TQ file of the model)",
}


def tensor_of(file: GgufFile, name: str) -> TensorInfo:
    if name not in file.tensors:
        raise FileError(f"{file.path}: the tensor {name} is missing; the file is not whole")
    return file.tensors[name]


def check_shape(file: GgufFile, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise FileError(
            f"{file.path}: the tensor {info.name} has the shape {shape_text(info.shape)}; "
            f"the metadata says {shape_text(shape)}",
        )


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def vector(file: GgufFile, name: str, size: int) -> Floats:
    """A short tensor of floats, decoded: float32 (size), finite."""
    info = tensor_of(file, name)
    check_shape(file, info, (size,))
    if info.type not in _VECTOR_TYPES:
        raise unsupported(file, info, _VECTOR_TYPES)
    values: Floats = dequantize(info.type, file.bytes_of(info).reshape(1, -1), size)[0]
    if not np.isfinite(values).all():
        raise FileError(f"{file.path}: {name} holds NaN or infinity; the file is damaged")
    return values


def unsupported(file: GgufFile, info: TensorInfo, supported: tuple[str, ...]) -> BitgenError:
    found = type_name(file, info)
    why = _WHY.get(found, "")
    return FileError(
        f"{file.path}: {info.name} is stored as {found.upper()}{why}; bitgen reads "
        f"{', '.join(t.upper() for t in supported)} there",
    )


def type_name(file: GgufFile, info: TensorInfo) -> str:
    """The type of a tensor; id 39 is TL2 in files of bitnet.cpp and MXFP4 everywhere else.

    bitnet.cpp calls its file type 39 or writes one of its own architectures; llama.cpp's MXFP4 is file type
    38 and never holds these models.
    """
    if info.type_id == BY_ID[39].id:
        file_type = file.metadata.get("general.file_type")
        architecture = file.metadata.get("general.architecture")
        if file_type == 39 or (file_type != 38 and str(architecture).startswith("bitnet")):
            return "tl2"
    return info.type
