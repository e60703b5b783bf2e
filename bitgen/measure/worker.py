"""The other process: opens kernels, verifies them, times them; no kernel ever runs, or is loaded, elsewhere.

`Worker` reads a `Task` at a time from its standard input, prepares what is expensive and the same for many
kernels (`Workbench`: weight pools, test cases, expected outputs) and forks a process for each task, which may
die or hang at any point. It starts no threads, so forking is safe.

Its standard input is the lifeline: when the other end is gone, whatever the reason, the process of the task
is killed and the worker ends.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import pickle
import resource
import select
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError
from bitgen.families.base import Codes
from bitgen.measure.cases import Case, Checks, cases_of, longest_cases, shape_cases
from bitgen.measure.guarded import Guarded, Pool, Pools
from bitgen.measure.harness import Functions, Harness
from bitgen.measure.task import Outcome, Task, Timing
from bitgen.reference import (
    code_values,
    coded_linear,
    grouped_linear,
    pack,
    pack_codes,
    quantize_activations,
    scale_output,
    ternary_matmul,
)
from bitgen.spec import Layout, Shape, ceil_to, family_named, regime_of

# Row blocks of random weights that a pool repeats: enough that no cache line of weights comes twice in a row.
_UNIT_BLOCKS = 4
_KEPT_OUTPUTS = 4
_SCRATCH_BYTES = 32 << 20  # the most that a kernel may ask for in a check
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05  # how often the phase of a silent task is looked at
_GRACE_S = 5  # a task whose worker was killed outlives its time limit by this at most

T = TypeVar("T")


# The phases of struct harness_progress.
LOADING, CHECKING, TIMING, DONE = range(4)


@dataclass(frozen=True)
class _Weights:
    """w (rows, k), and with groups of weights along k their scales (rows, groups); or codes too."""

    w: NDArray[np.int8]
    scales: NDArray[np.float32]
    group: int
    codes: Codes | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class _Inputs:
    """x (n, k), w_scale (m) and what the whole matmul must give, y (n, m)."""

    x: NDArray[np.float32]
    w_scale: NDArray[np.float32]
    expected: NDArray[np.float32]


@dataclass(frozen=True)
class _Contender:
    pool: Pool
    step: int
    copies: int
    inputs: _Inputs


class Workbench:
    """What tasks share: prepared in the worker before it forks, read by the process of the task."""

    def __init__(self, harness: Harness, cold_bytes: int) -> None:
        self.harness = harness
        self._cold_bytes = cold_bytes
        self._pools = Pools(harness)
        self._checks: dict[Hashable, Checks] = {}
        self._units: dict[tuple[Layout, int], tuple[_Weights, NDArray[np.uint8]]] = {}
        self._inputs: OrderedDict[Hashable, _Inputs] = OrderedDict()
        self._contenders: list[_Contender] = []
        self._to_check: list[tuple[Checks, ...]] = []

    def prepare(self, task: Task) -> None:
        """Everything that tasks may share, made before the fork. Raises BitgenError, loads no kernel."""
        self._to_check = [
            self._checks_of(functions, level, task.fixed_shape) if level else ()
            for functions, level in zip(task.kernels, task.checks, strict=True)
        ]
        timing = task.timing
        self._contenders = []
        self._pools.release()
        self._contenders = [self._contender(f, timing) for f in task.kernels] if timing else []

    def work(self, task: Task, progress: Any) -> Outcome:
        """In the process of the task: what is wrong with each kernel, and how long it took.

        ``progress`` (struct harness_progress *) is what the worker knows of a process that dies here.
        """
        kernels = []
        for index, functions in enumerate(task.kernels):
            progress.item = index
            kernels.append(self.harness.kernel(functions))
        if any(functions.tile_registers for functions in task.kernels):
            self.harness.ask_for_tiles()
        progress.phase = CHECKING
        every = enumerate(zip(kernels, self._to_check, strict=True))
        wrong = [self._check(kernel, index, checks, progress) for index, (kernel, checks) in every]
        times: list[list[float]] = []
        if task.timing is not None and not any(wrong):
            progress.phase = TIMING
            outputs, times = self._time(kernels, task.timing, progress)
            wrong = [
                None if index in task.probes else self._compare(index, output)
                for index, output in enumerate(outputs)
            ]
        progress.phase = DONE
        cases = [sum(len(c.cases) for c in checks) for checks in self._to_check]
        return Outcome("done", wrong=wrong, cases=cases, times_ns=times)

    def where(self, task: Task, phase: int, item: int) -> str:
        """In the worker: what a process was at, by its progress."""
        if phase == CHECKING:
            kernel, index = divmod(item, 1 << 32)
            cases = [case for checks in self._to_check[kernel] for case in checks.cases]
            return f"in {cases[index].title}" if index < len(cases) else "in a check"
        if phase == TIMING and task.timing:
            return f"in the timing of {task.timing.shape.name}, n = {task.timing.n}"
        return "while it was loaded" if phase == LOADING else "after its work"

    @staticmethod
    def culprit(phase: int, item: int) -> int:
        """The kernel a process was at, by its progress."""
        return item >> 32 if phase == CHECKING else item if phase in (LOADING, TIMING) else 0

    def _check(self, kernel: Any, index: int, checks: Sequence[Checks], progress: Any) -> str | None:
        first = index << 32
        for group in checks:
            found = group.run(kernel, progress, first)
            if found:
                return str(found)
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

    def _kept_checks(self, key: tuple[Any, ...], cases: Callable[[], Sequence[Case]]) -> Checks:
        if key not in self._checks:
            self._checks[key] = Checks(self.harness, key[0], cases(), self._scratch)
        return self._checks[key]

    @cached_property
    def _scratch(self) -> Guarded:
        # One for all checks: the first touch of it for each layout and regime took more time than they.
        return Guarded(self.harness, _SCRATCH_BYTES, 64)

    def _time(
        self, kernels: Sequence[Any], timing: Timing, progress: Any
    ) -> tuple[list[NDArray[np.float32]], list[list[float]]]:
        """The last output y (n, m) of each contender, and its times."""
        ffi, shape, n = self.harness.ffi, timing.shape, timing.n
        lanes = ffi.new("struct harness_lane[]", len(kernels))
        outputs = [Guarded(self.harness, 4 * n * shape.m, 4) for _ in kernels]
        cursors = {one.pool.address: ffi.new("int64_t *") for one in self._contenders}
        for lane, contender, kernel, output in zip(lanes, self._contenders, kernels, outputs, strict=True):
            lane.kernel = kernel[0]
            lane.w = ffi.cast("const uint8_t *", contender.pool.address)
            lane.w_step, lane.w_copies = contender.step, contender.copies
            lane.w_next = cursors[contender.pool.address]
            lane.w_scale = ffi.cast("const float *", contender.inputs.w_scale.ctypes.data)
            lane.x = ffi.cast("const float *", contender.inputs.x.ctypes.data)
            lane.y = output.pointer("float *")
            lane.m, lane.k, lane.n = shape.m, shape.k, n
        times = self._rounds(lanes, timing, progress)
        return [output.bytes.view(np.float32).reshape(n, shape.m) for output in outputs], times

    def _rounds(self, lanes: Any, timing: Timing, progress: Any) -> list[list[float]]:
        """The times of each contender, as many as the rounds it took part in."""
        ffi, lib, count = self.harness.ffi, self.harness.lib, len(lanes)
        timer = ffi.new("struct harness_timer **")
        try:
            self._require(lib.harness_open(timer, timing.threads, lanes, count, timing.min_ns, progress))
            times: list[list[float]] = [[] for _ in range(count)]
            taken, running, start = ffi.new("double[]", count), list(range(count)), time.monotonic_ns()
            for done, order in enumerate(timing.order):
                now = [one for one in order if one in running]
                self._require(lib.harness_round(timer[0], ffi.new("int32_t[]", now), len(now), taken))
                for one in now:
                    times[one].append(taken[one])
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

    def _compare(self, index: int, y: NDArray[np.float32]) -> str | None:
        """The output of a timed matmul against the reference, bit for bit."""
        expected = self._contenders[index].inputs.expected
        different = np.argwhere(y.view(np.int32) != expected.view(np.int32))
        if not len(different):
            return None
        token, row = different[0]
        got, want = y[token, row], expected[token, row]
        return f"the timed matmul, n = {len(y)}: row {row} of token {token} is {got}, not {want}"

    def _contender(self, functions: Functions, timing: Timing) -> _Contender:
        """The weights and activations of one kernel."""
        layout, shape, n = functions.layout, timing.shape, timing.n
        weights, packed = self._unit(layout, shape.k)
        # Each copy starts with the unit's first row block, so that every copy has the same product.
        step = ceil_to(layout.packed_bytes(shape), packed.size)
        copies = -(-self._cold_bytes // step) + 1 if timing.cold else 1
        pool = self._pools.get((layout, shape.k), copies * step, lambda: packed)
        # of a row block's weights, not of how they are packed
        key = (layout.row_block, layout.group, family_named(layout.family).weights, shape, n)
        return _Contender(pool, step, copies, self._kept(key, lambda: _inputs(weights, shape, n)))

    def _unit(self, layout: Layout, k: int) -> tuple[_Weights, NDArray[np.uint8]]:
        """Random weights (rows of a few row blocks, k), as they are and packed."""
        if (layout, k) not in self._units:
            rows = _UNIT_BLOCKS * layout.row_block
            rng = np.random.default_rng((rows, k))
            w = rng.integers(-1, 2, (rows, k), dtype=np.int8)
            scales = rng.uniform(0.001, 0.1, (rows, layout.groups(k))).astype(np.float16).astype(np.float32)
            if family_named(layout.family).is_ternary:
                self._units[layout, k] = (_Weights(w, scales, layout.group), pack(layout, w, scales))
            else:
                codes = _random_codes(layout, k, scales, rng)
                values = code_values(layout, codes)
                self._units[layout, k] = (
                    _Weights(values, scales, layout.group, codes, layout),
                    pack_codes(layout, codes),
                )
        return self._units[layout, k]

    def _kept(self, key: Hashable, make: Callable[[], _Inputs]) -> _Inputs:
        if key not in self._inputs:
            while len(self._inputs) >= _KEPT_OUTPUTS:
                self._inputs.popitem(last=False)
            self._inputs[key] = make()
        self._inputs.move_to_end(key)
        return self._inputs[key]


def _random_codes(layout: Layout, k: int, scales: NDArray[np.float32], rng: np.random.Generator) -> Codes:
    """Codes with these scales: every one, four tables."""
    family, rows = family_named(layout.family), len(scales)
    codes = rng.integers(0, family.codes, (rows, k), dtype=np.uint8)
    if family.by_table:
        tables = rng.integers(-127, 128, (4, 16), dtype=np.int8)
        selectors = rng.integers(0, 4, (rows // 16, scales.shape[1]), dtype=np.uint8)
        return Codes(codes, scales, None, tables, selectors)
    return Codes(codes, scales, scales * np.float32(-8) if family.scales > 1 else None)


def _inputs(weights: _Weights, shape: Shape, n: int) -> _Inputs:
    """The weights (rows, k) are repeated along m, and so is their product."""
    w = weights.w
    rng = np.random.default_rng((shape.m, shape.k, n))
    x = rng.standard_normal((n, shape.k), np.float32)
    w_scale = rng.uniform(0.001, 0.1, shape.m).astype(np.float32)
    times = (1, -(-shape.m // len(w)))
    if weights.group:
        if weights.codes is not None and weights.layout is not None:
            y = coded_linear(x, weights.codes, weights.layout)
        else:
            y = grouped_linear(x, w, weights.scales, weights.group)
        return _Inputs(x, w_scale, np.ascontiguousarray(np.tile(y, times)[:, : shape.m]))
    xq, x_scale = quantize_activations(x)
    acc = ternary_matmul(xq, w)
    repeated = np.tile(acc, times)[:, : shape.m]
    return _Inputs(x, w_scale, scale_output(repeated, x_scale, w_scale))


# ---- the process


class _Orphaned(Exception):  # noqa: N818 - not an error: nobody is left to answer to
    """The other end of the lifeline is closed."""


class Worker:
    """Forks a process for each task and tells what became of it."""

    def __init__(self, bench: Workbench, lifeline: BinaryIO) -> None:
        self._bench = bench
        self._lifeline = lifeline
        ffi = bench.harness.ffi
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # what a process that dies was at
        self._progress = ffi.cast("struct harness_progress *", ffi.from_buffer(self._shared))

    def serve(self, answers: int = 1) -> None:
        """Answer one line of JSON (`Outcome`) to each pickled `Task` until the lifeline ends."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is a recorded value, no file
        gc.collect()
        gc.freeze()  # or each task's collector would touch, and so copy, every page of the heap
        with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError, _Orphaned):
            while True:
                task: Task = pickle.load(self._lifeline)  # noqa: S301 - from the process that started this one
                os.write(answers, self.run(task).to_json() + b"\n")

    def run(self, task: Task) -> Outcome:
        """What became of ``task``, in a process of its own."""
        try:
            self._bench.prepare(task)
        except BitgenError as error:
            return Outcome("failed", error.message)
        self._progress.phase = self._progress.item = 0
        receive, send = os.pipe()
        worker = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(receive)
            self._work(task, send, worker)
        os.close(send)
        try:
            said, timed_out = self._listen(receive, task)
        except BaseException:
            _kill(pid)
            raise
        finally:
            os.close(receive)
        if timed_out:
            _kill(pid)
        _, status = os.waitpid(pid, 0)
        return self._verdict(task, said, status, timed_out)

    def _work(self, task: Task, send: int, worker: int) -> None:
        """In the process of the task; never returns."""
        code = 1
        try:
            _live_no_longer_than(worker, task.total_s)
            # A kernel's complaints (an abort's message) are no output of ours.
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            try:
                outcome = self._bench.work(task, self._progress)
            except BitgenError as error:
                outcome = Outcome("failed", error.message, self._culprit)
            os.write(send, outcome.to_json())
            code = 0
        finally:
            os._exit(code)  # no exit handlers: they belong to the worker

    @property
    def _culprit(self) -> int:
        return self._bench.culprit(int(self._progress.phase), int(self._progress.item))

    def _listen(self, receive: int, task: Task) -> tuple[bytes, bool]:
        """What the process writes until it closes its end, and whether its time was up first."""
        start = step = time.monotonic()
        said, seen = b"", (LOADING, 0)
        poller = select.poll()
        poller.register(receive, select.POLLIN)
        poller.register(self._lifeline, select.POLLIN)
        while True:
            ready = dict(poller.poll(_POLL_S * 1000))
            if ready.get(self._lifeline.fileno()):
                raise _Orphaned  # nobody sends while a task runs: this is the end of the stream
            if ready.get(receive):
                part = os.read(receive, 1 << 16)
                if not part:
                    return said, False
                said += part
            phase, now = int(self._progress.phase), time.monotonic()
            if seen != (phase, self._culprit):
                seen, step = (phase, self._culprit), now
            stuck = phase in (LOADING, CHECKING) and now - step > task.check_s
            if stuck or now - start > task.total_s:
                return said, True

    def _verdict(self, task: Task, said: bytes, status: int, timed_out: bool) -> Outcome:
        phase, item = int(self._progress.phase), int(self._progress.item)
        where = self._bench.where(task, phase, item)
        ended = Outcome("crashed", culprit=self._culprit, loading=phase == LOADING)
        if timed_out:
            limit = task.check_s if phase in (LOADING, CHECKING) else task.total_s
            return replace(ended, status="timeout", detail=f"not done after {limit:g} s, {where}")
        if os.WIFSIGNALED(status):
            return replace(ended, detail=f"{signal.Signals(os.WTERMSIG(status)).name} {where}")
        try:
            return Outcome.from_json(said)
        except ValueError:
            code = os.WEXITSTATUS(status)
            return replace(ended, detail=f"it ended the process (exit status {code}) {where}")


def _live_no_longer_than(worker: int, seconds: float) -> None:
    """The process of a task dies with its worker, also when that is killed with SIGKILL."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(seconds) + _GRACE_S)  # where the next line has no effect
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != worker:
        os._exit(1)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """The process that `LocalRunner` starts; its last arguments: the harness, and the bytes of cold pools."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's: it closes the lifeline
    path, cold_bytes = sys.argv[-2:]
    try:
        harness = Harness(path)
    except OSError as error:  # no kernel's fault: a folder mounted noexec, a policy of the system
        with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
            pickle.load(sys.stdin.buffer)  # noqa: S301 - the first task, as in `serve`
            os.write(1, Outcome("unusable", str(error)).to_json() + b"\n")
        return
    Worker(Workbench(harness, int(cold_bytes)), sys.stdin.buffer).serve()
