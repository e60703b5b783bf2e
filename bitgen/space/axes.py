"""The values that each knob of an algorithm may take."""

from __future__ import annotations

from collections.abc import Mapping

from bitgen.cpu import Isa
from bitgen.space.headroom import chunk_pairs
from bitgen.spec import LARGE, N1, SMALL, Regime

Axes = Mapping[str, tuple[int, ...]]

# Values that were measured to matter; what lies between them was never outside the noise. kc is a multiple of
# 48 and 16, so every family's chunks divide it. The scalar level is a fallback and an oracle: it needs one
# point of each kind, not a search.


def axes_of(family: str, isa: Isa, regime: Regime) -> dict[str, Axes]:
    axes: dict[str, Axes] = {}
    if family == "tl5" and regime is not LARGE:
        wide, split = isa.lut_bytes >= 128, isa.lut_bytes < 128 or isa.name == "scalar"
        axes |= {name: _five_axes(isa, regime) for name, has in (("wide", wide), ("split", split)) if has}
    elif family in ("tl1", "tl2"):
        axes["direct"] = _lookup_axes(family, isa, regime)
    elif regime is not LARGE:
        axes["direct"] = _multiply_axes(family, isa, regime)
    if regime is not N1:
        axes["panel"] = _panel_axes(isa, regime)
    if regime is not N1 and isa.tiles:
        axes["tiles"] = _tile_axes(isa, regime)
    if regime is not N1 and isa.mmla:
        axes["mmla"] = _mmla_axes(isa, regime)
    return axes


def _multiply_axes(family: str, isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4, 8) if wide else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4, 8, 16) if wide else (2,),
        "accs": (1, 2, 4 if isa.code_max >= 128 else 3) if regime is N1 or not wide else (1, 2),
        "widen": _pair_widths(isa, (8, chunk_pairs(family))),
        "unroll": (1, 2) if regime is N1 else (1,),
        "prefetch": ((0, 4096, 6144) if regime is N1 else (0, 2048)) if wide else (0,),
        **({"hint": (0, 1) if wide else (0,)} if regime is N1 else {}),
    }


def _lookup_axes(family: str, isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4) if wide else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4, 8) if wide else (2,),
        "mc": (0, 128) if wide else (0, 64),
        "kc": (0, 960, 1920) if wide else (0, 960),
        "widen": {"tl1": (63,), "tl2": (21,)}[family],
        "unroll": (1, 2) if regime is N1 and wide else (1,),
        "prefetch": (0, 4096) if regime is N1 and wide else (0,),
    }


def _five_axes(isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4, 8) if wide and regime is N1 else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4) if wide else (2,),
        "widen": (12,),
        "prefetch": (0, 2048, 6144) if regime is N1 and wide else (0,),
        **({"hint": (0, 2) if wide else (0,)} if regime is N1 else {}),
    }


def _panel_axes(isa: Isa, regime: Regime) -> Axes:
    wide, large = isa.name != "scalar", regime is LARGE
    tokens = (4, 6, 8, 12) if large else (4, 8)
    if isa.sums_bytes > 64:  # NEON: eight registers for 16 rows of a token
        tokens = (2, 3)
    return {
        "mr": ((32, 64) if isa.vector_bytes == 64 else (16, 32)),
        "nr": tokens if wide else (2, 4),
        "mc": (64, 256) if large and wide else (64,),
        "kc": (0, 960),
        "widen": _pair_widths(isa, (64,)),
        "unroll": (1, 2) if large and wide else (1,),
    }


def _tile_axes(isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    if regime is SMALL:
        return {
            "streams": (1, 2, 4) if wide else (1, 2),
            "ahead": (0, 1),
            "prefetch": (0, 4096) if wide else (0,),
        }
    return {
        "mr": (32, 64) if wide else (32,),
        "nr": (16, 32),
        "mc": (64, 256, 512) if wide else (64,),
        "kc": (0, 960, 1920) if wide else (0, 960),
        "pack": (0, 1),
    }


def _mmla_axes(isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "nr": (4,) if not wide else (4, 6) if isa.vector_bytes == 16 else (6, 8, 12),
        "mc": (64, 256) if regime is LARGE and wide else (64,),
        "kc": (0, 960),
    }


def _pair_widths(isa: Isa, widths: tuple[int, ...]) -> tuple[int, ...]:
    """A dot instruction widens by itself; without one int16 sums are three instructions cheaper a step."""
    if isa.name == "scalar":
        return (0, *widths)
    return (0,) if isa.native_dot4 else widths
