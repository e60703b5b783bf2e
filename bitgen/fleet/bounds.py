"""What a worker does at most for anybody, decided by itself: kernels, bytes, rounds, seconds.

Only legal schedules of its own version are rendered. A database can waste a machine's time, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitgen.cpu import Cpu, Isa, accepted_isas
from bitgen.errors import BitgenError
from bitgen.fleet.messages import Request
from bitgen.space import space_for
from bitgen.spec import KernelSpec, Shape, regime_named, regime_of


class RefusedError(BitgenError):
    """A request that this worker will never answer."""


@dataclass(frozen=True)
class Bounds:
    """The most of each; a ternary head of 151,669 x 5120, the largest matrix so far, has 0.78e9 weights."""

    kernels: int = 64
    rounds: int = 64
    tokens: int = 1024
    weights: int = 1 << 30
    values: int = 1 << 27  # activations and results of one call
    seconds: float = 900.0


BOUNDS = Bounds()


@dataclass(frozen=True)
class Machine:
    """What a worker's machine is: the records of a request are compared with it."""

    name: str
    label: str
    code: str
    threads: int
    cpu: Cpu
    isas: tuple[Isa, ...]

    @property
    def levels(self) -> dict[str, Isa]:
        """The ISA levels that it runs, the best one first."""
        return {isa.name: isa for isa in accepted_isas(self.cpu, self.isas)}


def check_request(request: Request, machine: Machine, bounds: Bounds = BOUNDS) -> None:
    """RefusedError, with the reason, for what this machine does not do."""
    if (request.label, request.code) != (machine.label, machine.code):
        asked = f"{request.label} with code {request.code}"
        raise RefusedError(f"it is for {asked}, and this is {machine.label} with code {machine.code}")
    if request.threads > machine.threads:
        raise RefusedError(f"{request.threads} threads, and this machine gives {machine.threads}")
    levels = machine.levels
    for name in request.isas:
        if name not in levels:
            raise RefusedError(f"the ISA level {name}, which this machine does not run")
    for spec, shape, n, threads in _kernels(request):
        if threads != request.threads:
            raise RefusedError(f"jobs of {threads} threads in a request for {request.threads}")
        _check_sizes(shape, n, bounds)
        _check_legal(spec, shape, n, machine, levels)
    if len(request.jobs) > bounds.kernels or (request.race and len(request.race.specs) > bounds.kernels):
        raise RefusedError(f"more than {bounds.kernels} kernels at once")
    if request.race and not 1 <= request.race.rounds <= bounds.rounds:
        raise RefusedError(f"{request.race.rounds} rounds; at most {bounds.rounds}")


def _kernels(request: Request) -> Iterator[tuple[KernelSpec, Shape, int, int]]:
    for job in request.jobs:
        for spec in filter(None, (job.spec, job.against)):
            yield spec, job.shape, job.n, job.threads
    if race := request.race:
        for spec in race.specs:
            yield spec, race.shape, race.n, race.threads


def _check_sizes(shape: Shape, n: int, bounds: Bounds) -> None:
    if not 1 <= n <= bounds.tokens:
        raise RefusedError(f"{n} tokens; at most {bounds.tokens}")
    if shape.m * shape.k > bounds.weights:
        raise RefusedError(f"a matrix of {shape.name}; at most {bounds.weights:,} weights")
    if n * (shape.m + shape.k) > bounds.values:
        raise RefusedError(f"{n} tokens of {shape.name}; at most {bounds.values:,} values")


def _check_legal(spec: KernelSpec, shape: Shape, n: int, machine: Machine, levels: dict[str, Isa]) -> None:
    """Rules about one machine's caches (``local``) are the coordinator's; the others make a kernel wrong."""
    if spec.isa not in levels:
        raise RefusedError(f"a kernel for {spec.isa}, which this machine does not run")
    if spec.shape is not None or regime_of(n).name != spec.regime:
        raise RefusedError(f"{spec.name} is no kernel for {n} tokens of any shape")
    try:
        regime, group = regime_named(spec.regime), spec.layout.group
        space = space_for(spec.family, levels[spec.isa], regime, shape, machine.cpu, group)
        wrong = [rule.text for rule in space.broken(spec) if not rule.local]
    except LookupError as error:
        raise RefusedError(f"a schedule that is not legal: it lacks {error}") from error
    except BitgenError as error:
        raise RefusedError(f"a schedule that is not legal: {error.message}") from error
    if wrong:
        raise RefusedError(f"{spec.schedule.name} is not legal: {'; '.join(wrong)}")
