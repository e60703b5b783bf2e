"""Name one kernel completely: family, shape, regime, layout, schedule, and the spec that holds them.

Everything here is a frozen record that validates itself; nothing here knows templates or a CPU. What the
records are made of, sizes and families, is at hand here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bitgen.errors import UsageError
from bitgen.families import EVERY_FAMILY as EVERY_FAMILY
from bitgen.families import FAMILIES as FAMILIES
from bitgen.families import Family as Family
from bitgen.families import family_named as family_named
from bitgen.families.base import TERNARY, UNPACKING
from bitgen.records import load
from bitgen.shapes import K_MAX as K_MAX
from bitgen.shapes import LARGE as LARGE
from bitgen.shapes import N1 as N1
from bitgen.shapes import REGIMES as REGIMES
from bitgen.shapes import SMALL as SMALL
from bitgen.shapes import X_ALIGN as X_ALIGN
from bitgen.shapes import X_PAD as X_PAD
from bitgen.shapes import Regime as Regime
from bitgen.shapes import Shape as Shape
from bitgen.shapes import ceil_to as ceil_to
from bitgen.shapes import regime_named as regime_named
from bitgen.shapes import regime_of as regime_of
from bitgen.shapes import x_stride as x_stride


@dataclass(frozen=True)
class WeightKind:
    """What decides, besides a shape, which layouts a matrix can have.

    ``weights``: see `Family.weights`; ``group``: weights along k that share a scale, 0: scales lie outside.
    """

    weights: str = TERNARY
    group: int = 0


TERNARY_ROWS = WeightKind()


@dataclass(frozen=True)
class Layout:
    """How the weights of one matrix lie in memory. It is chosen before any schedule and serves every regime.

    The matrix is padded with zero weights to whole row blocks of ``row_block`` rows and whole chunks of
    ``family.k_chunk`` columns. A row block is contiguous: its chunks in order of k, each made of
    ``row_block / 16`` sub-blocks of 16 rows, then the trailers of its sub-blocks.

    ``group``: of each row so many weights along k share a scale, and the matrix is padded to whole groups;
    behind the chunks of a group lie the scales of its sub-blocks, 16 half floats or floats each (of each
    sub-block 16 scales and then 16 offsets, where the family has them), and there are no trailers. 0: scales
    lie outside, one for the tensor or for each row. Of a family with tables a row block begins with them
    (`Family.head_bytes`).
    """

    family: str
    row_block: int
    group: int = 0

    def __post_init__(self) -> None:
        family = family_named(self.family)
        if self.row_block < family.rows or self.row_block % family.rows:
            message = f"row_block {self.row_block}: it must be a positive multiple of {family.rows}"
            raise UsageError(message)
        if self.group or not family.in_rows:
            family.require_group(self.group)

    @property
    def name(self) -> str:
        return f"{self.family}_r{self.row_block}" + (f"_g{self.group}" if self.group else "")

    @property
    def kind(self) -> WeightKind:
        """The matrices that can lie so."""
        return WeightKind(EVERY_FAMILY[self.family].weights, self.group)

    @property
    def sub_blocks(self) -> int:
        return self.row_block // 16

    def chunks(self, k: int) -> int:
        """Chunks along k: ceil(k / k_chunk); with groups those of whole groups."""
        k_chunk = EVERY_FAMILY[self.family].k_chunk
        return self.groups(k) * (self.group // k_chunk) if self.group else -(-k // k_chunk)

    def groups(self, k: int) -> int:
        """Groups along k: ceil(k / group); 0 without."""
        return -(-k // self.group) if self.group else 0

    def columns(self, k: int) -> int:
        """Activations that a kernel reads, zeros behind k: whole groups; without groups k."""
        return self.groups(k) * self.group if self.group else k

    def block_bytes(self, k: int, scale_bytes: int = 2) -> int:
        """Bytes of one row block, a multiple of 32; ``scale_bytes``: of a scale of a group."""
        f = EVERY_FAMILY[self.family]
        if self.group:
            of_16_rows = f.group_bytes(self.group) + 16 * f.scales * scale_bytes
            return self.head_bytes(k) + self.sub_blocks * self.groups(k) * of_16_rows
        return self.sub_blocks * (self.chunks(k) * f.chunk_bytes + f.trailer_bytes)

    def head_bytes(self, k: int) -> int:
        """Bytes in front of the groups of a row block."""
        return EVERY_FAMILY[self.family].head_bytes(self.sub_blocks * self.groups(k))

    def packed_bytes(self, shape: Shape, scale_bytes: int = 2) -> int:
        """Bytes of the whole packed matrix."""
        return -(-shape.m // self.row_block) * self.block_bytes(shape.k, scale_bytes)

    @property
    def bits_a_weight(self) -> float:
        """Storage without padding, scales in half floats, in bits a weight."""
        f = EVERY_FAMILY[self.family]
        of_scales = 32 * f.scales
        return (
            8 * (f.group_bytes(self.group) + of_scales) / (16 * self.group) if self.group else f.bits_a_weight
        )


# Knobs of recorded schedules that have another name today: old -> new. Records, committed winners, manifests
# and the logs of benchmarks all hold schedules, and all are read by `Schedule.from_plain`.
RENAMED_KNOBS: dict[str, str] = {
    "accs": "accumulators",
    "hint": "prefetch_hint",
    "widen": "widen_every",
}


@dataclass(frozen=True)
class Schedule:
    """How a kernel walks: an algorithm and the values of its knobs, in the order the space declares them."""

    algorithm: str
    knobs: tuple[tuple[str, int], ...]

    def __getitem__(self, knob: str) -> int:
        for name, value in self.knobs:
            if name == knob:
                return value
        raise KeyError(knob)

    def get(self, knob: str, default: int) -> int:
        """The value of a knob that not every schedule has."""
        return next((value for name, value in self.knobs if name == knob), default)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.knobs)

    def with_knobs(self, **values: int) -> Schedule:
        """The same schedule with some knobs set to other values."""
        unknown = set(values) - {name for name, _ in self.knobs}
        if unknown:
            known = ", ".join(name for name, _ in self.knobs)
            raise UsageError(f"{self.algorithm} has no knob {', '.join(sorted(unknown))}; it has {known}")
        return replace(self, knobs=tuple((name, values.get(name, value)) for name, value in self.knobs))

    @property
    def unpacks(self) -> bool:
        """Whether weights become bytes first, whatever the family: nothing is looked up in tables."""
        return self.algorithm in UNPACKING

    @property
    def name(self) -> str:
        return "_".join((self.algorithm, *(f"{name}{value}" for name, value in self.knobs)))

    def to_plain(self) -> dict[str, str | int]:
        return {"algorithm": self.algorithm, **dict(self.knobs)}

    @classmethod
    def from_plain(cls, data: object) -> Schedule:
        """Read {"algorithm": ..., knob: value, ...}, also with knobs that were renamed since."""
        entries = load(dict[str, str | int], data, "it")
        algorithm = load(str, entries.pop("algorithm", None), "algorithm")
        knobs = load(dict[str, int], entries, algorithm)
        return cls(algorithm, tuple((RENAMED_KNOBS.get(knob, knob), value) for knob, value in knobs.items()))


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. ``shape`` is None for a kernel that takes m and k as arguments, which is the usual case."""

    family: str
    isa: str
    regime: str
    layout: Layout
    schedule: Schedule
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.layout.family != self.family:
            raise UsageError(f"layout {self.layout.name} is not a layout of {self.family}")
        regime_named(self.regime)

    @property
    def name(self) -> str:
        """A C identifier that tells everything; it is printed, never parsed."""
        shape = f"_{self.shape.name}" if self.shape else ""
        layout = self.layout.name.removeprefix(f"{self.family}_")
        return f"bitgen_{self.family}{shape}_{self.regime}_{layout}_{self.schedule.name}__{self.isa}"

    @property
    def knobs(self) -> dict[str, int]:
        """The value of every knob, also of those that the schedule leaves out (`Algorithm.off`)."""
        return {**EVERY_FAMILY[self.family].algorithm(self.schedule.algorithm).off, **dict(self.schedule)}

    @property
    def prototype(self) -> str:
        return f"void {self.name}(const struct bitgen_matmul *a)"

    @property
    def table_bytes(self) -> int:
        """Bytes of the lookup tables of one token and one chunk; 0 for a kernel that reads none."""
        return EVERY_FAMILY[self.family].table_bytes(self.schedule.algorithm)

    @property
    def tables_prototype(self) -> str | None:
        """The function that builds its lookup tables; None for a kernel that reads none."""
        builder = EVERY_FAMILY[self.family].builder(self.schedule.algorithm)
        return TABLES_PROTOTYPE.format(builder=builder, isa=self.isa) if builder else None

    @property
    def scratch_prototype(self) -> str:
        return f"int64_t {self.name}_scratch(int64_t m, int64_t k, int64_t n)"


@dataclass(frozen=True)
class StepSizes:
    """The sizes of a model that the loops of its forward step run over, in elements; all other are counts.

    ``hidden`` the residual stream, ``q_rows`` = heads * head_dim the queries, ``ffn`` the inner layer.
    """

    hidden: int
    q_rows: int
    ffn: int
    head_dim: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise UsageError(f"{name} must be at least 1, not {size}")

    @property
    def name(self) -> str:
        return "_".join(f"{name}{size}" for name, size in vars(self).items())


QUANTIZE_PROTOTYPE = (
    "int32_t bitgen_quantize__{isa}(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, "
    "int32_t *x_sum)"
)
TABLES_PROTOTYPE = "void bitgen_{builder}__{isa}(const int8_t *xq, int64_t k, uint8_t *tables)"
