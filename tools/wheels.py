"""Make the wheels of a release: each has the kernel library of a platform inside, so nobody needs a compiler.

    python tools/wheels.py -o dist                           # every platform that a compiler here makes
    python tools/wheels.py -o dist --platform x86_64-gnu     # one of them
    python tools/wheels.py -o dist --bundle FOLDER           # of a library that was made already

The compiler is --cc, else zig (pip install ziglang), else what is found. The tag of a wheel says what its
library asks of a system, read from the library: with zig that is glibc 2.17 or musl 1.2, with gcc what this
system has. `python -m hatchling build` makes the wheel for any platform, which compiles its library when it
is first used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bitgen.bundle.elf import read_requirements
from bitgen.bundle.make import make_universal
from bitgen.bundle.manifest import read_bundle
from bitgen.bundle.wheel import slim
from bitgen.errors import BitgenError

ROOT = Path(__file__).resolve().parents[1]
PLATFORMS = ("x86_64-gnu", "aarch64-gnu", "x86_64-musl", "aarch64-musl")
SIZE_LIMIT = 10_000_000  # bytes of a wheel


def wheel_with(bundle: Path, out: Path) -> Path:
    """Write the wheel of bitgen that holds ``bundle`` to the folder ``out``; returns its file."""
    if (bundle / "bitgen.h").read_bytes() != (ROOT / "csrc" / "bitgen.h").read_bytes():
        raise BitgenError(f"{bundle} was made of another checkout: its header is not csrc/bitgen.h")
    tag = read_requirements(read_bundle(bundle).library).wheel_tag
    environment = {**os.environ, "BITGEN_WHEEL_BUNDLE": str(bundle.absolute()), "BITGEN_WHEEL_TAG": tag}
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out.absolute())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BitgenError(f"hatchling could not build the wheel: {done.stderr.strip().splitlines()[-1:]}")
    made = next(out.glob(f"bitgen-*-{tag}.whl"))
    if made.stat().st_size > SIZE_LIMIT:
        raise BitgenError(f"{made} has {made.stat().st_size:,} bytes, more than {SIZE_LIMIT:,}")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the wheels of a release.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder that gets the wheels")
    parser.add_argument("--platform", action="append", choices=PLATFORMS, help="default: all of them")
    parser.add_argument("--bundle", type=Path, help="a universal bundle instead of making one")
    parser.add_argument("--cc", help="C compiler (default: zig)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bundles = [args.bundle] if args.bundle else []
            for platform in () if args.bundle else args.platform or PLATFORMS:
                arch, libc = platform.split("-")
                folder = Path(scratch) / platform
                bundles.append(make_universal(arch, folder, libc=libc, cc=args.cc))
            for bundle in bundles:
                made = wheel_with(
                    slim(bundle, Path(scratch) / f"slim-{bundle.parent.name}" / bundle.name), args.out
                )
                print(f"{made} ({made.stat().st_size:,} bytes)")
    except BitgenError as error:
        print(f"wheels: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
