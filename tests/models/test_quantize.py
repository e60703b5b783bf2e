"""Weights of 3 and 4 bits from weights of floats: what is chosen, how a file holds it, and that it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_model import exact_logits
from model_files import (
    Plain,
    interleave,
    plain_model,
    refused,
    shape_of,
    small_config,
    tensor,
    write_folder,
    write_model,
)
from numpy.typing import NDArray
from reference_model import ReferenceEngine, logits_of

from bitgen.cli import main
from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import BitgenError, FileError
from bitgen.formats.coded import CODED
from bitgen.formats.convert import convert
from bitgen.formats.gguf import U32, NewTensor, read_gguf, write_gguf
from bitgen.formats.inspect import facts, type_uses
from bitgen.formats.open import open_model
from bitgen.formats.quants import dequantize, quantize_rows
from bitgen.formats.stored_matrix import CodedMatrix
from bitgen.formats.table_types import TableLayout
from bitgen.inference.engine import Engine
from bitgen.quantize import TYPES, Recipe, quantize
from bitgen.quantize.codebooks import learn_tables
from bitgen.quantize.fit import Fit, choose
from bitgen.quantize.forward import input_squares, logits, multiply, run_layer
from bitgen.runtime import load
from bitgen.spec import Shape
from bitgen.tokenizer.tokenizer import Tokenizer

BEST = accepted_isas(detect_cpu(), load_isas())[0].name
OWN = [name for name, kind in TYPES.items() if not kind.gguf]
SIZES = {"hidden": 96, "ffn": 144, "heads": 4, "kv_heads": 2, "head_dim": 24, "vocab": 40, "layers": 2}
IDS = [1, 26, 13, 39, 4, 4, 27, 3]
Floats = NDArray[np.float32]


def float_model(path: Path, architecture: str = "llama", **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A GGUF file whose matrices are F32 with heavy tails, and their values in the rotate-half convention."""
    model = plain_model(small_config(architecture, **{**SIZES, **changes}))
    rng, values, tensors = np.random.default_rng(1), {}, []
    for key in model.w:
        name = key.rpartition(".")[2]
        w: Any = (rng.standard_t(5, shape_of(model.config, name)) * 0.03).astype(np.float32)
        values[key] = w
        if architecture == "llama" and name in ("attn_q", "attn_k"):
            w = interleave(w, model.config.heads if name == "attn_q" else model.config.kv_heads)
        tensors.append(tensor(f"{key}.weight", w))
    return write_model(path, without_matrices(model), more=tensors), values


def without_matrices(model: Plain) -> Plain:
    return replace(model, w={})


def stacked(values: Mapping[str, Floats], layer: int, role: str) -> Floats:
    names = {"qkv": ("attn_q", "attn_k", "attn_v"), "gate_up": ("ffn_gate", "ffn_up")}
    return np.concatenate([values[f"blk.{layer}.{name}"] for name in names[role]])


# ---- what is chosen


def weights(m: int, k: int, seed: int = 0) -> Floats:
    made: Floats = (np.random.default_rng(seed).standard_t(4, (m, k)) * 0.02).astype(np.float32)
    return made


@pytest.mark.parametrize("rows", [16, 1])
@pytest.mark.parametrize("name", ["bitmod4", "bitmod3", "int4", "q4_0"])
def test_every_choice_is_the_best_of_all(name: str, rows: int) -> None:
    """Against a loop over rows, groups and tables that tries every value of a table for every weight."""
    kind, m, k, group = TYPES[name], 35, 70, 32
    w, h = weights(m, k), np.random.default_rng(5).uniform(0.1, 3, k).astype(np.float32)
    chosen = choose(w, kind.arrays(), Fit(group, kind.sign, fitted=False, rows=rows), h)
    got = chosen.values(kind.arrays(), k)
    total = 0.0
    for first in range(0, m, rows):
        for begin in range(0, k, group):
            part = w[first : first + rows, begin : begin + group].astype(np.float64)
            weight, errors, found = h[begin : begin + group], [], []
            for table in kind.arrays().astype(np.float64):
                top = table[np.abs(table).argmax()]
                largest = part[np.arange(len(part)), np.abs(part).argmax(axis=1)].astype(np.float32)
                scale = (largest / np.float32(top)).astype(np.float16).astype(np.float64)[:, None, None]
                # Of each row the scale of either sign, or the one that may be.
                tries = {"plus": [np.abs(scale)], "largest": [scale], "free": [np.abs(scale), -np.abs(scale)]}
                values = np.stack([each * table for each in tries[kind.sign]])  # (signs, rows, 1, values)
                off = (part[..., None] - values) ** 2
                sign = (off.min(axis=3) * weight).sum(axis=2).argmin(axis=0)
                rows_of = np.arange(len(part))
                errors.append((off[sign, rows_of].min(axis=2) * weight).sum())
                near = off[sign, rows_of].argmin(axis=2)
                found.append(values[sign[:, None], rows_of[:, None], 0, near])
            best = int(np.argmin(errors))
            total += errors[best]
            expected = found[best]
            assert np.abs(got[first : first + rows, begin : begin + group] - expected).max() < 1e-6
    assert chosen.error == pytest.approx(total, rel=1e-4)
    assert chosen.size == pytest.approx(float((w.astype(np.float64) ** 2 * h).sum()), rel=1e-4)


def test_what_more_freedom_gains() -> None:
    """The left one can always choose what the right one chose; here it gains by not doing so."""
    w = weights(64, 256)

    def error(name: str, **options: Any) -> float:
        return choose(
            w, TYPES[name].arrays(), Fit(128, TYPES[name].sign, **{"fitted": False, **options})
        ).error

    assert error("bitmod4", rows=1) < error("bitmod4")
    assert error("bitmod3", rows=1) < error("bitmod3")
    assert error("fp4", fitted=True) < error("fp4")
    assert error("bitmod4", fitted=True, rows=1) < error("bitmod4", rows=1)
    assert error("fp4") < error("fp3")


def test_tables_of_bitmod() -> None:
    """FP4 and FP3 with one more value: 5 and 8 (times 2), 3 and 6, and the sign of the scale is theirs."""
    extra = [sorted(set(table) - set(TYPES["fp4"].tables[0])) for table in TYPES["bitmod4"].tables]
    assert extra == [[10], [16]]
    assert [len(set(table)) for table in TYPES["bitmod4"].tables] == [16] * 2
    extra = [sorted(set(table) - set(TYPES["fp3"].tables[0])) for table in TYPES["bitmod3"].tables]
    assert extra == [[3], [6]]
    w = weights(32, 128)
    for name in ("bitmod4", "bitmod3"):
        two = TYPES[name].arrays()
        four = np.concatenate([two, -two])
        free = choose(w, two, Fit(128, "free", rows=1, fitted=False))
        paper = choose(w, four, Fit(128, rows=1, fitted=False))
        np.testing.assert_allclose(free.values(two, 128), paper.values(four, 128), rtol=1e-6)
    assert all(name in CODED for name, kind in TYPES.items() if kind.gguf)


def test_zeros_and_what_is_no_number() -> None:
    tables = TYPES["bitmod4"].arrays()
    zeros = choose(np.zeros((16, 40), np.float32), tables, Fit(32))
    assert not zeros.values(tables, 40).any()
    assert (zeros.error, zeros.size) == (0, 0)
    w = weights(16, 40)
    w[3, 39] = np.inf
    with pytest.raises(FileError, match="blk holds NaN or infinity"):
        choose(w, tables, Fit(32), name="blk")
    w[3, 39] = 1e9
    with pytest.raises(FileError, match="too large for scales of half floats"):
        choose(w, tables, Fit(32))


@pytest.mark.parametrize("levels", [16, 8])
def test_learned_tables_find_those_that_weights_were_made_of(levels: int) -> None:
    rng = np.random.default_rng(3)
    grids = [
        np.linspace(-1, 1, levels),
        np.sign(np.linspace(-1, 1, levels)) * np.linspace(-1, 1, levels) ** 2,
    ]
    blocks = []
    for i in range(40):
        w = grids[i % 2][rng.integers(0, levels, (16, 64))]
        w[:, 0] = 1  # the largest of each group
        blocks.append((w * rng.uniform(0.5, 2, (16, 1))).astype(np.float32))
    fit = Fit(64, sign="largest")
    tables = learn_tables(blocks, levels, 2, fit, None, "w")
    assert (np.diff(tables.astype(int), axis=1) > 0).all()
    found = sorted(table.tolist() for table in tables)
    expected = sorted(np.rint(grid * 127).astype(int).tolist() for grid in grids)
    assert np.abs(np.array(found) - expected).max() <= 1
    off = sum(choose(block, tables, fit).error for block in blocks)
    assert off < 1e-4 * sum(float((block**2).sum()) for block in blocks)


def test_learned_tables_of_nothing() -> None:
    tables = learn_tables([np.zeros((16, 64), np.float32)], 16, 4, Fit(32, sign="largest"), None, "w")
    assert tables.shape == (4, 16)
    assert tables.min() >= -127


# ---- how a file holds it


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("m", "k", "group"), [(16, 128, 128), (37, 75, 32), (5, 8, 256)])
def test_the_layout_as_it_is_drawn(bits: int, m: int, k: int, group: int) -> None:
    """docs/reference/file-types.md, bit by bit."""
    layout, rng = TableLayout("any", bits, group), np.random.default_rng(bits)
    groups, rows = -(-k // group), -(-m // 16)
    tables = rng.integers(-127, 128, (3, 1 << bits)).astype(np.int8)
    chosen = choose(weights(m, k), tables, Fit(group)).rows(tables, k)
    assert chosen.selectors is not None
    data = layout.encode(chosen)
    assert data.shape == layout.shape(m, k) == (rows, 33 * groups + 16 * -(-k // 8) * bits)
    for r in range(m):
        block = data[r // 16]
        halves = block[groups : 33 * groups].copy().view("<f2").reshape(16, groups)
        codes = block[33 * groups :].reshape(16, -1)[r % 16]
        number = int.from_bytes(codes.tobytes(), "little")
        for c in range(k):
            assert number >> bits * c & (1 << bits) - 1 == chosen.codes[r, c]
        assert (halves[r % 16] == chosen.scales[r]).all()
        assert (block[:groups] == chosen.selectors[r // 16]).all()
    matrix = layout.matrix("w", Shape(m, k), data.reshape(-1), tables)
    np.testing.assert_array_equal(
        matrix.values(0, m), choose(weights(m, k), tables, Fit(group)).values(tables, k)
    )
    if m > 16:
        np.testing.assert_array_equal(matrix.values(16, m), matrix.values(0, m)[16:])
        with pytest.raises(BitgenError, match="16 rows share a table"):
            matrix.coded(8, m)


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_an_own_type(tmp_path: Path, name: str) -> None:
    source, values = float_model(tmp_path / "m.gguf")
    made = quantize(source, tmp_path / "out.gguf", Recipe(name, 64))
    opened = open_model(made.path)
    kind = {3: "t3", 4: "t4"}[TYPES[name].bits]
    assert (opened.config.weights, opened.config.group) == (kind, 64)
    assert facts(opened)["stored as"] == f"{name}, {made.bits:.3f} bits a weight"
    used = {use.type: use for use in type_uses(opened)}
    assert used[name].tensors == 8
    assert used[name].values == made.weights
    bits = TYPES[name].bits
    assert bits + 0.25 < made.bits < bits + 0.9  # small matrices: rows and groups are filled up
    bound = {"int3": 0.35, "fp3": 0.3, "bitmod3": 0.26, "codebook3": 0.24}.get(name, 0.16)
    assert 0.05 < made.off < bound
    original = open_model(source)
    for i, (layer, before) in enumerate(zip(opened.weights.layers, original.weights.layers, strict=True)):
        np.testing.assert_array_equal(before.qkv.values(0, before.qkv.shape.m), stacked(values, i, "qkv"))
        for matrix, was in zip(layer.matrices, before.matrices, strict=True):
            m = matrix.shape.m
            off = matrix.values(0, m) - was.values(0, m)
            assert np.sqrt((off**2).mean()) < 1.5 * made.off * np.sqrt((was.values(0, m) ** 2).mean())
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(FileError, match="weights of 4 bits"):
        convert(made.path, tmp_path / "no.gguf", "tq2_0")


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_file_of_a_gguf_type(tmp_path: Path, name: str, architecture: str) -> None:
    """Other programs read the same values, with the rows of a llama where they expect them."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    quants = pytest.importorskip("gguf.quants", reason="the gguf package is the oracle")
    sizes = {"head_dim": 32, "ffn": 160}
    source, values = float_model(tmp_path / "m.gguf", architecture, **sizes)
    made = quantize(source, tmp_path / "out.gguf", Recipe(name))
    assert made.bits == 4.5
    tensors = {t.name: t for t in gguf.GGUFReader(made.path).tensors}
    for key, w in values.items():
        found = tensors[f"{key}.weight"]
        assert found.tensor_type.name == name.upper()
        heads = {"attn_q": 4, "attn_k": 2}.get(key.rpartition(".")[2])
        expected = interleave(w, heads) if heads and architecture == "llama" else w
        off = quants.dequantize(found.data, found.tensor_type) - expected
        assert np.sqrt((off**2).mean()) < 0.13 * w.std()
    opened = open_model(made.path)
    layer = opened.weights.layers[1]
    for role, matrix in (("qkv", layer.qkv), ("gate_up", layer.gate_up)):
        off = matrix.values(0, matrix.shape.m) - stacked(values, 1, role)
        assert np.sqrt((off**2).mean()) < 0.13 * stacked(values, 1, role).std()


@pytest.mark.parametrize(("architecture", "head"), [("llama", "q8_0"), ("qwen3", "q4_0"), ("bitnet", "f16")])
def test_heads(tmp_path: Path, architecture: str, head: str) -> None:
    """The head of its own, or the embedding where it is tied; the other one is copied."""
    source, _ = float_model(tmp_path / "m.gguf", architecture)
    made = quantize(source, tmp_path / "out.gguf", Recipe("fp4", 32, head))
    before, after = open_model(source).weights, open_model(made.path).weights
    assert after.output.type == head
    if before.lm_head is not None:
        np.testing.assert_array_equal(after.embedding.data, before.embedding.data)
    want, got = (w.output.rows(0, 40) for w in (before, after))
    bound = {"f16": 0.0, "q8_0": 0.004, "q4_0": 0.08}[head]
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


def test_rows_as_q8_0() -> None:
    w = weights(5, 96)
    w[1] = 0
    near = dequantize("q8_0", quantize_rows("q8_0", w, "w"), 96)
    step = np.abs(w.reshape(5, 3, 32)).max(axis=2).repeat(32, axis=1) / 127
    assert (np.abs(near - w) <= 0.51 * step + 1e-8).all()
    with pytest.raises(FileError, match="too large for half floats"):
        quantize_rows("f16", w + np.float32(1e6), "w")


def test_from_safetensors_and_from_ternary_weights(tmp_path: Path) -> None:
    """Ternary weights in groups of 64 or more are exact in 4 bits: every value is 0, s or -s."""
    config = small_config("llama", **SIZES)
    folder = write_folder(tmp_path / "hf", plain_model(config), "floats")
    made = quantize(folder, tmp_path / "out.gguf", Recipe("int4", 32))
    assert made.off < 1e-3  # scales are rounded to f16
    before, after = open_model(folder).weights, open_model(made.path).weights
    for x, y in zip(before.layers, after.layers, strict=True):
        for a, b in zip(x.matrices, y.matrices, strict=True):
            np.testing.assert_allclose(b.values(0, b.shape.m), a.values(0, a.shape.m), rtol=1e-3)
    again = quantize(made.path, tmp_path / "again.gguf", Recipe("fp4", 32))
    assert again.off < 1e-3


def test_gguf_tools_list_and_copy_it(tmp_path: Path) -> None:
    """With the gguf package a file is read, its tensors listed, and written again: the same model."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is the tool")
    source, _ = float_model(tmp_path / "m.gguf")
    path = quantize(source, tmp_path / "out.gguf", Recipe("codebook3", 32)).path
    reader = gguf.GGUFReader(path)
    listed = {t.name: t.tensor_type.name for t in reader.tensors}
    assert listed["blk.1.ffn_gate_up.weight"] == listed["blk.0.attn_qkv.tables"] == "I8"
    writer = gguf.GGUFWriter(tmp_path / "copy.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for one in reader.tensors:
        writer.add_tensor(one.name, one.data, raw_shape=one.data.shape, raw_dtype=one.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    a, b = open_model(path).weights, open_model(tmp_path / "copy.gguf").weights
    for x, y in zip(a.layers, b.layers, strict=True):
        for left, right in zip(x.matrices, y.matrices, strict=True):
            assert isinstance(left, CodedMatrix)
            assert isinstance(right, CodedMatrix)
            one, other = left.coded(0, left.shape.m), right.coded(0, right.shape.m)
            for field in ("codes", "scales", "tables", "selectors"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


# ---- calibration


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bitnet-b1.58"])
@pytest.mark.parametrize("window", [0, 3])
def test_the_float_model_is_the_formula(tmp_path: Path, architecture: str, window: int) -> None:
    source, _ = float_model(tmp_path / "m.gguf", architecture)
    model = open_model(source).weights
    if window:  # in every second layer
        windows = tuple(window * (i % 2) for i in range(model.config.layers))
        model = replace(model, config=replace(model.config, windows=windows))
    texts = [IDS, IDS[::-1]]
    x = model.embedding.gather(np.array(texts, np.int32).reshape(-1))
    for index in range(model.config.layers):
        x = run_layer(model, index, x, 2, lambda _, matrix, inputs: multiply(matrix, inputs))
    got = logits(model, x).reshape(2, len(IDS), -1)
    for ids, rows in zip(texts, got, strict=True):
        expected = logits_of(model, ids, rounds=False)
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_squares_of_inputs(tmp_path: Path) -> None:
    """Those of the formulas: what each matrix is multiplied with, squared, its mean over tokens."""
    source, _ = float_model(tmp_path / "m.gguf")
    model = open_model(source).weights
    seen: dict[str, Any] = {}

    class Watched(ReferenceEngine):
        def _linear(self, name: str, matrix: Any, x: Any) -> Any:
            seen[name] = np.mean(x**2, axis=0)
            return super()._linear(name, matrix, x)

    n = len(IDS)
    Watched(model, context=n, max_batch=1, rounds=False).forward(
        np.array(IDS, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.ones(n, bool)
    )
    for number, found in enumerate(input_squares(model, [IDS])):
        for role, values in found.items():
            np.testing.assert_allclose(values, seen[f"{number}.{role}"], rtol=1e-3)


def test_calibration_lowers_the_error_that_counts(tmp_path: Path) -> None:
    """Of what matrices make of that text: the sum of h (w - v)^2 over a layer, h from the text itself."""
    source, _ = float_model(tmp_path / "m.gguf", vocab=60)
    text = "abab cdeab fgh" * 60
    model = open_model(source)
    errors = {}
    for calibration in ("", text):
        out = tmp_path / f"{bool(calibration)}.gguf"
        after = open_model(quantize(source, out, Recipe("codebook3", 32, "keep", calibration)).path).weights
        ids = Tokenizer(model.tokenizer_data).encode(text, parse=False)
        window = model.config.context
        windows = [ids[i * window : (i + 1) * window] for i in range(min(16, len(ids) // window))]
        squares = input_squares(model.weights, windows)
        total = 0.0
        for h, x, y in zip(squares, model.weights.layers, after.layers, strict=True):
            for role in ("qkv", "o", "gate_up", "down"):
                a, b = getattr(x, role), getattr(y, role)
                total += float(((a.values(0, a.shape.m) - b.values(0, b.shape.m)) ** 2 * h[role]).sum())
        errors[bool(calibration)] = total
    assert errors[True] < 0.97 * errors[False]


# ---- running


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "group"), [("bitmod4", 128), ("bitmod3", 32), ("codebook4", 64), ("codebook3", 256)]
)
def test_it_runs(tmp_path: Path, level_library: Callable[[str], Path], name: str, group: int) -> None:
    """The bits of the exact model, so every integer sum is; and floats within what int16 activations cost."""
    architecture = "qwen3" if group == 64 else "llama"
    source, _ = float_model(tmp_path / "m.gguf", architecture)
    path = quantize(source, tmp_path / "out.gguf", Recipe(name, group)).path
    model = open_model(path).weights
    n = len(IDS)
    where = np.array(IDS, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.ones(n, bool)
    with load(level_library(BEST), 2) as table:
        got = Engine(model, table, context=64, kv="f32").forward(*where)
        fine = Engine(model, table, context=64, kv="f32", activations="int16").forward(*where)
    np.testing.assert_array_equal(got, exact_logits(model, IDS, "f32"))
    np.testing.assert_array_equal(fine, exact_logits(model, IDS, "f32", activations="int16"))
    floats = logits_of(model, IDS, rounds=False)
    assert np.abs(fine - floats).max() < 1e-3 * np.abs(floats).max()
    assert np.abs(got - floats).max() < 0.1 * np.abs(floats).max()


# ---- what is refused


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = float_model(tmp_path / "m.gguf")
    out = tmp_path / "out.gguf"
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "empty.txt").write_text("")
    cases: list[tuple[list[str], int, str]] = [
        (["--type", "bitmod5"], 2, "unknown type 'bitmod5'; did you mean bitmod"),
        (["--type", "fp4", "--group", "48"], 2, "fp4 has groups of 32, 64, 128, 256 weights, not 48"),
        (["--type", "q4_0", "--group", "128"], 2, "q4_0 has groups of 32 weights, not 128"),
        (["--type", "fp4", "--head", "q3"], 2, "unknown type of head 'q3'"),
        (["--type", "fp4", "--calibration", str(tmp_path / "latin")], 5, "is not UTF-8 text"),
        (["--type", "fp4", "--calibration", str(tmp_path / "short.txt")], 2, "tokens; 64 are the least"),
        (["--type", "fp4", "--calibration", str(tmp_path / "empty.txt")], 5, "empty.txt is empty"),
        (["--type", "fp4", "--calibration", str(tmp_path / "none")], 5, "none is missing"),
        (["--type", "iq4_nl"], 5, "144 columns do not fit"),
    ]
    for arguments, code, message in cases:
        assert main(["quantize", str(source), "-o", str(out), *arguments]) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not list(tmp_path.glob("out*"))
    for target, message in (
        (source, "is the source itself"),
        (tmp_path, "is a folder"),
        (tmp_path / "a" / "b", "no folder"),
    ):
        with pytest.raises(BitgenError, match=message):
            quantize(source, target, Recipe("fp4"))
    assert main(["quantize", str(source), "-o", str(out), "--type", "int3", "--group", "32"]) == 0
    assert "bits each, changed by" in capsys.readouterr().out


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    source, _ = float_model(tmp_path / "m.gguf")
    place = read_gguf(source).tensors["blk.1.ffn_down.weight"].offset
    content = bytearray(source.read_bytes())
    content[place + 8 : place + 12] = np.array([np.nan], "<f4").tobytes()
    source.write_bytes(content)
    with pytest.raises(FileError, match=r"blk\.1\.ffn_down\.weight holds NaN or infinity"):
        quantize(source, tmp_path / "out.gguf", Recipe("bitmod4"))
    assert not list(tmp_path.glob("out*"))


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    source, _ = float_model(tmp_path / "m.gguf")
    seen = []

    def stop(progress: Any) -> None:
        seen.append(progress.done)
        if len(seen) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out.gguf", Recipe("codebook4"), stop)
    assert not list(tmp_path.glob("out*"))
    assert seen == sorted(seen)


def copy_with(path: Path, out: Path, metadata: Mapping[str, Any], change: Mapping[str, Any]) -> None:
    """The file with other metadata, or other bytes or shapes of tensors."""
    file = read_gguf(path)
    tensors = []
    for info in file.tensors.values():
        data = file.bytes_of(info).copy()
        shape = info.shape
        if info.name in change:
            data, shape = change[info.name](data, shape)
        tensors.append(NewTensor(info.name, shape, info.type_id, data.size, lambda data=data: [data]))  # type: ignore[misc]
    numbers = {k: U32(v) for k, v in file.metadata.items() if type(v) is int}
    write_gguf(out, {**file.metadata, **numbers, **metadata}, tensors)


def test_damaged_files_of_own_types_are_refused(tmp_path: Path) -> None:
    source, _ = float_model(tmp_path / "m.gguf")
    path = quantize(source, tmp_path / "out.gguf", Recipe("bitmod4", 32)).path
    out = tmp_path / "bad.gguf"
    for key, value, message in (
        ("version", U32(2), "version is 2; this bitgen reads version 1"),
        ("version", "one", "version is 'one', not one whole number"),
        ("bits", U32(5), "bits is 5; 3 and 4 are supported"),
        ("bits", U32(3), "has the shape"),
        ("group", U32(48), "group is 48"),
        ("group", U32(64), "has the shape"),
    ):
        copy_with(path, out, {f"bitgen.weights.{key}": value}, {})
        assert message in refused(out)
    tables = "blk.0.attn_qkv.tables"
    for change, message in (
        (lambda data, _: (data[:32], (4, 8)), "its tables are (4, 8); 1 to 4 of 16 values"),
        (lambda data, _: (np.tile(data, 4), (8, 16)), "its tables are (8, 16)"),
        (lambda data, shape: (np.full_like(data, 128), shape), "-127 .. 127, are supported"),
        (lambda data, _: (data, (32,)), "has the shape 32, not two sizes"),
    ):
        copy_with(path, out, {}, {tables: change})
        assert message in refused(out)

    def third(data: Any, shape: Any) -> Any:
        data[0] = 4  # the first selector
        return data, shape

    copy_with(path, out, {}, {"blk.0.attn_qkv.weight": third})
    matrix = open_model(out).weights.layers[0].qkv  # selectors are read with their rows
    with pytest.raises(FileError, match=r"attn_qkv\.weight: a selector names a table that is not there"):
        matrix.values(0, 16)
