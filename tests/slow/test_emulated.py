"""Levels of CPUs that are not here: the emulator is compared with plain loops, then kernels run in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from bitgen.cpu import detect_cpu, find_isa, load_isas
from bitgen.render import vector_ops
from bitgen.spec import FAMILIES
from bitgen.toolchain import Compiler, find_compilers

PROGRAM = emulated.SOURCE.with_name("instructions.c")
COMPILERS = [c for c in find_compilers() if c.kind != "zig"] or find_compilers()
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread")
INSTRUCTIONS = ("-mavx2", "-mamx-tile", "-mamx-int8")  # no more of this CPU than the emulator needs itself
RESULTS = {"amx": 3208, "vnni": 3600}
# What a program must not do, and what the emulator says to it.
FAULTS = {
    "permission": "before the system's permission",
    "palette": "no such palette",
    "rows": "more than 16 rows",
    "bytes": "or 64 bytes a row",
    "halves": "rows without bytes",
    "reserved": "a reserved byte is not zero",
    "ninth": "a reserved byte is not zero",
    "depth": "sizes do not fit together",
    "height": "sizes do not fit together",
    "width": "sizes do not fit together",
    "configuration": "without a configuration",
    "released": "without a configuration",
    "unused": "not configured",
    "twice": "two operands are one tile",
    "page": "",  # a page that is not there: SIGSEGV, as any load
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.why_not() is not None, reason=f"{emulated.why_not()}"),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated.build(tmp_path_factory.mktemp("emulator"), COMPILERS[0].command)


@pytest.fixture(params=COMPILERS, ids=lambda compiler: compiler.kind, scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler: Compiler = request.param
    made = tmp_path_factory.mktemp("instructions") / "instructions"
    subprocess.run([*compiler.command, *FLAGS, *INSTRUCTIONS, "-o", made, PROGRAM], check=True)
    return made


def run(program: Path, word: str, emulator: Path | None) -> subprocess.CompletedProcess[str]:
    """The program on this CPU with the emulator, which is not asked for what the CPU has itself."""
    env = emulated.environment(emulator, emulated.lacking()) if emulator else None
    return subprocess.run([program, word], env=env, capture_output=True, text=True, check=False)


NO_TILES = pytest.mark.skipif(
    "amx_tile" not in emulated.lacking(),
    reason="this CPU has AMX, so the emulator sees none of its instructions",
)


@pytest.mark.parametrize("word", [pytest.param("amx", marks=NO_TILES), "vnni"])
def test_every_instruction_means_what_loops_say(program: Path, emulator: Path, word: str) -> None:
    done = run(program, word, emulator)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == RESULTS[word]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_hardware_refuses_is_refused(program: Path, emulator: Path, fault: str) -> None:
    done = run(program, fault, emulator)
    assert done.returncode in (-4, -11), "SIGILL or SIGSEGV"
    if "amx_tile" in emulated.lacking():
        assert FAULTS[fault] in done.stderr
        assert bool(FAULTS[fault]) == done.stderr.startswith("emulator: ")


@NO_TILES
def test_the_permitted_twin_of_these_faults_works(program: Path, emulator: Path) -> None:
    assert run(program, "none", emulator).returncode == 0


@pytest.mark.skipif(not emulated.lacking(), reason="this CPU has AMX and AVX-VNNI")
def test_without_the_emulator_it_is_an_illegal_instruction(program: Path) -> None:
    """So that a test in the emulator is one: this CPU does not carry them out by itself."""
    words = {"avx_vnni": "vnni", "amx_tile": "amx"}
    for feature in words.keys() & set(emulated.lacking()):
        assert run(program, words[feature], None).returncode != 0


# What runs on an emulated CPU: the words these levels add, the default kernels of all families and regimes, a
# whole model. `python tests/support/emulated.py bitgen verify --isa amx_int8` runs every schedule.
# (suite, level): file, which of its tests, how many they are.
NEW_OPS = ("vw_dot4", "vw_widen", "vw_rows")
SUITES = {
    ("ops", "avx_vnni"): (
        "kernels/test_vector_ops.py",
        f"avx_vnni and ({' or '.join(NEW_OPS)})",
        sum(name.startswith(NEW_OPS) for name in vector_ops("avx_vnni")) * len(COMPILERS),
    ),
    ("ops", "amx_int8"): ("kernels/test_vector_ops.py", "amx_int8 and tiles_mean", len(COMPILERS)),
    ("kernels", "avx_vnni"): ("kernels/test_exact.py", "one_shape and avx_vnni", 1),
    ("kernels", "amx_int8"): (
        "kernels/test_exact.py",
        "amx_int8 and (one_shape or drawn_problems and not n1)",
        1 + 2 * len(FAMILIES),
    ),
    ("probes", "amx_int8"): ("kernels/test_measure.py", "peak_of_tiles", 1),
    ("models", "avx_vnni"): ("models/test_engine.py", "exact_model and f32 and relu2 and avx_vnni", 1),
    ("models", "amx_int8"): ("models/test_engine.py", "exact_model and f32 and relu2 and amx_int8", 1),
}

DEEP = {("kernels", "avx_vnni"), ("models", "avx_vnni"), ("models", "amx_int8")}


def needs(level: str) -> pytest.MarkDecorator:
    """Skip a level that this CPU has, or of which it lacks more than the emulator gives it."""
    reason = emulated.missing_for(level)
    if find_isa(level, load_isas()).requires <= detect_cpu().features:
        reason = f"this CPU has {level}: the tests run without help"
    return pytest.mark.skipif(reason is not None, reason=f"{reason}")


@pytest.mark.skipif(
    not emulated.lacking(), reason="this CPU has AMX and AVX-VNNI: the tests run without help"
)
@pytest.mark.parametrize(
    ("suite", "level"),
    [
        pytest.param(
            *key, marks=[needs(key[1]), *([pytest.mark.deep] if key in DEEP else [])], id="-".join(key)
        )
        for key in SUITES
    ],
)
def test_suites_pass_on_an_emulated_cpu(
    suite: str, level: str, emulator: Path, request: pytest.FixtureRequest
) -> None:
    """The same tests as on a CPU that has the features, in a process of their own: none of them skips."""
    file, expression, count = SUITES[suite, level]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parents[1] / file),
        "-k",
        expression,
    ]
    env = emulated.environment(emulator, emulated.lacking())
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{count} passed" in last
    assert "skipped" not in last
    exact = re.search(r"exact: (\d+) schedules, (\d+)", done.stdout)
    if exact:
        request.node.user_properties.append(("exact", (int(exact[1]), int(exact[2]))))


BUILD = """
import sys; import emulated; emulated.pretend(); from libraries import QUICK, toolchain_of
from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cpu import detect_cpu
target = Target.of(detect_cpu(), "amx_int8")
write_library((), toolchain_of(*QUICK), sys.argv[1], "tiles", target, check=False)
"""
CREATE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print([library.bitgen_context_create(ctypes.byref(ctypes.c_void_p()), 2, flags) for flags in (0, 1, 2)])
"""


@needs("amx_int8")
@pytest.mark.skipif("amx_tile" not in emulated.lacking(), reason="this system grants tiles")
def test_a_process_that_is_refused_tiles_gets_an_error_or_portable_kernels(
    emulator: Path, tmp_path: Path
) -> None:
    """The system here knows no tiles; the emulator's grants them."""
    env = emulated.environment(emulator, emulated.lacking())
    path = ":".join(map(str, (Path(__file__).parents[1] / "support", Path(__file__).parents[2])))
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], env={**env, "PYTHONPATH": path}, check=True)
    create = [sys.executable, "-c", CREATE, str(tmp_path / "tiles" / "libbitgen-tiles.so")]
    refused = subprocess.run(create, capture_output=True, text=True, check=True)
    assert refused.stdout == "[19, 0, 0]\n", "BITGEN_ERROR_TILES, unless portable kernels are allowed"
    granted = subprocess.run(create, env=env, capture_output=True, text=True, check=True)
    assert granted.stdout == "[0, 0, 0]\n"
