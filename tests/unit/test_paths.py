from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from bitgen import paths
from bitgen.errors import BitgenError, FileError, ToolchainError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package folder of a checkout."""
    for folder in ("bitgen", "templates/isa", "csrc", "configs/models", "tune_logs/winners", "models"):
        (tmp_path / "checkout" / folder).mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    return tmp_path / "checkout" / "bitgen"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package folder of an installed wheel."""
    for folder in ("templates", "csrc", "configs", "winners", "models"):
        (tmp_path / "site-packages" / "bitgen" / "_data" / folder).mkdir(parents=True)
    return tmp_path / "site-packages" / "bitgen"


def test_checkout_is_recognised(checkout: Path, installed: Path) -> None:
    assert paths.checkout_dir(checkout) == checkout.parent
    assert paths.checkout_dir(installed) is None


@pytest.mark.parametrize("missing", ["pyproject.toml", "templates"])
def test_half_a_checkout_is_none(checkout: Path, missing: str) -> None:
    (checkout.parent / missing).rename(checkout.parent / "elsewhere")
    assert paths.checkout_dir(checkout) is None


def test_data_folders_of_a_checkout(checkout: Path) -> None:
    root = checkout.parent
    assert paths.templates_dir(checkout) == root / "templates"
    assert paths.csrc_dir(checkout) == root / "csrc"
    assert paths.configs_dir(checkout) == root / "configs"
    assert paths.winners_dir(checkout) == root / "tune_logs" / "winners"
    assert paths.models_dir(checkout) == root / "models"


def test_data_folders_of_a_wheel(installed: Path) -> None:
    assert paths.templates_dir(installed) == installed / "_data" / "templates"
    assert paths.csrc_dir(installed) == installed / "_data" / "csrc"
    assert paths.configs_dir(installed) == installed / "_data" / "configs"
    assert paths.winners_dir(installed) == installed / "_data" / "winners"
    assert paths.models_dir(installed) == installed / "_data" / "models"


def test_incomplete_installation_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"installation is incomplete: .*configs is missing"):
        paths.configs_dir(tmp_path / "bitgen")


def test_this_repository_has_its_data() -> None:
    assert (paths.configs_dir() / "isas.yaml").is_file()
    assert (paths.configs_dir() / "models" / "3B.yaml").is_file()
    assert paths.templates_dir().is_dir()
    assert (paths.csrc_dir() / "bitgen.h").is_file()
    assert paths.winners_dir().is_dir()
    assert (paths.models_dir() / "tiny.gguf").is_file()


def test_output_folders_by_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explicit, home, user = tmp_path / "explicit", tmp_path / "home", tmp_path / "user"
    monkeypatch.setattr(paths, "_user_cache_dir", lambda: user)
    monkeypatch.setenv("BITGEN_HOME", str(home))
    assert paths.generated_dir(explicit) == explicit
    assert paths.tune_logs_dir(str(explicit)) == explicit
    assert paths.generated_dir() == home / "generated"
    assert paths.tune_logs_dir() == home / "tune_logs"
    assert paths.cache_dir() == home / "cache"

    monkeypatch.setenv("BITGEN_HOME", "")
    monkeypatch.setattr(paths, "checkout_dir", lambda: tmp_path / "repo")
    assert paths.generated_dir() == tmp_path / "repo" / "generated"
    assert paths.tune_logs_dir() == tmp_path / "repo" / "tune_logs"
    assert paths.cache_dir() == user / "cache"  # never inside a checkout

    monkeypatch.setattr(paths, "checkout_dir", lambda: None)
    assert paths.generated_dir() == user / "generated"
    assert paths.tune_logs_dir() == user / "tune_logs"
    assert not any(folder.exists() for folder in (explicit, home, user))


def test_relative_and_home_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert paths.generated_dir("out") == tmp_path / "out"
    assert paths.generated_dir("~/out") == Path("/home/someone/out")
    assert paths.generated_dir("~nobody-of-that-name/out") == tmp_path / "~nobody-of-that-name" / "out"


def test_user_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BITGEN_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))  # macOS knows no XDG
    assert tmp_path in paths.cache_dir().parents
    assert "bitgen" in paths.cache_dir().parts


def test_ensure_dir_creates_parents_and_is_idempotent(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert paths.ensure_dir(folder) == folder
    assert paths.ensure_dir(folder) == folder
    assert folder.is_dir()


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_ensure_dir_reports_a_file_in_the_way(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"cannot write to the folder .*--out, --logs"):
        paths.ensure_dir(tmp_path / path)


def test_ensure_dir_reports_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # chmod does not stop root, who runs tests in containers.
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    with pytest.raises(BitgenError, match="it is read-only for this user"):
        paths.ensure_dir(tmp_path)


def test_errors_are_one_line_and_survive_pickling() -> None:
    error = ToolchainError("gcc said:\n  no such\tfile\n")
    assert str(error) == error.message == "gcc said: no such file"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(copy), copy.message, copy.exit_code) == (ToolchainError, error.message, 4)
