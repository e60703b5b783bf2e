"""What a worker is asked, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bitgen.measure.harness import Functions
from bitgen.measure.stats import EarlyStopping
from bitgen.spec import Shape


@dataclass(frozen=True)
class Timing:
    """How a matmul is timed: in rounds, at least ``min_ns`` each, unless ``budget_ns`` is spent before.

    ``order`` has for each round the contenders in the order they run. With ``stopping`` the first contenders
    are candidates, and ``against`` has the one that each is compared with, if any: a candidate leaves when it
    lost to that one, and the contenders behind the candidates when nobody is compared with them any more.
    """

    shape: Shape
    n: int
    threads: int
    cold: bool
    min_ns: float
    budget_ns: float
    order: tuple[tuple[int, ...], ...]
    against: tuple[int | None, ...] = ()
    stopping: EarlyStopping | None = None

    def staying(self, running: Sequence[int], times: Sequence[Sequence[float]]) -> list[int]:
        """The contenders that go on after a round."""
        if self.stopping is None:
            return list(running)
        candidates = [(one, self.against[one]) for one in running if one < len(self.against)]
        good = [
            (one, baseline)
            for one, baseline in candidates
            if baseline is None or not self.stopping.should_prune(times[one], times[baseline])
        ]
        wanted = {one for pair in good for one in pair}
        return [one for one in running if one in wanted]


@dataclass(frozen=True)
class Task:
    """One piece of work, which ends with its process after ``check_s`` seconds a check or ``total_s`` in all.

    ``checks``: for each kernel the name of the cases it must pass first ("quick", "deep"), or None when it
    was verified before. ``timing`` None: only check. ``probes`` are contenders whose output means nothing.
    ``fixed_shape``: the only shape of the (first) kernel.
    """

    kernels: tuple[Functions, ...]
    checks: tuple[str | None, ...]
    check_s: float
    total_s: float
    probes: frozenset[int] = frozenset()
    timing: Timing | None = None
    fixed_shape: Shape | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a task: ``status`` is done, crashed, timeout, failed, or unusable: nothing can load.

    Done: for each kernel what is ``wrong`` with it (None: nothing), how many ``cases`` it passed, and its
    nanoseconds a call of each round. Otherwise ``detail`` and the index of the ``culprit``; ``loading``: the
    process ended while that kernel's library was loaded, by whatever is in it.
    """

    status: str
    detail: str = ""
    culprit: int = 0
    loading: bool = False
    wrong: Sequence[str | None] = ()
    cases: Sequence[int] = ()
    times_ns: Sequence[Sequence[float]] = ()

    @property
    def done(self) -> bool:
        return self.status == "done"

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Outcome:
        """ValueError for what is no outcome."""
        return cls(**json.loads(text))
