from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import FINGERPRINT
from test_store import LARGE, OTHER, R16, R32, WIDE, of_layout, tuning

from bitgen.errors import BitgenError
from bitgen.store import RecordStore
from bitgen.target import Cpu, find_isa, load_isas, target_cpu
from bitgen.winners import FamilyWinner, Traits, export_winners, family_winners, nearest_winners

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
        tuning([(of_layout(R16, i=2), 1)], fingerprint=OTHER),
    )
    path = export_winners(store, FINGERPRINT, cpu("zen5"), ISAS, tmp_path / "winners")
    assert "_ns" not in path.read_text()
    assert family_winners("zen5", tmp_path / "winners") == (FamilyWinner(WIDE, 1, of_layout(R32)),)
    assert family_winners("zen4", tmp_path / "winners") == ()


def test_exporting_again_keeps_what_others_found_and_changes_nothing_else(tmp_path: Path) -> None:
    first = store_with(tmp_path / "1.jsonl", tuning([(of_layout(R16), 1), (of_layout(R16, LARGE), 1)]))
    second = store_with(tmp_path / "2.jsonl", tuning([(of_layout(R16, i=3), 1)]))
    folder = tmp_path / "winners"
    text = export_winners(first, FINGERPRINT, cpu("zen5"), ISAS, folder).read_text()
    assert export_winners(first, FINGERPRINT, cpu("zen5"), ISAS, folder).read_text() == text
    export_winners(second, FINGERPRINT, cpu("zen5"), ISAS, folder)
    specs = {winner.spec for winner in family_winners("zen5", folder)}
    assert specs == {of_layout(R16, i=3), of_layout(R16, LARGE)}
    assert [p.name for p in folder.iterdir()] == ["zen5.json"]


def test_a_family_without_winners_starts_from_the_nearest_one(tmp_path: Path) -> None:
    store = store_with(tmp_path / "r.jsonl", tuning([(of_layout(R16), 1)]))
    assert nearest_winners(cpu("zen4"), ISAS, tmp_path) is None
    small = cpu("zen3", AVX2)
    other = cpu("icelake", vendor="GenuineIntel")
    arm = target_cpu("cortex-a72")
    for known in (small, other, arm):
        export_winners(store, FINGERPRINT, known, ISAS, tmp_path)
    # The same ISA levels are worth more than the same vendor; another architecture is no neighbour at all.
    nearest = nearest_winners(cpu("zen4"), ISAS, tmp_path)
    assert nearest is not None
    assert nearest.cpu_family == "icelake"
    assert nearest.why == (
        "the nearest family to zen4: 0 ISA levels differ, caches by 0 powers of two, another vendor"
    )
    export_winners(store, FINGERPRINT, cpu("zen5"), ISAS, tmp_path)
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
