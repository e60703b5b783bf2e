"""Models of transformers on bitgen's kernels, in place.

::

    import bitgen.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("microsoft/bitnet-b1.58-2B-4T")
    bitgen.hf.optimize(model)          # its ternary layers multiply on bitgen's kernels from here on
    model.generate(...)                # as before; also compiled, copied, forked, saved

    bitgen.hf.install()                # or: each BitNet checkpoint that is loaded later

``python -m bitgen.hf serve ...`` is transformers' command line after `install`. Needs the extra hf.
"""

from __future__ import annotations

from bitgen.errors import BitgenError

try:
    from bitgen.hf.checkpoints import install, uninstall
    from bitgen.hf.layers import optimize, restore
except ModuleNotFoundError as error:
    if error.name not in ("torch", "transformers"):
        raise
    raise BitgenError(f"{error.name} is not installed: pip install 'bitgen[hf]'") from None

__all__ = ["install", "optimize", "restore", "uninstall"]
