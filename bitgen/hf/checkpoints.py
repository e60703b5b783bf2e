"""BitNet checkpoints that are optimised as transformers loads them."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

from bitgen.hf.layers import optimize

_METHOD = "bitnet"
_options: dict[str, Any] = {}


class OptimizingQuantizer(BitNetHfQuantizer):
    """transformers' quantizer of BitNet checkpoints, and `optimize` once the weights are there."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        return optimize(model.eval(), **_options)  # as transformers leaves it a moment later


def install(**options: Any) -> None:
    """Optimise each BitNet checkpoint that transformers loads from now on, also in pipelines and servers.

    ``options`` are those of `optimize`. It is for this process; models that are loaded already stay as they
    are. transformers refuses a second quantizer of one name, so its own is replaced where it looks it up.
    """
    _options.clear()
    _options.update(options)
    AUTO_QUANTIZER_MAPPING[_METHOD] = OptimizingQuantizer


def uninstall() -> None:
    """Let transformers load BitNet checkpoints as before."""
    AUTO_QUANTIZER_MAPPING[_METHOD] = BitNetHfQuantizer
