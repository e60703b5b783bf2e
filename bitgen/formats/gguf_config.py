"""The metadata of a GGUF file as a ModelConfig, with the kind of weights that its matrices are.

Names are those of llama.cpp, bitnet.cpp and ik_llama.cpp, which agree.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitgen.errors import BitgenError, FileError
from bitgen.families.base import TERNARY as TERNARY_WEIGHTS
from bitgen.formats.architectures import (
    EMBEDDING,
    GGUF_LAYER,
    LM_HEAD,
    Architecture,
    file_config,
    gguf_names,
    stored_in_gguf,
)
from bitgen.formats.code_rows import common_kind
from bitgen.formats.coded import CODED, TWO_BIT_KIND, TWO_BITS
from bitgen.formats.config import Floats, ModelConfig, check_head_dim, printable
from bitgen.formats.gguf import GgufFile, TensorInfo
from bitgen.formats.gguf_tensors import tensor_of, type_name, vector
from bitgen.formats.matrices import ONE_BIT
from bitgen.formats.rope import Yarn
from bitgen.formats.scalars import Scalars
from bitgen.formats.source import Settings, short
from bitgen.formats.stored_matrix import BINARY
from bitgen.formats.table_types import TableLayout
from bitgen.formats.ternary import TERNARY
from bitgen.spec import WeightKind


def architecture_of(file: GgufFile) -> Architecture:
    """FileError that names the architecture found and those supported."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FileError(f"{file.path}: general.architecture is missing; this is no model file")
    found = stored_in_gguf(name, file.tensors)
    if found is None:
        raise FileError(
            f"{file.path}: the architecture {short(name)} is not supported; bitgen runs "
            f"{', '.join(gguf_names())}",
        )
    return found


def gguf_config(file: GgufFile, two_bits: bool = False) -> ModelConfig:
    """The hyperparameters. FileError names what is missing or not supported.

    ``two_bits``: Q2_0 holds weights of 2 bits, -1 .. 2, not ternary ones.
    """
    arch = architecture_of(file)
    _refuse_transforms(file)
    keys = Settings(file.path, file.metadata, arch.gguf_name + ".")
    if keys.integer("expert_count", 0):
        raise keys.error("expert_count", "is not 0: mixtures of experts are not supported")
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    if heads < 1:
        raise keys.error("attention.head_count", f"is {heads}")
    head_dim = check_head_dim(keys.integer("attention.key_length", hidden // heads), str(file.path))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.error(key, f"is {keys.get(key)} with heads of {head_dim}, which is not supported")
    context = keys.integer("context_length")
    embedding = tensor_of(file, f"{EMBEDDING.gguf}.weight")
    if len(embedding.shape) != 2:
        raise FileError(f"{file.path}: token_embd.weight has the shape {embedding.shape}")
    kind = _weight_kind(file, arch, two_bits)
    factors, context = _rope_factors(file, keys, head_dim, context)
    return file_config(
        file.path,
        arch,
        kind,
        hidden=hidden,
        ffn=keys.integer("feed_forward_length"),
        layers=keys.integer("block_count"),
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=embedding.shape[0],
        context=context,
        rope_theta=keys.number("rope.freq_base", 10000.0),
        activation=arch.activation,
        norm_eps=scalars_of(keys, arch).eps(keys.number("attention.layer_norm_rms_epsilon")),
        tied_head=f"{LM_HEAD.gguf}.weight" not in file.tensors,
        name=printable(Settings(file.path, file.metadata, "general.").text("name")[:200]),
        rope_factors=factors,
        yarn=_yarn(keys),
        windows=_windows(file, keys, context),
    )


def _windows(file: GgufFile, keys: Settings, context: int) -> tuple[int, ...]:
    """Of each layer, as a ModelConfig has them: one number for all, or for those that a pattern names."""
    layers, window = keys.integer("block_count"), keys.integer("attention.sliding_window", 0)
    if not 0 < window < context or layers > len(file.tensors):  # those that are missing are named later
        return ()
    pattern = keys.raw("attention.sliding_window_pattern")
    if pattern is None:
        return (window,) * layers
    if not isinstance(pattern, np.ndarray) or pattern.dtype != bool or pattern.size != layers:
        raise keys.error(
            "attention.sliding_window_pattern", f"is not {layers} of true and false, one a layer"
        )
    return tuple(window if slides else 0 for slides in pattern.tolist())


def scalars_of(keys: Settings, arch: Architecture) -> Scalars:
    """What is folded into the weights; nothing of most architectures."""
    if not arch.runs_as:
        return Scalars()
    return Scalars.of_gguf(keys, keys.integer("embedding_length"), keys.integer("block_count"))


def _group(file: GgufFile, arch: Architecture) -> int:
    """That of the architecture; 0 for I2_S, which stores BitLinear layers: a scale a tensor and a token."""
    first = GGUF_LAYER.format(0) + arch.matrices["q"].gguf + ".weight"
    return 0 if first in file.tensors and file.tensors[first].type == "i2_s" else arch.group


def _two_bit_block(file: GgufFile, arch: Architecture) -> int:
    """Of a file whose matrices are all Q2_0 of one kind the weights of a block, else 0."""
    found = {type_name(file, info) for info in _matrix_tensors(file, arch)}
    kind = found.pop() if len(found) == 1 else ""
    return TERNARY[kind].block if kind in TWO_BITS else 0


def _matrix_tensors(file: GgufFile, arch: Architecture) -> list[TensorInfo]:
    ends = tuple(f".{tensor.gguf}.weight" for tensor in arch.matrices.values())
    return [info for name, info in file.tensors.items() if name.startswith("blk.") and name.endswith(ends)]


def _weight_kind(file: GgufFile, arch: Architecture, two_bits: bool) -> WeightKind:
    """The kind that holds the weights of all matrices, and their groups. FileError: they have none."""
    own = TableLayout.of(file.path, file.metadata)
    if own is not None and arch.input_norms:
        raise FileError(
            f"{file.path}: {own.type} stacks matrices of one input, which {arch.name} norms apart"
        )
    if own is not None:
        return WeightKind(own.kind, own.group)
    coded = _coded_kind(file, arch)
    if coded is None and two_bits and (block := _two_bit_block(file, arch)):
        return WeightKind(TWO_BIT_KIND, block)
    return coded or WeightKind(BINARY if _is_binary(file, arch) else TERNARY_WEIGHTS, _group(file, arch))


def _is_binary(file: GgufFile, arch: Architecture) -> bool:
    """Whether all matrices are bits, of a model whose activations have groups: a scale a token has rows."""
    found = {type_name(file, info) for info in _matrix_tensors(file, arch)}
    return found == {ONE_BIT} and arch.group > 0


def _coded_kind(file: GgufFile, arch: Architecture) -> WeightKind | None:
    """That of matrices of 4 bits; None: there are none of them. FileError: no kind holds all matrices."""
    found = _matrix_tensors(file, arch)
    coded = [info for info in found if type_name(file, info) in CODED]
    if not coded:
        return None
    other = next((info for info in found if type_name(file, info) not in CODED), None)
    if other is not None:
        raise FileError(
            f"{file.path}: {coded[0].name} is stored as {coded[0].type.upper()} and {other.name} as "
            f"{type_name(file, other).upper()}; bitgen runs models whose matrices are all of "
            f"{', '.join(name.upper() for name in CODED)}, or all ternary",
        )
    groups = sorted({CODED[info.type].group for info in coded})
    if len(groups) > 1:
        raise FileError(
            f"{file.path}: some matrices are in groups of {groups[0]} weights (NVFP4), some of {groups[1]}; "
            "bitgen runs models whose matrices share one size"
        )
    try:
        return WeightKind(common_kind(CODED[info.type].kind for info in coded), groups[0])
    except FileError as error:
        raise FileError(f"{file.path}: {error.message}") from None


def _refuse_transforms(file: GgufFile) -> None:
    """Without the transform that its weights are stored under, a model writes fluent nonsense."""
    found = [key for key in file.metadata if "hadamard" in key]
    if found:
        raise FileError(
            f"{file.path}: the weights are stored under a Hadamard transform ({short(found[0])}, as in "
            "Ternary-Bonsai-2), which is not supported",
        )


def _rope_factors(
    file: GgufFile, keys: Settings, head_dim: int, context: int
) -> tuple[tuple[float, ...] | None, int]:
    """The divisors of the RoPE frequencies, and the positions that they are for.

    A tensor (Llama 3.1) times a linear factor, or one of the two tensors of longrope.
    """
    half = head_dim // 2
    factors = np.ones(half, np.float32)
    if "rope_freqs.weight" in file.tensors:
        factors = vector(file, "rope_freqs.weight", half)
    # A factor alone is a linear one, as llama.cpp has it.
    linear = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    scaling = keys.text("rope.scaling.type", "linear" if linear else "none")
    if scaling == "linear":
        factors = factors * np.float32(linear or 1.0)  # GGUF readers treat 0 as "not set"
    elif scaling == "longrope":
        factors, context = _longrope(file, keys, half, context)
    elif scaling not in ("none", "yarn"):
        known = "none, linear, yarn and longrope"
        raise keys.error("rope.scaling.type", f"is {short(scaling)}; {known} are supported")
    return None if (factors == 1).all() else tuple(factors.tolist()), context


def _longrope(file: GgufFile, keys: Settings, half: int, context: int) -> tuple[Floats, int]:
    """Divisors for short texts, which are those of long ones too, or else for the original context alone."""
    if keys.number("rope.scaling.attn_factor", 1.0) != 1:
        raise keys.error("rope.scaling.attn_factor", "is not 1, which is not supported with longrope")
    short_ones, long_ones = (vector(file, f"rope_factors_{kind}.weight", half) for kind in ("short", "long"))
    if np.array_equal(short_ones, long_ones):
        return short_ones, context
    return short_ones, min(context, keys.integer("rope.scaling.original_context_length", context))


def _yarn(keys: Settings) -> Yarn | None:
    if keys.text("rope.scaling.type") != "yarn":
        return None
    for key, plain in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if keys.number(f"rope.scaling.{key}", plain) != plain:
            raise keys.error(f"rope.scaling.{key}", f"is not {plain:g}, which is not supported")
    factor = keys.number("rope.scaling.factor")
    context = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    betas = keys.number("rope.scaling.yarn_beta_fast", 32.0), keys.number("rope.scaling.yarn_beta_slow", 1.0)
    attention = keys.number("rope.scaling.attn_factor", 1.0)  # on top of what YaRN makes of the factor
    try:
        yarn = Yarn(factor, context, *betas)
        return yarn if attention == 1 else replace(yarn, attention=yarn.scale * attention)
    except BitgenError as error:
        raise keys.error("rope.scaling", f"is not possible: {error.message}") from None
