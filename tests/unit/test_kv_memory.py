"""Memory of keys and values: taken as it is written, given back when it is not needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitgen.inference.kv_memory import KvMemory

STATUS = Path("/proc/self/status")


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(found[1]) if found else 0


@pytest.mark.skipif(not STATUS.exists(), reason="there is no /proc")
def test_memory_is_taken_and_given_back() -> None:
    size, part = 1 << 36, 64 << 20  # 64 GiB of addresses
    before = resident()
    memory = KvMemory(size)
    assert resident() < before + part // 4
    memory.data[:part] = 1
    assert resident() > before + part // 2
    memory.give_back(1, part)
    assert resident() < before + part // 4
    assert memory.data[0] == 1  # the first page is not whole
    memory.data[:part] = 2
    assert memory.data[part - 1] == 2
