"""tools/compare_text.py sees a change of machine code, and none where only names and comments change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bitgen.toolchain import find_compilers

TOOLS = Path(__file__).parents[2] / "tools"
TEXT = """#include <stdint.h>
static const int32_t table[4] = {1, 2, 3, 4};
int32_t bitgen_NAME__avx2(int32_t i);
int32_t bitgen_NAME__avx2(int32_t VARIABLE) { return table[VARIABLE & 3] * FACTOR; }
"""


@pytest.mark.skipif(not any(c.kind == "gcc" for c in find_compilers()), reason="gcc is not installed")
def test_machine_code_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import compare_text

    def revision(side: str, texts: dict[str, str]) -> compare_text.Revision:
        for name, text in texts.items():
            file = tmp_path / side / "default" / "i2s" / "avx2" / f"{name}.c"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return compare_text.Revision(tmp_path, tmp_path / side)

    def text(name: str, variable: str, factor: int) -> str:
        return TEXT.replace("NAME", name).replace("VARIABLE", variable).replace("FACTOR", str(factor))

    before = revision("before", {"n1": text("a", "i", 5), "small": text("b", "i", 5), "large": "int x"})
    after = revision("after", {"n1": text("long_name", "index", 5), "small": text("b", "i", 7)})
    cache = compare_text.Cache(tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        changed, count = compare_text.compare(before, after, cache, [], ["avx2"])
        kinds = {compiler.kind for compiler, _, _ in changed}
        assert "gcc" in kinds
        assert count == 3 * len(kinds)
        assert {name for _, _, name in changed} == {"default/i2s/avx2/small", "default/i2s/avx2/large"}
    assert compare_text.compare(before, after, cache, ["n1"], [])[0] == []
    assert compare_text.compare(before, after, cache, [], ["neon"]) == ([], 0)
    sys.modules.pop("compare_text")
