"""The tool from a wheel, in an empty folder: templates, configs, presets and winners come with it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import step_levels
from libraries import share_cache

from bitgen import __version__
from bitgen.cpu import CAP_VARIABLE, accepted_isas, detect_cpu, load_isas
from bitgen.errors import FileError
from bitgen.paths import models_dir

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
    share_cache(tmp_path / "cache" / "bitgen")
    before = sorted(path.name for path in site.rglob("*") if "__pycache__" not in path.parts)
    made = run(site, tmp_path, "-m", "bitgen", "build", "-m", "tiny", "--isa", BEST).strip().splitlines()[-1]
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


# ---- the wheel of a platform: its kernel library inside, and no compiler anywhere


@pytest.fixture(scope="module")
def platform_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip unpacks of the wheel for this platform, made as a release makes it."""
    if sys.platform != "linux":
        pytest.skip("wheels with a library are made for Linux")
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: without it a wheel needs the network")
    made = tmp_path_factory.mktemp("platform")
    library = step_levels.universal_library(tmp_path_factory)
    script = ROOT / "tools" / "wheels.py"
    command = [sys.executable, str(script), "--bundle", str(library), "-o", str(made)]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = made.glob("*.whl")
    assert re.fullmatch(
        rf"bitgen-{__version__}-py3-none-manylinux_\d+_\d+_\w+(\.manylinux2014_\w+)?.whl", wheel.name
    )
    assert wheel.stat().st_size < 10_000_000
    pip("install", "--no-deps", "--no-index", "--target", made / "site", wheel, cwd=made)
    return made / "site"


def run_without_compiler(
    site: Path, home: Path, *argv: str, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command of the installed tool with an empty search path; what it writes is below ``home``."""
    env = {"PYTHONPATH": str(site), "HOME": str(home), "PATH": "/nonexistent", "LANG": "C.UTF-8"}
    env |= {key: value for key, value in os.environ.items() if key == CAP_VARIABLE}
    command = [sys.executable, "-m", "bitgen", *argv]
    return subprocess.run(
        command, cwd=home, env=env, input=text, capture_output=True, text=True, check=False, timeout=600
    )


def test_text_perplexity_bench_and_chat_without_a_compiler(platform_site: Path, tmp_path: Path) -> None:
    example = json.loads((models_dir() / "tiny.json").read_text(encoding="utf-8"))["greedy"][0]
    prompt, count = example["prompt"], str(len(example["tokens"]))
    commands = (
        ["run", "-m", "tiny", "--temp", "0", "--no-perf", "-p", prompt, "-n", count],
        ["perplexity", "-m", "tiny", "-c", "64", "-f", "-"],
        ["bench", "-m", "tiny", "-p", "8", "-n", "4", "-r", "1"],
        ["chat", "-m", "tiny", "-n", "4"],
    )
    said = []
    for command in commands:
        done = run_without_compiler(platform_site, tmp_path, *command, text="In the beginning. " * 40)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0].strip() == (prompt + example["text"]).strip()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".packed"}, "weights, and nothing that was compiled"


def test_the_bundle_of_a_wheel_is_trusted_as_the_wheel_is(platform_site: Path, tmp_path: Path) -> None:
    done = run_without_compiler(platform_site, tmp_path, "bundle", "pick", "-o", "json")
    picked = json.loads(done.stdout)
    assert Path(picked["chosen"]).is_relative_to(platform_site)
    assert picked["isa"] == BEST
    (candidate,) = picked["candidates"]
    assert (candidate["key"], candidate["state"]) == ("in bitgen's wheel", "chosen")
    library = next(Path(picked["chosen"]).glob("*.so"))
    library.chmod(0o777)
    done = run_without_compiler(platform_site, tmp_path, "run", "-m", "tiny", "-p", "x", "-n", "1")
    library.chmod(0o755)
    assert (done.returncode, done.stdout) == (FileError.exit_code, "")
    assert "every user can write to it" in done.stderr
