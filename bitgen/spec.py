"""Name one kernel completely: family, shape, regime, layout, schedule, and the spec that holds them.

Everything here is a frozen record that validates itself; nothing here knows C, templates or a CPU.
Sizes: ``m`` output rows, ``k`` reduction, ``n`` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd

from bitgen.errors import UsageError, unknown
from bitgen.records import load

# Kernels read whole chunks of activations: a row has room for the longest chunk (48) to begin at its last
# element.
X_PAD = 47
# Rows begin on cache lines.
X_ALIGN = 64

# Bound of the scaled in-place accumulators: field 64 * code 2 * |x| 128 = 16384 a weight. One accumulator of
# I2_S sees a quarter of k, one of T5 two fifths: 2^31 / (16384 * 2 / 5) = 327680. The plain sum alone would
# allow 2^24.
K_MAX = 1 << 18


def ceil_to(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is >= ``value``."""
    return -(-value // multiple) * multiple


def x_stride(k: int) -> int:
    """Bytes between two rows of int8 activations of length ``k``: ``k + X_PAD`` rounded up to ``X_ALIGN``.

    One ``X_ALIGN`` more where that is a multiple of 2048: rows 4 KiB apart would compete for one L1 set.
    """
    stride = ceil_to(k + X_PAD, X_ALIGN)
    return stride + X_ALIGN if stride % 2048 == 0 else stride


@dataclass(frozen=True, order=True)
class Shape:
    """A weight matrix: ``m`` output rows by ``k`` inputs."""

    m: int
    k: int

    def __post_init__(self) -> None:
        if self.m < 1 or self.k < 1:
            raise UsageError(f"shape {self.m}x{self.k}: m and k must be at least 1")
        if self.k > K_MAX:
            raise UsageError(f"shape {self.m}x{self.k}: k must be at most {K_MAX} (int32 accumulators)")
        if self.m > 1 << 31:
            raise UsageError(f"shape {self.m}x{self.k}: m must be at most 2^31")

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"3200x8640"`` (m x k)."""
        m, sep, k = text.lower().partition("x")
        if not sep or not m.strip().isdecimal() or not k.strip().isdecimal():
            raise UsageError(f"shape {text!r}: write it as MxK, for example 3200x8640")
        return cls(int(m), int(k))

    def to_plain(self) -> str:
        return self.name

    @classmethod
    def from_plain(cls, data: object) -> Shape:
        """Read "MxK", or the [m, k] of older records."""
        return cls.parse(data) if isinstance(data, str) else cls(*load(tuple[int, int], data, "it"))


@dataclass(frozen=True)
class Regime:
    """A range of n that has kernels of its own."""

    name: str
    n_min: int
    n_max: int | None


N1 = Regime("n1", 1, 1)
SMALL = Regime("small", 2, 16)
LARGE = Regime("large", 17, None)
REGIMES = (N1, SMALL, LARGE)


def regime_of(n: int) -> Regime:
    """The regime that ``n`` tokens fall into."""
    if n < 1:
        raise UsageError(f"n must be at least 1, not {n}")
    return next(r for r in reversed(REGIMES) if n >= r.n_min)


def regime_named(name: str) -> Regime:
    for regime in REGIMES:
        if regime.name == name:
            return regime
    raise unknown("regime", name, (regime.name for regime in REGIMES))


@dataclass(frozen=True)
class Family:
    """A way to store ternary weights and to multiply with them.

    ``g`` weights share one code; a chunk of 16 rows x ``k_chunk`` weights takes ``chunk_bytes``; a row block
    has a multiple of ``rows`` rows and ends with ``trailer_bytes`` for each 16. ``tables`` gives the
    algorithms that look sums up, and the bytes of the tables that each reads for one token and one chunk
    (none: the kernels multiply).
    """

    name: str
    title: str
    g: int
    k_chunk: int
    chunk_bytes: int
    trailer_bytes: int
    tables: tuple[tuple[str, int], ...] = ()
    rows: int = 16

    @property
    def looks_up(self) -> bool:
        """Whether its own algorithms look sums up in tables; they multiply codes otherwise."""
        return bool(self.tables)

    def table_bytes(self, algorithm: str) -> int:
        """Bytes of the lookup tables of one token and one chunk; 0 for an algorithm that reads none."""
        return dict(self.tables).get(algorithm, 0)

    def builder(self, algorithm: str) -> str | None:
        """What builds the tables of an algorithm: the template kernels/NAME.c.j2; None when it reads none."""
        if not self.table_bytes(algorithm):
            return None
        kind = f"_{algorithm}" if len(self.tables) > 1 else ""
        return f"{self.name}{kind}_tables"

    @property
    def tile_chunks(self) -> int:
        """The fewest chunks that fill whole tiles of 64 k: 4, or T5's 16 (five tiles)."""
        return 64 // gcd(64, self.k_chunk)

    @property
    def bits_a_weight(self) -> float:
        """Storage without padding, in bits a weight."""
        return 8 * self.chunk_bytes / (16 * self.k_chunk)


I2S = Family("i2s", "I2_S", g=1, k_chunk=16, chunk_bytes=64, trailer_bytes=0)
TL1 = Family("tl1", "TL1", g=2, k_chunk=16, chunk_bytes=64, trailer_bytes=0, tables=(("direct", 256),))
TL2 = Family("tl2", "TL2", g=3, k_chunk=48, chunk_bytes=160, trailer_bytes=64, tables=(("direct", 512),))
T5 = Family("t5", "T5", g=5, k_chunk=20, chunk_bytes=64, trailer_bytes=0)
TL5 = Family(
    *("tl5", "TL5"),
    g=5,
    k_chunk=20,
    chunk_bytes=64,
    trailer_bytes=64,
    tables=(("wide", 1024), ("split", 256)),
    rows=64,
)
FAMILIES: Mapping[str, Family] = {f.name: f for f in (I2S, TL1, TL2, T5, TL5)}


def family_named(name: str) -> Family:
    key = name.lower().replace("_", "")
    if key not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return FAMILIES[key]


@dataclass(frozen=True)
class Layout:
    """How the weights of one matrix lie in memory. It is chosen before any schedule and serves every regime.

    The matrix is padded with zero weights to whole row blocks of ``row_block`` rows and whole chunks of
    ``family.k_chunk`` columns. A row block is contiguous: its chunks in order of k, each made of
    ``row_block / 16`` sub-blocks of 16 rows, then the trailers of its sub-blocks.
    """

    family: str
    row_block: int

    def __post_init__(self) -> None:
        rows = family_named(self.family).rows
        if self.row_block < rows or self.row_block % rows:
            message = f"row_block {self.row_block}: it must be a positive multiple of {rows}"
            raise UsageError(message)

    @property
    def name(self) -> str:
        return f"{self.family}_r{self.row_block}"

    @property
    def sub_blocks(self) -> int:
        return self.row_block // 16

    def chunks(self, k: int) -> int:
        """Chunks along k: ceil(k / k_chunk)."""
        return -(-k // FAMILIES[self.family].k_chunk)

    def block_bytes(self, k: int) -> int:
        """Bytes of one row block, a multiple of 32."""
        f = FAMILIES[self.family]
        return self.sub_blocks * (self.chunks(k) * f.chunk_bytes + f.trailer_bytes)

    def packed_bytes(self, shape: Shape) -> int:
        """Bytes of the whole packed matrix."""
        return -(-shape.m // self.row_block) * self.block_bytes(shape.k)


# Knobs of recorded schedules that have another name today: old -> new. Records, committed winners, manifests
# and the logs of benchmarks all hold schedules, and all are read by `Schedule.from_plain`.
RENAMED_KNOBS: dict[str, str] = {}


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
        return dict(self.knobs).get(knob, default)

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
        return self.algorithm in ("panel", "tiles", "mmla")

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
        layout = f"r{self.layout.row_block}"
        return f"bitgen_{self.family}{shape}_{self.regime}_{layout}_{self.schedule.name}__{self.isa}"

    @property
    def prototype(self) -> str:
        return f"void {self.name}(const struct bitgen_matmul *a)"

    @property
    def table_bytes(self) -> int:
        """Bytes of the lookup tables of one token and one chunk; 0 for a kernel that reads none."""
        return FAMILIES[self.family].table_bytes(self.schedule.algorithm)

    @property
    def tables_prototype(self) -> str | None:
        """The function that builds its lookup tables; None for a kernel that reads none."""
        builder = FAMILIES[self.family].builder(self.schedule.algorithm)
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
