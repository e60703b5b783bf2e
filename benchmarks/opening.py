"""How long it takes to install, choose and open a bundle, and to get a first token of the tiny model.

    python benchmarks/opening.py DIST.zip [-r 10]      # a distribution made by `bitgen bundle make`

Everything is in a folder of its own, with a key of its own. Times are of the processor and, in brackets, of
the clock; each repetition is a new process, and the median is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

SIGN = """
from bitgen.bundle.pack import pack
from bitgen.trust import signatures
secret, _ = signatures().generate(None)
signer = signatures().Signer(secret, None, "the key")
import pathlib, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as archive:
    archive.extractall("dist")
pack([pathlib.Path("dist")], pathlib.Path("signed.zip"), signer=signer)
pathlib.Path("key").write_text(signer.public.text)
"""
# Each into a folder of its own: file systems take longer for files whose like were deleted a moment ago.
INSTALL = """
import os, pathlib, tempfile
os.environ["BITGEN_HOME"] = tempfile.mkdtemp(dir=os.environ["BITGEN_HOME"])
from bitgen.bundle.install import install
from bitgen.trust import TrustStore, signatures
signatures()
TrustStore().add(pathlib.Path("key").read_text())
start()
install("signed.zip")
stop("install, signature and all files checked")
"""
INSTALL_HERE = """
import pathlib
from bitgen.bundle.install import install
from bitgen.trust import TrustStore
TrustStore().add(pathlib.Path("key").read_text())
install("signed.zip")
"""
OPEN = """
import bitgen.inference.opening, bitgen.runtime
from bitgen.formats.open import open_model
config = open_model("tiny").config
start()
bundle = bitgen.inference.opening.find_library(config)
stop("choose")
start()
bitgen.runtime.load(bundle, 1)
stop("load, hash included")
"""
FIRST = """
start()
import bitgen
llm = bitgen.LLM("tiny", threads=1)
next(iter(llm.generate("In the beginning", max_tokens=1, temperature=0)))
stop("import to first token")
"""
_SETTLED_S = 6.0  # ext4 steps over what was deleted within 5 s, as packing does
CLOCK = """
import time
def start():
    global began
    began = time.process_time(), time.perf_counter()
def stop(what):
    import json
    print(json.dumps([what, time.process_time() - began[0], time.perf_counter() - began[1]]), flush=True)
"""


def measured(program: str, home: Path, *argv: str) -> list[tuple[str, float, float]]:
    """Run a program in a new process: (what, seconds of the processor, of the clock)."""
    env = {**os.environ, "BITGEN_HOME": str(home)}
    if env.pop("PYTHONDONTWRITEBYTECODE", ""):  # an installed bitgen is compiled once, not at each start
        env["PYTHONPYCACHEPREFIX"] = str(home / "compiled Python")
    words = [sys.executable, "-c", CLOCK + program, *argv]
    done = subprocess.run(words, cwd=home, env=env, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time installing, choosing and opening a bundle.")
    parser.add_argument("distribution", type=Path, help="an unsigned zip made by `bitgen bundle make`")
    parser.add_argument("-r", "--repetitions", type=int, default=10)
    args = parser.parse_args()
    if not zipfile.is_zipfile(args.distribution):
        sys.exit(f"{args.distribution} is no zip; `bitgen bundle make` writes one")
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as home:
        measured(SIGN, Path(home), str(args.distribution.absolute()))
        time.sleep(_SETTLED_S)
        runs = args.repetitions + 1
        for program in (*[INSTALL] * runs, INSTALL_HERE, *[OPEN] * runs, *[FIRST] * runs):
            for what, cpu, clock in measured(program, Path(home)):
                times.setdefault(what, []).append((cpu, clock))
    for what, taken in times.items():
        # The first one reads from a cold disk, or packs weights.
        cpu, clock = (statistics.median(column) * 1e3 for column in zip(*taken[1:], strict=True))
        print(f"{what:45} {cpu:8.1f} ms ({clock:.1f})")


if __name__ == "__main__":
    main()
