"""Joules a token: sensors in a fake tree of the kernel's files, who is charged, what is never a number."""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import FakeEngine, fake_llm

from bitgen.cli import arguments, main
from bitgen.energy import (
    IDLE,
    Command,
    Meter,
    NoSensorError,
    Power,
    Source,
    Spent,
    median_a_token,
    open_source,
)
from bitgen.errors import UsageError
from bitgen.inference.bench import bench_engine
from bitgen.inference.scheduler import Timings
from bitgen.inference.sequence import Request
from bitgen.serve.worker import Job, Worker

RANGE = 262_143_328_850  # microjoules: what the kernel says of many packages


class Tree:
    """The kernel's files below a folder of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, name: str, kind: str, microjoules: int = 0, most: int = RANGE) -> Path:
        folder = self.root / "sys/class/powercap" / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{kind}\n")
        (folder / "max_energy_range_uj").write_text(f"{most}\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        return folder

    def chip(self, name: str, **files: object) -> Path:
        folder = self.root / "sys/class/hwmon" / f"hwmon{len(list(self.root.rglob('hwmon?')))}"
        folder.mkdir(parents=True)
        for file, content in {"name": name, **files}.items():
            (folder / file).write_text(f"{content}\n")
        return folder

    def open(self) -> Source:
        return open_source(root=self.root)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def count(zone: Path, microjoules: int) -> None:
    (zone / "energy_uj").write_text(f"{microjoules}\n")


# ---- Sensors ----


def test_packages_are_added_up_and_nothing_is_counted_twice(tree: Tree) -> None:
    first = tree.zone("intel-rapl:0", "package-0", 5_000_000)
    second = tree.zone("intel-rapl:1", "package-1", 7_000_000)
    others = [
        tree.zone("intel-rapl:0:0", "core"),
        tree.zone("intel-rapl:0:1", "dram"),
        tree.zone("intel-rapl:2", "psys"),
        tree.zone("intel-rapl-mmio:0", "package-0"),
    ]
    source = tree.open()
    assert source.scope == "CPU package, 2 packages, without DRAM"
    count(first, 6_500_000)
    count(second, 7_250_000)
    for zone in others:
        count(zone, 99_000_000)
    assert source.joules() == pytest.approx(1.75)


def test_one_package_says_so(tree: Tree) -> None:
    tree.zone("intel-rapl:0", "package-0")
    assert tree.open().scope == "CPU package, without DRAM"


def test_a_machine_with_mmio_zones_alone_has_a_package(tree: Tree) -> None:
    zone = tree.zone("intel-rapl-mmio:0", "package-0", 1)
    source = tree.open()
    count(zone, 2_000_001)
    assert source.joules() == pytest.approx(2.0)


def test_a_counter_starts_over_at_its_range(tree: Tree) -> None:
    zone = tree.zone("intel-rapl:0", "package-0", RANGE - 1_000_000)
    source = tree.open()
    count(zone, 500_000)
    assert source.joules() == pytest.approx(1.5)
    count(zone, 700_000)
    assert source.joules() == pytest.approx(1.7)


def test_no_sensor_is_a_reason(tree: Tree) -> None:
    with pytest.raises(NoSensorError, match="neither powercap nor"):
        tree.open()
    tree.zone("intel-rapl:0", "psys")
    with pytest.raises(NoSensorError, match="neither powercap nor"):
        tree.open()


def test_a_counter_of_root_names_the_udev_rule(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.zone("intel-rapl:0", "package-0")
    read = Path.read_text

    def refuse(path: Path, *args: Any, **options: Any) -> str:  # as the kernel does; tests may run as root
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(
        NoSensorError, match=r"only root may read .*energy_uj; docs/guide/energy.md has a udev"
    ):
        tree.open()


@pytest.mark.parametrize("text", ["", "-5", "many"])
def test_a_counter_that_is_no_number_is_an_error(tree: Tree, text: str) -> None:
    zone = tree.zone("intel-rapl:0", "package-0")
    source = tree.open()
    (zone / "energy_uj").write_text(text)
    with pytest.raises(NoSensorError, match="not a number"):
        source.joules()


def test_sockets_of_hwmon_are_added_up_without_cores(tree: Tree) -> None:
    chip = tree.chip(
        "amd_energy",
        energy1_input=1_000_000,
        energy1_label="Ecore000",
        energy2_input=3_000_000,
        energy2_label="Esocket0",
        energy3_input=4_000_000,
        energy3_label="Esocket1",
    )
    tree.chip("k10temp", temp1_input=45_000)
    source = tree.open()
    assert source.scope == "CPU socket, without DRAM"
    (chip / "energy1_input").write_text("9000000")
    (chip / "energy2_input").write_text("4000000")
    (chip / "energy3_input").write_text("4500000")
    assert source.joules() == pytest.approx(1.5)
    (chip / "energy3_input").write_text("1")
    with pytest.raises(NoSensorError, match="went back"):
        source.joules()


def test_a_power_of_hwmon_is_integrated(tree: Tree) -> None:
    tree.chip("power_meter", power1_average=100_000_000)
    source = tree.open()
    try:
        assert source.scope == "whole machine (ACPI power meter)"
        before = source.joules()
        assert source.joules() >= before
    finally:
        source.close()


class Hands:
    """A clock that is moved by hand, and a power that goes with it."""

    def __init__(self, watts: float = 0.0) -> None:
        self.now, self.watts = 0.0, watts

    def __call__(self) -> float:
        return self.now


def test_each_reading_of_a_power_counts_with_the_one_before() -> None:
    hands = Hands(10.0)
    source = Power("test", lambda: hands.watts, 3600.0, hands)
    try:
        hands.now, hands.watts = 2.0, 20.0
        source.sample()
        assert source.joules() == pytest.approx(2 * 15.0)
        hands.now = 3.0
        assert source.joules() == pytest.approx(30.0 + 20.0)
    finally:
        source.close()


def test_a_power_that_fails_is_no_number() -> None:
    readings = iter([5.0])
    failed = threading.Event()

    def watts() -> float:
        for value in readings:
            return value
        failed.set()
        raise NoSensorError("unplugged")

    source = Power("test", watts, 0.001)
    assert failed.wait(10)
    source.close()
    with pytest.raises(NoSensorError, match="unplugged"):
        source.joules()


# ---- Commands ----


def script(tmp_path: Path, text: str) -> str:
    file = tmp_path / "meter with a space.py"
    file.write_text(text)
    return shlex.join([sys.executable, "-S", str(file)])


GROWING = (
    "import pathlib\np = pathlib.Path(__file__ + '.n')\nn = int(p.read_text()) + 1 if p.exists() else 40\n"
)
GROWING += "p.write_text(str(n))\nprint(n * 250, 'mJ')\n"


def test_a_command_that_prints_joules(tmp_path: Path) -> None:
    source = open_source(script(tmp_path, GROWING))
    assert source.scope.startswith("what ")
    assert source.joules() == pytest.approx(0.25)
    assert source.joules() == pytest.approx(0.5)


def test_a_command_that_prints_watts_is_a_power(tmp_path: Path) -> None:
    source = open_source(script(tmp_path, "print('2.5e1 W')"))
    assert isinstance(source, Power)
    assert source.joules() >= 0
    source.close()


def test_no_shell_reads_a_command(tmp_path: Path) -> None:
    line = script(tmp_path, "import sys\nprint(len(sys.argv), 'J')")
    assert Command(f"{line} $HOME '*' ; false").read() == (5.0, "J")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('12 apples')", "must print a number with J, mJ, W or mW, not '12 apples'"),
        ("print('1 W\\n2 W')", "must print a number"),
        ("print('-1 J')", "must print a number"),
        ("print('nan J')", "must print a number"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("print('W' * 10**6)", "must print a number"),
    ],
)
def test_a_command_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_source(script(tmp_path, text))


@pytest.mark.parametrize("line", ["", "   ", "'open", "/no/such/program x"])
def test_a_line_that_is_no_command_is_one_line(line: str) -> None:
    with pytest.raises(UsageError, match="--energy-command"):
        open_source(line)


def test_a_command_that_changes_its_unit_or_goes_back_fails(tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_text("5 J")
    line = script(tmp_path, f"print(open({str(file)!r}).read())")
    source = open_source(line)
    for text, said in (("4 J", "went back"), ("9 W", "printed J before and W now")):
        file.write_text(text)
        with pytest.raises(NoSensorError, match=said):
            source.joules()


# ---- Who is charged ----


class FakeSource:
    scope, least_s, most_s = "fake", 0.1, 60.0

    def __init__(self, clock: Callable[[], float], watts: float = 10.0) -> None:
        self.clock, self.watts, self.fails = clock, watts, False

    def joules(self) -> float:
        if self.fails:
            raise NoSensorError("unplugged")
        return self.watts * self.clock()

    def close(self) -> None:
        pass


def said(meter: Meter) -> str:
    return meter.error


def test_a_meter_charges_the_phase_that_was_on() -> None:
    hands = Hands()
    meter = Meter(FakeSource(hands), hands)
    for phase, seconds in (("prompt", 2.0), ("decode", 3.0), ("decode", 1.0), ("prompt", 1.0), (None, 50.0)):
        meter.enter(phase)
        hands.now += seconds
    meter.enter("decode")
    assert meter.spent == {"prompt": Spent(30.0, 3.0), "decode": Spent(40.0, 4.0)}
    assert meter.idle_watts is None
    meter.enter(None)
    meter.measure_idle(lambda seconds: setattr(hands, "now", hands.now + seconds))
    assert meter.idle_watts == pytest.approx(10.0)


def test_a_long_phase_is_read_again_in_time() -> None:
    hands = Hands()
    meter = Meter(FakeSource(hands), hands)
    meter.enter("decode")
    for _ in range(20):
        hands.now += 4.0
        meter.enter("decode")
    meter.enter(None)
    assert meter.spent["decode"].seconds == pytest.approx(80.0)
    assert not meter.error


def test_a_wrap_that_may_have_been_missed_is_no_number() -> None:
    hands = Hands()
    meter = Meter(FakeSource(hands), hands)
    meter.enter(IDLE)
    hands.now += 500.0  # an idle server that was stopped: nobody's loss
    meter.enter("decode")
    assert said(meter) == ""
    hands.now += 61.0
    meter.enter(None)
    assert said(meter) == "no reading for 61 s: the counter may have started over meanwhile"
    assert meter.spent == {}


def test_a_sensor_that_fails_takes_all_numbers_with_it() -> None:
    hands = Hands()
    source = FakeSource(hands)
    meter = Meter(source, hands)
    meter.enter("prompt")
    hands.now += 1.0
    meter.enter("decode")
    source.fails = True
    hands.now += 10.0
    meter.enter(None)
    assert meter.spent == {}
    assert arguments.energy_lines(meter, Timings()) == ["           energy = not available (unplugged)"]


def test_the_median_is_over_spans() -> None:
    spans = [Spent(10.0, 2.0), Spent(100.0, 2.0), Spent(12.0, 3.0)]
    assert median_a_token(spans, [10, 10, 10], 0.0) == pytest.approx(1.2)
    assert median_a_token(spans, [10, 10, 10], 1.0) == pytest.approx(0.9)
    assert median_a_token([], [], 0.0) is None
    assert median_a_token(spans, [10, 10, 10], None) is None


def test_the_scheduler_says_what_it_computes() -> None:
    engine = FakeEngine(batch=1, token_s=0.5)
    llm = fake_llm(engine, max_stall_s=None)
    meter = Meter(FakeSource(engine.clock), engine.clock)
    llm.scheduler.meter = meter
    list(llm.scheduler.run([Request(tuple(range(262, 270)), max_tokens=5, ignore_end=True)]))
    timings = llm.timings
    assert (timings.prompt_tokens, timings.step_tokens) == (8, 4)
    assert meter.spent == {"prompt": Spent(40.0, 4.0), "decode": Spent(20.0, 2.0)}
    engine.clock.now += 100.0  # after the text: nobody's
    meter.enter(IDLE)
    assert meter.spent["decode"].joules == pytest.approx(20.0)
    prompt, decode = arguments.energy_lines(meter, timings)[1:]
    assert prompt == "    prompt energy =      40.00 J  /     8 tokens (5 J per token)"
    assert decode == "    decode energy =      20.00 J  /     4 tokens (5 J per token)"


def test_a_worker_measures_idleness_while_it_waits() -> None:
    engine = FakeEngine(batch=1, token_s=0.5)
    scheduler = fake_llm(engine).scheduler
    source = FakeSource(engine.clock)
    source.most_s = 1e9
    worker = Worker(scheduler, lambda call: call(), engine.clock, Meter(source, engine.clock))
    job = Job(Request(tuple(range(262, 270)), max_tokens=5, ignore_end=True), lambda _: None)

    def come(block: bool, timeout: float | None) -> Any:
        assert block
        assert timeout
        engine.clock.now += 20.0
        return ("submit", job)

    inbox = worker._inbox
    worker._inbox = type(
        "Inbox", (), {"get": staticmethod(lambda b, t: come(b, t) if b else inbox.get(b, t))}
    )()
    worker.turn(wait=True)
    worker._inbox = inbox
    while worker._running:
        worker.turn()
    worker.submit(job)  # so that the next wait ends
    worker.turn(wait=True)
    spent = worker.snapshot.spent
    assert spent[IDLE] == Spent(200.0, 20.0)
    assert spent["prompt"].joules + spent["decode"].joules == pytest.approx(10.0 * 12 * 0.5)


def test_bench_has_a_reading_for_each_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(batch=2, token_s=0.25)
    monkeypatch.setattr("time.perf_counter", engine.clock)
    meter = Meter(FakeSource(engine.clock), engine.clock)
    runs = bench_engine(engine, 1, prompts=[4], steps=[8], batches=[2], repeats=3, meter=meter)
    prompt, steps = list(runs)
    # Runs of 1 s until 3 s have passed, and of 4 s.
    assert prompt.span_tokens == (12, 12, 12)
    assert prompt.seconds == (1.0,) * 9
    assert prompt.spans == (Spent(30.0, 3.0),) * 3
    assert steps.span_tokens == (16, 16, 16)
    assert steps.spans == (Spent(40.0, 4.0),) * 3
    assert prompt.mean == pytest.approx(4.0)


# ---- The command line ----


@pytest.fixture
def no_sensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = open_source
    monkeypatch.setattr("bitgen.energy.open_source", lambda command: original(command, tmp_path))


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_energy(parser)
    return parser.parse_args(argv)


@pytest.mark.usefixtures("no_sensor")
def test_without_a_sensor_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with arguments.metered(parsed("--energy")) as meter:
        assert meter is None
    said = (
        "bitgen: energy: not available (neither powercap nor a known hwmon sensor here: a virtual machine?)\n"
    )
    assert capsys.readouterr() == ("", said)
    with arguments.metered(parsed()) as meter:
        assert meter is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [["--url", "http://127.0.0.1:9"], ["--kernels", "-m", "3B"]])
def test_bench_measures_models_that_run_here(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--energy", *options]) == UsageError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_conversation_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", "tiny", "-cnv", "--energy"]) == UsageError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
