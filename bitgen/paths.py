"""Where things are: the only module that finds templates, csrc, configs, winners, models, output folders.

In a checkout templates/, csrc/, configs/ and models/ lie beside the package; an installed wheel carries them
inside it (``bitgen/_data``). Output goes, first match wins, to the folder given by the caller, to
``$BITGEN_HOME``, to the checkout (``generated/``, ``tune_logs/``), to the user's cache folder. Nothing is
created until it is written to: call `ensure_dir` then.
"""

from __future__ import annotations

import os
from pathlib import Path

from bitgen.errors import BitgenError, FileError

HOME_VARIABLE = "BITGEN_HOME"
_PACKAGE = Path(__file__).resolve().parent


def checkout_dir(package: Path = _PACKAGE) -> Path | None:
    """The root of the source checkout ``package`` belongs to, or None when it is installed from a wheel."""
    root = package.parent
    is_checkout = (root / "pyproject.toml").is_file() and (root / "templates").is_dir()
    return root if is_checkout else None


def templates_dir(package: Path = _PACKAGE) -> Path:
    """The folder with isa/ and kernels/. BitgenError when the installation is incomplete."""
    return _data_dir("templates", Path("templates"), package)


def csrc_dir(package: Path = _PACKAGE) -> Path:
    """The folder with the plain C of libraries. BitgenError when the installation is incomplete."""
    return _data_dir("csrc", Path("csrc"), package)


def configs_dir(package: Path = _PACKAGE) -> Path:
    """The folder with isas.yaml, search.yaml and models/. BitgenError when the installation is incomplete."""
    return _data_dir("configs", Path("configs"), package)


def winners_dir(package: Path = _PACKAGE) -> Path:
    """The folder with the committed winners of CPU families, read only.

    BitgenError when the installation is incomplete.
    """
    return _data_dir("winners", Path("tune_logs", "winners"), package)


def models_dir(package: Path = _PACKAGE) -> Path:
    """The folder with the models that ship with bitgen. BitgenError when the installation is incomplete."""
    return _data_dir("models", Path("models"), package)


def shipped_bundles_dir(package: Path = _PACKAGE) -> Path | None:
    """The folder with the kernel libraries of a platform's wheel; None where bitgen came without any."""
    folder = package / "_data" / "bundles"
    return folder if folder.is_dir() else None


def generated_dir(override: str | os.PathLike[str] | None = None) -> Path:
    """The folder that gets emitted libraries, headers and C sources; not created here."""
    return _output_dir("generated", override)


def tune_logs_dir(override: str | os.PathLike[str] | None = None) -> Path:
    """The folder that gets tuning records; not created here."""
    return _output_dir("tune_logs", override)


def cache_dir() -> Path:
    """The folder of compiled objects; not created here.

    Never inside a checkout: the cache is addressed by content, so every checkout and installation of one
    user shares it.
    """
    home = _home()
    return home / "cache" if home is not None else _user_cache_dir() / "cache"


def config_dir() -> Path:
    """The folder of what a person decided: whom bundles are taken from; not created here."""
    home = _home()
    if home is not None:
        return home / "config"
    from platformdirs import user_config_path

    return user_config_path("bitgen", appauthor=False)


def installed_dir() -> Path:
    """The folder of installed bundles; not created here. Never inside a checkout: they are the user's."""
    home = _home()
    if home is not None:
        return home / "bundles"
    from platformdirs import user_data_path

    return user_data_path("bitgen", appauthor=False) / "bundles"


def ensure_dir(path: str | os.PathLike[str]) -> Path:
    """Create ``path`` with its parents where missing and return it.

    FileError when it cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error.strerror or str(error)) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _not_writable(folder, "it is read-only for this user")
    return folder


def _data_dir(name: str, in_checkout: Path, package: Path) -> Path:
    root = checkout_dir(package)
    folder = root / in_checkout if root is not None else package / "_data" / name
    if not folder.is_dir():
        message = f"bitgen's installation is incomplete: {folder} is missing; install bitgen again"
        raise FileError(message)
    return folder


def _output_dir(name: str, override: str | os.PathLike[str] | None) -> Path:
    if override is not None:
        return _absolute(override)
    home = _home()
    if home is not None:
        return home / name
    root = checkout_dir()
    return (root if root is not None else _user_cache_dir()) / name


def _home() -> Path | None:
    value = os.environ.get(HOME_VARIABLE, "")
    return _absolute(value) if value else None


def _absolute(path: str | os.PathLike[str]) -> Path:
    # Absolute, because children that measure kernels do not share our working directory. "~nobody/x" and a
    # missing home make expanduser raise; the path is then taken literally.
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        return Path(path).absolute()


def _user_cache_dir() -> Path:
    from platformdirs import user_cache_path  # 5 ms that `bitgen --help` need not pay

    return user_cache_path("bitgen", appauthor=False)


def _not_writable(folder: Path, reason: str) -> BitgenError:
    message = (
        f"cannot write to the folder {folder}: {reason}; choose another (--out, --logs, {HOME_VARIABLE})"
    )
    return FileError(message)
