from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bitgen.formats.config import find_model
from bitgen.inference.non_matmul_cost import non_matmul_cost


@pytest.mark.slow  # it needs a library with tuned kernels, and times it
def test_the_rest_of_the_step_grows_with_layers_and_vocabulary(bundle: Path) -> None:
    small = replace(
        find_model("3B"), hidden=256, ffn=512, layers=2, heads=4, kv_heads=4, head_dim=64, vocab=2000
    )
    deep, wide = replace(small, layers=200), replace(small, vocab=40000)
    times = [non_matmul_cost(preset, bundle, 1, (1, 32)) for preset in (small, deep, wide)]
    for found in times:
        assert set(found) == {1, 32}
        assert 0 < found[32] < found[1]  # of a prompt only the last token has logits
    assert times[1][1] > 3 * times[0][1]
    assert times[2][1] > 3 * times[0][1]
