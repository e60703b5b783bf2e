from __future__ import annotations

import ctypes
import functools
import os
import re
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import emulated
import pytest
from exact_specs import DEEP_VARIABLE
from hypothesis import HealthCheck, settings
from libraries import CACHE_VARIABLE, share_cache, shared_cache

from bitgen.cpu import CAP_VARIABLE, Cpu, detect_cpu
from bitgen.errors import BitgenError
from bitgen.paths import HOME_VARIABLE

if TYPE_CHECKING:
    from bitgen.runtime import KernelTable

# The same examples in every run, and no limits of time: a loaded machine is slow, not wrong.
# For new examples: pytest --hypothesis-profile=explore
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("explore"), derandomize=True)
settings.load_profile("fixed")

if emulated.VARIABLE in os.environ:
    emulated.pretend()


def pytest_configure(config: pytest.Config) -> None:
    """Kernels that tests call in this process may use tiles: the system must be asked once.

    A shell starts background jobs with SIGINT ignored, and children inherit that: tests interrupt them.
    Parallel workers, and tests that tests start, inherit the folder of what is compiled. Nothing is
    written to the home of whoever runs the tests, nor read from there.
    """
    if not os.environ.get(CACHE_VARIABLE):
        os.environ[CACHE_VARIABLE] = folder = tempfile.mkdtemp(prefix="bitgen-tests-")
        config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has that of the process that started it
        home = tempfile.mkdtemp(prefix="bitgen-home-")
        config.add_cleanup(functools.partial(shutil.rmtree, home, ignore_errors=True))
        os.environ[HOME_VARIABLE] = str(share_cache(Path(home)))
    os.environ["BITGEN_RACE"] = "0"  # of layouts, at the first run of a model that nobody tuned
    # 60 ms of each of hundreds of processes, and where several run it only spins.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Hundreds of processes are started here, and each would compile the package for itself, 0.5 s.
        os.environ["PYTHONPYCACHEPREFIX"] = str(shared_cache() / "python")
    if config.option.isa_cap is not None:
        os.environ[CAP_VARIABLE] = config.option.isa_cap
    try:
        cpu = detect_cpu()
    except BitgenError as error:
        raise pytest.UsageError(error.message) from error
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "amx_tile" in cpu.features:
        arch_prctl, request_permission, tile_data = 158, 0x1023, 18
        assert ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--isa-cap",
        metavar="LEVEL",
        help="let this CPU act as one of at most this ISA level (BITGEN_ISA_CAP)",
    )
    parser.addoption(
        "--cpu-times",
        metavar="N",
        type=int,
        default=0,
        help="at the end, CPU seconds of every file, and of the N tests that took most",
    )


SLOW = Path(__file__).parent / "slow"
LIBRARIES = {"bundle", "level_library", "universal_library"}  # fixtures that compile one
# Files that call the kernels of a library: what a CPU is for.
SMALL_CPU = {"test_group_kernels", "test_int16", "test_isa_cap", "test_nibble_kernels", "test_runtime"}
# Files that ask no CPU, or one that is named: the lanes of small CPUs need not repeat them.
ANY_CPU = {
    f"test_{name}"
    for name in (
        *("abi", "architectures", "config", "digests", "docs", "draft_model", "energy", "fleet", "gguf"),
        *("imports", "packing", "progress", "public_api", "public_cli", "quants", "records", "reference"),
        *("rooms", "safetensors", "sampling", "scheduler", "serve_dialects", "serve_endpoints"),
        *("serve_worker", "store", "tokenizer", "trust", "whole", "winners"),
    )
}
# Files that take longest, by `--cpu-times` or because they wait, begin first: none is left alone at the end.
# The soak of a server, a minute, is over while others compile.
LONG = (
    "test_exact",
    "test_serve",
    "test_fleet_database",
    "test_arm",
    "test_engine",
    "test_vector_ops",
    "test_aarch64_root",
    "test_windows",
    "test_cli",
    "test_measure",
    "test_sanitizers",
    "test_bundle_commands",
    "test_places",
    "test_emulated",
    "test_render",
    "test_sized_step",
    "test_sliding_windows",
    "test_search",
    "test_library",
    "test_wheel",
    "test_benchmarks",
    "test_release",
    "test_tiny",
    "test_hostile_files",
    "test_cli_model",
    "test_energy_outcomes",
    "test_generate",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast lane does not read files that are slow as a whole: some import PyTorch, which takes 5 s."""
    wanted: str = config.option.markexpr
    if collection_path.suffix != ".py" or not wanted.startswith("not slow") or " or " in wanted:
        return None
    if collection_path.is_relative_to(SLOW):
        return True
    text = collection_path.read_text(encoding="utf-8")
    return True if re.search(r"^pytestmark = (\[\s*)?pytest\.mark\.slow", text, re.MULTILINE) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some files wait, for clocks, servers and databases."""
    return detect_cpu().usable_threads + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/slow is slow, and what calls a library; elsewhere a test says so itself.

    Of a CPU that acts as a smaller one these calls are what is asked: `SMALL_CPU` is in its fast lane. Deep
    tests are for `.ci/deep`.
    """
    capped = bool(os.environ.get(CAP_VARIABLE))
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    deep = pytest.mark.skip(reason=f"takes minutes: .ci/deep tests runs it ({DEEP_VARIABLE}=1)")
    for item in items:
        if item.get_closest_marker("deep") and not os.environ.get(DEEP_VARIABLE):
            item.add_marker(deep)
        calls = LIBRARIES & set(getattr(item, "fixturenames", ()))
        if item.path.is_relative_to(SLOW) or (calls and not (capped and item.path.stem in SMALL_CPU)):
            item.add_marker(pytest.mark.slow)
        if item.path.stem in ANY_CPU:
            item.add_marker(pytest.mark.any_cpu)


def pytest_report_header() -> str | None:
    cap = os.environ.get(CAP_VARIABLE)
    return f"{CAP_VARIABLE}: this CPU acts as one of at most {cap}" if cap else None


RECORDED_CPUS = Path(__file__).parent / "data" / "cpuinfo"


@pytest.fixture
def recorded_cpu(tmp_path: Path) -> Callable[[str], Cpu]:
    """A function from the name of a recording in tests/data/cpuinfo to the Cpu detected from it."""

    def detect(name: str) -> Cpu:
        root = tmp_path / "machines" / name
        (root / "proc").mkdir(parents=True)
        shutil.copy(RECORDED_CPUS / f"{name}.txt", root / "proc" / "cpuinfo")
        return detect_cpu(root, "Linux")

    return detect


@pytest.fixture
def bitgen_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds everything bitgen writes during the test; what is compiled is shared."""
    home = share_cache(tmp_path / "bitgen_home")
    monkeypatch.setenv("BITGEN_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of tuned kernels (`libraries.choices`) for this CPU, verified by its self-test."""
    import libraries

    return libraries.built_library(tmp_path_factory)


@pytest.fixture(scope="session")
def level_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an ISA level to an untuned library of it; it skips the test if that cannot run here."""
    import step_levels  # asks for the CPU, which pytest_configure may cap

    return partial(step_levels.level_library, tmp_path_factory)


@pytest.fixture(scope="session")
def tables(level_library: Callable[[str], Path]) -> Iterator[Callable[..., KernelTable]]:
    """A function from an ISA level (the best here) and threads (2) to a table of its untuned library."""
    import step_levels

    yield from step_levels.tables(level_library)


@pytest.fixture(scope="session")
def universal_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that holds every ISA level this CPU runs and chooses among them when it is loaded."""
    import step_levels

    return step_levels.universal_library(tmp_path_factory)


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended; other work on the machine does not count."""
    taken = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in taken)


_last_cpu = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Each report says what CPU time its phase took; fixtures count for the test that needed them first."""
    global _last_cpu
    report = yield
    now = _cpu_seconds()
    report.user_properties.append(("cpu", now - _last_cpu))
    _last_cpu = now
    return report


def _cpu_lines(terminalreporter: pytest.TerminalReporter, most: int) -> list[str]:
    tests: Counter[str] = Counter()
    for kind in ("", "passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(kind, ()):
            tests[report.nodeid] += dict(getattr(report, "user_properties", ())).get("cpu", 0.0)
    files: Counter[str] = Counter()
    for name, seconds in tests.items():
        files[name.partition("::")[0]] += seconds
    rows = [("all", files.total()), *files.most_common(), *tests.most_common(most)]
    return [f"cpu: {seconds:8.1f} s  {name}" for name, seconds in rows]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much was verified and what was found against oracles, also from parallel workers."""
    if most := terminalreporter.config.option.cpu_times:
        for line in _cpu_lines(terminalreporter, most):
            terminalreporter.write_line(line)
    passed = terminalreporter.getreports("passed")
    counts = [value for report in passed for name, value in report.user_properties if name == "exact"]
    if counts:
        schedules, cases = (sum(column) for column in zip(*counts, strict=True))
        terminalreporter.write_line(f"exact: {schedules} schedules, {cases} (schedule, shape, n) cases")
    for report in passed:
        for name, value in report.user_properties:
            if name == "oracle":
                terminalreporter.write_line(f"oracle: {value}")
