"""Bundles: read, verified, chosen, and each refusal one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitgen.abi import ABI_VERSION
from bitgen.bundle import (
    MANIFEST_NAME,
    TUNED,
    Bundle,
    KernelEntry,
    Manifest,
    choose_bundle,
    describe,
    find_bundles,
    ranked,
    read_bundle,
    refused_features,
    require_runnable,
    sha256_of,
)
from bitgen.bundle.manifest import Label, Origin
from bitgen.bundle.measured import Measured, recall, remember
from bitgen.cpu import Cache, Cpu
from bitgen.errors import BitgenError, FileError, UnsupportedError
from bitgen.records import dump
from bitgen.spec import KernelSpec, Layout, Schedule, Shape, StepSizes

AVX2 = ("avx2", "bmi2", "f16c", "fma")
AVX512 = (*AVX2, "avx512bw", "avx512f")
SPEC = KernelSpec("tl2", "avx2", "n1", Layout("tl2", 32), Schedule("direct", (("streams", 2), ("nr", 1))))


def cpu(family: str = "zen2", features: tuple[str, ...] = AVX2, **values: Any) -> Cpu:
    fields: dict[str, Any] = {
        "os": "Linux",
        "arch": "x86_64",
        "vendor": "AuthenticAMD",
        "model_name": "a CPU",
        "family": family,
        "features": frozenset(features),
        "logical_cpus": 2,
        "physical_cores": 2,
        "usable_threads": 2,
        "caches": (Cache(1, "Data", 32768, 64, 1),),
    }
    return Cpu(**{**fields, **values})


def manifest(**changes: Any) -> Manifest:
    kernels = (
        KernelEntry(SPEC, Shape(100, 500), 2, TUNED, "a" * 64),
        KernelEntry(SPEC, sha256="b" * 64),
    )
    base = Manifest(
        name="test",
        library="libbitgen-test.so",
        arch="x86_64",
        system="Linux",
        cpu_family="zen2",
        model="3B",
        isas={"avx2": AVX2, "scalar": ()},
        kernels=kernels,
        files={},
        compiler={"avx2": {"compiler": "gcc"}},
        fingerprint="f" * 64,
        bitgen_version="0.1.0",
        step=StepSizes(hidden=3200, q_rows=3200, ffn=8640, head_dim=100),
    )
    return replace(base, **changes)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(folder: str = "test", library: bytes = b"machine code", **changes: Any) -> Path:
        path = tmp_path / folder
        path.mkdir()
        (path / "libbitgen-test.so").write_bytes(library)
        made = manifest(**changes)
        made = replace(made, files={"libbitgen-test.so": sha256_of(path / "libbitgen-test.so")})
        (path / MANIFEST_NAME).write_text(json.dumps(dump(made)))
        return path

    return write


def test_a_manifest_survives_json(write: Callable[..., Path]) -> None:
    bundle = read_bundle(write())
    expected = manifest(files=bundle.manifest.files)
    assert bundle.manifest == expected
    assert bundle.library.read_bytes() == b"machine code"
    assert expected.features == frozenset(AVX2)
    assert expected.is_tuned
    assert not manifest(kernels=expected.kernels[1:]).is_tuned


def test_a_manifest_from_before_there_were_sized_steps_is_read(write: Callable[..., Path]) -> None:
    path = write()
    edit(path, step=...)
    assert read_bundle(path).manifest.step is None
    assert read_bundle(write("generic", step=None)).manifest.step is None


def edit(path: Path, **changes: Any) -> None:
    file = path / MANIFEST_NAME
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / MANIFEST_NAME).unlink(), r"is not a bundle: there is no manifest\.json in it"),
        (lambda p: (p / MANIFEST_NAME).write_text("{"), "cannot read .*manifest.json"),
        (lambda p: (p / MANIFEST_NAME).write_text("[]"), "format is None, this bitgen reads 1"),
        (lambda p: (p / MANIFEST_NAME).write_bytes(b"\xff"), "cannot read .*manifest.json"),
        (lambda p: (p / MANIFEST_NAME).write_text("[" * 100_000), "cannot read .*manifest.json"),
        (lambda p: edit(p, format=2), "format is 2, this bitgen reads 1"),
        (
            lambda p: edit(p, abi_version=2),
            f"abi_version is 2, this bitgen reads {ABI_VERSION}: build the bundle again",
        ),
        (lambda p: edit(p, isas=...), "missing key isas; the manifest is damaged: build"),
        (lambda p: edit(p, kernels=[{}]), r"kernels\[0\]: missing key spec"),
        (lambda p: edit(p, kernels=7), "kernels must be a list"),
        (lambda p: edit(p, step={"hidden": 3200}), "step: missing keys q_rows, ffn, head_dim"),
        (lambda p: edit(p, library="../x.so"), "library must be a file name"),
        (lambda p: edit(p, files={}), "sha256 differs"),
        (lambda p: (p / "libbitgen-test.so").write_bytes(b"other"), "sha256 differs"),
        (lambda p: (p / "libbitgen-test.so").unlink(), "cannot be read: .*No such file"),
    ],
)
def test_a_spoilt_bundle_is_one_line(
    write: Callable[..., Path], spoil: Callable[[Path], object], message: str
) -> None:
    path = write()
    spoil(path)
    with pytest.raises(FileError, match=message) as caught:
        read_bundle(path)
    assert "\n" not in caught.value.message


def test_a_kernel_with_an_unknown_family_is_named(write: Callable[..., Path]) -> None:
    path = write()
    data = json.loads((path / MANIFEST_NAME).read_text())
    data["kernels"][0]["spec"]["layout"]["family"] = "t9"
    (path / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(BitgenError, match="unknown family 't9'"):
        read_bundle(path)


def bundle(name: str, **changes: Any) -> Bundle:
    return Bundle(Path(name), manifest(**changes))


UNTUNED = {"kernels": manifest().kernels[1:]}
WIDE = {"isas": {"avx512": AVX512, "scalar": ()}}


@pytest.mark.parametrize(
    ("given", "best"),
    [
        ([bundle("here")], "here"),
        ([bundle("other", cpu_family="haswell"), bundle("here")], "here"),
        ([bundle("untuned", **UNTUNED), bundle("here")], "here"),
        ([bundle("other", cpu_family="haswell"), bundle("untuned", **UNTUNED)], "untuned"),
        ([bundle("wide", **WIDE), bundle("here")], "here"),
        ([bundle("first"), bundle("second")], "first"),
        ([bundle("wide", **WIDE)], None),
        ([], None),
    ],
)
def test_the_best_runnable_bundle_is_chosen(given: list[Bundle], best: str | None) -> None:
    chosen, decisions = choose_bundle(given, cpu())
    assert (chosen.path.name if chosen else None) == best
    assert [decision.bundle for decision in decisions] == given


def test_a_bundle_that_uses_more_of_the_cpu_is_preferred() -> None:
    big = cpu("zen4", AVX512)
    given = [bundle("narrow", cpu_family="x86_64"), bundle("wide", cpu_family="icelake", **WIDE)]
    assert choose_bundle(given, big)[0] == given[1]


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (bundle("b", **WIDE), "it is for zen2, this CPU (zen2) lacks avx512bw, avx512f"),
        (bundle("b", arch="aarch64"), "it is for Linux on aarch64, this is Linux on x86_64"),
        (bundle("b", system="Darwin"), "it is for Darwin on x86_64, this is Linux on x86_64"),
    ],
)
def test_a_rejection_says_why(of: Bundle, reason: str) -> None:
    _, (decision,) = choose_bundle([of], cpu())
    assert not decision.accepted
    assert decision.reason == reason
    assert describe([decision]) == [f"b: rejected, {reason}"]
    with pytest.raises(UnsupportedError) as caught:
        require_runnable(of, cpu())
    assert caught.value.message == f"cannot use b: {reason}"


def test_an_acceptance_says_why() -> None:
    _, decisions = choose_bundle([bundle("a"), bundle("b", cpu_family="haswell", **UNTUNED)], cpu())
    assert describe(decisions) == [
        "a: accepted, tuned, for this CPU family",
        "b: accepted, untuned, for haswell, which also runs here",
    ]
    require_runnable(decisions[0].bundle, cpu())


def installed(name: str, label: Label, **changes: Any) -> Bundle:
    return replace(bundle(name, **changes), origin=Origin("3B", "1.0", "A" * 16, label))


def test_what_was_built_here_comes_before_what_was_installed() -> None:
    big = cpu("zen2", AVX512)
    wide = installed("installed", "tuned", **WIDE)
    assert choose_bundle([wide, bundle("own")], big)[0] == bundle("own")
    assert choose_bundle([wide, bundle("own", **UNTUNED)], big)[0] == wide
    assert choose_bundle([bundle("own", cpu_family="haswell"), wide], big)[0] == wide


def test_accepted_bundles_are_ranked_each_with_what_the_one_above_has_more() -> None:
    given = [
        installed("default", "default"),
        installed("moved", "transferred"),
        installed("old", "tuned", bitgen_version="0.0.9"),
        installed("new", "tuned", bitgen_version="0.0.10"),
        installed("same", "tuned", bitgen_version="0.0.10"),
        installed("wide", "tuned", **WIDE),
    ]
    decisions = choose_bundle(given, cpu())[1]
    assert [(d.bundle.path.name, why) for d, why in ranked(decisions, cpu())] == [
        ("new", ""),
        ("same", "the one above was found first"),
        ("old", "the one above is of a newer bitgen"),
        ("moved", "the one above has better tuned kernels"),
        ("default", "the one above has better tuned kernels"),
    ]
    assert decisions[1].reason == "tuned on another CPU family, for this CPU family"


def with_library(name: str, sha256: str, **changes: Any) -> Bundle:
    return bundle(name, files={"libbitgen-test.so": sha256}, **changes)


def test_a_race_decides_where_all_took_part(bitgen_home: Path) -> None:
    own, other = with_library("own", "a" * 64), with_library("other", "b" * 64, cpu_family="haswell")
    times = {"a" * 64: 2e6, "b" * 64: 1e6}
    assert recall(cpu()).of(own) is None
    remember(cpu(), Measured("a CPU", times))
    measured = recall(cpu())
    assert measured.of(other) == 1e6
    chosen, decisions = choose_bundle([own, other], cpu(), measured=measured)
    assert chosen == other
    assert [why for _, why in ranked(decisions, cpu(), measured)] == [
        "",
        "the one above was faster in the last race here",
    ]
    new = with_library("new", "c" * 64, cpu_family="haswell")
    assert choose_bundle([own, other, new], cpu(), measured=measured)[0] == own, "the race is void"
    elsewhere = cpu("zen2", AVX512)
    assert recall(elsewhere).of(own) is None, "another CPU has raced nothing"
    (file,) = (bitgen_home / "cache" / "races").iterdir()
    file.write_text("damaged")
    assert choose_bundle([own, other], cpu(), measured=recall(cpu()))[0] == own


def test_a_library_for_every_cpu_requires_what_all_its_levels_do() -> None:
    of = bundle("all", isas={"avx512": AVX512, "avx2": AVX2, "scalar": ()}, dispatches=True)
    chosen, (decision,) = choose_bundle([of], cpu("nehalem", ()))
    assert chosen == of
    assert decision.reason == "it serves every x86_64 CPU with the best of its ISA levels"
    assert not choose_bundle([of], cpu(arch="aarch64"))[1][0].accepted


def test_what_the_system_refuses_is_a_reason() -> None:
    tiles = cpu("sapphirerapids", (*AVX2, "amx_tile"))
    of = bundle("b", isas={"amx_int8": (*AVX2, "amx_tile")})
    assert choose_bundle([of], tiles)[0] == of
    chosen, (decision,) = choose_bundle([of], tiles, frozenset({"amx_tile"}))
    assert chosen is None
    assert decision.reason == "the system refuses amx_tile to this process"
    assert refused_features(cpu()) == frozenset()


def test_bundles_are_found_and_damaged_ones_reported(write: Callable[..., Path], tmp_path: Path) -> None:
    good, bad = write("good"), write("spoilt")
    (bad / "libbitgen-test.so").write_bytes(b"")
    (tmp_path / "unrelated").mkdir()
    bundles, errors = find_bundles(tmp_path)
    assert [bundle.path for bundle in bundles] == [good]
    assert [bad.name in error.message for error in errors] == [True]
    assert find_bundles(tmp_path / "nothing") == ([], [])
