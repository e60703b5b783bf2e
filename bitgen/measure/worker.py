"""What a measuring process does: open kernels, prove them exact, time them; at any point it may die or hang.

`Workbench` lives in the server and holds what is expensive and the same for many kernels (weight pools, test
cases, expected outputs); `Workbench.work` runs in a child forked from it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError
from bitgen.measure.cases import Checks, Mismatch, cases_of, longest_cases, shape_cases
from bitgen.measure.guarded import Guarded, Pool, Pools
from bitgen.measure.harness import Functions, Harness
from bitgen.measure.stats import DropRule
from bitgen.packing import pack
from bitgen.reference import quantize_activations, scale_output, ternary_matmul
from bitgen.spec import Layout, Shape, ceil_to, regime_of

# Row blocks of random weights that a pool repeats: enough that no cache line of weights comes twice in a row.
_UNIT_BLOCKS = 4
_KEPT_OUTPUTS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """How a matmul is timed: in rounds, at least ``min_ns`` a lane, unless ``budget_ns`` is spent before.

    ``order`` has for each round the lanes in the order they run. With a ``rule`` the first lanes are
    candidates, and ``against`` has the lane that each is compared with, if any: a candidate leaves when it
    lost to that one, and the lanes behind the candidates when nobody is compared with them any more.
    With a ``last_shape`` the last lane multiplies one token by that, whatever the others do.
    """

    shape: Shape
    n: int
    threads: int
    cold: bool
    min_ns: float
    budget_ns: float
    order: tuple[tuple[int, ...], ...]
    against: tuple[int | None, ...] = ()
    rule: DropRule | None = None
    last_shape: Shape | None = None

    def of_lane(self, lane: int, lanes: int) -> tuple[Shape, int]:
        """The shape and the tokens of one lane of ``lanes``."""
        own = self.last_shape if lane == lanes - 1 else None
        return (own, 1) if own else (self.shape, self.n)

    def to_dict(self) -> dict[str, Any]:
        last = self.last_shape
        shapes = {"shape": [self.shape.m, self.shape.k], "last_shape": [last.m, last.k] if last else None}
        return {**asdict(self), **shapes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        order = tuple(tuple(int(lane) for lane in lanes) for lanes in data["order"])
        rule = DropRule.from_dict(data["rule"]) if data["rule"] else None
        made = {
            "shape": Shape(*data["shape"]),
            "order": order,
            "against": tuple(data["against"]),
            "rule": rule,
            "last_shape": Shape(*data["last_shape"]) if data["last_shape"] else None,
        }
        return cls(**{**data, **made})

    def staying(self, running: Sequence[int], times: Sequence[Sequence[float]]) -> list[int]:
        """The lanes that go on after a round."""
        if self.rule is None:
            return list(running)
        candidates = [(lane, self.against[lane]) for lane in running if lane < len(self.against)]
        good = [
            (lane, rival)
            for lane, rival in candidates
            if rival is None or not self.rule.lost(times[lane], times[rival])
        ]
        wanted = {lane for pair in good for lane in pair}
        return [lane for lane in running if lane in wanted]


@dataclass(frozen=True)
class Task:
    """One piece of work for a measuring process.

    ``checks``: for each kernel the name of the cases it must pass first ("quick", "deep"), or None when it
    was proven before. ``timing`` None: only check. ``probes`` are lanes whose output means nothing.
    ``fixed_shape``: the only shape of the (first) kernel.
    """

    kernels: tuple[Functions, ...]
    checks: tuple[str | None, ...]
    probes: frozenset[int] = frozenset()
    timing: Timing | None = None
    fixed_shape: Shape | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kernels": [kernel.to_dict() for kernel in self.kernels],
            "checks": list(self.checks),
            "probes": sorted(self.probes),
            "timing": self.timing.to_dict() if self.timing else None,
            "fixed_shape": [self.fixed_shape.m, self.fixed_shape.k] if self.fixed_shape else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        fixed = data["fixed_shape"]
        return cls(
            kernels=tuple(Functions.from_dict(kernel) for kernel in data["kernels"]),
            checks=tuple(data["checks"]),
            probes=frozenset(data["probes"]),
            timing=Timing.from_dict(data["timing"]) if data["timing"] else None,
            fixed_shape=Shape(*fixed) if fixed else None,
        )


# The phases of struct harness_progress.
OPENING, CHECKING, TIMING, DONE = range(4)


class Workbench:
    """What measuring processes share: prepared by the server before it forks, read by its children."""

    def __init__(
        self, harness: Harness, cold_bytes: int, pool_budget_bytes: int, huge_pages: bool = True
    ) -> None:
        self.harness = harness
        self._cold_bytes = cold_bytes
        self._pools = Pools(harness, pool_budget_bytes, huge_pages)
        self._checks: dict[Hashable, Checks] = {}
        self._units: dict[Layout, dict[int, tuple[NDArray[np.int8], NDArray[np.uint8]]]] = {}
        self._inputs: OrderedDict[Hashable, Any] = OrderedDict()
        self._lanes: list[_Lane] = []
        self._to_check: list[tuple[Checks, ...]] = []

    def prepare(self, task: Task) -> None:
        """Everything that children may share, made before the fork. Raises BitgenError, runs no kernel."""
        self._to_check = [
            self._checks_of(functions, level, task.fixed_shape) if level else ()
            for functions, level in zip(task.kernels, task.checks, strict=True)
        ]
        timing = task.timing
        self._lanes = []
        if timing:
            works = [timing.of_lane(lane, len(task.kernels)) for lane in range(len(task.kernels))]
            for functions, (shape, n) in zip(task.kernels, works, strict=True):
                self._lanes.append(self._lane(functions, shape, n, timing.cold))

    def work(self, task: Task, progress: Any) -> dict[str, Any]:
        """In the child: what is wrong with each kernel, and how long it took.

        {"wrong": [text or None], "cases": [how many], "times": [[nanoseconds a round]]}, one entry a kernel.
        ``progress`` (struct harness_progress *) is what the parent knows of a child that dies here.
        """
        kernels = [self.harness.kernel(functions) for functions in task.kernels]
        if any(functions.tile_registers for functions in task.kernels):
            self.harness.ask_for_tiles()
        progress.phase = CHECKING
        wrong: list[str | None] = []
        for lane, (kernel, checks) in enumerate(zip(kernels, self._to_check, strict=True)):
            mismatch = self._check(kernel, lane, checks, progress)
            wrong.append(str(mismatch) if mismatch else None)
        times: list[list[float]] = []
        if task.timing is not None and not any(wrong):
            progress.phase = TIMING
            outputs, times = self._bench(kernels, task.timing, progress)
            wrong = [
                None if lane in task.probes else self._compare(lane, outputs[lane])
                for lane in range(len(kernels))
            ]
        progress.phase = DONE
        cases = [sum(len(c.cases) for c in checks) for checks in self._to_check]
        return {"wrong": wrong, "cases": cases, "times": times}

    def where(self, task: Task, phase: int, item: int) -> str:
        """In the server: what a child was at, by its progress."""
        if phase == CHECKING:
            lane, index = divmod(item, 1 << 32)
            cases = [case for checks in self._to_check[lane] for case in checks.cases]
            return f"in {cases[index].title}" if index < len(cases) else "in a check"
        if phase == TIMING and task.timing:
            return f"in the timing of {task.timing.shape.name}, n = {task.timing.n}"
        return "while it was loaded" if phase == OPENING else "after its work"

    def culprit(self, phase: int, item: int) -> int:
        """The kernel a child was at, by its progress."""
        return item >> 32 if phase == CHECKING else item if phase == TIMING else 0

    # ---- checks

    def _check(self, kernel: Any, lane: int, checks: Sequence[Checks], progress: Any) -> Mismatch | None:
        first = lane << 32
        for group in checks:
            found = group.run(kernel, progress, first)
            if found:
                return found
            first += len(group.cases)
        return None

    def _checks_of(self, functions: Functions, level: str, fixed: Shape | None) -> tuple[Checks, ...]:
        layout, regime = functions.layout, regime_of(functions.n_min).name
        if fixed is not None:
            return (self._kept_checks((layout, regime, fixed), lambda: shape_cases(regime, fixed)),)
        deep = level == "deep"
        groups = [self._kept_checks((layout, regime, deep), lambda: cases_of(regime, deep=deep))]
        if deep and functions.scaled:
            groups.append(self._kept_checks((layout, regime, "longest"), lambda: longest_cases(regime)))
        return tuple(groups)

    def _kept_checks(self, key: tuple[Any, ...], cases: Callable[[], Sequence[Any]]) -> Checks:
        if key not in self._checks:
            self._checks[key] = Checks(self.harness, key[0], cases())
        return self._checks[key]

    # ---- timing

    def _bench(
        self, kernels: Sequence[Any], timing: Timing, progress: Any
    ) -> tuple[list[NDArray[np.float32]], list[list[float]]]:
        ffi = self.harness.ffi
        lanes = ffi.new("struct harness_lane[]", len(kernels))
        works = [timing.of_lane(lane, len(kernels)) for lane in range(len(kernels))]
        outputs = [Guarded(self.harness, 4 * n * shape.m, 4) for shape, n in works]
        every = zip(lanes, self._lanes, kernels, outputs, works, strict=True)
        for c_lane, lane, kernel, output, (shape, n) in every:
            c_lane.kernel = kernel[0]
            c_lane.w = ffi.cast("const uint8_t *", lane.pool.address)
            c_lane.w_step, c_lane.w_copies, c_lane.w_next = lane.step, lane.copies, 0
            c_lane.w_scale = ffi.cast("const float *", lane.inputs.w_scale.ctypes.data)
            c_lane.x = ffi.cast("const float *", lane.inputs.x.ctypes.data)
            c_lane.y = output.pointer("float *")
            c_lane.m, c_lane.k, c_lane.n = shape.m, shape.k, n
        times = self._rounds(lanes, timing, progress)
        y = [
            output.bytes.view(np.float32).reshape(n, shape.m)
            for output, (shape, n) in zip(outputs, works, strict=True)
        ]
        return y, times

    def _rounds(self, lanes: Any, timing: Timing, progress: Any) -> list[list[float]]:
        """The times of each lane, as many as the rounds it took part in."""
        ffi, lib, count = self.harness.ffi, self.harness.lib, len(lanes)
        timer = ffi.new("struct harness_timer **")
        try:
            self._require(lib.harness_open(timer, timing.threads, lanes, count, timing.min_ns, progress))
            times: list[list[float]] = [[] for _ in range(count)]
            taken, running, start = ffi.new("double[]", count), list(range(count)), time.monotonic_ns()
            for done, order in enumerate(timing.order):
                now = [lane for lane in order if lane in running]
                self._require(lib.harness_round(timer[0], ffi.new("int32_t[]", now), len(now), taken))
                for lane in now:
                    times[lane].append(taken[lane])
                running = timing.staying(running, times)
                # A second round, unless the first was far beyond the budget: one time alone shows no noise.
                spent = time.monotonic_ns() - start
                if not running or spent > (1 if done else 4) * timing.budget_ns:
                    break
            return times
        finally:
            lib.harness_close(timer[0])

    @staticmethod
    def _require(code: int) -> None:
        if code:
            raise BitgenError(f"the host code answers with error {code}")

    def _compare(self, lane: int, y: NDArray[np.float32]) -> str | None:
        """The output of a timed matmul against the reference, bit for bit."""
        expected = self._lanes[lane].inputs.expected
        different = np.argwhere(y.view(np.int32) != expected.view(np.int32))
        if not len(different):
            return None
        token, row = different[0]
        got, want = y[token, row], expected[token, row]
        return f"the timed matmul, n = {len(y)}: row {row} of token {token} is {got}, not {want}"

    def _lane(self, functions: Functions, shape: Shape, n: int, cold: bool) -> _Lane:
        """The weights and activations of one participant."""
        layout = functions.layout
        w, packed = self._unit(layout, shape.k)
        # Each copy starts with the unit's first row block, so that every copy has the same product.
        step = ceil_to(layout.packed_bytes(shape), packed.size)
        copies = -(-self._cold_bytes // step) + 1 if cold else 1
        pool = self._pools.get((layout, shape.k), copies * step, lambda: packed)
        key = (layout.row_block, shape, n)  # of a row block's weights, not of how they are packed
        return _Lane(pool, step, copies, self._kept(key, lambda: _inputs(w, shape, n)))

    def _unit(self, layout: Layout, k: int) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
        """Random weights (rows of a few row blocks, k), as they are and packed."""
        units = self._units.setdefault(layout, {})
        if k not in units:
            rows = _UNIT_BLOCKS * layout.row_block
            w = np.random.default_rng((rows, k)).integers(-1, 2, (rows, k), dtype=np.int8)
            units[k] = (w, pack(layout, w))
        return units[k]

    def _kept(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._inputs:
            while len(self._inputs) >= _KEPT_OUTPUTS:
                self._inputs.popitem(last=False)
            self._inputs[key] = make()
        self._inputs.move_to_end(key)
        found: T = self._inputs[key]
        return found


@dataclass(frozen=True)
class _Inputs:
    """x (n, k), w_scale (m) and what the whole matmul must give, y (n, m)."""

    x: NDArray[np.float32]
    w_scale: NDArray[np.float32]
    expected: NDArray[np.float32]


@dataclass(frozen=True)
class _Lane:
    pool: Pool
    step: int
    copies: int
    inputs: _Inputs


def _inputs(w: NDArray[np.int8], shape: Shape, n: int) -> _Inputs:
    """``w`` (rows, k) is repeated along m, and so is its product."""
    rng = np.random.default_rng((shape.m, shape.k, n))
    x = rng.standard_normal((n, shape.k), np.float32)
    w_scale = rng.uniform(0.001, 0.1, shape.m).astype(np.float32)
    xq, x_scale = quantize_activations(x)
    acc = ternary_matmul(xq, w)
    repeated = np.tile(acc, (1, -(-shape.m // len(w))))[:, : shape.m]
    return _Inputs(x, w_scale, scale_output(repeated, x_scale, w_scale))
