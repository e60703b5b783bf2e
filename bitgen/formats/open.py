"""Open a model file, whatever it is: one GGUF file, or a folder as Hugging Face lays it out."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bitgen.errors import BitgenError, FileError, nearest_names
from bitgen.formats.config import ModelPreset, find_model, load_models
from bitgen.formats.downloads import find_download, is_download
from bitgen.formats.gguf_model import read_gguf_model, tensor_summaries
from bitgen.formats.gguf_tokenizer import gguf_tokenizer
from bitgen.formats.hf import open_folder
from bitgen.formats.model_file import ModelFile, fingerprint_of
from bitgen.paths import models_dir


def open_model(path: str | os.PathLike[str], two_bits: bool = False) -> ModelFile:
    """Open a .gguf file, a folder with config.json and safetensors, or a folder with one .gguf file.

    A .safetensors file stands for its folder; the name of a model that ships with bitgen (`shipped_model`)
    for its file, unless there is a file or folder of that name; `bitgen.formats.downloads` knows names with
    hf:, lmstudio: and ollama: in front. ``two_bits``: Q2_0 holds weights of 2 bits, not ternary ones.
    FileError when there is no model, when it is damaged, or when it is of a kind that bitgen does not run.
    """
    name = os.fspath(path)
    file = find_download(name) if is_download(name) else Path(path).expanduser()
    if not file.exists():
        file = shipped_model(os.fspath(path)) or file
        _refuse_unknown_name(os.fspath(path), file)
    if file.is_dir():
        if (file / "config.json").is_file():
            return open_folder(file)
        found = sorted(file.glob("*.gguf"))
        if len(found) != 1:
            what = (
                "no model: neither config.json nor a .gguf file"
                if not found
                else f"{len(found)} .gguf files: name one"
            )
            raise FileError(f"the folder {file} holds {what}")
        file = found[0]
    if file.suffix == ".safetensors" and (file.parent / "config.json").is_file():
        return open_folder(file.parent)
    return _open_gguf(file, two_bits)


def shipped_model(name: str) -> Path | None:
    """The file of a model that ships with bitgen: "tiny" is models/tiny.gguf. None for any other name."""
    if not name.isidentifier():  # a path, or something with a suffix
        return None
    try:
        file = models_dir() / f"{name}.gguf"
    except BitgenError:  # no such folder: then the name is what is wrong
        return None
    return file if file.is_file() else None


def preset_of(model: str | ModelPreset) -> ModelPreset:
    """The shapes of a preset (its name), a YAML file, or a model file or folder that `bitgen run` reads."""
    if isinstance(model, ModelPreset):
        return model
    path = Path(model)
    is_file = path.suffix.lower() in (".gguf", ".safetensors") or path.is_dir()
    if not is_file and not is_download(model) and not shipped_model(model):
        return find_model(model)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    return ModelPreset.of(open_model(model).config, safe or "model")


def _refuse_unknown_name(name: str, file: Path) -> None:
    """BitgenError for a name that is neither a file nor a model that ships: a typing error, or a preset."""
    if file.exists() or os.sep in name or file.suffix in (".gguf", ".safetensors"):
        return
    shipped = sorted(each.stem for each in models_dir().glob("*.gguf"))
    wanted = f"give a .gguf file, a Hugging Face folder, or {' or '.join(shipped)}"
    if any(name.casefold() in preset.names for preset in load_models()):
        raise FileError(
            f"{name} is a preset, which has shapes and no weights: {wanted}; `bitgen bench -m {name}` times "
            "it with random weights",
        )
    near = nearest_names(name, shipped)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise FileError(f"{name!r} does not exist and is no model that ships: {hint}{wanted}")


def _open_gguf(path: Path, two_bits: bool) -> ModelFile:
    file, config, weights = read_gguf_model(path, two_bits)
    return ModelFile(
        path=path,
        container="gguf",
        config=config,
        weights=weights,
        metadata=file.metadata,
        tensors=tensor_summaries(file, config),
        fingerprint=fingerprint_of([path], [file.data[: file.header_bytes].data]),
        read_tokenizer=lambda: gguf_tokenizer(file),
    )
