"""The weight families: each file here that holds a ``FAMILY`` (or several, ``FAMILIES``) is found by that."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from bitgen.errors import unknown
from bitgen.families.base import TERNARY
from bitgen.families.base import Family as Family


def _found() -> Iterator[Family]:
    for module in pkgutil.iter_modules(__path__):
        file = importlib.import_module(f"{__name__}.{module.name}")
        family = getattr(file, "FAMILY", None)
        yield from getattr(file, "FAMILIES", ()) if family is None else (family,)


# From the most bits a weight to the fewest.
EVERY_FAMILY: dict[str, Family] = {
    family.name: family for family in sorted(_found(), key=lambda one: (-one.bits_a_weight, one.name))
}
# Those that a ternary matrix may be packed for: a tune decides. A matrix of 4-bit codes has one family.
FAMILIES: dict[str, Family] = {name: one for name, one in EVERY_FAMILY.items() if one.is_ternary}


def family_named(name: str) -> Family:
    """The family called ``name`` ("TL2" and "i2_s" find tl2 and i2s); UsageError when there is none."""
    key = name.lower().replace("_", "")
    if key not in EVERY_FAMILY:
        raise unknown("family", name, EVERY_FAMILY)
    return EVERY_FAMILY[key]


def families_of(weights: str) -> tuple[str, ...]:
    """The names of the families that hold such ``weights`` (`Family.weights`). UsageError: none does."""
    found = tuple(name for name, family in EVERY_FAMILY.items() if family.weights == weights)
    if not found:
        kinds = dict.fromkeys(family.weights for family in EVERY_FAMILY.values())
        raise unknown("kind of weights", weights, kinds)
    return found


def first_family(weights: str) -> str:
    """The family for such weights that serves what nobody tuned: of ternary ones I2_S."""
    return "i2s" if weights == TERNARY else families_of(weights)[0]
