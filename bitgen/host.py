"""The host part of a library as translation units: what feeds and runs a kernel, whoever calls it.

The tuner times kernels through the same ``bitgen_run`` that the shipped library calls, compiled from the same
text with the same flags. Everything here is compiled at the architecture's baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitgen.config import load_strict, load_yaml
from bitgen.cpu import ArmFeature
from bitgen.errors import BitgenError, FileError, UnsupportedError
from bitgen.packing import T5_CODES
from bitgen.paths import configs_dir
from bitgen.render import render_host, render_step_header
from bitgen.spec import K_MAX, X_ALIGN, X_PAD, KernelSpec
from bitgen.toolchain import Unit

ARCHS = ("x86_64", "aarch64")
SYSTEMS = {"Linux": "linux", "Darwin": "darwin"}
_MAX_FEATURES = 64  # bits of the mask in struct bitgen_isa

Headers = tuple[tuple[str, str], ...]


def row_grain(spec: KernelSpec) -> int:
    """Rows that a claim of work should have a multiple of: what the schedule walks at once.

    A kernel takes any multiple of its row block; less than this wastes streams or unpacked panels.
    """
    knobs = dict(spec.schedule)
    return max(knobs.get("streams", 1) * spec.layout.row_block, knobs.get("mc", 0))


def host_headers(arch: str) -> Headers:
    """(file name, text) of the headers: bitgen.h is public, the others are internal."""
    _require_arch(arch)
    return (
        ("bitgen.h", render_host("bitgen.h.j2")),
        ("kernel.h", render_host("kernel.h.j2", x_align=X_ALIGN, x_pad=X_PAD, k_max=K_MAX)),
        ("pool.h", render_host("pool.h.j2")),
        ("step.h", render_step_header()),
        ("arch.h", render_host(f"arch_{arch}.h.j2")),
    )


def host_unit(name: str, text: str, headers: Headers) -> Unit:
    """A unit of host code: at the architecture's baseline, nothing visible that is not marked BITGEN_API."""
    return Unit(name, text, headers=headers, flags=("-fvisibility=hidden",))


def run_units(arch: str) -> tuple[Unit, ...]:
    """The units behind ``bitgen_run`` (see kernel.h): the thread pool, and one multiplication."""
    headers = host_headers(arch)
    return tuple(host_unit(name, render_host(f"{name}.c.j2"), headers) for name in ("pool", "run"))


def library_units(
    arch: str, system: str, features: Iterable[str], table: Mapping[str, Any]
) -> tuple[Unit, ...]:
    """All host units of a library: `run_units`, public functions, packers, step, CPU check, table of kernels.

    ``system`` is Linux or Darwin, ``features`` what the library's ISA levels require, in the order that the
    masks of ``table`` (the values of table.c.j2) count them. BitgenError for what there is no host code for.
    """
    if system not in SYSTEMS:
        raise UnsupportedError(f"there is no host code for {system}; there is for {', '.join(SYSTEMS)}")
    headers = (*host_headers(arch), ("table.h", render_host("table.h.j2")))
    rows = feature_rows(arch, features, system=system)
    check = "cpu_aarch64_darwin" if (arch, system) == ("aarch64", "Darwin") else f"cpu_{arch}"
    texts = {
        "library": render_host("library.c.j2"),
        "step": render_host("step.c.j2"),
        "rope": render_host("rope.c.j2"),
        "pack": render_host("pack.c.j2", t5_codes=T5_CODES.tolist()),
        "cpu": render_host(f"{check}.c.j2", features=rows),
        "cores": render_host(f"cores_{SYSTEMS[system]}.c.j2"),
        "table": render_host("table.c.j2", **table),
    }
    return (*run_units(arch), *(host_unit(name, text, headers) for name, text in texts.items()))


@dataclass(frozen=True)
class X86Feature:
    """A bit of cpuid, and the bits of XCR0 (``state``) that the system must save; see cpu_features.yaml."""

    leaf: int
    subleaf: int
    register: Literal["eax", "ebx", "ecx", "edx"]
    bit: int
    state: int = 0


@dataclass(frozen=True)
class _FeatureFile:
    x86_64: dict[str, X86Feature]
    aarch64: dict[str, ArmFeature]
    aarch64_darwin: dict[str, str]


def feature_rows(
    arch: str, names: Iterable[str], file: Path | None = None, *, system: str = "Linux"
) -> list[dict[str, Any]]:
    """For each feature its row of configs/cpu_features.yaml (or ``file``) and its ``name``.

    On macOS an ARM feature's row is its ``setting`` in sysctl.

    FileError when a feature has no row: no library can check it.
    """
    _require_arch(arch)
    path = file if file is not None else configs_dir() / "cpu_features.yaml"
    table = load_strict(_FeatureFile, load_yaml(path), str(path))
    rows: Mapping[str, X86Feature | ArmFeature] = table.x86_64 if arch == "x86_64" else table.aarch64
    known: Mapping[str, dict[str, Any]] = {name: dataclasses.asdict(row) for name, row in rows.items()}
    if (arch, system) == ("aarch64", "Darwin"):
        known = {name: {"setting": setting} for name, setting in table.aarch64_darwin.items()}
    wanted = list(names)
    missing = [name for name in wanted if name not in known]
    if missing:
        message = f"{path}: no row under {arch} for {', '.join(missing)}, which isas.yaml requires"
        raise FileError(message)
    if len(wanted) > _MAX_FEATURES:
        raise BitgenError(f"a library can check {_MAX_FEATURES} CPU features, not {len(wanted)}")
    return [{"name": name, **known[name]} for name in wanted]


def _require_arch(arch: str) -> None:
    if arch not in ARCHS:
        raise UnsupportedError(f"there is no host code for {arch}; there is for {', '.join(ARCHS)}")
