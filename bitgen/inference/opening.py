"""What running a model takes: a library for its matrices, room for its context, an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from bitgen.bundle import (
    PORTABLE,
    Bundle,
    all_bundles,
    choose_bundle,
    judge,
    level_below_best,
    refused_features,
)
from bitgen.bundle.manifest import Offer, in_every_library
from bitgen.bundle.measured import recall
from bitgen.cpu import detect_cpu
from bitgen.errors import UsageError
from bitgen.families.base import COMMON_GROUP, TERNARY
from bitgen.formats.config import ModelConfig
from bitgen.formats.model_file import ModelFile
from bitgen.formats.stored_matrix import BINARY
from bitgen.formats.weights import Weights
from bitgen.inference.engine import Engine, Head, Kv
from bitgen.inference.kv_memory import Capacity
from bitgen.inference.layouts import settle_layouts
from bitgen.inference.weight_cache import find_groups, named_matrices
from bitgen.progress import Progress, Report
from bitgen.runtime import Activations, KernelTable
from bitgen.spec import Shape, WeightKind

CONTEXT_DEFAULT = 4096  # positions, where the model has as many and nobody asks for more


def context_for(config: ModelConfig, asked: int | None) -> int:
    """The number of positions to make room for. BitgenError when the model does not have as many."""
    if asked is None:
        return min(CONTEXT_DEFAULT, config.context)
    if asked < 0 or asked > config.context:
        raise UsageError(f"the context must be 1 to {config.context} positions (0: all of them), not {asked}")
    return asked or config.context


def config_of_kernels(model: ModelFile | Weights) -> ModelConfig:
    """The config of the kernels that a model needs: its own, but for groups that not every library serves.

    In which groups ternary weights run is seen in their scales. Where some run in groups that only a library
    built for them has kernels of an ISA level for, ``group`` is the one of the most weights.
    """
    weights = model if isinstance(model, Weights) else model.weights
    config = weights.config
    if isinstance(model, Weights) or config.weights != TERNARY:
        return config
    groups, sizes = find_groups(weights, model.fingerprint.key), Counter[int]()
    for name, matrix in named_matrices(weights).items():
        group = 0 if (found := groups[name]) is None else found.group
        if not in_every_library(WeightKind(config.weights, group)):
            sizes[group] += matrix.shape.m * matrix.shape.k
    return replace(config, group=sizes.most_common(1)[0][0]) if sizes else config


def tuned_shapes(config: ModelConfig, tuned: Iterable[Shape | None]) -> set[Shape]:
    """Those of the model's matrix shapes that are among the ``tuned`` ones of a library's kernels."""
    return set(config.shapes) & {shape for shape in tuned if shape}


def _multiplies(offer: Offer, config: ModelConfig) -> bool:
    """Whether a kernel is for weights such as the model's, and more than the generic one."""
    return offer.kind == config.kind and offer.role != PORTABLE


def has_kernels(bundle: Bundle, config: ModelConfig) -> bool:
    """Whether a library has kernels of an ISA level for weights such as the model's."""
    return any(_multiplies(offer, config) for offer in bundle.manifest.offers())


def made_for_others(bundle: Bundle, config: ModelConfig) -> bool:
    """Whether a library was built for weights of another kind than the model's ordinary ternary ones.

    It has I2_S for those, not T5. Kernels of bits for every shape are in every library, and one for every CPU
    has kernels for all kinds.
    """
    if bundle.manifest.dispatches or not in_every_library(config.kind):
        return False
    offers = (offer for offer in bundle.manifest.offers() if offer.role != PORTABLE)
    bits = (WeightKind(BINARY, COMMON_GROUP), None)
    return any(not in_every_library(offer.kind) and (offer.kind, offer.shape) != bits for offer in offers)


def find_library(config: ModelConfig, progress: Report | None = None) -> Bundle | None:
    """The bundle to run a model with on this CPU, built here or installed: tuned for its matrices first.

    What another family left here for a lower ISA level than this CPU's best comes after all that have it.
    The library is verified when it is opened. ``progress`` hears of what must not be used: one of another
    ABI, a damaged or a revoked one, installed ones that others can change.
    """
    cpu = detect_cpu()
    refused = refused_features(cpu)
    found, errors = all_bundles(hashed=False, cpu=cpu)
    if progress is not None:
        for error in errors:
            progress(Progress(f"not used: {error.message}", lasting=True))
    bundles = [bundle for bundle in found if judge(bundle, cpu, refused).accepted]

    def fitting(bundle: Bundle) -> tuple[bool, bool, int, bool, bool]:
        offers = [offer for offer in bundle.manifest.offers() if _multiplies(offer, config)]
        tuned = tuned_shapes(config, (offer.shape for offer in offers))
        best = level_below_best(bundle, cpu, refused) is None
        suits = best or bundle.manifest.cpu_family == cpu.family
        return bool(offers), suits, len(tuned), not made_for_others(bundle, config), best

    fits = [fitting(bundle) for bundle in bundles]
    most = max(fits, default=None)
    best = [bundle for bundle, fit in zip(bundles, fits, strict=True) if fit == most]
    return choose_bundle(best, cpu, refused, recall(cpu))[0]


def open_engine(
    model: ModelFile | Weights,
    table: KernelTable,
    *,
    context: int,
    kv: Kv = "f16",
    head: Head = "full",
    activations: Activations | None = None,
    batch: int = 1,
    capacity: Capacity | None = None,
    from_disk: bool = False,
    fingerprint: str | None = None,
    progress: Report | None = None,
) -> Engine:
    """The engine over a kernel library; the weights of a file are packed once and then mapped.

    A ``capacity`` counts for more than ``batch``. ``fingerprint`` stands for weights that come from no file.
    """
    weights, fingerprint = (
        (model, fingerprint) if isinstance(model, Weights) else (model.weights, model.fingerprint.key)
    )
    settle_layouts(table, weights.config, progress)
    return Engine(
        weights,
        table,
        context=context,
        kv=kv,
        head=head,
        activations=activations,
        max_batch=batch,
        capacity=capacity,
        fingerprint=fingerprint,
        from_disk=from_disk,
        progress=progress,
    )
