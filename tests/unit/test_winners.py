from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from synthetic import WIDE, fingerprints
from test_store import LARGE, R16, R32, of_layout, others, tuning

from bitgen import __version__, api, library, winners
from bitgen.api import choices_for
from bitgen.bundle import PORTABLE, Bundle, KernelEntry, read_bundle, write
from bitgen.bundle.contents import Target
from bitgen.bundle.manifest import Offer
from bitgen.bundle.transfer import committed_kernels
from bitgen.cli import main
from bitgen.cpu import Cpu, accepted_isas, detect_cpu, find_isa, load_isas, target_cpu
from bitgen.environment import Environment
from bitgen.errors import BitgenError, FileError, ToolchainError
from bitgen.fingerprints import Fingerprint
from bitgen.formats.config import ModelPreset, find_model
from bitgen.inference import opening
from bitgen.inference.opening import has_kernels, made_for_others
from bitgen.library import library_for
from bitgen.measure import Job
from bitgen.paths import winners_dir
from bitgen.progress import Progress
from bitgen.space import space_for
from bitgen.spec import RENAMED_KNOBS, KernelSpec, Layout, Schedule, Shape, regime_named
from bitgen.store import RecordStore
from bitgen.winners import Traits, export_winners, family_winners, nearest_winners

ISAS = load_isas()
AVX2, AVX512 = (find_isa(name, ISAS).requires for name in ("avx2", "avx512"))


def cpu(family: str, features: frozenset[str] = AVX512, vendor: str = "AuthenticAMD") -> Cpu:
    return Cpu("Linux", "x86_64", vendor, family, family, features, 8, 4, 4)


def store_with(path: Path, *tunings: object) -> RecordStore:
    store = RecordStore(path)
    for record in tunings:
        store.append(record)  # type: ignore[arg-type]
    return store


def test_exported_winners_are_schedules_of_the_chosen_layout_without_timings(tmp_path: Path) -> None:
    store = store_with(
        tmp_path / "r.jsonl",
        tuning([(of_layout(R16), 1), (of_layout(R32), 1)], R32),
        tuning([(of_layout(R16, i=2), 1)], made=others),
    )
    path = export_winners(store, fingerprints, cpu("zen5"), ISAS, tmp_path / "winners")
    assert "_ns" not in path.read_text()
    assert family_winners("zen5", tmp_path / "winners") == (Job(of_layout(R32), WIDE, 1, 1),)
    assert family_winners("zen4", tmp_path / "winners") == ()


def test_exporting_again_keeps_what_others_found_and_changes_nothing_else(tmp_path: Path) -> None:
    first = store_with(tmp_path / "1.jsonl", tuning([(of_layout(R16), 1), (of_layout(R16, LARGE), 1)]))
    second = store_with(tmp_path / "2.jsonl", tuning([(of_layout(R16, i=3), 1)]))
    folder = tmp_path / "winners"
    text = export_winners(first, fingerprints, cpu("zen5"), ISAS, folder).read_text()
    assert export_winners(first, fingerprints, cpu("zen5"), ISAS, folder).read_text() == text
    export_winners(second, fingerprints, cpu("zen5"), ISAS, folder)
    specs = {winner.spec for winner in family_winners("zen5", folder)}
    assert specs == {of_layout(R16, i=3), of_layout(R16, LARGE)}
    assert [p.name for p in folder.iterdir()] == ["zen5.json"]


def test_no_two_layouts_are_exported_for_one_shape(tmp_path: Path) -> None:
    first = store_with(tmp_path / "1.jsonl", tuning([(of_layout(R16), 1), (of_layout(R16, LARGE), 1)]))
    second = store_with(tmp_path / "2.jsonl", tuning([(of_layout(R32), 1)], R32))
    for store in (first, second):
        export_winners(store, fingerprints, cpu("zen5"), ISAS, tmp_path)
    assert [winner.spec for winner in family_winners("zen5", tmp_path)] == [of_layout(R32)]


def test_what_others_exported_is_merged_once_it_is_legal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, isa = Shape(3200, 3200), find_isa("avx2", ISAS)
    spaces = {name: space_for("i2s", isa, regime_named(name), shape, cpu("zen2")) for name in ("n1", "large")}
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    points = {name: next(p for p in space if p.layout == R16) for name, space in spaces.items()}
    other = next(p for p in spaces["n1"] if p.layout == R16 and p != points["n1"])
    for folder, chosen in ((mine, [points["n1"], points["large"]]), (theirs, [other])):
        tuned = replace(tuning([(point, 2) for point in chosen]), shape=shape)
        export_winners(store_with(folder / "r.jsonl", tuned), fingerprints, cpu("zen2"), ISAS, folder)
    exported = theirs / "zen2.json"
    assert main(["export", "--merge", str(exported), "--out", str(mine)]) == 0
    assert capsys.readouterr().out.strip() == str(mine / "zen2.json")
    assert {winner.spec for winner in family_winners("zen2", mine)} == {other, points["large"]}
    text = exported.read_text()
    for old, new, why in (
        ('"cpu_family": "zen2"', '"cpu_family": "../zen2"', "holds no winners of a CPU family"),
        ('"isa": "avx2"', '"isa": "neon"', "which zen2 does not run"),
        ('"streams": ', '"streams": 99', "is not legal"),
    ):
        exported.write_text(text.replace(old, new))
        assert main(["export", "--merge", str(exported), "--out", str(mine)]) == FileError.exit_code
        assert why in capsys.readouterr().err
    assert {winner.spec for winner in family_winners("zen2", mine)} == {other, points["large"]}


def test_an_export_says_what_it_was_tuned_on_and_nothing_of_the_folders(tmp_path: Path) -> None:
    store = store_with(tmp_path / "r.jsonl", tuning([(of_layout(R16), 1)]))
    text = export_winners(store, fingerprints, cpu("zen5"), ISAS, tmp_path).read_text()
    assert json.loads(text)["tuned_on"] == {
        "cpu": "zen5 26 68",
        "compiler": "gcc 12",
        "harness": "1234",
        "version": __version__,
    }
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text


def test_a_library_takes_the_legal_winners_of_this_cpus_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tune of its own, a machine builds what was committed for its family."""
    monkeypatch.setenv("BITGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(winners, "winners_dir", lambda: tmp_path)
    env, preset = Environment(), find_model("3B")
    isa, shape = env.isa(None), Shape(preset.matmuls[0].m, preset.matmuls[0].k)
    assert choices_for(preset, env, isa).entries == ()
    point = next(s for s in env.space("i2s", isa, "n1", shape) if s.layout == R16)
    knobs = tuple((name, 99 if name == "streams" else value) for name, value in point.schedule)
    outdated = replace(point, schedule=Schedule(point.schedule.algorithm, knobs))
    tuned = tuning([(point, 2), (outdated, 1)], made=env.fingerprints)
    store = store_with(tmp_path / "r.jsonl", replace(tuned, shape=shape))
    export_winners(store, env.fingerprints, env.cpu, env.isas, tmp_path)
    assert len(family_winners(env.cpu.family, tmp_path)) == 2
    found = {entry.threads: entry for entry in choices_for(preset, env, isa).entries}
    assert found[2] == KernelEntry(point, shape, 2)
    assert found[1].spec.layout == point.layout
    assert not env.space("i2s", isa, "n1", shape).broken(found[1].spec), "the nearest legal schedule"
    assert (near := nearest_winners(env.cpu, env.isas))
    assert near.why == "this CPU's family"


def test_a_build_tells_of_a_tune_that_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of the compiler made every winner stale, and the build took others without a word."""
    monkeypatch.setattr(write, "write_library", lambda *_, **__: tmp_path)
    env, preset = Environment(logs=tmp_path), find_model("TriLM-99M")
    isa, shape = env.isa(None), preset.matmuls[0].shape
    point = next(s for s in env.space("i2s", isa, "n1", shape) if s.layout == R16)

    def older(spec: KernelSpec) -> Fingerprint:
        return replace(env.fingerprints(spec), compiler="gcc 4.2")

    store_with(env.store.path, replace(tuning([(point, 1)], made=older), shape=shape))
    said: list[Progress] = []
    api.build(preset, logs=tmp_path, progress=said.append)
    stale = "what was tuned here for 1 of 4 shapes does not count, made with another compiler"
    assert [one.text for one in said if one.lasting] == [f"{stale}: `bitgen tune --model TriLM-99M` again"]
    store_with(env.store.path, replace(tuning([(point, 1)], made=env.fingerprints), shape=shape))
    said.clear()
    api.build(preset, logs=tmp_path, progress=said.append)
    assert not said


def folder_of(library: Path | Bundle) -> Path:
    return library.path if isinstance(library, Bundle) else library


@pytest.mark.slow  # it compiles a forward pass for the sizes of a model, twice
@pytest.mark.usefixtures("bitgen_home")
def test_a_model_runs_on_the_winners_of_this_cpus_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untuned, a model's first run builds the committed kernels of its shapes; the next one finds them."""
    monkeypatch.setattr(winners, "winners_dir", lambda: tmp_path)
    env, preset = Environment(), find_model("TriLM-99M")
    isa, shape = env.isa(None), Shape(preset.matmuls[0].m, preset.matmuls[0].k)
    point = env.space("t5", isa, "n1", shape).default
    tuned = tuning([(point, 1)], point.layout, made=env.fingerprints)
    store = store_with(tmp_path / "r.jsonl", replace(tuned, shape=shape))
    untuned = folder_of(library_for(preset))
    assert untuned.name.startswith("untuned-")
    export_winners(store, env.fingerprints, env.cpu, env.isas, tmp_path)
    said: list[Progress] = []
    library = folder_of(library_for(preset, said.append))
    assert [each.text for each in said] == [f"building the kernels of {preset.alias}, once"]
    kernels = read_bundle(library).manifest.kernels
    assert [kernel.spec for kernel in kernels if kernel.shape == shape] == [point]
    assert folder_of(library_for(preset, said.append)) == library
    assert len(said) == 1
    # Where nothing can be compiled, what is there runs.
    shutil.rmtree(library)
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert folder_of(library_for(preset)) == untuned


def a_bundle(offers: Sequence[Offer], *, dispatches: bool = False, isa: str = "", family: str = "") -> Bundle:
    """One of which only what it offers is asked; of this CPU's best ISA level and family, or others."""
    here = detect_cpu()
    manifest = SimpleNamespace(
        name="a",
        offers=lambda: offers,
        kernels=offers,
        dispatches=dispatches,
        cpu_family=family or here.family,
        isas={isa or accepted_isas(here, ISAS)[0].name: ()},
    )
    return cast(Bundle, SimpleNamespace(manifest=manifest, origin=None, label="default"))


@pytest.mark.parametrize("group", [32, 64])
def test_groups_that_not_every_library_serves_get_a_library(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ternary weights in other groups than 128 ran on portable kernels, 76 times slower."""
    built: list[ModelPreset] = []
    monkeypatch.setattr(library, "find_library", lambda *_: None)

    def build(preset: ModelPreset, **_: object) -> Path:
        built.append(preset)
        return tmp_path

    monkeypatch.setattr(api, "build", build)
    preset = replace(find_model("Bonsai-1.7B"), group=group)
    assert library_for(preset) == tmp_path
    assert [one.alias for one in built] == [f"untuned-ternary-g{group}"]
    env = Environment()
    kernels = choices_for(built[0], env, env.isa(None)).entries
    regimes = {one.spec.regime for one in kernels if one.spec.layout.group == group and one.shape is None}
    assert regimes == {"n1", "small", "large"}


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("family", ["", "another"])
def test_a_library_for_a_lower_level_is_replaced_or_told_of(
    tuned: bool, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that another CPU left in a shared home, or a run under BITGEN_ISA_CAP, slowed every later run."""
    own = accepted_isas(detect_cpu(), load_isas())[0].name
    if own == "scalar":
        pytest.skip("needs a CPU with more than the scalar level")
    preset = replace(find_model("TriLM-99M"), name="nobody's")
    shape = preset.matmuls[0].shape if tuned else None
    low = a_bundle([Offer("i2s", 0, "default", shape)], isa="scalar", family=family)
    monkeypatch.setattr(library, "find_library", lambda *_: low)
    monkeypatch.setattr(library, "preset_name", lambda _: None)
    monkeypatch.setattr(api, "untuned_library", lambda: tmp_path)
    said: list[Progress] = []
    found = library_for(preset, said.append)
    kept = [one.text for one in said if one.lasting]
    if tuned and not family:  # it was asked for
        assert found is low
        why = f"the library a is for scalar, and this CPU runs {own}: `bitgen build` makes a faster one"
        assert kept == [why]
    else:
        assert found == tmp_path
        assert not kept

    def fail() -> Path:
        raise ToolchainError("no compiler")

    monkeypatch.setattr(api, "untuned_library", fail)
    assert library_for(preset, said.append) is low
    assert said[-1].lasting
    assert said[-1].text.startswith(f"the library a is for scalar, and this CPU runs {own}")


@pytest.mark.parametrize("family", ["", "another"])
def test_what_is_there_runs_where_nothing_can_be_written(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image whose folders are read-only: the model did not run at all."""
    if family and len(accepted_isas(detect_cpu(), load_isas())) < 2:
        pytest.skip("needs a CPU with more than the scalar level")
    preset = find_model("TriLM-99M")
    shape = preset.matmuls[0].shape if family else None
    isa = "scalar" if family else ""
    there = a_bundle([Offer("i2s", 0, "default", shape)], isa=isa, family=family)
    monkeypatch.setattr(library, "find_library", lambda *_: there)
    monkeypatch.setattr(library, "preset_name", lambda _: preset.alias)

    def fail(*_: object, **__: object) -> Path:
        raise FileError("it is read-only")

    monkeypatch.setattr(library, "_build", fail)
    monkeypatch.setattr(api, "untuned_library", fail)
    said: list[Progress] = []
    assert library_for(preset, said.append) is there
    assert "better kernels cannot be built: it is read-only" in [one.text for one in said if one.lasting]


def test_a_library_of_this_cpus_level_comes_before_another_familys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though that one was tuned for the model's matrices."""
    preset = find_model("TriLM-99M")
    if len(accepted_isas(detect_cpu(), load_isas())) < 2:
        pytest.skip("needs a CPU with more than the scalar level")
    tuned = [Offer("i2s", 0, "tuned", matmul.shape) for matmul in preset.matmuls]
    theirs = a_bundle(tuned, isa="scalar", family="another")
    mine = a_bundle([Offer("i2s", 0, "default", None)])
    monkeypatch.setattr(opening, "all_bundles", lambda **_: ([theirs, mine], []))
    monkeypatch.setattr(opening, "judge", lambda *_: SimpleNamespace(accepted=True))
    monkeypatch.setattr(opening, "choose_bundle", lambda found, *_: (found[0], []))
    assert opening.find_library(preset) is mine


def test_what_is_there_and_not_used_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed library that a group could write to was passed over, and slow default kernels ran."""
    why = FileError("cannot trust bundles: its group can write to it; chmod g-w")
    monkeypatch.setattr(opening, "all_bundles", lambda **_: ([], [why]))
    said: list[Progress] = []
    assert opening.find_library(find_model("TriLM-99M"), said.append) is None
    assert [(one.text, one.lasting) for one in said] == [(f"not used: {why.message}", True)]


def test_a_library_for_4_bit_models_is_not_a_ternary_ones() -> None:
    """It holds I2_S alone for ternary weights: a ternary model gets the default kernels of all families.

    Kernels of bits for every shape are in every library.
    """
    offers = [
        Offer("i2s", 0, "default", None),
        Offer("q1", 128, "default", None),
        Offer("t4", 32, PORTABLE, None),
        Offer("i2s", 64, PORTABLE, None),
    ]
    plain, coded, binary, grouped = (
        a_bundle(each)
        for each in (
            offers,
            [*offers, Offer("t4", 32, "default", None)],
            [*offers, Offer("q1", 128, "tuned", Shape(256, 256))],
            [*offers, Offer("i2s", 64, "default", None)],
        )
    )
    ternary = find_model("TriLM-99M")
    assert not made_for_others(plain, ternary)
    assert made_for_others(coded, ternary)
    assert made_for_others(binary, ternary)
    assert made_for_others(grouped, ternary)
    every_kind = a_bundle([*offers, Offer("t4", 32, "default", None)], dispatches=True)
    assert not made_for_others(every_kind, ternary), "one for every CPU"
    assert not made_for_others(coded, replace(ternary, weights="t4", group=32))
    in_groups = replace(ternary, group=64)
    assert not made_for_others(grouped, in_groups)
    assert has_kernels(grouped, in_groups)
    assert not has_kernels(plain, in_groups)


def test_committed_winners_are_legal_schedules_of_one_layout_a_shape() -> None:
    for path in sorted(winners_dir().glob("*.json")):
        data = json.loads(path.read_text())
        assert data["cpu_family"] == path.stem
        # what kernels were made of and timed by: all templates once, the harness today
        assert set(data["tuned_on"]) - {"templates", "harness"} == {"cpu", "compiler", "version"}
        layouts: dict[tuple[Shape, int, str], set[Layout]] = {}
        for winner in family_winners(path.stem):
            spec, level = winner.spec, find_isa(winner.spec.isa, ISAS)
            assert level.name in data["traits"]["isas"]
            regime, group = regime_named(spec.regime), spec.layout.group
            space = space_for(spec.family, level, regime, winner.shape, cpu(path.stem), group)
            assert not [rule.text for rule in space.broken(spec) if not rule.local], spec.name
            layouts.setdefault((winner.shape, winner.threads, spec.isa), set()).add(spec.layout)
        assert all(len(found) == 1 for found in layouts.values())


def test_a_family_without_winners_starts_from_the_nearest_one(tmp_path: Path) -> None:
    store = store_with(tmp_path / "r.jsonl", tuning([(of_layout(R16), 1)]))
    assert nearest_winners(cpu("zen4"), ISAS, tmp_path) is None
    small = cpu("zen3", AVX2)
    other = cpu("icelake", vendor="GenuineIntel")
    arm = target_cpu("cortex-a72")
    for known in (small, other, arm):
        export_winners(store, fingerprints, known, ISAS, tmp_path)
    # The same ISA levels are worth more than the same vendor; another architecture is no neighbour at all.
    nearest = nearest_winners(cpu("zen4"), ISAS, tmp_path)
    assert nearest is not None
    assert nearest.cpu_family == "icelake"
    assert nearest.why == (
        "the nearest family to zen4: 0 ISA levels differ, caches by 0 powers of two, another vendor"
    )
    export_winners(store, fingerprints, cpu("zen5"), ISAS, tmp_path)
    assert (near := nearest_winners(cpu("zen4"), ISAS, tmp_path))
    assert near.cpu_family == "zen5"
    assert (own := nearest_winners(cpu("zen3", AVX2), ISAS, tmp_path))
    assert (own.cpu_family, own.why) == ("zen3", "this CPU's family")
    assert (near := nearest_winners(target_cpu("neoverse-n1"), ISAS, tmp_path))
    assert near.cpu_family == arm.family


def test_nearness_counts_levels_then_caches_then_the_vendor() -> None:
    here = Traits.of(cpu("zen4"), ISAS)
    assert here.distance(here) == (0, 0.0, 0)
    assert here.distance(replace(here, l2_bytes=4 * here.l2_bytes)) == (0, 2.0, 0)
    levels, _, vendor = here.distance(Traits.of(cpu("haswell", AVX2, "GenuineIntel"), ISAS))
    assert levels > 0
    assert vendor == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "winners": [{"shape": "0x1"}]}'])
def test_a_broken_family_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "zen5.json").write_text(text)
    with pytest.raises(BitgenError, match=r"zen5\.json"):
        family_winners("zen5", tmp_path)


def test_a_family_file_of_another_schema_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "zen5.json").write_text(json.dumps({"schema": 1, "winners": []}))
    assert family_winners("zen5", tmp_path) == ()


def test_a_family_file_with_a_renamed_knob_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path / "r.jsonl", tuning([(of_layout(R16), 1)]))
    path = export_winners(store, fingerprints, cpu("zen5"), ISAS, tmp_path)
    path.write_text(path.read_text().replace('"streams"', '"rivers"'))
    monkeypatch.setitem(RENAMED_KNOBS, "rivers", "streams")
    assert [winner.spec for winner in family_winners("zen5", tmp_path)] == [of_layout(R16)]
    export_winners(store, fingerprints, cpu("zen5"), ISAS, tmp_path)
    assert "rivers" not in path.read_text()


def test_a_level_with_a_unit_of_its_own_does_not_inherit_kernels_without_it(tmp_path: Path) -> None:
    """Winners of zen4, which has no tiles: one token keeps its kernel, batches get those of tiles."""
    shutil.copy(winners_dir() / "zen4.json", tmp_path)
    target = Target.of(target_cpu("sapphirerapids", "Linux"))
    entries = committed_kernels(target, [Shape(3200, 8640)], tmp_path).entries
    algorithms = {entry.spec.regime: entry.spec.schedule.algorithm for entry in entries}
    assert entries[0].spec.isa == "amx_int8"
    assert algorithms["small"] == algorithms["large"] == "tiles"
    assert algorithms["n1"] != "tiles"
    assert len({entry.spec.layout for entry in entries}) == 1
