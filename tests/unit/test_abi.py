"""The public C header: every function and the layout of every struct, as tests/data/abi.txt lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bitgen import abi, abi_types
from bitgen.paths import csrc_dir

LISTED = Path(__file__).parents[1] / "data" / "abi.txt"
HEADER = (csrc_dir() / "bitgen.h").read_text(encoding="utf-8")


def functions() -> Iterator[str]:
    for declaration in re.findall(r"^BITGEN_API ([^;]+);", HEADER, re.MULTILINE):
        yield " ".join(declaration.split())


def structs() -> Iterator[str]:
    """Each struct with its size, and each field with offset and size."""
    _, names, _ = abi.ffi.list_types()
    for name in names:
        kind = abi.ffi.typeof(f"struct {name}")
        if f"struct {name} {{" not in HEADER:  # opaque, and cffi would abort when asked for its fields
            yield f"struct {name}"
            continue
        yield f"struct {name} {abi.ffi.sizeof(kind)}"
        for field, place in kind.fields:
            yield f"    {place.offset:3} {abi.ffi.sizeof(place.type):3} {place.type.cname.strip()} {field}"


def numbers() -> Iterator[str]:
    for name in re.findall(r"\b(BITGEN_[A-Z0-9_]+)\b", HEADER.partition("ABI begins")[2]):
        if hasattr(abi.constants, name):
            yield f"{name} {getattr(abi.constants, name):#x}"


def listing() -> str:
    parts = (functions(), structs(), dict.fromkeys(numbers()))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def test_the_abi_is_the_listed_one() -> None:
    """Whoever changes this file changes BITGEN_ABI_VERSION, unless something is only added at the end."""
    assert listing() == LISTED.read_text(encoding="utf-8")


def test_structs_that_callers_fill_begin_with_their_size() -> None:
    for name in ("model", "tokens"):
        (first, place), *_ = abi.ffi.typeof(f"struct bitgen_{name}").fields
        assert (first, place.offset, place.type.cname) == ("size", 0, "int64_t")
    assert abi.ffi.sizeof("struct bitgen_packed_header") == 64


def test_python_reads_its_numbers_from_the_header() -> None:
    assert abi.DENSE_TYPES["q6_k"] == abi.constants.BITGEN_DENSE_Q6_K
    assert list(abi.DENSE_TYPES.values()) == list(range(abi.constants.BITGEN_DENSE_TYPES))
    assert len(abi.STAGES) == abi.constants.BITGEN_STAGES
    assert abi.KV_TYPES == {"f16": 0, "f32": 1, "q8": 2, "q4": 3}
    assert abi.ACTIVATIONS == {"silu": 0, "relu2": 1}


def test_the_header_need_not_be_parsed() -> None:
    assert abi.ffi is abi_types.ffi, "`python -m bitgen.abi` writes bitgen/abi_types.py anew"


def test_a_library_may_lack_a_function() -> None:
    """Of this process, which has none of them, whether the header was parsed before or is parsed now."""
    for ffi in (abi.ffi, abi._parsed(abi._declarations())):
        assert not abi.has_function(ffi.dlopen(None), "bitgen_matmul")
