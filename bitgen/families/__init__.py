"""The weight families: each file here that holds a ``FAMILY`` is one, and nothing else lists them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from bitgen.errors import unknown
from bitgen.families.base import Family as Family


def _found() -> Iterator[Family]:
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            yield family


# From the most bits a weight to the fewest.
FAMILIES: Mapping[str, Family] = {
    family.name: family for family in sorted(_found(), key=lambda one: (-one.bits_a_weight, one.name))
}


def family_named(name: str) -> Family:
    """The family called ``name`` ("TL2" and "i2_s" find tl2 and i2s); UsageError when there is none."""
    key = name.lower().replace("_", "")
    if key not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return FAMILIES[key]
