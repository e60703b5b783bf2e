"""Weights by nodes: on this machine as on one of two, whose threads' places the C tests are about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_model import small_config

from bitgen.inference.engine import Engine, Head
from bitgen.inference.numa import place_model
from bitgen.inference.synthetic import random_weights
from bitgen.inference.weight_cache import find_groups, pack_model
from bitgen.progress import Progress
from bitgen.runtime import KernelTable, load

pytestmark = pytest.mark.slow

CONFIG = small_config(hidden=160, ffn=320, head_dim=40, layers=2)


@pytest.fixture
def table(bundle: Path) -> Iterator[KernelTable]:
    with load(bundle, 2) as opened:
        yield opened


@pytest.fixture
def on_two(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The library's threads are on two nodes, as Python is told; the bytes of each copy."""
    copied: list[int] = []
    real = KernelTable.copy_to_nodes

    def copy(table: KernelTable, data: Any) -> Any:
        copied.append(data.nbytes)
        return real(table, data)

    monkeypatch.setattr(KernelTable, "nodes", 2)
    monkeypatch.setattr(KernelTable, "copy_to_nodes", copy)
    return copied


def logits(engine: Engine) -> Any:
    tokens = np.arange(7, dtype=np.int32)
    return engine.forward(tokens, tokens, np.zeros(7, np.int32), np.ones(7, bool))


def test_a_copy_is_the_same_bytes(table: KernelTable) -> None:
    assert table.nodes >= 1
    data = np.random.default_rng(0).integers(0, 256, (33, 1000), np.uint8)
    copy = table.copy_to_nodes(data)
    assert copy.shape == data.shape
    assert copy.ctypes.data % 64 == 0
    assert np.array_equal(copy, data)


@pytest.mark.parametrize("head", ["full", "screened", "q8"])
def test_a_model_on_two_nodes_gives_the_same_bits(
    table: KernelTable, head: Head, request: pytest.FixtureRequest
) -> None:
    weights = random_weights(CONFIG, 1)
    expected = logits(Engine(weights, table, head=head))
    copied = request.getfixturevalue("on_two")
    seen: list[Progress] = []
    engine = Engine(weights, table, head=head, progress=seen.append)
    assert np.array_equal(logits(engine), expected)
    packed = pack_model(weights, table, find_groups(weights))
    sizes = [matrix.data.nbytes for layer in packed.layers for matrix in layer.values()]
    vocab, hidden = CONFIG.vocab, CONFIG.hidden
    # The head of floats is copied where steps read it, and else the int8 rows that stand for it.
    heads = {"full": [2 * vocab * hidden], "q8": [vocab * hidden]}
    heads["screened"] = [vocab * hidden, 2 * vocab * hidden]
    assert copied == [*sizes, *heads[head]]
    lines = [str(each) for each in seen if each.lasting]
    assert (
        f"2 NUMA nodes: {sum(sizes) >> 20:,} MiB of packed weights are copied to where they are read" in lines
    )


@pytest.mark.usefixtures("bitgen_home")
def test_weights_from_disk_are_not_copied(table: KernelTable, on_two: list[int]) -> None:
    weights = random_weights(CONFIG, 1)
    engine = Engine(weights, table, fingerprint="x", from_disk=True)
    engine.close()
    assert on_two == []


def test_one_node_is_left_alone(table: KernelTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelTable, "nodes", 1)
    packed = pack_model(weights := random_weights(CONFIG, 1), table, find_groups(weights))
    assert place_model(packed, table) is packed
