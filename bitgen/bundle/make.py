"""Make the libraries of a release: from committed winners, stripped, with the release compiler.

Nothing that was tuned on this machine goes in: (winners, templates, compiler) decide the bytes.
"""

from __future__ import annotations

import platform
from pathlib import Path

from bitgen.bundle.contents import Target
from bitgen.bundle.transfer import committed_kernels, every_committed_shape
from bitgen.bundle.write import write_library
from bitgen.cpu import detect_cpu
from bitgen.toolchain import Toolchain, release_compiler

UNIVERSAL = "universal"


def make_universal(
    arch: str,
    out: Path,
    *,
    system: str = "Linux",
    libc: str = "gnu",
    cc: str | None = None,
    sources: bool = True,
    check: bool = True,
) -> Path:
    """Write the bundle ``out/universal-ARCH`` with all ISA levels of an architecture; returns its folder.

    ``libc``: gnu or musl, of Linux. ``sources``: with the C text. It is executed at each level of this CPU
    where this machine can (``check``). Errors: as of `bitgen.bundle.write.write_library`.
    """
    target = Target.every(arch, system)
    compiler = release_compiler(arch, system, cc, libc=libc)
    chosen = committed_kernels(target, every_committed_shape(arch))
    here = detect_cpu()
    native = (here.arch, here.os) == (arch, system) and (libc == "gnu") == (platform.libc_ver()[0] == "glibc")
    return write_library(
        chosen.entries,
        Toolchain(compiler, strip=True),
        out,
        f"{UNIVERSAL}-{arch}",
        target,
        label=chosen.label,
        origin=chosen.origin,
        check=check and native,
        sources=sources,
    )
