"""The Python lines of README run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bitgen.reference import ternary_matmul

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_example_of_the_readme(bundle: Path, bitgen_home: Path) -> None:
    generated = bitgen_home / "generated"
    generated.mkdir(parents=True)
    (generated / "tests").symlink_to(bundle, target_is_directory=True)
    code = re.search(r"```python\n(import bitgen\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    rng = np.random.default_rng(5)
    w = rng.integers(-1, 2, (40, 100), dtype=np.int8)
    xq = rng.integers(-128, 128, (3, 100), dtype=np.int8)
    x = rng.normal(size=(3, 100)).astype(np.float32)
    names = {"w": w, "scale": 0.5, "x": x, "xq": xq}
    exec(code[1], names)  # noqa: S102
    assert np.array_equal(np.asarray(names["acc"]), ternary_matmul(xq, w))
    assert np.asarray(names["y"]).shape == (3, 40)
