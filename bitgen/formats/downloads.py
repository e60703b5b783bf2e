"""Models that other programs have downloaded, and downloading from the Hugging Face hub (the extra hub).

::

    hf:owner/repo[:file][@revision]   the hub's cache (HF_HUB_CACHE, HF_HOME/hub), which programs share
    lmstudio:owner/repo[:file]        LM Studio's folder
    ollama:name[:tag]                 Ollama's folder (OLLAMA_MODELS)

A name that is found on disk costs no network: what was pulled stays what it is until it is pulled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.whole import whole

PREFIXES = ("hf:", "lmstudio:", "ollama:")
_HF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^:@]+))?(?:@(?P<revision>[\w./-]+))?")
_LMSTUDIO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^:@]+))?")
_OLLAMA = re.compile(r"(?P<name>[\w./-]+)(?::(?P<tag>[\w.-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MODEL_LAYER = "application/vnd.ollama.image.model"
_FOLDER_FILES = (
    "*config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)


@dataclass(frozen=True)
class Download:
    """A model on disk: the name that finds it, and its file or folder."""

    name: str
    path: Path

    @property
    def bytes(self) -> int:
        files = [self.path] if self.path.is_file() else list(self.path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files if file.exists())  # links may lead nowhere


@dataclass(frozen=True)
class HubName:
    """``hf:owner/repo[:file][@revision]``."""

    repo: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubName:
        """UsageError for anything else."""
        found = _HF.fullmatch(name.removeprefix("hf:"))
        if not found or ".." in name:
            raise UsageError(f"{name!r} is no name of the hub: hf:owner/repo[:file][@revision]")
        return cls(found["repo"], found["file"], found["revision"])


def is_download(name: str) -> bool:
    """Whether a name is one of these rather than a path."""
    return name.startswith(PREFIXES)


def find_download(name: str) -> Path:
    """The file or folder of a name; one of the hub that is not there is downloaded. FileError without."""
    if name.startswith("hf:"):
        wanted = HubName.parse(name)
        return _in_hub_cache(wanted) or pull(wanted)[0]
    pattern, form = (_OLLAMA, "ollama:name[:tag]"), (_LMSTUDIO, "lmstudio:owner/repo[:file]")
    regex, shown = pattern if name.startswith("ollama:") else form
    found = regex.fullmatch(name.partition(":")[2])
    if not found or ".." in name:
        raise UsageError(f"{name!r} is no such name: {shown}")
    if name.startswith("ollama:"):
        known = {each.name: each.path for each in ollama_models()}
        path = known.get(f"ollama:{found['name']}:{found['tag'] or 'latest'}")
    else:
        files = [root / found["repo"] for root in _lmstudio_roots()]
        path = next((_one_model(folder, found["file"], name) for folder in files if folder.is_dir()), None)
    if path is None:
        raise FileError(f"{name} is not on this machine; `bitgen list` shows what is")
    return path


def downloads() -> list[Download]:
    """All that is on this machine, by name."""
    return sorted([*hub_models(), *lmstudio_models(), *ollama_models()], key=lambda each: each.name)


# ---- The hub's cache ----


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def hub_models() -> Iterator[Download]:
    """Of the revision that was pulled last."""
    for folder in sorted(hub_cache().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        snapshot = _snapshot(folder, None)
        if snapshot is None:
            continue
        for file in sorted(snapshot.rglob("*.gguf")):
            if file.exists():  # a link to what is no longer there is not
                yield Download(f"hf:{repo}:{file.relative_to(snapshot).as_posix()}", file)
        if (snapshot / "config.json").exists() and next(snapshot.glob("*.safetensors"), None):
            yield Download(f"hf:{repo}", snapshot)


def _in_hub_cache(wanted: HubName) -> Path | None:
    snapshot = _snapshot(hub_cache() / f"models--{wanted.repo.replace('/', '--')}", wanted.revision)
    return None if snapshot is None else _one_model(snapshot, wanted.file, f"hf:{wanted.repo}")


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    """The folder of a revision: a commit, or a name that was resolved to one when it was pulled."""
    revision = revision or "main"
    ref = folder / "refs" / revision
    try:
        commit = ref.read_text(encoding="ascii").strip() if ref.is_file() else revision
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch(r"[\w.-]+", commit) and snapshot.is_dir() else None


def _one_model(folder: Path, file: str | None, name: str) -> Path | None:
    """The named file of a folder, or its only model; None where it has none. UsageError for several."""
    if file is not None:
        return folder / file if (folder / file).is_file() else None
    if (folder / "config.json").is_file() and next(folder.glob("*.safetensors"), None):
        return folder
    files = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*.gguf") if each.is_file())
    return folder / _only(files, name) if files else None


def _only(files: Sequence[str], name: str) -> str:
    if len(files) != 1:
        raise UsageError(f"{name} has {len(files)} .gguf files, name one: {name}:{f', {name}:'.join(files)}")
    return files[0]


# ---- LM Studio and Ollama ----


def _lmstudio_roots() -> list[Path]:
    home = Path.home()
    return [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]


def lmstudio_models() -> Iterator[Download]:
    for root in _lmstudio_roots():
        for file in sorted(root.glob("*/*/*.gguf")):
            yield Download(f"lmstudio:{file.parent.relative_to(root).as_posix()}:{file.name}", file)


def ollama_models() -> Iterator[Download]:
    """By what their manifests say: the weights are a blob with the name of its sum."""
    root = Path(os.environ.get("OLLAMA_MODELS") or "~/.ollama/models").expanduser()
    manifests = root / "manifests"
    for manifest in sorted(file for file in manifests.rglob("*") if file.is_file()):
        parts = manifest.relative_to(manifests).parts
        try:
            layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
            digest = next(layer["digest"] for layer in layers if layer["mediaType"] == _MODEL_LAYER)
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            continue  # not a manifest, or of a model without weights
        blob = root / "blobs" / str(digest).replace(":", "-")
        if len(parts) > 2 and blob.is_file():
            *path, tag = parts[2:] if parts[1] == "library" else parts[1:]
            yield Download(f"ollama:{'/'.join(path)}:{tag}", blob)


# ---- Pulling ----


def pull(wanted: HubName) -> tuple[Path, str]:
    """Download a model into the hub's cache: its path, and the commit it is from.

    What was interrupted goes on where it stopped; files are compared with the hub's SHA-256. ``HF_TOKEN`` (or
    the token that is logged in) is sent, ``HF_ENDPOINT`` is asked. FileError when it cannot be had.
    """
    hub = _hub()
    endpoint, cache = os.environ.get("HF_ENDPOINT") or None, hub_cache()
    errors: tuple[type[BaseException], ...] = (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError)
    errors += (OSError, ValueError, RuntimeError, *_http_errors())
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(wanted.repo, revision=wanted.revision)
        commit, names = str(info.sha), [each.rfilename for each in info.siblings or ()]
        file = wanted.file or _file_of(names, f"hf:{wanted.repo}")
        options: dict[str, Any] = {"revision": commit, "cache_dir": cache, "endpoint": endpoint}
        for each in [file] if file else _files_of_folder(names):
            path = Path(hub.hf_hub_download(wanted.repo, each, **options))
            _check_sum(path)
    except BitgenError:
        raise
    except errors as error:
        raise FileError(f"cannot pull hf:{wanted.repo}: {_reason(error)}") from error
    _remember(cache / f"models--{wanted.repo.replace('/', '--')}", wanted.revision or "main", commit)
    return path if file else path.parent, commit


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise BitgenError("huggingface_hub is not installed: pip install 'bitgen[hub]'") from None
    return huggingface_hub


def _http_errors() -> tuple[type[BaseException], ...]:
    """What connections of huggingface_hub raise: it came from requests to httpx."""
    found: list[type[BaseException]] = []
    for module, name in (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("requests", "RequestException")):
        try:
            found.append(getattr(__import__(module), name))
        except ImportError:
            continue
    return tuple(found)


def _file_of(names: Sequence[str], name: str) -> str | None:
    """The only .gguf file; None for a folder of safetensors."""
    files = [each for each in names if each.endswith(".gguf")]
    if not files and "config.json" in names and any(each.endswith(".safetensors") for each in names):
        return None
    if not files:
        raise FileError(f"{name} holds no model that bitgen reads: neither .gguf nor safetensors")
    return _only(files, name)


def _files_of_folder(names: Sequence[str]) -> list[str]:
    """Those that a folder of safetensors needs."""
    top = [name for name in names if "/" not in name]
    # Mistral's repositories hold all weights once more, in a form of their own.
    own = [name for name in top if not fnmatch(name, "consolidated*.safetensors")]
    return [name for name in own if any(fnmatch(name, pattern) for pattern in _FOLDER_FILES)]


def _check_sum(path: Path) -> None:
    """Compare a file with the sum that the cache named it by. FileError, and it is gone, when it differs."""
    blob = path.resolve()
    if not _SHA256.fullmatch(blob.name):
        return  # a small file, or a cache without links: the hub gives no sum
    digest = hashlib.sha256()
    with blob.open("rb") as data:
        while part := data.read(1 << 22):
            digest.update(part)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise FileError(f"{path.name} is not what the hub has (SHA-256): it is deleted; pull again")


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Let a revision's name stand for this commit from now on."""
    ref = folder / "refs" / revision
    if revision != commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with whole(ref, synced=False) as file:
            file.write(commit.encode("ascii"))


def _reason(error: BaseException) -> str:
    """The line of an error that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
