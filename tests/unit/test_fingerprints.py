from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitgen import hostcode, render
from bitgen.cpu import find_isa, load_isas, target_cpu
from bitgen.fingerprints import fingerprints
from bitgen.hostcode import csrc_text
from bitgen.measure import harness
from bitgen.paths import templates_dir
from bitgen.space import space_for
from bitgen.spec import FAMILIES, N1, Schedule, Shape
from bitgen.toolchain import Toolchain, find_compiler

CPU, ISAS = target_cpu("haswell"), load_isas()
AVX2 = find_isa("avx2", ISAS)
TOOLCHAIN = Toolchain(find_compiler())
# One kernel a family, and one that multiplies on another level.
SPECS = {
    name: space_for(name, AVX2, N1, Shape(640, 320), CPU).default for name in FAMILIES if name != "tl5"
} | {"scalar": space_for("i2s", find_isa("scalar", ISAS), N1, Shape(640, 320), CPU).default}

Edit = Callable[[str, str, str], None]  # file, old text, new text


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Edits a copy of the templates, which is rendered from in this test."""
    copy = tmp_path / "templates"
    shutil.copytree(templates_dir(), copy)
    monkeypatch.setattr(render, "templates_dir", lambda: copy)
    caches = [
        f for f in vars(render).values() if hasattr(f, "cache_clear") and f.__module__ == "bitgen.render"
    ]

    def change(file: str, old: str, new: str) -> None:
        text = (copy / file).read_text(encoding="utf-8")
        assert old in text
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        for cached in caches:
            cached.cache_clear()

    yield change
    for cached in caches:
        cached.cache_clear()


def stale_after(file: str, old: str, new: str, edit: Edit) -> set[str]:
    before = fingerprints(CPU, ISAS, TOOLCHAIN)
    known = {name: before(spec) for name, spec in SPECS.items()}
    edit(file, old, new)
    now = fingerprints(CPU, ISAS, TOOLCHAIN)
    return {name for name, spec in SPECS.items() if now(spec) != known[name]}


def test_an_edited_template_makes_its_own_kernels_stale(edit: Edit) -> None:
    text = (templates_dir() / "kernels" / "t5.c.j2").read_text(encoding="utf-8")
    assert stale_after("kernels/t5.c.j2", text, text + "\nstatic int added;\n", edit) == {"t5"}


def test_lookup_tables_belong_to_the_kernels_that_read_them(edit: Edit) -> None:
    text = (templates_dir() / "kernels" / "tl1_tables.c.j2").read_text(encoding="utf-8")
    assert stale_after("kernels/tl1_tables.c.j2", text, text + "\nstatic int added;\n", edit) == {"tl1"}


def test_the_quantiser_belongs_to_all(edit: Edit) -> None:
    text = (templates_dir() / "kernels" / "quantize.c.j2").read_text(encoding="utf-8")
    assert stale_after("kernels/quantize.c.j2", text, text + "\nstatic int added;\n", edit) == set(SPECS)


def test_comments_and_white_space_do_not_count(edit: Edit) -> None:
    text = (templates_dir() / "kernels" / "i2s.c.j2").read_text(encoding="utf-8")
    added = text + "\n\n/* A comment\n   of two lines. */\n// and another\n"
    assert stale_after("kernels/i2s.c.j2", text, added, edit) == set()


def test_a_kernels_own_name_does_not_count() -> None:
    """Else a knob that is renamed would cost all that is known of its kernels."""
    of = fingerprints(CPU, ISAS, TOOLCHAIN)
    spec = SPECS["i2s"]
    renamed = replace(spec, schedule=Schedule(spec.schedule.algorithm, (*spec.schedule.knobs, ("idle", 0))))
    assert renamed.name != spec.name
    assert of(renamed) == of(spec)


def test_flags_of_another_level_do_not_count() -> None:
    before = fingerprints(CPU, ISAS, TOOLCHAIN)
    flags = (*AVX2.cc_flags, "-fno-builtin")
    changed = [replace(isa, cc_flags=flags) if isa.name == "avx2" else isa for isa in ISAS]
    after = fingerprints(CPU, changed, TOOLCHAIN)
    assert after(SPECS["scalar"]) == before(SPECS["scalar"])
    assert after(SPECS["i2s"]).differences(before(SPECS["i2s"])) == ["compiler"]


def test_the_cpu_and_the_harness_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprints(CPU, ISAS, TOOLCHAIN)(SPECS["i2s"])
    other = replace(CPU, model_name="another")
    assert fingerprints(other, ISAS, TOOLCHAIN)(SPECS["i2s"]).differences(before) == ["cpu"]
    text = csrc_text
    monkeypatch.setattr(harness, "csrc_text", lambda name: text(name) + "int added;")
    assert fingerprints(CPU, ISAS, TOOLCHAIN)(SPECS["i2s"]).differences(before) == ["harness"]


@pytest.mark.parametrize("name", ["bitgen.h", "step.h"])
def test_a_new_function_of_the_library_does_not_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every ABI would cost all that is known of all kernels."""
    before = fingerprints(CPU, ISAS, TOOLCHAIN)(SPECS["i2s"])
    text = csrc_text
    added = {name: "int32_t added(void);"}
    monkeypatch.setattr(hostcode, "csrc_text", lambda file: text(file) + added.get(file, ""))
    assert fingerprints(CPU, ISAS, TOOLCHAIN)(SPECS["i2s"]) == before


@pytest.mark.parametrize("name", ["run.c", "pool.c", "kernel.h", "matmul.h"])
def test_what_runs_in_a_kernels_turn_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprints(CPU, ISAS, TOOLCHAIN)(SPECS["i2s"])
    text = csrc_text
    added = {name: "int32_t added(void);"}
    monkeypatch.setattr(hostcode, "csrc_text", lambda file: text(file) + added.get(file, ""))
    assert fingerprints(CPU, ISAS, TOOLCHAIN)(SPECS["i2s"]).differences(before) == ["harness"]


@pytest.mark.parametrize(
    "change",
    [{"isa": "mmx"}, {"schedule": Schedule("direct", ())}, {"schedule": Schedule("magic", (("a", 1),))}],
    ids=["level", "knobs", "algorithm"],
)
def test_what_cannot_be_rendered_any_more_is_just_stale(change: dict[str, Any]) -> None:
    old = replace(SPECS["i2s"], **change)
    assert fingerprints(CPU, ISAS, TOOLCHAIN)(old).kernel == ""
