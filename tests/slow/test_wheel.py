"""The tool from a wheel, in an empty folder: templates, configs, presets and winners come with it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bitgen import __version__
from bitgen.cpu import accepted_isas, detect_cpu, load_isas

ROOT = Path(__file__).parents[2]
BEST = accepted_isas(detect_cpu(), load_isas())[0].name


def pip(*argv: str | Path, cwd: Path) -> None:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    command = [sys.executable, "-m", "pip", "--quiet", *argv]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("hatchling", "pip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: without it a wheel needs the network")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def run(site: Path, empty: Path, *argv: str) -> str:
    """A command of the installed tool; everything it writes goes below ``empty``."""
    env = {k: v for k, v in os.environ.items() if k not in ("BITGEN_HOME", "PYTHONPATH", "CC")}
    env |= {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(empty / "cache"), "HOME": str(empty)}
    done = subprocess.run(
        [sys.executable, *argv], cwd=empty, env=env, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_the_tool_needs_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [
        *(ROOT / "templates").rglob("*"),
        *(ROOT / "csrc").rglob("*"),
        *(ROOT / "configs").rglob("*"),
    ]:
        if path.is_file():
            assert f"bitgen/_data/{path.relative_to(ROOT).as_posix()}" in names
    assert "bitgen/_data/winners/README.md" in names
    assert "bitgen/py.typed" in names
    assert wheel.name == f"bitgen-{__version__}-py3-none-any.whl"
    tops = {name.split("/")[0] for name in names}
    assert tops == {"bitgen", f"bitgen-{__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".jsonl", ".so", ".o", ".pyc")) or "/tests/" in name]


def test_it_is_the_installed_one(site: Path, tmp_path: Path) -> None:
    where = run(site, tmp_path, "-c", "import bitgen; print(bitgen.__file__)").strip()
    assert Path(where) == site / "bitgen" / "__init__.py"


def test_render_and_models_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    text = run(site, tmp_path, "-m", "bitgen", "render", "tl2", "--isa", "avx2", "--shape", "3200x8640")
    assert text.startswith("/*\n * bitgen_tl2_3200x8640_n1_")
    presets = json.loads(run(site, tmp_path, "-m", "bitgen", "models", "-o", "json"))["models"]
    assert {"3B", "2B-4T"} <= {row["alias"] for row in presets}
    assert list(tmp_path.iterdir()) == [], "these commands write nothing"


def test_output_goes_to_the_users_cache(site: Path, tmp_path: Path) -> None:
    """Where there is no checkout: generated libraries and compiled objects, never the installation."""
    before = sorted(path.name for path in site.rglob("*") if "__pycache__" not in path.parts)
    made = (
        run(site, tmp_path, "-m", "bitgen", "build", "-m", "TriLM-99M", "--isa", BEST)
        .strip()
        .splitlines()[-1]
    )
    assert Path(made).is_relative_to(tmp_path)
    assert (Path(made) / "manifest.json").is_file()
    loaded = run(
        site,
        tmp_path,
        "-c",
        "import bitgen, numpy as np; t = bitgen.load(); l = t.linear(np.ones((3, 5), np.int8), 0.5);"
        "print(l.accumulate(np.full((1, 5), 2, np.int8)).tolist())",
    )
    assert loaded == "[[10, 10, 10]]\n"
    after = sorted(path.name for path in site.rglob("*") if "__pycache__" not in path.parts)
    assert after == before


def test_the_entry_point(site: Path, tmp_path: Path) -> None:
    (script,) = (site / "bin").glob("bitgen")
    assert run(site, tmp_path, str(script), "--version") == f"bitgen {__version__}\n"
