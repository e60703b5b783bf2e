"""Make the wheels of a release: each has the kernel library of a platform inside, so nobody needs a compiler.

    python tools/wheels.py -o dist                           # every platform that a compiler here makes
    python tools/wheels.py -o dist --platform x86_64-gnu     # one of them
    python tools/wheels.py -o dist --bundle FOLDER           # of a library that was made already

Where bitgen's Python does not run (Windows), or nobody has run what was built (macOS), it is a zip instead:
the library, what programs link with, its header, an example in C, and a text that says what was tried.

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

from bitgen.bundle.container import write_archive
from bitgen.bundle.elf import read_requirements
from bitgen.bundle.make import make_universal
from bitgen.bundle.manifest import MANIFEST_NAME, read_bundle
from bitgen.bundle.wheel import slim
from bitgen.errors import BitgenError
from bitgen.toolchain.linker import import_library

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ("x86_64-gnu", "aarch64-gnu", "x86_64-musl", "aarch64-musl")
ZIPS = {"x86_64-windows": "Windows", "aarch64-macos": "Darwin"}
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


README = {
    "Windows": """\
bitgen {version} for {arch} Windows: kernels for low-bit language models, as a library in C.

{library} serves every {arch} CPU: it takes the best of its ISA levels that the CPU has ({levels}).
A program finds it in its own folder, and is linked with {imports}, in Microsoft's and MinGW's format:

    zig cc -target x86_64-windows-gnu -O2 -ffp-contract=off -I. example.c {imports} -o example.exe
    cl /O2 /fp:precise /I. example.c {imports}

What was tried: example.c and the tests of the library under Wine, at AVX2 and in scalar code. Nobody has run
it under Windows itself, or linked it by Microsoft's linker. Bundles are not installed there, so
bitgen_bundle_open() refuses; bitgen's Python has WSL 2.
""",
    "Darwin": """\
bitgen {version} for {arch} macOS: kernels for low-bit language models, as a library in C.

{library} serves every {arch} CPU: it takes the best of its ISA levels that the CPU has ({levels}).

    cc -O2 -ffp-contract=off -I. example.c {library} -Wl,-rpath,. -o example

Built, never run: nobody has tried it on a Mac. example.c says whether it computes what it should.
""",
}


def zip_with(bundle: Path, out: Path) -> Path:
    """Write the zip of a library for C alone to the folder ``out``; returns its file."""
    manifest = read_bundle(bundle).manifest
    system = {"Darwin": "macos"}.get(manifest.system, manifest.system.lower())
    name = f"bitgen-{manifest.bitgen_version}-{system}-{manifest.arch}"
    text = README[manifest.system].format(
        version=manifest.bitgen_version,
        arch=manifest.arch,
        library=manifest.library,
        imports=import_library(manifest.library),
        levels=", ".join(manifest.isas),
    )
    files = {file: (bundle / file).read_bytes() for file in (*manifest.files, MANIFEST_NAME)}
    files |= {"example.c": (ROOT / "examples" / "c" / "example.c").read_bytes(), "README.txt": text.encode()}
    files["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    out.mkdir(parents=True, exist_ok=True)
    write_archive({f"{name}/{file}": data for file, data in files.items()}, out / f"{name}.zip")
    return out / f"{name}.zip"


def make(platform: str, folder: Path, cc: str | None) -> Path:
    """Make the universal bundle of a platform in ``folder``; returns it."""
    arch, libc = platform.split("-")
    if platform in ZIPS:
        return make_universal(arch, folder, system=ZIPS[platform], cc=cc)
    return make_universal(arch, folder, libc=libc, cc=cc)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the wheels of a release.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder that gets the wheels")
    parser.add_argument("--platform", action="append", choices=(*WHEELS, *ZIPS), help="default: all of them")
    parser.add_argument("--bundle", type=Path, help="a universal bundle instead of making one")
    parser.add_argument("--cc", help="C compiler (default: zig)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bundles = [args.bundle] if args.bundle else []
            for platform in () if args.bundle else args.platform or (*WHEELS, *ZIPS):
                bundles.append(make(platform, Path(scratch) / platform, args.cc))
            for bundle in bundles:
                thin = slim(bundle, Path(scratch) / f"slim-{bundle.parent.name}" / bundle.name)
                made = (wheel_with if read_bundle(thin).manifest.system == "Linux" else zip_with)(
                    thin, args.out
                )
                print(f"{made} ({made.stat().st_size:,} bytes)")
    except BitgenError as error:
        print(f"wheels: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
