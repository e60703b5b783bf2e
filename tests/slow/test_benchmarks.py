"""Every script of benchmarks/ does its smallest piece of work, or says in one line what it lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import share_cache
from model_files import preset_yaml

from bitgen.cpu import accepted_isas, detect_cpu, load_isas

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"
BEST = accepted_isas(detect_cpu(), load_isas())[0].name
TINY = preset_yaml("tests/tiny", hidden=256, ffn=512, layers=1, heads=2, kv_heads=1, head_dim=128, vocab=64)
MODULES = {"oracle", "replay", "served"}  # imported by other scripts, and by tests; nothing to run

SERVED = {"threads": 1, "rounds": 1, "tokens": 8, "long": 64, "prefix": 32, "mix": 32, "stream": 64}

# What each does with the least of everything; {model} and {folder} are filled in. A line that it prints.
RUNS = {
    "all": (["--list"], "bitgen tune --model 3B"),
    "search_study": (["--log", "{log}", "--seeds", "1"], "median regret"),
    "cost_model": (["--regime", "small", "--seeds", "1"], "what a search tries first"),
    "kernels": (
        ["decode", "--model", "{model}", "--isa", BEST, "--family", "i2s", "--rounds", "1"],
        "of DRAM",
    ),
    "instructions": (["--family", "i2s", "--isa", BEST], "inner loops, n1"),
    "step": (
        ["--model", "{model}", "--threads", "1", "--context", "4", "--prompt", "4", "--rounds", "1"],
        "beyond matrices",
    ),
    "make_peer_model": (["--model", "{model}", "--work", "{folder}", "--type", "Q4_0"], "Q4_0.gguf"),
    "peer_bitgen": (["{model}", "--context", "8"], '"bytes"'),
    "serve": (
        ["--model", "tiny", "--draft", "tiny", *(f"--{what}={n}" for what, n in SERVED.items())],
        "a repeated start",
    ),
    "activations": (["-m", "{model}", "-t", "1", "--tokens", "1", "--rounds", "1"], "int16"),
}
PACKAGES = {"peer_ik": "ik_llama_cpp", "peer_llama": "llama_cpp"}
# Scripts that need what is rarely installed, and what they say without it.
LACKS = {
    "peers": (
        ["--model", "{model}", "--work", "{folder}"],
        "name a peer's Python with --ik, --llama or both",
    ),
    "hf": (["--model", "none"], "none"),
    "opening": (["none.zip"], "none.zip"),
    "tunes": (["tune"], "give tune:SECONDS"),
    "quantize": (["-m", "none.gguf", "--work", "{folder}"], "none.gguf does not exist"),
    "peer_ik": (["none.gguf"], "this Python has no ik-llama-cpp-python"),
    "peer_llama": (["none.gguf"], "this Python has no llama-cpp-python"),
    "arm_loops": (["--core", "neoverse-n1", "--family", "i2s", "--llvm", "0"], "llvm-mca-0"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return share_cache(tmp_path_factory.mktemp("benchmarks") / "home")


def run(home: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return started(home, str(SCRIPTS / f"{script}.py"), *words)


def started(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=home,
        env={**os.environ, "BITGEN_HOME": str(home), "PYTHONPATH": f"{ROOT}:{SCRIPTS}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def filled(words: list[str], folder: Path) -> list[str]:
    model, log = folder / "tiny.yaml", folder / "log.jsonl.gz"
    model.write_text(TINY)
    if "{log}" in words:
        import gzip

        with gzip.open(SCRIPTS / "data" / "spaces-zen4.jsonl.gz", "rt") as lines, gzip.open(log, "wt") as few:
            few.writelines(line for line, _ in zip(lines, range(4), strict=False))  # one group
    return [word.format(model=model, folder=folder, log=log) for word in words]


def test_every_script_is_here() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {*RUNS, *LACKS, *MODULES, "peer_side"}


# In one process, as each imports the same; the tests below start every script by itself.
HELP = """
import contextlib, io, json, runpy, sys
said = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            said[script] = stop.code, out.getvalue()
print(json.dumps(said))
"""


def test_every_script_tells_what_it_does(home: Path) -> None:
    scripts = [str(SCRIPTS / f"{name}.py") for name in (*RUNS, *LACKS)]
    done = started(home, "-c", HELP, *scripts)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert list(said) == scripts
    for script, (code, text) in said.items():
        assert not code, script
        assert text.startswith(f"usage: {Path(script).name}")


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.deep if name == "serve" else ()) for name in RUNS]
)
def test_a_script_runs(script: str, home: Path, tmp_path: Path) -> None:
    if script == "instructions" and not shutil.which("objdump"):
        pytest.skip("there is no objdump")
    words, says = RUNS[script]
    done = run(home, script, *filled(words, tmp_path))
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_all_keeps_what_it_makes(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run(home, "all", "--only", "opening", "--out", str(out), "--distribution", "none.zip")
    assert done.returncode == 1
    assert "opening: " in done.stdout
    assert "none.zip" in json.loads(out.read_text())["figures"]["opening"]["error"]
    done = run(home, "all", "--only", "opening", "--only", "peers-3B", "--out", str(out))
    assert done.returncode == 0
    assert "peers-3B: skipped, give --work and --ik" in done.stdout
    held = json.loads(out.read_text())
    assert held["figures"]["peers-3B"]["skipped"] == "give --work and --ik"
    assert held["machine"]["cpu"]["family"] == detect_cpu().family
    for wrong in (["--only", "no"], ["--out", str(Path(__file__))]):
        done = run(home, "all", *wrong)
        assert done.returncode != 0
        assert len(done.stderr.splitlines()) == 1


def test_every_command_of_the_documents_is_a_figure() -> None:
    """A script that a page quotes is run by `all.py`; what they do is theirs."""
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))
    quoted = set(re.findall(r"python benchmarks/(\w+)\.py", text)) - {"all", "make_peer_model"}
    commands = (SCRIPTS / "all.py").read_text()
    assert {script for script in quoted if f'"{script}.py' not in commands} == set()


@pytest.mark.parametrize("script", LACKS)
def test_what_a_script_lacks_is_said_in_one_line(script: str, home: Path, tmp_path: Path) -> None:
    if script in PACKAGES and importlib.util.find_spec(PACKAGES[script]):
        pytest.skip(f"{PACKAGES[script]} is installed")
    words, says = LACKS[script]
    done = run(home, script, *filled(words, tmp_path))
    assert done.returncode != 0
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
