"""Damaged model files end in a BitgenError or in a valid load; tests/support/mutations.py does the damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import plain_model, small_config, write_folder, write_model
from mutations import TYPES, hf_folder, read_everything
from nvfp4_files import WRITERS

from bitgen.errors import BitgenError
from bitgen.formats.gguf import ALIGNMENT, read_gguf

COUNT = 100  # mutations of each kind; the docs have the counts of a long run
STEP = 8  # between the lengths of files of each type; `.ci/deep mutations` takes every one

pytest.importorskip("tokenizers", reason="the tokenizer is read too")


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    """The outcomes of a run in a process of its own, with limits of memory and time."""
    script = Path(__file__).parents[1] / "support" / "mutations.py"
    root = script.parents[2]
    done = subprocess.run(
        [sys.executable, str(script), "--count", str(COUNT), "--seed", "7", "--step", str(STEP)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{script.parent}", "RUST_BACKTRACE": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, int]] = json.loads(done.stdout)
    assert results.pop("seconds")
    return results


def test_mutations_are_refused_or_load(counts: dict[str, dict[str, int]]) -> None:
    mutated = {kind: found for kind, found in counts.items() if "prefix" not in kind}
    assert len(mutated) == 14 + 3 * len(WRITERS) + 2 * len(TYPES)
    for kind, found in mutated.items():
        assert sum(found.values()) == COUNT, kind
        assert set(found) <= {"valid", "refused", "refused by the tokenizer"}
    for kind in TYPES:
        assert mutated[f"GGUF {kind}, one number"]["refused"], kind
        assert mutated[f"GGUF {kind}, one byte"]["valid"], kind
    names = ("GGUF llama, one byte", "GGUF bitnet, one number", "GGUF bitnet-embedding, one number")
    for kind in (*names, "config.json, one value"):
        assert mutated[kind]["refused"], kind
        assert mutated[kind]["valid"], kind


def test_every_prefix_is_refused(counts: dict[str, dict[str, int]]) -> None:
    prefixes = {kind: found for kind, found in counts.items() if "prefix" in kind}
    assert len(prefixes) == 4 + len(WRITERS) + len(TYPES)
    for kind, found in prefixes.items():
        assert set(found) <= {"refused", "refused by the tokenizer"}, kind
        assert sum(found.values()) > 250


def test_a_prefix_of_the_last_tensor_is_refused_too(tmp_path: Path) -> None:
    """The padding after the last tensor is not part of it, every byte before is."""
    path = write_model(tmp_path / "m.gguf", plain_model(small_config()))
    last = max(read_gguf(path).tensors.values(), key=lambda t: t.offset)
    assert last.size is not None
    end = last.offset + last.size
    assert path.stat().st_size - end < ALIGNMENT
    os.truncate(path, end)
    read_gguf(path)
    os.truncate(path, end - 1)
    with pytest.raises(BitgenError, match="ends after the file; was the download cut short"):
        read_gguf(path)


def test_what_is_damaged_is_whole_at_first(tmp_path: Path) -> None:
    assert read_everything(hf_folder(tmp_path)).json is not None


def test_a_sparse_file_that_claims_everything_takes_no_memory(tmp_path: Path) -> None:
    """A header of 2^40 bytes' worth of zeros: an empty key twice is refused at once."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + (0).to_bytes(8, "little") + (1 << 36).to_bytes(8, "little"))
    os.truncate(path, 1 << 40)
    with pytest.raises(BitgenError, match="damaged"):
        read_gguf(path)


def test_a_folder_whose_tokenizer_is_huge_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config()), "floats")
    os.truncate(folder / "tokenizer.json", 1 << 40)
    with pytest.raises(BitgenError, match="more than 64 MB"):
        read_everything(folder)
