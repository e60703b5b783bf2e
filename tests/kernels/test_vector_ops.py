"""Every op of every ISA level that this CPU or an emulator runs, against its meaning written down in numpy.

For each op a C wrapper with one signature is generated: block and scalar arguments are read from memory,
pointer arguments point into a page between two forbidden ones. Three types have no form in memory: flags (vm)
are made by vb_test and read by vb_select, sums of products (vp) are made by vp_add and read by vw_widen,
activations (vx) are made by vx_load and read by vw_dot4_field.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import foreign
import numpy as np
import pytest
from float_ops import FLOAT_DOMAINS, FLOAT_EXTENTS, FLOAT_MEANINGS, FLOAT_RANGES
from libraries import shared_cache
from loaded import load_units

from bitgen.cpu import ANY_ARCH, Isa, Rejected, detect_cpu, load_isas, resolve_isas
from bitgen.paths import templates_dir
from bitgen.render import parse_ops, vector_ops
from bitgen.toolchain import CompileError, Compiler, Prototype, Toolchain, Unit, find_compilers

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data" / "vector_ops_harness"
ISA_FILES = sorted((templates_dir() / "isa").glob("*.h"))
ISAS = load_isas()
DECISIONS = {decision.isa.name: decision for decision in resolve_isas(detect_cpu(), ISAS)}
# zig is a clang and takes seconds to start; it is used where there is nothing else.
EMULATED_ISAS = [isa for isa in ISAS if isa.arch in (ANY_ARCH, "aarch64")]
COMPILERS = [c for c in find_compilers() if c.kind != "zig"] or find_compilers()
NOT_FUNCTIONS = {"includes", "types", "vt", "vp", "vx", "values_bias"}
HELPERS = ("avx2_", "neon_", "sve_")  # how the names of a level's own functions begin, which its ops share
CANARY = 0xA5
DTYPES = {
    "vb": np.uint8,
    "vh": np.int16,
    "vw": np.int32,
    "vf": np.float32,
    "vm": np.uint8,
    "vp": np.int8,  # the bytes s of products with u = HALF
    "vx": np.int8,
}
BYTES = {"vx": 16}  # of a block; 64 unless it stands here
HALF = 64  # the largest u of two additions to a sum: 2 * 2 * 64 * 128 = 32768
CONSTANTS = (("int", "bits"), ("int", "f"))  # constants in every kernel: each value gets a function
SCALARS = {"uint8_t": np.uint8, "int": np.intc, "int32_t": np.int32, "int64_t": np.int64, "float": np.float32}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Signature:
    name: str
    returns: str
    params: tuple[tuple[str, str], ...]  # (type, name)

    @classmethod
    def of(cls, text: str) -> Signature:
        match = re.search(r"^OP\s+(\w+)\s+(\w+)\(([^)]*)\)", text, re.MULTILINE)
        assert match, text
        params = [p.strip() for p in match[3].split(",") if p.strip() != "void"]
        split = [re.fullmatch(r"(.*?\W)(\w+)", p) for p in params]
        return cls(match[2], match[1], tuple((m[1].strip(), m[2]) for m in split if m))


def signatures(isa_name: str, tiles: bool = False) -> dict[str, Signature]:
    """Of the ops of a level, or of those for tiles, which have a test of their own."""
    ops = vector_ops(isa_name)
    return {
        name: Signature.of(text)
        for name, text in ops.items()
        if name not in NOT_FUNCTIONS and not name.startswith(HELPERS) and name.startswith("vt_") == tiles
    }


TILES = signatures("scalar", tiles=True)
MMLA_PART = (templates_dir() / "isa" / "scalar.h").read_text().partition("//== Products of 2 x 8")[2]
MMLA_NAMES = set(parse_ops(MMLA_PART))
MMLA = {name: signature for name, signature in signatures("scalar").items() if name in MMLA_NAMES}
AFFINE = {"vb_affine_field": signatures("scalar")["vb_affine_field"]}
SCALAR = {
    name: signature for name, signature in signatures("scalar").items() if name not in {**MMLA, **AFFINE}
}


def ops_of(isa: Isa) -> dict[str, Signature]:
    """The ops that a level must have, without those for tiles."""
    return {**SCALAR, **(MMLA if isa.mmla else {}), **(AFFINE if isa.affine else {})}


# ---------------------------------------------------------------------------------------------------------
# What the ops mean. Arguments are arrays of the block's elements, numpy scalars, and for a pointer the
# bytes that may be touched: a function that stores changes them in place.

MEANINGS: dict[str, Callable[..., Any]] = {}
Meaning = TypeVar("Meaning", bound=Callable[..., Any])


def meaning(function: Meaning) -> Meaning:
    MEANINGS[function.__name__] = function
    return function


def lanes(block: Array) -> Array:
    """Rows: the four 16-byte quarters of a block."""
    return block.reshape(4, -1)


def wrapped(values: Array, dtype: Any) -> Array:
    """int64 to a narrower integer, mod 2^bits."""
    return values.astype(np.int64).astype(dtype)


def i64(block: Array) -> Array:
    return block.astype(np.int64)


def loaded(dtype: Any) -> Callable[[Array], Array]:
    return lambda p: p.view(dtype)


def stored(p: Array, v: Array) -> None:
    p[:] = v.view(np.uint8)


def packed(part: int, *blocks: Array) -> Array:
    """In every lane byte ``part`` (0 low, 1 high) of the eight int16 of each block."""
    return np.hstack([v.view(np.uint8).reshape(4, 8, 2)[:, :, part] for v in blocks]).reshape(-1)


def zipped(a: Array, b: Array, half: slice) -> Array:
    """The elements ``half`` of every lane of a and of b, alternating."""
    return np.stack([lanes(a)[:, half], lanes(b)[:, half]], axis=2).reshape(-1)


def digits(lo: Array, hi: Array, radix: int, half: slice) -> Array:
    """Bytes ``half`` of every lane, as int8: lo + radix * hi."""
    low, high = (lanes(v.view(np.int8))[:, half].reshape(-1).astype(np.int64) for v in (lo, hi))
    return wrapped(low + int(radix) * high, np.int16)


MEANINGS.update(FLOAT_MEANINGS)
MEANINGS.update(
    prefetch=lambda _p: None,
    prefetch_once=lambda _p: None,
    prefetch_l2=lambda _p: None,
    compiler_barrier=lambda: None,
    vb_load=loaded(np.uint8),
    vh_load=loaded(np.int16),
    vw_load=loaded(np.int32),
    vf_load=loaded(np.float32),
    vb_store=stored,
    vw_store=stored,
    vb_splat=lambda x: np.full(64, x),
    vw_splat=lambda x: np.full(16, x),
    vf_splat=lambda x: np.full(16, x),
    vb_splat4=lambda p: np.tile(p, 16),
    vb_quad=lambda p: np.tile(p, 4),
    vb_nibbles=lambda p: np.concatenate([p & 15, p >> 4]),
    vb_lut128=lambda p, idx: p[idx & 127],
    vb_avg=lambda a, b: ((i64(a) + i64(b) + 1) >> 1).astype(np.uint8),
    vb_mirror=lambda v, s: np.where(s >= 128, np.uint8(0xAA) - v, v),
    vb_and=lambda a, b: a & b,
    vb_add=lambda a, b: wrapped(i64(a) + i64(b), np.uint8),
    vb_field=lambda v, bits, mask: (v >> np.uint8(bits)) & np.uint8(mask),
    vb_affine_field=lambda v, bits, mask: (v >> np.uint8(bits)) & np.uint8(mask),
    vb_high=lambda v, bits: v >> np.uint8(bits),
    vb_spread=lambda a, b, c: sum((v & 0x88) >> np.uint8(3 - p) for p, v in enumerate((a, b, c))),
    vb_test=lambda v, bits: (v & bits != 0).astype(np.uint8),
    vb_sign=lambda v, s: wrapped(np.where(s >= 128, -i64(v), i64(v)), np.uint8),
    vb_choose=lambda s, a, b: np.where(s >= 128, a, b),
    vb_flip=lambda v, m: np.where(m, ~v, v),
    vb_select=lambda m, a, b: np.where(m, a, b),
    vh_zip_lo=lambda lo, hi: zipped(lo, hi, slice(0, 8)).view(np.int16),
    vh_zip_hi=lambda lo, hi: zipped(lo, hi, slice(8, 16)).view(np.int16),
    vh_zero=lambda: np.zeros(32, np.int16),
    vp_zero=lambda: np.zeros(16, np.int32),
    vx_load=lambda p, at: p.view(np.int8)[at:].astype(np.int32),
    vh_add=lambda a, b: wrapped(i64(a) + i64(b), np.int16),
    vh_sub=lambda a, b: wrapped(i64(a) - i64(b), np.int16),
    vh_digits_lo=lambda lo, hi, radix: digits(lo, hi, radix, slice(0, 8)),
    vh_digits_hi=lambda lo, hi, radix: digits(lo, hi, radix, slice(8, 16)),
    vh_mul=lambda a, b: wrapped(i64(a) * i64(b), np.int16),
    vh_sign_high=lambda v: v.view(np.int8)[1::2].astype(np.int16),
    vb_low_bytes=lambda a, b: packed(0, a, b),
    vb_high_bytes=lambda a, b: packed(1, a, b),
    vw_zero=lambda: np.zeros(16, np.int32),
    vw_add=lambda a, b: wrapped(i64(a) + i64(b), np.int32),
    vw_sub=lambda a, b: wrapped(i64(a) - i64(b), np.int32),
    vw_sra=lambda v, bits: v >> np.int32(bits),
    vw_max=np.maximum,
    vw_hsum=lambda v: wrapped(i64(v).sum(), np.int32),
    vw_hmax=lambda v: v.max(),
    vw_zip_lo=lambda a, b: zipped(a, b, slice(0, 4)).view(np.int32),
    vw_zip_hi=lambda a, b: zipped(a, b, slice(4, 8)).view(np.int32),
    vf_mul=lambda a, b: a * b,
    vf_from_w=lambda v: v.astype(np.float32),
    vw_abs_bits=lambda v: v.view(np.int32) & 0x7FFFFFFF,
    vw_round=lambda v: np.rint(v).astype(np.int32),
)


@meaning
def vb_lut16(table: Array, idx: Array) -> Array:
    found = np.take_along_axis(lanes(table), i64(lanes(idx)) & 15, axis=1)
    return np.where(idx >= 128, 0, found.reshape(-1))


@meaning
def vb_lut_low(table: Array, idx: Array) -> Array:
    found = np.take_along_axis(lanes(table), i64(lanes(idx)) & 15, axis=1)
    return np.where(idx >= 128, 0, found.reshape(-1))


@meaning
def vb_lut8(table: Array, v: Array, bits: int) -> Array:
    return np.take_along_axis(lanes(table), i64(lanes(v)) >> bits & 7, axis=1).reshape(-1)


@meaning
def vh_pairs(u: Array, s: Array) -> Array:
    sums = (i64(u) * i64(s.view(np.int8))).reshape(32, 2).sum(axis=1)
    exact: Array = sums.astype(np.int16)
    assert np.array_equal(exact, sums)  # that no legal input saturates
    return exact


def products(u: Any, s: Array) -> Array:
    """Sums of four products: int64 (16,)."""
    sums: Array = (i64(np.asarray(u)) * i64(s.view(np.int8))).reshape(16, 4).sum(axis=1)
    return sums


def field(x: Array, f: int) -> Array:
    """Four activations, 16 times."""
    return np.tile(x[4 * f : 4 * f + 4], 16).view(np.uint8)


@meaning
def vp_add(sums: Array, u: Array, s: Array) -> Array:
    return (products(HALF, sums) + products(u, s)).astype(np.int32)


@meaning
def vp_add_field(sums: Array, u: Array, x: Array, f: int) -> Array:
    return vp_add(sums, u, field(x, f))


@meaning
def vw_dot4_field(acc: Array, u: Array, x: Array, f: int) -> Array:
    return vw_dot4(acc, u, field(x, f))


@meaning
def vw_dot4(acc: Array, u: Array, s: Array) -> Array:
    return wrapped(i64(acc) + products(u, s), np.int32)


@meaning
def vw_dot4_values(acc: Array, v: Array, s: Array) -> Array:
    return wrapped(i64(acc) + products(v.view(np.int8), s), np.int32)


@meaning
def vw_dot4_values_field(acc: Array, v: Array, x: Array, f: int) -> Array:
    return vw_dot4_values(acc, v, field(x, f))


@meaning
def vw_widen(acc: Array, v: Array) -> Array:
    return wrapped(i64(acc) + products(HALF, v), np.int32)


@meaning
def vw_rows(acc: Array, lo: Array, hi: Array) -> Array:
    sums = np.concatenate([i64(lanes(lo)).sum(axis=0), i64(lanes(hi)).sum(axis=0)])
    return wrapped(i64(acc) + sums, np.int32)


@meaning
def vw_extend_lo(acc: Array, v: Array) -> Array:
    return wrapped(i64(acc) + i64(lanes(v))[:, :4].reshape(-1), np.int32)


@meaning
def vw_extend_hi(acc: Array, v: Array) -> Array:
    return wrapped(i64(acc) + i64(lanes(v))[:, 4:].reshape(-1), np.int32)


@meaning
def vw_store_n(p: Array, v: Array, n: int) -> None:
    p[:] = v[:n].view(np.uint8)


@meaning
def vf_load_n(p: Array, n: int) -> Array:
    return np.concatenate([p.view(np.float32), np.zeros(16 - n, np.float32)])


@meaning
def vf_store_n(p: Array, v: Array, n: int) -> None:
    p[:] = v[:n].view(np.uint8)


@meaning
def vw_transpose_lanes(p: Array, stride: int, *v: Array) -> None:
    for j, i in itertools.product(range(4), range(4)):
        at = stride * j + 16 * i
        p[at : at + 16] = lanes(v[i].view(np.uint8))[j]


@meaning
def vw_store_s8(p: Array, v: Array) -> None:
    p[:] = np.clip(v, -128, 127).astype(np.int8).view(np.uint8)


@meaning
def vw_mmla(acc: Array, u: Array, s: Array) -> Array:
    rows, tokens = i64(u).reshape(4, 2, 8), i64(s.view(np.int8)).reshape(4, 2, 8)
    return wrapped(i64(acc) + (rows @ tokens.transpose(0, 2, 1)).reshape(-1), np.int32)


@meaning
def vw_even(a: Array, b: Array) -> Array:
    return np.concatenate([a[::2], b[::2]])


@meaning
def vw_odd(a: Array, b: Array) -> Array:
    return np.concatenate([a[1::2], b[1::2]])


def by_turns(p: Array, a: Array, b: Array, count: int) -> None:
    p[:] = np.stack([a.reshape(-1, count), b.reshape(-1, count)], axis=1).reshape(-1)


MEANINGS.update(
    vb_store_zip4=lambda p, a, b: by_turns(p, a, b, 4),
    vb_store_zip8=lambda p, a, b: by_turns(p, a, b, 8),
)

# ---------------------------------------------------------------------------------------------------------
# What the ops are tried on.

EDGES: dict[str, list[Any]] = {
    "vb": [0, 1, 0x0F, 0x55, 127, 128, 129, 255],
    "vh": [0, 1, -1, 127, 255, -256, 32767, -32768],
    "vw": [0, 1, -1, -128, 127, 128, -129, 2**24 + 1, 2**31 - 1, -(2**31)],
    "vf": [0.0, -0.0, 1.5, -2.5, 3.4e38, 1e-40, np.inf, -np.inf, np.nan],
    "vm": [0, 1],
    "vp": [0, 1, -1, 127, -128],
    "vx": [0, 1, -1, 127, -128],
}
# Arguments with a domain of their own, its edges first; everything else is drawn from all values of its type.
CODES = [0, 1, 127, 128, *range(2, 127)]
VALUES = [127, 129, *range(127), *range(130, 256)]  # every int8 but -128
ROUNDED = [
    -127.5,
    -2.5,
    -1.5,
    -0.5,
    0.5,
    1.5,
    2.5,
    126.5,
    0.49999997,
    8388607.5,
    2.0**31 - 128,
    -(2.0**31) + 128,
]
DOMAINS: dict[tuple[str, str], list[Any]] = {
    ("vb_lut16", "idx"): [0, 15, 128, 255, *range(1, 15), *range(129, 255)],
    ("vb_lut8", "v"): [v for v in range(128) if not v & 8],
    ("vb_sign", "s"): [1, 127, 128, 255, *range(2, 127), *range(129, 255)],
    ("vh_pairs", "u"): CODES,
    ("vp_add", "u"): CODES,
    ("vp_add_field", "u"): CODES,
    ("vw_dot4", "u"): CODES,
    ("vw_dot4_field", "u"): CODES,
    ("vw_dot4_values", "v"): VALUES,
    ("vw_dot4_values_field", "v"): VALUES,
    ("vw_round", "v"): [*ROUNDED, *np.arange(-300, 300, 0.25)],
    **FLOAT_DOMAINS,
}
RANGES: dict[tuple[str, str], range] = {
    ("vb_field", "bits"): range(8),
    ("vb_affine_field", "bits"): range(8),
    ("vb_high", "bits"): range(8),
    ("vb_lut8", "bits"): range(0, 5, 4),
    ("vh_digits_lo", "radix"): range(1, 65),
    ("vh_digits_hi", "radix"): range(1, 65),
    ("vw_sra", "bits"): range(32),
    ("vx_load", "at"): range(0, 81, 20),
    ("vp_add_field", "f"): range(4),
    ("vw_dot4_field", "f"): range(4),
    ("vw_dot4_values_field", "f"): range(4),
    ("vw_store_n", "n"): range(1, 17),
    ("vf_load_n", "n"): range(17),
    ("vf_store_n", "n"): range(1, 17),
    ("vw_transpose_lanes", "stride"): range(64, 449, 64),
    **FLOAT_RANGES,
}
EXTENTS: dict[str, Callable[[dict[str, Any]], int]] = {
    "prefetch_once": lambda _: 0,
    "prefetch_l2": lambda _: 0,
    "prefetch": lambda _: 0,  # so that the address is the forbidden page's
    "vb_splat4": lambda _: 4,
    "vb_quad": lambda _: 16,
    "vb_nibbles": lambda _: 32,
    "vx_load": lambda args: args["at"] + 16,
    "vb_lut128": lambda _: 128,
    "vb_store_zip4": lambda _: 128,
    "vb_store_zip8": lambda _: 128,
    "vw_store_s8": lambda _: 16,
    "vw_store_n": lambda args: 4 * args["n"],
    "vf_load_n": lambda args: 4 * args["n"],
    "vf_store_n": lambda args: 4 * args["n"],
    "vw_transpose_lanes": lambda args: 3 * args["stride"] + 64,
    **FLOAT_EXTENTS,
}


def random_block(rng: np.random.Generator, kind: str) -> Array:
    if kind == "vm":
        return rng.integers(0, 2, 64, np.uint8)
    return rng.integers(0, 256, BYTES.get(kind, 64), np.uint8).view(DTYPES[kind])


def blocks(rng: np.random.Generator, signature: Signature, kind: str, name: str) -> Iterator[Array]:
    """First every edge in all elements, then mixtures of edges and, in the whole type, any values."""
    domain = DOMAINS.get((signature.name, name))
    edges = np.array(EDGES[kind] if domain is None else domain).astype(DTYPES[kind])
    count = BYTES.get(kind, 64) // edges.itemsize
    yield from (np.full(count, edge) for edge in edges)
    while True:
        yield rng.choice(edges, count)
        if domain is None:
            yield random_block(rng, kind)


def argument_lists(signature: Signature, code_max: int = 128) -> Iterator[list[Any]]:
    """Every count with some edges, or all pairs of edges and 40 random draws. The same on every run.

    ``code_max`` is the ISA level's: the largest byte that it multiplies.
    """
    multiplied = {(name, "u"): code_max for name in ("vh_pairs", "vw_dot4", "vw_dot4_field")}
    multiplied |= {(name, "u"): HALF for name in ("vp_add", "vp_add_field")}
    rng = np.random.default_rng([ord(letter) for letter in signature.name])
    made = {name: blocks(rng, signature, kind, name) for kind, name in signature.params if kind in DTYPES}
    first = 20 if len(made) == 1 else 11
    pairs = itertools.product(*(list(itertools.islice(stream, first)) for stream in list(made.values())[:2]))
    given: list[dict[str, Any]] = [dict(zip(made, drawn, strict=False)) for drawn in pairs]
    counts = [name for _, name in signature.params if (signature.name, name) in RANGES]
    for name in counts:
        some = given[:: max(1, len(given) // 8)]
        given = [{**drawn, name: value} for value in RANGES[signature.name, name] for drawn in some]
    for drawn in given if counts else given + [{}] * 40:
        args = complete(rng, signature, made, drawn)
        limits = [multiplied.get((signature.name, name)) for _, name in signature.params]
        yield [
            arg if limit is None else np.minimum(arg, np.uint8(limit))
            for arg, limit in zip(args, limits, strict=True)
        ]


def complete(
    rng: np.random.Generator, signature: Signature, made: dict[str, Iterator[Array]], given: dict[str, Any]
) -> list[Any]:
    """Draw the arguments that are not given."""
    args = dict(given)
    for kind, name in signature.params:
        if kind in DTYPES and name not in args:
            args[name] = next(made[name])
        elif kind in SCALARS:
            anything = rng.integers(0, 256, 8, np.uint8).view(SCALARS[kind])[0]
            args[name] = SCALARS[kind](args.get(name, anything))
    for kind, name in signature.params:  # last, because a count may decide how many bytes there are
        if "*" in kind:
            size = EXTENTS[signature.name](args) if signature.name in EXTENTS else 64
            reads = "const" in kind
            args[name] = rng.integers(0, 256, size, np.uint8) if reads else np.full(size, CANARY, np.uint8)
    if signature.name in ("vb_field", "vb_affine_field"):
        args["mask"] = args["mask"] & np.int32(255 >> args["bits"])
    return [args[name] for _, name in signature.params]


# ---------------------------------------------------------------------------------------------------------
# The harness.


def function_name(signature: Signature, isa: Isa, args: list[Any]) -> str:
    counts = [f"_{value}" for p, value in zip(signature.params, args, strict=True) if p in CONSTANTS]
    return f"test_{signature.name}{''.join(counts)}__{isa.name}"


def wrapper(signature: Signature, function: str, constant: int | None = None) -> str:
    """``void FUNCTION(void *const *arg, void *out)``; arg[i] points to argument i, or is it (a pointer)."""
    lines = ["(void)arg, (void)out;"]
    for i, (kind, name) in enumerate(signature.params):
        if kind == "vm":
            lines.append(f"vm {name} = vb_test(vb_load(arg[{i}]), vb_splat(255));")
        elif kind == "vp":
            lines.append(f"vp {name} = vp_add(vp_zero(), vb_splat({HALF}), vb_load(arg[{i}]));")
        elif kind == "vx":
            lines.append(f"vx {name} = vx_load(arg[{i}], 0);")
        elif "*" in kind:
            lines.append(f"{kind}{name} = arg[{i}];")
        elif (kind, name) in CONSTANTS and constant is not None:
            lines.append(f"enum {{ {name} = {constant} }};")
        else:
            lines += [f"{kind} {name};", f"memcpy(&{name}, arg[{i}], sizeof {name});"]
    call = f"{signature.name}({', '.join(name for _, name in signature.params)})"
    if signature.name.startswith("vw_dot4_values"):  # a level may take them 128 larger: that comes off again
        lines.append("v = vb_add(v, vb_splat(values_bias));")
        ones = (
            "vw_dot4_field(vw_zero(), vb_splat(1), x, f)"
            if "x, f" in call
            else "vw_dot4(vw_zero(), vb_splat(1), s)"
        )
        call = f"vw_sub({call}, values_bias ? vw_shl({ones}, 7) : vw_zero())"
    if signature.returns == "void":
        lines.append(f"{call};")
    elif signature.returns == "vm":
        lines.append(f"vb_store(out, vb_select({call}, vb_splat(1), vb_splat(0)));")
    elif signature.returns == "vp":
        lines.append(f"vw_store(out, vw_widen(vw_zero(), {call}));")
    elif signature.returns == "vx":  # byte j of each four, 16 times; of field f those of lane f
        ones = ", ".join(str(int(i // 4 % 4 == i % 4)) for i in range(64))
        lines += [f"static const uint8_t ones[64] = {{{ones}}};", "int32_t sums[16];", f"vx x = {call};"]
        for f in range(4):
            lines.append(f"vw_store(sums, vw_dot4_field(vw_zero(), vb_load(ones), x, {f}));")
            lines.append(f"memcpy((int32_t *)out + {4 * f}, sums + {4 * f}, 16);")
    else:
        lines += [f"{signature.returns} result = {call};", "memcpy(out, &result, sizeof result);"]
    body = "\n".join(f"    {line}" for line in lines)
    return f"void {function}(void *const *arg, void *out)\n{{\n{body}\n}}\n"


# The ops for tiles only mean something together. rows0, rows1, the numbers of three tiles; contents.
TILE_PRODUCT = """\
    int n[5];
    vt t;
    memcpy(n, arg[0], sizeof n);
    vt_begin(&t, n[0], n[1]);
    vt_load(&t, n[2], arg[1], 64);
    vt_load(&t, n[3], arg[2], 64);
    vt_load(&t, n[4], arg[3], 64);
    vt_dot4(&t, n[2], n[3], n[4]);
    vt_store(&t, n[2], arg[4]);
    vt_end(&t);
    (void)out;
"""
TILE_WRAPPERS = {
    "product": TILE_PRODUCT,
    "signed_product": TILE_PRODUCT.replace("vt_dot4", "vt_dot4_signed"),
    "load": """\
    int n[5];
    int32_t rows[256];
    vt t;
    memcpy(n, arg[0], sizeof n);
    vt_begin(&t, n[0], n[1]);
    if (n[2] < 4) vt_zero(&t, n[2]);
    vt_load(&t, n[2], arg[1], n[3]);
    if (n[2] < 4) {
        vt_store(&t, n[2], rows);
        memcpy(out, rows + 16 * n[4], 64);
        vt_zero(&t, n[2]);
    }
    vt_end(&t);
""",
}


def unit_of(isa: Isa) -> Unit:
    """All ops of a level, each behind its wrappers."""
    ops = dict(vector_ops(isa.name))
    head = ["#include <stdint.h>", "#include <string.h>", ops.pop("includes"), ops.pop("types")]
    head.insert(3, "#define OP static inline __attribute__((always_inline, unused))")
    prototypes, bodies = [], []
    for signature in ops_of(isa).values():
        names = [name for kind, name in signature.params if (kind, name) in CONSTANTS]
        counts = RANGES[signature.name, names[0]] if names else [None]
        for constant in counts:
            args = [constant] * len(signature.params)
            name = function_name(signature, isa, args)
            prototypes.append(Prototype.parse(f"void {name}(void *const *arg, void *out)"))
            bodies.append(wrapper(signature, name, constant))
    for name, body in TILE_WRAPPERS.items() if isa.tiles else ():
        prototypes.append(Prototype.parse(f"void test_{name}__{isa.name}(void *const *arg, void *out)"))
        bodies.append(f"void test_{name}__{isa.name}(void *const *arg, void *out)\n{{\n{body}}}\n")
    text = "\n".join([*head, *ops.values(), *bodies])
    return Unit(f"vocabulary_{isa.name}", text, isa, tuple(prototypes))


GUARDED = Unit(
    "guarded",
    (DATA / "guarded.c").read_text(),
    functions=(
        Prototype.parse("int64_t page_bytes(void)"),
        Prototype.parse("uint8_t *guarded_page(void)"),
        Prototype.parse(
            "int guarded_call(void (*op)(void *const *arg, void *out), void *const *arg, void *out)"
        ),
    ),
)


@dataclass(frozen=True)
class Outcome:
    signal: int
    result: Array  # the first 64 bytes at `out`
    memory: Array  # the bytes the pointer argument may touch, afterwards
    strayed: bool  # whether bytes around them changed


def toolchain_of_words(compiler: Compiler) -> Toolchain:
    # -O1: at -O3 the wrappers of all words take gcc half a minute a level, and a word is inlined either way.
    return Toolchain(compiler, shared_cache(), timeout_s=900, werror=True, extra_flags=("-O1",))


class Harness:
    """The ops of all levels that run here, compiled by one compiler."""

    def __init__(self, toolchain: Toolchain) -> None:
        isas = [decision.isa for decision in DECISIONS.values() if not isinstance(decision, Rejected)]
        units = [GUARDED, *(unit_of(isa) for isa in isas)]
        toolchain.compile_objects(units)  # in parallel; what fails is raised by the next line
        self.kernels = load_units(toolchain, units)
        self.page_bytes = int(self.kernels.lib.page_bytes())
        self.page = self.kernels.lib.guarded_page()
        assert self.page, "no memory for a guarded page"

    def run(self, function: str, args: list[Any], is_pointer: list[bool], offset: int) -> Outcome:
        """Call with the pointer argument (no op has two) at ``offset`` of the page, canaries all around."""
        ffi = self.kernels.ffi
        page = np.frombuffer(ffi.buffer(self.page, self.page_bytes), np.uint8)
        page[:] = CANARY
        size, pointers, alive = 0, [], []
        for value, here in zip(args, is_pointer, strict=True):
            if here:
                size = len(value)
                page[offset : offset + size] = value
                pointers.append(self.page + offset)
            else:
                alive.append(np.atleast_1d(value).copy())
                pointers.append(ffi.cast("void *", alive[-1].ctypes.data))
        out = np.full(64, CANARY, np.uint8)
        argv = ffi.new("void *[]", pointers or [ffi.NULL])
        op = self.kernels.function(function)
        number = self.kernels.lib.guarded_call(op, argv, ffi.cast("void *", out.ctypes.data))
        around = np.delete(page, slice(offset, offset + size))
        return Outcome(number, out, page[offset : offset + size].copy(), bool((around != CANARY).any()))

    def try_all(self, isa: Isa, op: str) -> Iterator[Trial]:
        """What `trials_of` has of an op."""
        for trial in trials_of(self, isa, ops_of(isa)[op]):
            (outcome,) = self.run_all(isa, [trial.call])
            yield replace(trial, outcome=outcome)

    def run_all(self, _isa: Isa, calls: list[Call]) -> Iterator[Outcome]:
        """The outcomes of ``calls``, in order."""
        for call in calls:
            yield self.run(call.function, call.args, call.is_pointer, call.offset)


@dataclass(frozen=True)
class Call:
    """A function of `unit_of`, its arguments, which of them is a pointer, and where in the page it points."""

    function: str
    args: list[Any]
    is_pointer: list[bool]
    offset: int


@dataclass(frozen=True)
class Trial:
    """A call, what it should return and leave behind its pointer, and what came of it."""

    call: Call
    expected: Any
    memories: list[Array]
    outcome: Outcome | None = None


class Emulated:
    """The ops of each level of another architecture as a program of its own, run by an emulator.

    Once for all ops of a level: to start it takes longer than to call one.
    """

    page_bytes = 4096

    def __init__(self, compiler: Compiler, folder: Path) -> None:
        self.folder = folder
        self.toolchain = toolchain_of_words(compiler)
        self.programs: dict[str, tuple[Path, list[str]]] = {}
        self.level = ""
        self.tried: dict[str, list[Trial]] = {}  # op of that level -> its calls and their outcomes

    def try_all(self, isa: Isa, op: str) -> list[Trial]:
        """What `trials_of` has of an op; those of the level that was asked for last are kept."""
        if self.level != isa.name:
            every = {name: list(trials_of(self, isa, signature)) for name, signature in ops_of(isa).items()}
            outcomes = self.run_all(isa, [trial.call for trials in every.values() for trial in trials])
            self.tried = {
                name: [replace(trial, outcome=next(outcomes)) for trial in trials]
                for name, trials in every.items()
            }
            assert next(outcomes, None) is None, "more outcomes than calls"
            self.level = isa.name
        return self.tried[op]

    def run_all(self, isa: Isa, calls: list[Call]) -> Iterator[Outcome]:
        """The outcomes of ``calls``, in order, all from one run of the program."""
        program, functions = self.programs.get(isa.name) or self._program(isa)
        numbers = {name: number for number, name in enumerate(functions)}
        data = b"".join(record(call, numbers) for call in calls)
        done = foreign.emulate([str(program)], foreign.core_of(isa), data)
        assert done.returncode == 0, done.stderr
        at = 0
        for call in calls:
            size = sum(len(v) for v, here in zip(call.args, call.is_pointer, strict=True) if here)
            signal, strayed = struct.unpack_from("=2i", done.stdout, at)
            answer = np.frombuffer(done.stdout, np.uint8, 64 + size, at + 8)
            yield Outcome(signal, answer[:64].copy(), answer[64:].copy(), bool(strayed))
            at += 72 + size
        assert at == len(done.stdout)

    def _program(self, isa: Isa) -> tuple[Path, list[str]]:
        unit = unit_of(isa)
        functions = [function.name for function in unit.functions]
        table = "".join(f"void {name}(void *const *arg, void *out);\n" for name in functions)
        table += f"void (*const ops[])(void *const *arg, void *out) = {{{', '.join(functions)}}};\n"
        units = [unit, GUARDED, Unit("ops", table), Unit("foreign", (DATA / "foreign.c").read_text())]
        objects = self.toolchain.compile_objects(units)
        failed = next((one for one in objects if isinstance(one, CompileError)), None)
        if failed:
            raise failed
        program = self.folder / isa.name
        subprocess.run(
            [*self.toolchain.compiler.command, "-static", "-o", program, *map(str, objects), "-lm"],
            check=True,
        )
        self.programs[isa.name] = program, functions
        return program, functions


def record(call: Call, numbers: dict[str, int]) -> bytes:
    """A call as data/vector_ops_harness/foreign.c reads it; ``numbers`` are those of its functions."""
    pointer, memory, values = -1, b"", []
    for i, (value, here) in enumerate(zip(call.args, call.is_pointer, strict=True)):
        if here:
            pointer, memory = i, value.tobytes()
        values.append(b"" if here else np.atleast_1d(value).tobytes())
    head = struct.pack("=5i", numbers[call.function], len(values), pointer, call.offset, len(memory))
    return head + b"".join(value.ljust(64, b"\0") for value in values) + memory


def offsets(page_bytes: int, kinds: list[str], args: list[Any]) -> list[int]:
    """Where to put the bytes behind a pointer: at the page's end, unaligned before it, at its start."""
    for kind, value in zip(kinds, args, strict=True):
        if "*" in kind:
            step = 4 if "32" in kind or "float" in kind else 2 if "16" in kind else 1
            end = page_bytes - len(value)
            return [end, end - step, 0]
    return [0]


@pytest.fixture(params=COMPILERS, ids=lambda compiler: compiler.kind, scope="session")
def harness(request: pytest.FixtureRequest) -> Harness:
    return Harness(toolchain_of_words(request.param))


@pytest.fixture(
    params=[
        # What a second compiler makes of the ops is asked on this CPU; of an emulator by .ci/deep only.
        pytest.param(compiler, id=compiler.kind, marks=[pytest.mark.deep] if count else [])
        for count, compiler in enumerate(foreign.cross_compilers())
    ],
    scope="session",
)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(request.param, tmp_path_factory.mktemp("emulated"))


def same(got: Array, expected: Any) -> bool:
    """Bit for bit; any NaN is as good as another."""
    want = np.atleast_1d(expected)
    have = got[: want.nbytes].view(want.dtype)
    if want.dtype != np.float32:
        return np.array_equal(have, want)
    nan = np.isnan(want)
    return np.array_equal(np.isnan(have), nan) and np.array_equal(
        have[~nan].view(np.uint32), want[~nan].view(np.uint32)
    )


def fault_of(outcome: Outcome, expected: Any, memories: list[Array]) -> str | None:
    """What is wrong with a call that should return ``expected`` and leave ``memories`` behind its pointer."""
    if outcome.signal:
        return f"forbidden memory is touched (signal {outcome.signal})"
    if outcome.strayed:
        return "memory around the pointer's is written"
    if expected is not None and not same(outcome.result, expected):
        return f"not {expected}"
    return next((f"not {memory}" for memory in memories if not np.array_equal(outcome.memory, memory)), None)


def each_word(isas: list[Isa]) -> pytest.MarkDecorator:
    pairs = [pytest.param(isa, op, id=f"{isa.name}-{op}") for isa in isas for op in ops_of(isa)]
    return pytest.mark.parametrize(("isa", "op"), pairs)


@each_word([isa for isa in ISAS if isa.arch in (ANY_ARCH, detect_cpu().arch)])
def test_word_means_what_numpy_says(harness: Harness, isa: Isa, op: str) -> None:
    decision = DECISIONS[isa.name]
    if isinstance(decision, Rejected):
        pytest.skip(f"cannot run {isa.name} here: {decision.reason}")
    try_op(harness, isa, ops_of(isa)[op])


@pytest.mark.skipif(foreign.why_not() is not None, reason=f"{foreign.why_not()}")
@each_word(EMULATED_ISAS)
def test_word_means_what_numpy_says_on_an_emulated_cpu(emulated: Emulated, isa: Isa, op: str) -> None:
    try_op(emulated, isa, ops_of(isa)[op])


def trials_of(harness: Harness | Emulated, isa: Isa, signature: Signature) -> Iterator[Trial]:
    """Calls of one op with everything `argument_lists` has, at several places of the page."""
    kinds = [kind for kind, _ in signature.params]
    is_pointer = ["*" in kind for kind in kinds]
    for args in argument_lists(signature, isa.code_max):
        copies = [value.copy() for value in args]
        with np.errstate(all="ignore"):
            expected = MEANINGS[signature.name](*copies)
        function = function_name(signature, isa, args)
        for offset in offsets(harness.page_bytes, kinds, args):
            memories = list(itertools.compress(copies, is_pointer))
            yield Trial(Call(function, args, is_pointer, offset), expected, memories)


def try_op(harness: Harness | Emulated, isa: Isa, signature: Signature) -> None:
    """Every trial of an op is without fault."""
    names, count = [name for _, name in signature.params], 0
    for count, trial in enumerate(harness.try_all(isa, signature.name), 1):  # noqa: B007
        assert trial.outcome is not None
        fault = fault_of(trial.outcome, trial.expected, trial.memories)
        assert fault is None, f"{fault} with {dict(zip(names, trial.call.args, strict=True))}"
    assert count >= (1 if not names else 15)


def tile_rows(tile: int, rows0: int, rows1: int) -> int:
    return 16 if tile > 5 else rows0 if tile in (0, 1, 4) else rows1


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.tiles], ids=lambda isa: isa.name)
def test_tiles_mean_what_numpy_says(harness: Harness, isa: Isa) -> None:
    """Products into every tile of sums, and loads that end where a page does."""
    decision = DECISIONS[isa.name]
    if isinstance(decision, Rejected):
        pytest.skip(f"cannot run {isa.name} here: {decision.reason}")
    rng = np.random.default_rng(5)
    combinations = itertools.product(
        ((16, 16), (16, 1), (7, 7), (16, 9)),
        range(4),
        (4, 5),
        (6, 7),
        (("product", np.uint8), ("signed_product", np.int8)),
    )
    tried = 0
    for (rows0, rows1), c, a, b, (product, weights) in combinations:
        rows = tile_rows(c, rows0, rows1)
        if tile_rows(a, rows0, rows1) != rows:
            continue
        sums = rng.integers(-(2**31), 2**31, (16, 16)).astype(np.int32)
        x = rng.integers(-128, 128, (16, 64)).astype(np.int8)
        w = rng.integers(0, 256, (16, 64), np.uint8).view(weights)
        by_row = i64(w).reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16)  # (k, output rows)
        expected = wrapped(i64(sums) + i64(x) @ by_row, np.int32)[:rows]
        numbers = np.array([rows0, rows1, c, a, b], np.intc)
        args = [numbers, sums, x, w, np.full(64 * rows, CANARY, np.uint8)]
        is_pointer = [False] * 4 + [True]
        call = Call(f"test_{product}__{isa.name}", args, is_pointer, harness.page_bytes - 64 * rows)
        (outcome,) = harness.run_all(isa, [call])
        assert fault_of(outcome, None, [expected.view(np.uint8).reshape(-1)]) is None, numbers
        tried += 1
    for tile, stride in itertools.product(range(8), (64, 80, 192)):
        rows = tile_rows(tile, 16, 5)
        memory = rng.integers(0, 256, (rows - 1) * stride + 64, np.uint8)
        row = int(rng.integers(rows))
        numbers = np.array([16, 5, tile, stride, row], np.intc)
        call = Call(
            f"test_load__{isa.name}", [numbers, memory], [False, True], harness.page_bytes - len(memory)
        )
        (outcome,) = harness.run_all(isa, [call])
        wanted = memory[row * stride : row * stride + 64] if tile < 4 else None
        assert fault_of(outcome, wanted, [memory]) is None, numbers
        tried += 1
    assert tried == 2 * (2 * 16 // 2 + 2 * 16) + 24


def test_the_harness_sees_a_forbidden_access(harness: Harness) -> None:
    """So that the test above can fail: the load of a block whose last byte is forbidden."""
    forbidden_access_is_seen(harness)


@pytest.mark.skipif(foreign.why_not() is not None, reason=f"{foreign.why_not()}")
def test_the_emulated_harness_sees_a_forbidden_access(emulated: Emulated) -> None:
    forbidden_access_is_seen(emulated)


def forbidden_access_is_seen(harness: Harness | Emulated) -> None:
    block, scalar = np.zeros(63, np.uint8), DECISIONS["scalar"].isa
    function = function_name(SCALAR["vb_load"], scalar, [None])
    calls = [Call(function, [block], [True], offset) for offset in (harness.page_bytes - 63, 0)]
    bad, good = harness.run_all(scalar, calls)
    assert bad.signal != 0
    assert good.signal == 0


# ---------------------------------------------------------------------------------------------------------
# The files.


def test_every_word_has_a_meaning() -> None:
    assert set(MEANINGS) == {*SCALAR, *MMLA, *AFFINE}


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_every_level_has_the_ops_of_scalar(isa: Isa) -> None:
    own = {name for name in vector_ops(isa.name) if not name.startswith(HELPERS)}
    of_tiles = {"vt", *TILES}
    assert own | of_tiles | set(MMLA) | set(AFFINE) == set(vector_ops("scalar"))
    assert own & of_tiles == (of_tiles if isa.tiles else set())
    assert signatures(isa.name) == ops_of(isa)
    assert signatures(isa.name, tiles=True) == (TILES if isa.tiles else {})


@pytest.mark.parametrize("path", ISA_FILES, ids=lambda path: path.name)
def test_a_file_holds_ops_and_no_preprocessor(path: Path) -> None:
    assert path.stem in {name for isa in ISAS for name in isa.headers}
    text = path.read_text()
    marks = re.findall(r"^//: (\w+)$", text, re.MULTILINE)
    assert len(marks) == len(set(marks)) == len(parse_ops(text)), "a op is defined twice"
    directives = set(re.findall(r"^\s*#\s*(\w+)", text, re.MULTILINE))
    assert directives <= {"include"}, "no #if: what an ISA level has is decided by its file"


@pytest.mark.parametrize("path", ISA_FILES, ids=lambda path: path.name)
def test_a_comment_names_no_word(path: Path) -> None:
    """The renderer takes every name in a op's text for a use, and would write that op out too."""
    ops = {name for isa in ISAS for name in vector_ops(isa.name)} - NOT_FUNCTIONS
    for name, text in parse_ops(path.read_text()).items():
        comments = " ".join(re.findall(r"//(.*)", text))
        assert not ops & set(re.findall(r"\w+", comments)), f"in the comment of {name}"
