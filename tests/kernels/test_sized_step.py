# ruff: noqa: E501 - C is quoted as it is
"""A forward step made for a model's sizes: the same bits, and every other model still runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libraries import RAGGED, WHOLE, toolchain_of
from reference_model import random_dense, small_config

from bitgen import records
from bitgen.abi import DENSE_TYPES
from bitgen.bundle import read_bundle, write
from bitgen.bundle.contents import Contents, Target, choose_contents
from bitgen.bundle.units import library_units_of, table_values
from bitgen.bundle.write import write_library
from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import BitgenError
from bitgen.formats.config import ModelConfig
from bitgen.formats.quants import DENSE
from bitgen.inference.engine import Engine
from bitgen.inference.synthetic import random_weights
from bitgen.render import render_quantize, render_step
from bitgen.runtime import KernelTable, load
from bitgen.spec import StepSizes

pytestmark = pytest.mark.slow

BEST = accepted_isas(detect_cpu(), load_isas())[0].name
MADE = {"best, ragged": (BEST, RAGGED), "best, whole": (BEST, WHOLE), "scalar, ragged": ("scalar", RAGGED)}


def config_with(sizes: StepSizes, **changes: Any) -> ModelConfig:
    heads = sizes.q_rows // sizes.head_dim
    fields = {"hidden": sizes.hidden, "ffn": sizes.ffn, "head_dim": sizes.head_dim, "heads": heads}
    return small_config(**{**fields, "kv_heads": 1, "layers": 1, **changes})


FITS = ("silu, sub-norms", "relu2, norms of q and k", "groups, sub-norms")


def models(sizes: StepSizes) -> dict[str, ModelConfig]:
    """What one set of sizes leaves open, and models that differ from it in one size each."""
    return {
        FITS[0]: config_with(sizes, kv_heads=sizes.q_rows // sizes.head_dim),
        FITS[1]: config_with(sizes, activation="relu2", sub_norms=False, qk_norm=True, tied_head=False),
        FITS[2]: config_with(sizes, group=64),
        "another hidden": config_with(sizes, hidden=sizes.hidden - 30),
        "another ffn": config_with(sizes, ffn=sizes.ffn - 7),
        "more heads": config_with(sizes, heads=3),
        "as many rows of other heads": config_with(
            sizes, head_dim=sizes.head_dim // 2, heads=2 * sizes.q_rows // sizes.head_dim
        ),
    }


@pytest.fixture(scope="module", params=MADE)
def made(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    level_library: Callable[[str], Path],
) -> Iterator[tuple[StepSizes, KernelTable, KernelTable]]:
    """Sizes, a library with a step for them, and one with the step for every model alone."""
    level, sizes = MADE[request.param]
    name = f"sized-{level}-{sizes.hidden}"
    target = Target.of(detect_cpu(), level)
    out = tmp_path_factory.mktemp("sized")
    bundle = write_library((), toolchain_of(), out, name, target, sizes=sizes, check=False)
    assert read_bundle(bundle).manifest.step == sizes
    with load(bundle, 2) as sized, load(level_library(level), 2) as generic:
        yield sizes, sized, generic


@pytest.mark.parametrize("kv", ["f16", "f32", "q8", "q4"])
def test_sized_or_not_the_logits_are_the_same(
    made: tuple[StepSizes, KernelTable, KernelTable], kv: Any
) -> None:
    sizes, sized, generic = made
    for name, config in models(sizes).items():
        weights = random_weights(config, 3)
        logits = [logits_in_parts(Engine(weights, table, kv=kv), config) for table in (sized, generic)]
        assert np.array_equal(*logits), name


def test_every_format_of_head_and_embedding(made: tuple[StepSizes, KernelTable, KernelTable]) -> None:
    sizes, sized, generic = made
    weights = random_weights(config_with(sizes), 5)
    for kind in (kind for kind in DENSE if kind in DENSE_TYPES and not sizes.hidden % DENSE[kind].block):
        stored = replace(weights, embedding=random_dense(kind, 97, sizes.hidden))
        for head in ("exact", "q8"):
            logits = [
                logits_in_parts(Engine(stored, table, head=head), stored.config) for table in (sized, generic)
            ]
            assert np.array_equal(*logits), (kind, head)


def logits_in_parts(engine: Engine, config: ModelConfig) -> Any:
    """Of a text of 140 tokens, more than a chunk of keys, that goes in as 1, 130 and 9."""
    ids = np.random.default_rng(1).integers(0, config.vocab, 140).astype(np.int32)
    at = np.arange(140, dtype=np.int32)
    cuts = (slice(0, 1), slice(1, 131), slice(131, 140))
    nothing = np.zeros(140, np.int32)
    return np.concatenate([engine.forward(ids[c], at[c], nothing[c], nothing[c] == 0) for c in cuts])


# ---- which step runs ----

REFUSES = """\
#include "step.h"
static void embed(const uint8_t *row, int64_t k, float *x) { for (int64_t i = 0; i < k; ++i) x[i] = row[0]; }
static int32_t refuse(float *x, const float *add, const float *weight, float eps, int64_t k, int64_t k_pad, int8_t *xq,
                      float *x_scale, int32_t *x_sum) {
    (void)x, (void)add, (void)weight, (void)eps, (void)k, (void)k_pad, (void)xq, (void)x_scale, (void)x_sum;
    return 1;
}
static int32_t refuse_groups(float *x, const float *add, const float *weight, float eps, int64_t k, int64_t group,
                             int64_t stride, int8_t *xq, float *x_scale, int32_t *x_sum) {
    return (void)group, refuse(x, add, weight, eps, k, stride, xq, x_scale, x_sum);
}
extern const struct bitgen_step_ops OPS;
const struct bitgen_step_ops OPS = {
    .embed = {embed, embed, embed}, .norm_quantize = refuse, .norm_quantize_groups = refuse_groups};
"""


def test_the_step_for_its_sizes_runs_where_all_of_them_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its place a step that finds NaN in everything."""
    real = library_units_of
    source = render_step("scalar", RAGGED)
    ops = source.name.replace("bitgen_step", "bitgen_step_ops")
    assert ops in source.text

    def replaced(contents: Contents) -> Any:
        units = real(contents)
        assert [unit.name for unit in units].count(source.name) == 1
        return tuple(
            replace(unit, text=REFUSES.replace("OPS", ops)) if unit.name == source.name else unit
            for unit in units
        )

    monkeypatch.setattr(write, "library_units_of", replaced)
    target = Target.of(detect_cpu(), "scalar")
    bundle = write_library((), toolchain_of(), tmp_path, "refuses", target, sizes=RAGGED, check=False)
    with load(bundle, 1) as table:
        for name, config in models(RAGGED).items():
            run = partial(logits_in_parts, Engine(random_weights(config, 3), table), config)
            if name in FITS:
                with pytest.raises(BitgenError, match="NaN"):
                    run()
            else:
                assert np.isfinite(run()).all()


def test_only_the_level_of_the_kernels_has_a_step_of_its_own() -> None:
    cpu = detect_cpu()
    generic = choose_contents((), Target.of(cpu))
    sized = replace(generic, sizes=RAGGED)
    steps = table_values(sized)["steps"]
    assert [step["sizes"] for step in steps] == [RAGGED, *[None] * (len(steps) - 1)]
    assert [step["sizes"] for step in table_values(generic)["steps"]] == [None] * len(steps)
    # Nothing else changes but the table: objects of the same text are compiled once for all libraries.
    texts = [{(unit.name, unit.text) for unit in library_units_of(contents)} for contents in (generic, sized)]
    assert {name for name, _ in texts[1] - texts[0]} == {render_step(BEST, RAGGED).name, "table"}


# ---- the text ----

CHANGED = """\
* bitgen_step_hidden100_q_rows500_ffn150_head_dim100__scalar
*     bitgen render step --isa scalar --model NAME  (any of these sizes)
* models     hidden 100, q_rows 500, ffn 150, head_dim 100
OP int32_t quantize(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum) {
k = 100;
OP int32_t norm_quantize(
/* The same for the inputs of a matrix: 100 or 500 or 150. */
static int32_t quantize_sized(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum) {
if (k == 100) return quantize(x, 100, k_pad, xq, x_scale, x_sum);
if (k == 500) return quantize(x, 500, k_pad, xq, x_scale, x_sum);
return quantize(x, 150, k_pad, xq, x_scale, x_sum);
static int32_t norm_quantize_sized(
float *x, const float *add, const float *weight, float eps, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale,
int32_t *x_sum) {
if (k == 100) return norm_quantize(x, add, weight, eps, 100, k_pad,
xq, x_scale, x_sum);
if (k == 500) return norm_quantize(x, add, weight, eps, 500, k_pad,
return norm_quantize(x, add, weight, eps, 150, k_pad,
ffn = 150;
head_dim = 100;
hd = 100;
const int64_t hd = 100, block_bytes = hd * 32;
const int64_t hd = 100, wide = (hd + 15) / 16 * 16;
const int64_t hd = 100, block_bytes = hd * 64;
const int64_t hd = 100, block_bytes = hd * 16;
const int64_t hd = 100, block_bytes = hd * 8;
const int64_t k = 100;
extern const struct bitgen_step_ops bitgen_step_ops_hidden100_q_rows500_ffn150_head_dim100__scalar;
const struct bitgen_step_ops bitgen_step_ops_hidden100_q_rows500_ffn150_head_dim100__scalar = {
.quantize = quantize_sized,
.norm_quantize = norm_quantize_sized,
"""


def test_what_sizes_change_in_the_text() -> None:
    """And the quantiser's own text takes the place of a call."""
    generic, sized = (render_step("scalar", sizes).text.splitlines() for sizes in (None, RAGGED))
    diff = list(difflib.unified_diff(generic, sized, n=0, lineterm=""))[2:]
    added = dict.fromkeys(line[1:].strip() for line in diff if line.startswith("+"))
    quantiser = {line.strip() for line in render_quantize("scalar").text.splitlines()}
    assert [line for line in added if line not in quantiser] == CHANGED.splitlines()
    for name in ("a->head_dim", "a->k;"):
        assert name in "\n".join(generic)
        assert name not in "\n".join(sized)


def test_sizes_are_positive_and_survive_json() -> None:
    assert records.load(StepSizes, records.dump(RAGGED), "") == RAGGED
    with pytest.raises(BitgenError, match="ffn must be at least 1, not 0"):
        replace(RAGGED, ffn=0)
