from __future__ import annotations

from pathlib import Path

import pytest

from bitgen.errors import FileError
from bitgen.measure.client import WorkerClient
from bitgen.measure.task import Task


def test_what_cannot_be_loaded_is_no_kernels_fault(tmp_path: Path) -> None:
    """As where the cache is mounted noexec: every kernel "crashed", and was "NOT exact"."""
    harness = tmp_path / "harness.so"
    harness.write_bytes(b"no library")
    client = WorkerClient(harness, 0)
    with pytest.raises(FileError, match=r"cannot load what was compiled: .*noexec.*BITGEN_HOME"):
        client.ask(Task((), (), 1, 1))
    assert client.pid is None
