"""The public Python API: what is listed here goes on working, with the same arguments.

Additions are free: a new name, a new argument with a default. A line leaves this list only together with an
entry in the changelog.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import bitgen
from bitgen.runtime import KernelTable, Linear

# Arguments and their defaults; None: an attribute.
API: dict[str, str | None] = {
    "bitgen.BitgenError": "message",
    "bitgen.Cpu": None,
    "bitgen.Isa": None,
    "bitgen.LLM": "model, *, library=None, threads=None, context=None, kv='f16', head='auto', batch=1, "
    "progress=None",
    "bitgen.ModelPreset": "name, hidden, ffn, layers, heads, kv_heads, head_dim, vocab, rope_theta, "
    "activation, sub_norms, tied_head, norm_eps, architecture, aliases=()",
    "bitgen.build": "model, *, isa=None, cc=None, out=None, logs=None, name=None, target=None, system=None",
    "bitgen.detect_cpu": "root='/', system=None",
    "bitgen.find_model": "name_or_path, models=None",
    "bitgen.load": "path=None, threads=None",
    "bitgen.load_isas": "file=None",
    "bitgen.load_models": "folder=None",
    "bitgen.resolve_isas": "cpu, isas",
    "bitgen.tune": "model, *, isas=(), families=(), regimes=(), threads=(), objective=None, seed=0, "
    "trials=None, timeout_s=None, quick=False, fresh=False, dry_run=False, cc=None, logs=None, progress=None",
    "LLM.answer": "self, prompt, **options",
    "LLM.chat": "self, messages, **options",
    "LLM.chat_prompt": "self, messages",
    "LLM.close": "self",
    "LLM.context": None,
    "LLM.context_hint": None,
    "LLM.generate": "self, prompt, **options",
    "LLM.head_bytes": None,
    "LLM.logit_parts": "self, ids, first=0",
    "LLM.logits": "self, ids, first=0",
    "LLM.memory": None,
    "LLM.over": "engine, config, tokenizer",
    "LLM.request": "self, prompt, *, max_tokens=128, stop=(), lookup=False, ignore_end=False, **sampling",
    "LLM.template_text": None,
    "LLM.timings": None,
    "Generation.finish": None,
    "Generation.seed": None,
    "Generation.text": None,
    "Generation.tokens": None,
    "KernelTable.close": "self",
    "KernelTable.kernels": None,
    "KernelTable.layout_name": "self, shape",
    "KernelTable.linear": "self, w, scale",
    "KernelTable.packed_bytes": "self, shape",
    "KernelTable.threads": None,
    "KernelTable.version": None,
    "Linear.__call__": "self, x",
    "Linear.accumulate": "self, xq",
    "Linear.kernel": "self, n",
    "ModelPreset.alias": None,
    "ModelPreset.aliases": None,
    "ModelPreset.matmuls": None,
    "ModelPreset.ternary_weights": None,
}
OWNERS: dict[str, Any] = {
    "bitgen": bitgen,
    "LLM": bitgen.LLM,
    "Generation": inspect.get_annotations(bitgen.LLM.chat)["return"],
    "KernelTable": KernelTable,
    "Linear": Linear,
    "ModelPreset": bitgen.ModelPreset,
}


STARS: dict[Any, str] = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}


def arguments(call: Any) -> list[str]:
    """The parameters of a callable as they are listed above."""
    found: list[str] = []
    for parameter in inspect.signature(call).parameters.values():
        stars = STARS.get(parameter.kind, "")
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        found.append(f"{stars}{parameter.name}{default}")
    return found


def resolve(name: str) -> Any:
    owner, _, member = name.partition(".")
    found = OWNERS[owner]
    if isinstance(found, str):  # an annotation
        module = inspect.getmodule(bitgen.LLM.chat)
        found = getattr(module, found)
    return getattr(found, member)


@pytest.mark.parametrize("name", API)
def test_it_takes_what_it_took(name: str) -> None:
    value, listed = resolve(name), API[name]
    if listed is None:
        return
    found, known = arguments(value), listed.split(", ")
    split = known.index("*") if "*" in known else len([k for k in known if not k.startswith("**")])
    assert found[:split] == known[:split], "arguments without a name keep their places"
    assert set(known) <= set(found), "arguments with a name stay"
    added = [argument for argument in found if argument not in known and not argument.startswith("*")]
    assert all("=" in argument for argument in added), "what is new has a default"


def test_the_package_names_what_it_has() -> None:
    listed = {name.partition(".")[2] for name in API if name.startswith("bitgen.")}
    assert listed <= set(dir(bitgen))


def test_a_missing_argument_is_seen() -> None:
    def shorter(model: str, *, isas: tuple[str, ...] = ()) -> None:
        del model, isas

    known = (API["bitgen.tune"] or "").split(", ")
    assert not set(known) <= set(arguments(shorter))
