from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bitgen.abi import STAGES
from bitgen.formats.config import find_model
from bitgen.inference.engine import Engine
from bitgen.inference.non_matmul_cost import non_matmul_cost

SMALL = replace(find_model("3B"), hidden=256, ffn=512, layers=7, heads=4, kv_heads=4, head_dim=64, vocab=2000)


@pytest.mark.slow  # it needs a library with tuned kernels
def test_the_rest_of_a_step_is_its_layers_and_once_embedding_and_head(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = non_matmul_cost(SMALL, bundle, 1, (1, 32))
    assert set(measured) == {1, 32}
    assert all(nanoseconds > 0 for nanoseconds in measured.values())
    times = {stage: float(10**i) for i, stage in enumerate(STAGES)}
    monkeypatch.setattr(Engine, "times_ns", property(lambda _: times))
    of_layers = sum(times[stage] for stage in ("norm", "rope", "attention", "gate"))
    expected = (times["embed"] + times["head"] + 7 * of_layers) / 32  # tokens, in 32 steps or in one
    assert non_matmul_cost(SMALL, bundle, 1, (1, 32)) == {1: expected, 32: expected}
