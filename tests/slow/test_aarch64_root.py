"""What is built here runs on an ARM machine that has Python, the package and no compiler (under qemu)."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aarch64_root
import foreign
import pytest

from bitgen.api import build
from bitgen.bundle.make import make_universal
from bitgen.errors import ToolchainError, UnsupportedError
from bitgen.llm import LLM
from bitgen.paths import models_dir

# Core of qemu's -> the target whose library runs there, and the ISA level of its kernels.
CORES = {
    "cortex-a72": ("cortex-a72", "neon"),
    "neoverse-n1": ("neoverse-n1", "neon_dotprod"),
    "max": ("neoverse-v1", "neon_i8mm"),
}
# Bytes of qemu's SVE registers -> the level that one library with SVE for each length runs there.
LENGTHS = {16: "sve128", 32: "sve256", 64: "sve512"}
GREEDY: dict[str, Any] = json.loads((models_dir() / "tiny.json").read_text())["greedy"][0]
IDS = [
    *GREEDY["ids"],
    *GREEDY["tokens"],
]  # 53 tokens: kernels for many tokens and, with a prompt of 3, for few

PROGRAM = """\
import hashlib, json, sys
import numpy as np
import bitgen
from bitgen.cpu import accepted_isas, load_isas

library, ids, prompt, count = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
cpu = bitgen.detect_cpu()
rng = np.random.default_rng(0)
exact, used = [], []
with bitgen.load(library) as table:
    for m, k, n in ((3200, 320, 1), (100, 333, 5), (64, 640, 20)):
        w, xq = rng.integers(-1, 2, (m, k), np.int8), rng.integers(-128, 128, (n, k), np.int8)
        linear = table.linear(w, 1.0)
        acc = linear.accumulate(xq)
        exact.append(bool((acc == xq.astype(np.int32) @ w.T.astype(np.int32)).all()))
        used.append(linear.kernel(n).isa)
with bitgen.LLM("tiny", library=library, threads=1, head="screened") as llm:
    logits = [hashlib.sha256(llm.logits(part).tobytes()).hexdigest() for part in (ids[:3], ids)]
    generation = llm.generate(prompt, temperature=0, max_tokens=count)
    text = "".join(generation)
levels = [isa.name for isa in accepted_isas(cpu, load_isas())]
answer = {"arch": cpu.arch, "levels": levels, "exact": exact, "used": used, "logits": logits, "text": text}
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> aarch64_root.Aarch64Root:
    if foreign.why_not():
        pytest.skip(str(foreign.why_not()))
    try:
        return aarch64_root.made(tmp_path_factory.mktemp("aarch64") / "root")
    except aarch64_root.UnavailableError as error:
        pytest.skip(f"no aarch64 system here: {error}")


@pytest.fixture(
    scope="module",
    params=[pytest.param(core, marks=[pytest.mark.deep] if core == "cortex-a72" else []) for core in CORES],
)
def shipped(
    request: pytest.FixtureRequest,
    system: aarch64_root.Aarch64Root,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, str]:
    """A core, and the library for it that was built here and copied into the system."""
    target, level = CORES[request.param]
    return request.param, ship(system, target, level, tmp_path_factory.mktemp("built"))


def ship(system: aarch64_root.Aarch64Root, target: str, level: str, out: Path) -> str:
    """Build a library in ``out``, copy it into the system, and tell its name there."""
    bundle = build("tiny", target=target, system="Linux", isa=level, cc="gcc", out=out)
    shutil.copytree(bundle, system.folder / "home" / bundle.name, symlinks=True)
    return bundle.name


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def logits_here(level_library: Callable[[str], Path]) -> list[str]:
    """sha256 of the logits for three tokens and for all, by scalar code on this machine."""
    with LLM("tiny", library=level_library("scalar"), threads=1) as llm:
        return [hashlib.sha256(llm.logits(ids).tobytes()).hexdigest() for ids in (IDS[:3], IDS)]


def test_it_computes_what_this_machine_computes(
    shipped: tuple[str, str], system: aarch64_root.Aarch64Root, logits_here: list[str]
) -> None:
    """accumulate() equals numpy; a model's logits and, by a screened head, its text are those of scalar code.

    Though /proc/cpuinfo may be that of the machine below, the core's levels are known.
    """
    core, library = shipped
    answer = computed(system, library, core, len(GREEDY["tokens"]))
    _, level = CORES[core]
    assert answer["arch"] == "aarch64"
    assert level in answer["levels"]
    assert core == "max" or answer["levels"][0] == level
    assert answer["exact"] == [True, True, True]
    assert answer["used"] == [level] * 3
    assert answer["logits"] == logits_here
    assert answer["text"] == GREEDY["text"]


@pytest.mark.deep
def test_each_length_of_sve_computes_it(
    system: aarch64_root.Aarch64Root, tmp_path: Path, logits_here: list[str]
) -> None:
    """One library, three lengths of registers: kernels and forward step for each, the same bits."""
    library = ship(system, "a64fx", "sve512", tmp_path)
    for size, level in LENGTHS.items():
        answer = computed(system, library, f"max,sve-default-vector-length={size}", 4)
        assert answer["used"] == [level] * 3
        assert answer["exact"] == [True, True, True], level
        assert answer["logits"] == logits_here, level
        assert len(answer["text"]) > 0
        assert GREEDY["text"].startswith(answer["text"]), level


def computed(system: aarch64_root.Aarch64Root, library: str, core: str, tokens: int) -> dict[str, Any]:
    """What PROGRAM says on a core."""
    words = (library, json.dumps(IDS), GREEDY["prompt"], str(tokens))
    answer: dict[str, Any] = json.loads(said(system.run("-c", PROGRAM, *words, core=core)))
    return answer


def test_the_command_line_works_there(shipped: tuple[str, str], system: aarch64_root.Aarch64Root) -> None:
    """`bitgen run` with the library; on a core that lacks what a library needs one line says so."""
    core, library = shipped
    options = ("--library", library, "--temp", "0", "-n", "16", "--no-perf", "-p", GREEDY["prompt"])
    if core == "cortex-a72":
        pytest.skip("as on neoverse-n1, and every core runs this library")
    done = system.run("-m", "bitgen", "run", "-m", "tiny", *options, core="neoverse-n1")
    if core == "neoverse-n1":
        assert (GREEDY["prompt"] + GREEDY["text"]).startswith(said(done).rstrip("\n"))
        assert len(said(done)) > len(GREEDY["prompt"]) + 16
    else:
        assert done.returncode == UnsupportedError.exit_code
        assert "lacks i8mm" in done.stderr
        assert done.stderr.count("\n") == 1


def test_without_a_library_and_a_compiler_the_way_out_is_named(system: aarch64_root.Aarch64Root) -> None:
    done = system.run("-m", "bitgen", "run", "-m", "tiny", "-p", "x")
    assert done.returncode == ToolchainError.exit_code
    assert "no C compiler found: install gcc or clang, or pip install ziglang" in done.stderr


@pytest.mark.deep
def test_the_wheel_of_its_platform_needs_no_compiler(
    system: aarch64_root.Aarch64Root, tmp_path: Path
) -> None:
    """Unpacked as pip does it: each core takes its ISA level, and writes the text of every other machine."""
    bundle = make_universal("aarch64", tmp_path / "made", cc="gcc")
    script = Path(__file__).parents[2] / "tools" / "wheels.py"
    subprocess.run([sys.executable, script, "--bundle", bundle, "-o", tmp_path], check=True)
    (wheel,) = tmp_path.glob("bitgen-*_aarch64.whl")
    home = system.folder / "home"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home)  # -m looks in the working directory first
    try:
        for core, (_, level) in CORES.items():
            picked = json.loads(said(system.run("-m", "bitgen", "bundle", "pick", "-o", "json", core=core)))
            assert picked["chosen"] == str(home / "bitgen/_data/bundles/universal-aarch64")
            assert core == "max" or picked["isa"] == level
        words: tuple[str, ...] = ("run", "-m", "tiny", "--temp", "0", "--no-perf", "-p", GREEDY["prompt"])
        done = system.run("-m", "bitgen", *words, "-n", str(len(GREEDY["tokens"])), core="neoverse-n1")
        assert said(done) == GREEDY["prompt"] + GREEDY["text"] + "\n"
        words = ("perplexity", "-m", "tiny", "-c", "64", "-f", "-")
        assert "perplexity" in said(system.run("-m", "bitgen", *words, text="In the beginning. " * 40))
        words = ("bench", "-m", "tiny", "-p", "8", "-n", "4", "-r", "1")
        assert "universal-aarch64" in said(system.run("-m", "bitgen", *words))
        assert said(system.run("-m", "bitgen", "chat", "-m", "tiny", "-n", "4", text="In the beginning"))
    finally:
        shutil.rmtree(home / "bitgen")


@pytest.mark.deep
def test_tuning_works_there(system: aarch64_root.Aarch64Root) -> None:
    """The whole way of `bitgen tune`, with the cross compiler of this machine as the compiler there."""
    compiler = str(shutil.which("aarch64-linux-gnu-gcc"))
    options = ("--family", "i2s", "--regime", "n1", "--cc", compiler, "-t", "1", "-o", "json")
    done = system.run(
        "-m", "bitgen", "tune", "-m", "tiny", "--dry-run", *options, core="neoverse-n1", timeout_s=900
    )
    (group,) = json.loads(said(done))["groups"]
    assert (group["group"], group["exact"], group["failed"]) == ("I2_S neon_dotprod n1, 1 thread", 2, 0)
    assert not list((system.folder / "home").rglob("*.jsonl"))
