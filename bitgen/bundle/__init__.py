"""Chosen kernels -> a library that works without Python: rendered, compiled, proven by running it, written.

What is written is a bundle (see `bitgen.bundle`)::

    NAME/libbitgen-NAME.so      the library;  libbitgen-NAME.so.1 is a link to it, for programs that load it
    NAME/bitgen.h               its public header
    NAME/bitgen.pc              for pkg-config; the folder may be moved
    NAME/manifest.json          what is inside, with digests
    NAME/src/                   the C text it was made from, and a Makefile

Beside the chosen kernels a library always holds, for each layout that occurs and for I2_S, kernels of the
target's ISA level with default schedules and portable ones: every shape is served, tuned or not. SVE leaves
the length of registers to the system: a library with kernels for one length holds others for the rest.
"""

from __future__ import annotations

from bitgen.library.contents import DEFAULT_LAYOUT, Contents, KernelChoice, Target, choose_contents
from bitgen.library.units import library_units_of, table_values
from bitgen.library.write import write_library

__all__ = [
    "DEFAULT_LAYOUT",
    "Contents",
    "KernelChoice",
    "Target",
    "choose_contents",
    "library_units_of",
    "table_values",
    "write_library",
]
