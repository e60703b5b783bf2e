"""What a kernel adds into an int16 or an int32 lane at most, and what fits there."""

from __future__ import annotations

from dataclasses import dataclass

from bitgen.spec import FAMILIES, K_MAX, KernelSpec

INT16_MIN, INT16_MAX = -32768, 32767
# The least and the largest value that one addition puts into an int16 lane, with activations in -128..127.
PAIR_RANGE = (-2 * 2 * 128, 2 * 2 * 127)  # I2_S and panels: codes 0..2, two products a lane
ENTRY_RANGE = {"tl1": (-2 * 128, 2 * 128), "tl2": (-3 * 128, 3 * 128), "tl5": (-5 * 128, 5 * 128)}


@dataclass(frozen=True)
class Int16Sums:
    """Additions into one int16 lane between two widenings, each of a value in [low, high]."""

    additions: int
    low: int
    high: int

    @property
    def exact(self) -> bool:
        """Whether no sum can leave int16."""
        return self.additions * self.low >= INT16_MIN and self.additions * self.high <= INT16_MAX

    def __str__(self) -> str:
        low, high = self.additions * self.low, self.additions * self.high
        return f"{self.additions} additions of {self.low} .. {self.high} give {low} .. {high}"


def int16_sums(spec: KernelSpec) -> Int16Sums | None:
    """The int16 partial sums of a kernel; None when every product goes to int32 at once."""
    s = dict(spec.schedule)
    if not s.get("widen"):
        return None  # tiles have no such knob
    if spec.schedule.algorithm == "panel":
        return Int16Sums(s["widen"], *PAIR_RANGE)
    if not FAMILIES[spec.family].looks_up:
        scale = field_scale(s["accs"])
        adds = s["widen"] * last_fields(spec.family, s["accs"])
        return Int16Sums(adds, scale * PAIR_RANGE[0], scale * PAIR_RANGE[1])
    family = FAMILIES[spec.family]
    lookups = family.k_chunk // family.g * family.rows // 64  # an int16 lane and chunk
    low, high = ENTRY_RANGE[spec.family]
    if spec.schedule.algorithm == "split":  # the lookups of a chunk are added as bytes first
        return Int16Sums(s["widen"], lookups * low, lookups * high)
    return Int16Sums(s["widen"] * lookups, low, high)


def field_scale(accs: int) -> int:
    """The largest scale of codes in place that ``accs`` accumulators add: field f stays at 4^(f mod accs)."""
    return int(4 ** (accs - 1))


def last_fields(family: str, accs: int) -> int:
    """How many fields of a chunk go to the last accumulator, which has the largest scale."""
    fields = FAMILIES[family].k_chunk // 4
    # Of three the fourth field and T5's fifth are shifted to the first.
    return 1 if accs == 3 else 4 // accs + fields - 4


def headroom_lines(spec: KernelSpec) -> list[str]:
    """The bounds of a kernel's accumulators as arithmetic."""
    sums = int16_sums(spec)
    lines = [f"int16: {sums}, within {INT16_MIN} .. {INT16_MAX}"] if sums else []
    s, family = dict(spec.schedule), FAMILIES[spec.family]
    multiplies = spec.schedule.unpacks or not family.looks_up
    accs, fields = s.get("accs", 1), family.k_chunk // 4
    per = 2 * 128 * field_scale(accs) if multiplies else 128
    # of a chunk's fields, those of the last accumulator
    mine = f"{last_fields(spec.family, accs)}/{fields}" if accs > 1 else "1"
    lines.append(f"int32: {mine} of k x {per} is below 2^31 for k <= {K_MAX}")
    return lines


def chunk_pairs(family: str) -> int:
    """Chunks that one int16 accumulator takes: 64 additions of 512 fit, 4 a chunk or T5's 5."""
    return 16 if family == "i2s" else 12
