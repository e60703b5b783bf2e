"""The host part of a library as translation units: what runs a kernel, whoever calls it.

The tuner times kernels through the same ``bitgen_run`` that the shipped library calls, compiled from the same
text with the same flags.
"""

from __future__ import annotations

from bitgen.errors import EXIT_UNSUPPORTED, BitgenError
from bitgen.render import render_host
from bitgen.spec import K_MAX, X_ALIGN
from bitgen.toolchain import Unit

ARCHS = ("x86_64", "aarch64")

Headers = tuple[tuple[str, str], ...]


def host_headers(arch: str) -> Headers:
    """(file name, text) of the headers: bitgen.h is public, kernel.h, pool.h and arch.h are internal."""
    if arch not in ARCHS:
        raise BitgenError(
            f"there is no host code for {arch}; there is for {', '.join(ARCHS)}", EXIT_UNSUPPORTED
        )
    return (
        ("bitgen.h", render_host("bitgen.h.j2")),
        ("kernel.h", render_host("kernel.h.j2", x_align=X_ALIGN, k_max=K_MAX)),
        ("pool.h", render_host("pool.h.j2")),
        ("arch.h", render_host(f"arch_{arch}.h.j2")),
    )


def host_unit(name: str, text: str, headers: Headers) -> Unit:
    """A unit of host code: at the architecture's baseline, nothing visible that is not marked BITGEN_API."""
    return Unit(name, text, headers=headers, flags=("-fvisibility=hidden",))


def run_units(arch: str) -> tuple[Unit, ...]:
    """The units behind ``bitgen_run`` (see kernel.h): the thread pool, and one multiplication."""
    headers = host_headers(arch)
    return tuple(host_unit(name, render_host(f"{name}.c.j2"), headers) for name in ("pool", "run"))
