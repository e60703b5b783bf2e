"""What CONTRIBUTING.md says one touches is all it takes to add something: done in a copy of the house."""

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
COMMAND = '''"""Greets."""
def add_arguments(parser): parser.add_argument("name")
def run(args): print(f"hello {args.name}")
'''
# File, a line that is there, and what takes its place.
EDITS = (
    ("bitgen/cli/__init__.py", "COMMANDS = {\n", 'COMMANDS = {\n    "toy": "greet somebody",\n'),
    (
        "bitgen/formats/architectures.py",
        "_RECORDS = (\n",
        '_RECORDS = (\n    Architecture("toy-model", "silu", _PRE_NORMS, hf_classes=("ToyForCausalLM",)),\n',
    ),
    (
        "bitgen/search/propose.py",
        '    "tpe": TpeProposer,\n',
        '    "tpe": TpeProposer,\n'
        '    "last": lambda points, first, seed: Enumeration(points[::-1], first, seed),\n',
    ),
    ("configs/search.yaml", "\nstrategy: auto\n", "\nstrategy: last\n"),
    (
        "bitgen/families/algorithms.py",
        "    # Few tokens, by capabilities.\n    _FEW",
        '    off: ClassVar[Knobs] = {"load_ahead": 0}\n    _FEW',
    ),
    (
        "bitgen/families/algorithms.py",
        '            "streams": (1, 2, 4, 8) if wide else (1, 2),\n            "nr": (1,) if',
        '            "load_ahead": (0, 1) if regime is N1 else (0,),\n'
        '            "streams": (1, 2, 4, 8) if wide else (1, 2),\n            "nr": (1,) if',
    ),
    (
        "templates/kernels/multiply_macros.j2",
        "/*% if nr == 1 %*/\nconst vx x_first",
        '/*% if nr == 1 and not schedule.get("load_ahead", 0) %*/\nconst vx x_first',
    ),
)


def edited(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file}: {old}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_nothing_takes_more_than_three_files() -> None:
    assert len({file for file, *_ in EDITS if "algorithms" in file or "templates" in file}) == 2, "a knob"
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:a|an) [^|]+\| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) >= 7
    for row in rows:
        assert 1 <= len(set(re.findall(r"`((?:bitgen|templates|configs|csrc|docs)/[^`]+)`", row))) <= 3, row


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with one more of each: new files, and what `edited` changes in others."""
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
    (root / "bitgen" / "cli" / "toy.py").write_text(COMMAND, encoding="utf-8")
    for file, old, new in EDITS:
        edited(root / file, old, new)
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
        *("--trials", "2", "--quick", "-t", "1", "-o", "csv"),
    )
    assert "toy" in out
    assert "toy_c" in out


def test_a_command_is_a_file_and_a_line(house: Path) -> None:
    assert bitgen(house, "toy", "you") == "hello you\n"
    assert "greet somebody" in bitgen(house, "--help")


def test_an_architecture_and_a_strategy_are_entries(house: Path) -> None:
    script = """
from bitgen.formats.architectures import gguf_names, hf_classes, stored_in_gguf
from bitgen.search.propose import proposer_for
from bitgen.search.plan import load_search_config
assert "toy-model" in gguf_names() and "ToyForCausalLM" in hf_classes()
assert stored_in_gguf("toy-model", ()).activation == "silu"
assert load_search_config().strategy == "last"
print(proposer_for([1, 2, 3], [], 0, "last", 0).ask(3))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=house,
        env={**os.environ, "PYTHONPATH": str(house)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_knob_is_two_files_and_exact(house: Path) -> None:
    args = ("render", "i2s", "--isa", "avx2", "--knob")
    without, ahead = (bitgen(house, *args, f"load_ahead={value}") for value in (0, 1))
    assert "load_ahead" not in without
    assert "x_first" in without
    assert "x_first" not in ahead
    counts = bitgen(house, "check", "--family", "i2s", "--isa", "scalar", "--regime", "n1", "--sample", "4")
    assert "all exact" in counts
