"""What one touches to add a weight family or an ISA level: file and template, or entry and header."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import share_cache
from model_files import preset_yaml

pytestmark = pytest.mark.slow  # two checks and a tune in processes of their own
ROOT = Path(__file__).parents[2]
TOYS = ROOT / "tests" / "data" / "places"
MODEL = preset_yaml("toy-model", hidden=64, ffn=96, layers=1, heads=4, kv_heads=4, head_dim=16, vocab=256)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with a family and an ISA level more: four files, of which one is an entry."""
    root = tmp_path_factory.mktemp("house")
    for folder in ("bitgen", "templates", "configs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "csrc").is_dir():
        shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "tune_logs" / "winners").mkdir(parents=True)
    (root / "models").mkdir()
    shutil.copy(TOYS / "toy.py", root / "bitgen" / "families")
    shutil.copy(TOYS / "toy.c.j2", root / "templates" / "kernels")
    shutil.copy(TOYS / "toy.h", root / "templates" / "isa")
    with (root / "configs" / "isas.yaml").open("a", encoding="utf-8") as levels:
        levels.write((TOYS / "isas.yaml").read_text(encoding="utf-8"))
    (root / "toy-model.yaml").write_text(MODEL, encoding="utf-8")
    share_cache(root / "home")
    return root


def bitgen(house: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bitgen", *arguments],
        cwd=house,
        env={**os.environ, "PYTHONPATH": str(house), "BITGEN_HOME": str(house / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_family_is_a_file_and_a_template(house: Path) -> None:
    text = bitgen(house, "render", "toy", "--isa", "scalar", "--regime", "n1")
    assert "weights    Toy, 8.000 bits a weight" in text
    assert "all exact" in bitgen(house, "check", "--family", "toy", "--isa", "scalar", "--sample", "2")


def test_an_isa_level_is_an_entry_and_a_header(house: Path) -> None:
    text = bitgen(house, "render", "i2s", "--isa", "toy_c", "--regime", "n1")
    assert "(~(uint32_t)b.w[i] + 1u)" in text, "the level's own op"
    counts = bitgen(house, "check", "--family", "i2s", "--isa", "toy_c", "--regime", "n1", "--sample", "2")
    assert "all exact" in counts
    assert re.search(r"[1-9]\d* schedules", counts)


def test_both_are_tuned(house: Path) -> None:
    out = bitgen(
        *(house, "tune", "-m", "toy-model.yaml", "--family", "toy", "--isa", "toy_c", "--regime", "n1"),
        *("--trials", "2", "-t", "1", "-o", "csv"),
    )
    assert "toy" in out
    assert "toy_c" in out
