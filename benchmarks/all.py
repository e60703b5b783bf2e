"""Remake every figure of the documents on this machine, one after another, and keep them in one file.

    python benchmarks/all.py --list                        # what there is, and what a machine lacks for it
    python benchmarks/all.py --work FOLDER --ik PYTHON     # all of it: hours, best with nothing else running
    python benchmarks/all.py --only decode-3B --only step-3B

Each figure is a command of the documents, run as it stands there. Its result goes into
build/figures-MACHINE.json (--out names another file), with what the machine is and how loaded it was: CPU,
memory, kernel, compiler, commit. A run that was cut short goes on behind what the file holds; --fresh starts
again. What a machine lacks (a peer's Python, a folder for the peers' files, a level of its CPU) is recorded
as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitgen import __version__
from bitgen.cli.tables import Column, Table, render_tables
from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.cpu.linux import available_memory
from bitgen.errors import BitgenError, FileError
from bitgen.records import dump
from bitgen.toolchain import find_compilers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Figure:
    """A command of the documents, for level ``isa``; words in braces are options of this run."""

    name: str
    page: str
    command: str
    isa: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """The options that must be given."""
        return tuple(re.findall(r"{(\w+)}", self.command.replace("{threads}", "")))


_PERFORMANCE = "docs/reference/performance.md"
_PEERS = "peers.py --work {work} --ik {ik} --threads {threads}"

# In this order: what was tuned and built first is what the others run.
FIGURES = (
    Figure("tune-3B", _PERFORMANCE, "bitgen tune --model 3B -o json"),
    Figure("build-3B", _PERFORMANCE, "bitgen build --model 3B"),
    Figure("tune-2B-4T", _PERFORMANCE, "bitgen tune --model 2B-4T -o json"),
    Figure("build-2B-4T", _PERFORMANCE, "bitgen build --model 2B-4T"),
    Figure("tune-3B-1", _PERFORMANCE, "bitgen tune --model 3B --threads 1 --regime n1 -o json"),
    Figure("tune-3B-avx2", _PERFORMANCE, "bitgen tune --model 3B --isa avx2 --regime n1 -o json", isa="avx2"),
    Figure(
        "decode-3B", _PERFORMANCE, "kernels.py decode --model 3B --threads 1,{threads} --rounds 21 -o json"
    ),
    Figure(
        "decode-3B-avx2",
        _PERFORMANCE,
        "kernels.py decode --model 3B --threads 1,{threads} --rounds 15 --isa avx2 --family i2s --family t5 "
        "--family tl5 -o json",
        isa="avx2",
    ),
    Figure(
        "decode-3B-avx512_vnni",
        _PERFORMANCE,
        "kernels.py decode --model 3B --threads 1,{threads} --rounds 15 --isa avx512_vnni --family i2s "
        "--family t5 --family tl5 -o json",
        isa="avx512_vnni",
    ),
    Figure(
        "batch-3B",
        _PERFORMANCE,
        "kernels.py batch --model 3B --threads {threads} --family i2s --family t5 -o json",
    ),
    Figure("prefill-3B", _PERFORMANCE, "kernels.py prefill --model 3B --threads 1 -n 128 -o json"),
    Figure("step-3B", _PERFORMANCE, "step.py --model 3B --threads 1,{threads} -o json"),
    Figure(
        "step-3B-4k", _PERFORMANCE, "step.py --model 3B --threads {threads} --context 4096 --kv q8 -o json"
    ),
    Figure("peers-3B", _PERFORMANCE, f"{_PEERS} --model 3B -o json"),
    Figure(
        "peers-2B-4T-llama",
        _PERFORMANCE,
        f"{_PEERS} --llama {{llama}} --model 2B-4T --tests pp128,tg32 -o json",
    ),
    Figure(
        "peers-2B-4T-4k",
        _PERFORMANCE,
        f"{_PEERS} --model 2B-4T --type IQ2_BN_R4 --tests tg32,tg32@d4096 --kv q8 -o json",
    ),
    Figure(
        "heads-2B-4T",
        _PERFORMANCE,
        "peers.py --work {work} --model 2B-4T --bitgen best=40 --bitgen head=screened,best=40 "
        "--threads {threads} --rounds 7 --tests tg32 -o json",
    ),
    Figure(
        "serve-3B",
        "docs/guide/serving.md",
        "serve.py streams step stall prefix cpu --model 3B --threads {threads} -o json",
    ),
    Figure("bench-100B", _PERFORMANCE, "bitgen bench -m 100B -p 0 -n 8 -r 3 -o json"),
    Figure("kernels-3B", "docs/guide/tuning.md", "bitgen bench --kernels --model 3B -o json"),
    Figure(
        "activations",
        "docs/reference/activations.md",
        "activations.py -m Bonsai-1.7B -t {threads} --tokens 1,128 --rounds 5",
    ),
    Figure(
        "four-bits",
        "docs/guide/four-bits.md",
        "kernels.py decode --model 3B --group 32 --family q4m --family t4 --threads {threads} --rounds 9 "
        "-o json",
    ),
    Figure("instructions", "docs/reference/kernels.md", "instructions.py -o json"),
    Figure("arm-loops", "docs/reference/performance-arm.md", "arm_loops.py -o json"),
    Figure("search", "docs/lab/search.md", "search_study.py -o json"),
    Figure("cost-model", "docs/lab/search.md", "cost_model.py -o json"),
    Figure(
        "tunes-3B",
        "docs/lab/search.md",
        "tunes.py tune:480 tune:150 loaded:150 loaded:150 loaded:150 transferred committed --model 3B "
        "--threads {threads} -o json",
    ),
    Figure(
        "transformers",
        "docs/guide/python.md",
        "hf.py --model 2B-4T --prompt 32 --steps 3 --repeats 2 --mode eager --mode own --threads {threads} "
        "-o json",
    ),
    Figure(
        "transformers-compiled",
        "docs/guide/python.md",
        "hf.py --model 2B-4T --layers 6 --prompt 32 --steps 4 --repeats 3 --threads {threads} -o json",
    ),
    Figure("opening", "docs/guide/bundles.md", "opening.py {distribution}"),
    Figure(
        "quantised",
        "docs/guide/quantising.md",
        "quantize.py -m {smollm2} --work {work} --windows 4 --speed {threads}",
    ),
)


def machine() -> dict[str, Any]:
    """What made the figures: CPU, memory, system, compiler, this code, and the load before them."""
    git = shutil.which("git")
    commit = ""
    if git:
        said = subprocess.run(
            [git, "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        commit = said.stdout.strip()
    return {
        "cpu": dump(detect_cpu()),
        "available_memory": available_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "compilers": [compiler.version.splitlines()[0] for compiler in find_compilers()],
        "bitgen": __version__,
        "commit": commit,
        "load": os.getloadavg()[0],
    }


def lacks(figure: Figure, options: Mapping[str, str | None], levels: frozenset[str]) -> str:
    """Why a figure cannot be made here; empty where it can."""
    if figure.isa and figure.isa not in levels:
        return f"this CPU does not run {figure.isa}"
    missing = [f"--{need}" for need in figure.needs if not options.get(need)]
    return f"give {' and '.join(missing)}" if missing else ""


def command_of(figure: Figure, options: Mapping[str, str | None]) -> list[str]:
    """The words of a figure's command; scripts and bitgen run in this Python."""
    first, *rest = figure.command.split()
    start = [sys.executable, "-m", "bitgen"] if first == "bitgen" else [sys.executable, str(HERE / first)]
    return [*start, *(word.format(**options) for word in rest)]


def make(figure: Figure, options: Mapping[str, str | None]) -> dict[str, Any]:
    """Run a figure's command: what it printed (tables, where it is JSON), or the last line of an error."""
    load, started = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run(
        command_of(figure, options), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    made: dict[str, Any] = {
        "page": figure.page,
        "command": figure.command.format(**{**options, "work": "FOLDER", "ik": "PYTHON", "llama": "PYTHON"}),
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_before": load,
        "seconds": round(time.perf_counter() - started, 1),
        "exit_code": done.returncode,
    }
    if done.returncode:
        return {**made, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    try:
        return {**made, "result": json.loads(done.stdout)}
    except ValueError:
        return {**made, "result": done.stdout}


def read(file: Path) -> dict[str, Any]:
    """The figures a file holds; FileError where it is none of these files."""
    if not file.exists():
        return {"machine": machine(), "figures": {}}
    try:
        held = json.loads(file.read_text())
        return {"machine": dict(held["machine"]), "figures": dict(held["figures"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{file} holds no figures of this script: name another file with --out") from None


def write(file: Path, held: dict[str, Any]) -> None:
    """The file whole, or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(held, indent=1) + "\n")
    part.replace(file)


def run(args: argparse.Namespace) -> int:
    """Make what is asked for; the number of figures that failed."""
    cpu = detect_cpu()
    levels = frozenset(isa.name for isa in accepted_isas(cpu, load_isas()))
    options = {
        "threads": str(args.threads or cpu.usable_threads),
        **{name: getattr(args, name) for name in ("work", "ik", "llama", "distribution", "smollm2")},
    }
    known = {figure.name for figure in FIGURES}
    if unknown := sorted(set(args.only) - known):
        raise BitgenError(f"there is no figure {', '.join(unknown)}: --list shows them")
    figures = [figure for figure in FIGURES if not args.only or figure.name in args.only]
    if args.list:
        rows = [(f.name, f.page, lacks(f, options, levels), f.command) for f in figures]
        columns = (Column("name", "figure"), Column("page", "page"), Column("lacks", "lacks"))
        print(render_tables([Table("figures", (*columns, Column("command", "command")), rows)], "text"))
        return 0
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{cpu.family}-{cpu.usable_threads}").strip("-")
    file = args.out or ROOT / "build" / f"figures-{name}.json"
    held = {"machine": machine(), "figures": {}} if args.fresh else read(file)
    failed = 0
    for figure in figures:
        before = held["figures"].get(figure.name)
        if before and before.get("exit_code") == 0 and not args.only:
            print(f"{figure.name}: in {file} already", flush=True)
            continue
        if reason := lacks(figure, options, levels):
            held["figures"].setdefault(figure.name, {"page": figure.page, "skipped": reason})
            print(f"{figure.name}: skipped, {reason}", flush=True)
        else:
            made = held["figures"][figure.name] = make(figure, options)
            failed += bool(made["exit_code"])
            print(f"{figure.name}: {made.get('error', 'made')} ({made['seconds']:.0f} s)", flush=True)
        write(file, held)
    print(f"{file}: {len(held['figures'])} figures")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the figures, and what is missing for each here")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this one; repeatable")
    parser.add_argument("--fresh", action="store_true", help="make again what the file holds")
    parser.add_argument("--out", type=Path, help="the file (build/figures-MACHINE.json)")
    parser.add_argument("--threads", type=int, help="where a figure is about all cores (all usable ones)")
    parser.add_argument("--work", help="a folder for the peers' files")
    parser.add_argument("--ik", metavar="PYTHON", help="a Python with ik-llama-cpp-python")
    parser.add_argument("--llama", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--distribution", metavar="ZIP", help="a distribution of bundles")
    parser.add_argument("--smollm2", metavar="FILE", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    try:
        sys.exit(1 if run(parser.parse_args()) else 0)
    except BitgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
