"""Layers that keep their weights and multiply on bitgen's kernels.

A layer is optimised by its class: `BitLinear` becomes `OptimizedBitLinear`, a subclass, and so on. Its
parameters and buffers stay as they are, so whatever reads or writes them (state_dict, save_pretrained, to)
goes on as before; beside them is one buffer of packed bytes that no state_dict holds.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear, BitLinear

from bitgen.api import load
from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.formats.matrices import packed_matrix, ternary_matrix
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.hf.operator import WithoutGradient, bytes_of, table_of
from bitgen.runtime import Groups, KernelTable

Activations: TypeAlias = Literal["bitgen", "transformers"]
M = TypeVar("M", bound=nn.Module)
_ROWS = 256  # packed at once; a multiple of 256, as `KernelTable.pack_rows` asks for
_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Kernel:
    """How a layer multiplies: the operator's arguments beside tensors, and who rounds activations."""

    library: str
    threads: int
    activations: Activations
    m: int
    scales: int


class _Optimized(nn.Module):
    """What the optimised classes share: ``bitgen_packed`` are the weights for ``bitgen_kernel``."""

    bitgen_kernel: Kernel
    bitgen_packed: torch.Tensor
    bias: Any  # those of the class that is optimised
    weight_scale: Any
    rms_norm: Any
    activation_quant: Any
    post_quant_process: Any

    def bitgen_linear(self, x: torch.Tensor) -> torch.Tensor:
        """The operator for activations of any float type, or int8."""
        kernel = self.bitgen_kernel
        asks = torch.is_grad_enabled() and x.requires_grad
        y: torch.Tensor = (WithoutGradient.apply if asks else torch.ops.bitgen.linear)(
            x if x.dtype == torch.int8 else x.to(torch.float32),
            self.bitgen_packed,
            kernel.m,
            kernel.scales,
            kernel.library,
            kernel.threads,
        )
        return y if x.dtype == torch.int8 else y.to(x.dtype)

    def train(self, mode: bool = True) -> Any:
        """Training runs the original code; weights that it changed are packed anew after it."""
        before = self.training
        super().train(mode)
        if before and not mode:
            _pack_again(self)
        return self


def _runs_here(module: nn.Module, x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not module.training


# BitLinear's methods as they were before transformers compiled them: inside of a model that is compiled as a
# whole PyTorch (2.13) stumbles over a method that is compiled already.
_QUANT, _POST = (
    getattr(method, "_torchdynamo_orig_callable", method)
    for method in (BitLinear.activation_quant, BitLinear.post_quant_process)
)


class OptimizedBitLinear(_Optimized, BitLinear):
    """BitLinear: packed weights, activations rounded to int8 a token."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as it is called there
        if not _runs_here(self, input):
            return BitLinear.forward(self, input)
        if self.rms_norm is not None:
            input = self.rms_norm(input)  # noqa: A001
        if self.bitgen_kernel.activations == "transformers":
            whole = torch.compiler.is_compiling()
            rounded, scale = _QUANT(self, input) if whole else self.activation_quant(input)
            y = self.bitgen_linear(rounded).to(input.dtype)
            post = partial(_POST, self) if whole else self.post_quant_process
            y = post(y, self.weight_scale, scale)
        else:
            y = self.bitgen_linear(input)
        return y if self.bias is None else y + self.bias


class OptimizedAutoBitLinear(_Optimized, AutoBitLinear):
    """AutoBitLinear: weights as floats that are rounded, or were; activations rounded to int8 a token."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as it is called there
        if not _runs_here(self, input):
            return AutoBitLinear.forward(self, input)
        if self.rms_norm is not None:
            input = self.rms_norm(input)  # noqa: A001
        y = self.bitgen_linear(input)
        if self.bias is None:
            return y
        return y + (self.bias if self.online_quant else self.bias * self.weight_scale)


class OptimizedLinear(_Optimized, nn.Linear):
    """Linear with ternary weights. Its activations are rounded to int8, which PyTorch's are not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as it is called there
        if not _runs_here(self, input):
            return nn.Linear.forward(self, input)
        y = self.bitgen_linear(input)
        return y if self.bias is None else y + self.bias


_OPTIMIZED: dict[type[nn.Module], type[_Optimized]] = {
    BitLinear: OptimizedBitLinear,
    AutoBitLinear: OptimizedAutoBitLinear,
    nn.Linear: OptimizedLinear,
}


# ---- Optimise ----


def optimize(
    model: M,
    *,
    library: str | Path | None = None,
    threads: int | None = None,
    activations: Activations = "bitgen",
    linears: bool = True,
) -> M:
    """Let the ternary layers of a model multiply on bitgen's kernels, in place; returns the model.

    These are transformers' BitLinear and AutoBitLinear, and with ``linears`` each Linear whose weights are
    -s, 0 and s with one s, one a row, or one for each 32 to 256 weights along k. A Linear's activations are
    rounded to int8 then, as bitgen's engine rounds them; BitLinears round theirs anyway.

    ``library`` is a bundle or a .so (None: the best here, as `bitgen.load` finds it), ``threads`` None one a
    physical core. With ``activations`` "transformers" a BitLinear rounds them in the model's own dtype: in
    bfloat16 to slightly other integers, those of transformers; the sums over them are exact in both.

    Called again it packs weights that were changed by hand. BitgenError when no layer is ternary.
    """
    if activations not in ("bitgen", "transformers"):
        raise UsageError(f"activations must be bitgen or transformers, not {activations!r}")
    with load(library, 1) as found:
        path = str((found.path if found.bundle is None else found.bundle.path).absolute())
    table, count = table_of(path, threads or 0), 0
    for name, module in list(model.named_modules()):
        base = _base(module)
        if base is None or (base is nn.Linear and not linears):
            continue
        try:
            matrix = _matrix(name, module, base)
        except FileError:
            if base is nn.Linear:
                continue
            raise
        kernel = Kernel(path, threads or 0, activations, matrix.shape.m, _count(matrix))
        _equip(module, base, kernel, _pack(table, matrix))
        count += 1
    if not count:
        raise BitgenError("no layer of this model is ternary: neither BitLinear nor Linear of -s, 0 and s")
    return model


def restore(model: M) -> M:
    """Let an optimised model be what it was; returns the model."""
    for module in optimized(model):
        _become(module, _plain(module))
        del module.bitgen_kernel, module.bitgen_packed
    return model


def optimized(model: nn.Module) -> Iterator[_Optimized]:
    """The layers that run on bitgen's kernels."""
    return (module for module in list(model.modules()) if isinstance(module, _Optimized))


def _base(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer has or had; None for one of another class, also a subclass of these."""
    kind = type(module)
    if isinstance(module, _Optimized):
        return _plain(module)
    return kind if kind in _OPTIMIZED else None


def _plain(module: _Optimized) -> type[nn.Module]:
    return next(base for base, ours in _OPTIMIZED.items() if ours is type(module))


def _equip(module: Any, base: type[nn.Module], kernel: Kernel, packed: torch.Tensor) -> None:
    _become(module, _OPTIMIZED[base])
    module.bitgen_kernel = kernel
    module.register_buffer("bitgen_packed", packed, persistent=False)
    if _loaded not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_loaded)


def _become(module: Any, kind: type[nn.Module]) -> None:
    """Change a layer's class, and the method that accelerate's hooks keep of it."""
    module.__class__ = kind
    if "_old_forward" in vars(module):
        module._old_forward = types.MethodType(kind.forward, module)


def _loaded(module: nn.Module, keys: Any) -> None:
    del keys
    if isinstance(module, _Optimized):
        _pack_again(module)


def _pack_again(module: _Optimized) -> None:
    """Pack a layer's weights as they are now; one that is no longer ternary becomes what it was."""
    base, kernel = _plain(module), module.bitgen_kernel
    try:
        matrix = _matrix(base.__name__, module, base)
    except FileError as error:
        warnings.warn(f"{error.message}: it runs as before", stacklevel=2)
        restore(module)
        return
    packed = _pack(table_of(kernel.library, kernel.threads), matrix)
    changed = Kernel(kernel.library, kernel.threads, kernel.activations, matrix.shape.m, _count(matrix))
    _equip(module, base, changed, packed)


# ---- Weights ----


def _matrix(name: str, module: Any, base: type[nn.Module]) -> TernaryMatrix:
    """The weights a layer multiplies with. FileError when they are not ternary."""
    weight = module.weight.detach()
    if weight.device.type != "cpu":
        raise UsageError(f"the weights are on {weight.device}: bitgen's kernels run on the CPU")
    if base is BitLinear:
        scale = (1.0 / module.weight_scale.detach().float()).numpy()
        return packed_matrix(name, module.out_features, weight.numpy(), scale)
    if base is AutoBitLinear and module.online_quant:
        wide = weight.float()
        inverse = 1.0 / wide.abs().mean().clamp(min=1e-5)  # as the layer computes it
        weight = ((wide * inverse).round().clamp(-1, 1) / inverse).to(weight.dtype)
    if weight.dtype not in _KINDS:
        raise FileError(f"{name} holds {weight.dtype}")
    matrix = ternary_matrix(name, _KINDS[weight.dtype], tuple(weight.shape), bytes_of(weight))
    if matrix.group and base is AutoBitLinear:  # looked at now: FileError
        raise FileError(f"{name} has a scale for each {matrix.group} weights, which a BitLinear has not")
    if base is AutoBitLinear and not module.online_quant:
        return matrix.scaled(module.weight_scale.detach().float().numpy())
    return matrix


def _count(matrix: TernaryMatrix) -> int:
    """How many scales lie behind the packed weights."""
    return 0 if matrix.group else matrix.scale.size


def _pack(table: KernelTable, matrix: TernaryMatrix) -> torch.Tensor:
    """Packed weights and the scales behind them, uint8; PyTorch's memory starts at a multiple of 64."""
    shape, group = matrix.shape, matrix.kernel_group
    scales = matrix.scales(0, shape.m, group) if group else matrix.scale.astype(np.float32)
    groups = Groups.of(scales, group) if group else None
    size = table.packed_bytes(shape, groups)
    whole = torch.empty(size + (0 if group else scales.nbytes), dtype=torch.uint8)
    memory = whole.numpy()
    for begin in range(0, shape.m, _ROWS):
        end = min(begin + _ROWS, shape.m)
        rows = np.ascontiguousarray(matrix.rows(begin, end))
        part = np.ascontiguousarray(scales[begin:end]) if group else None
        table.pack_rows(rows, begin, shape, memory[:size], groups, part)
    if not group:
        memory[size:] = scales.view(np.uint8)
    return whole
