"""Who imports whom: the contracts of pyproject.toml, and what they cannot say."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bitgen"
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
has_linter = pytest.mark.skipif(
    importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed (the extra dev)"
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in a file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@cache
def imports_of_modules() -> dict[str, set[str]]:
    return {name: imports(tree) for name, tree in modules()}


def importers(library: str) -> set[str]:
    return {
        name
        for name, imported in imports_of_modules().items()
        if any(found == library or found.startswith(f"{library}.") for found in imported)
    }


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LINT], cwd=root, capture_output=True, text=True, check=False)


@has_linter
def test_the_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@has_linter
@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("spec.py", "import bitgen.space"),
        ("render.py", "import bitgen.measure"),
        ("runtime.py", "import bitgen.toolchain"),
        ("store.py", "import optuna"),
        ("new_module.py", "'a module without a place'"),
    ],
)
def test_a_broken_contract_is_found(file: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "bitgen", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "bitgen" / file).open("a") as text:
        text.write(f"\n{line}\n")
    assert lint(tmp_path).returncode != 0


def test_one_wall_around_each_library() -> None:
    """Also imports inside functions, and without import-linter installed."""
    assert all(name.startswith("bitgen.search") for name in importers("optuna"))
    assert importers("jinja2") <= {"bitgen.render", "bitgen.report.page", "bitgen.inference.chat_template"}
    assert importers("archspec") <= {"bitgen.cpu.microarch"}
    assert all(name.startswith("bitgen.cpu") for name in importers("cpuinfo"))
    assert importers("yaml") <= {"bitgen.records"}
    assert importers("optuna")
    assert importers("jinja2")


def test_processes_are_started_in_few_places() -> None:
    """A compiler runs in toolchain, measured kernels in measure, a library's self-test in library.

    And a command of the user's own that reads a meter.
    """
    allowed = {
        "bitgen.energy",
        "bitgen.toolchain.process",
        "bitgen.cpu.macos",
        "bitgen.measure.client",
        "bitgen.bundle.write",
    }
    assert importers("subprocess") <= allowed, importers("subprocess") - allowed


def test_no_drawer_for_odds_and_ends() -> None:
    names = {name.rpartition(".")[2] for name in imports_of_modules()}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("bitgen", {"numpy", "cffi", "jinja2", "optuna", "yaml"}),
        ("bitgen.spec", {"cffi", "jinja2", "optuna"}),
        ("bitgen.bundle", {"optuna", "jinja2", "bitgen.render", "bitgen.toolchain", "bitgen.search"}),
        ("bitgen.runtime", {"optuna", "jinja2", "bitgen.render", "bitgen.toolchain", "bitgen.search"}),
        ("bitgen.search", {"optuna"}),
        ("bitgen.cli", {"numpy", "cffi", "jinja2", "optuna", "yaml", "archspec"}),
    ],
)
def test_importing_stays_light(module: str, absent: set[str]) -> None:
    script = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


def test_choosing_a_library_parses_nothing_that_was_parsed_before(tmp_path: Path) -> None:
    """And imports nothing that only other work needs: a first token waits for all of it.

    What numpy takes does not count: in Python 3.10 its `platform` takes subprocess.
    """
    absent = {"cffi", "jinja2", "optuna", "pycparser", "rich", "subprocess", "tempfile", "yaml"}
    script = f"""
import sys, numpy
before = set(sys.modules)
from bitgen.formats.open import open_model
from bitgen.inference.opening import find_library
find_library(open_model("tiny").config)
print(*sorted({absent!r} & set(sys.modules) - before))
"""
    env = {**os.environ, "BITGEN_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
