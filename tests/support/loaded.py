"""Compiled functions called in the process of a test: only code that the test trusts is loaded here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cffi

from bitgen.toolchain import Toolchain, Unit, build_library, declarations_of


@dataclass(frozen=True)
class Loaded:
    """``ffi`` makes arguments, ``lib.NAME(...)`` calls a function."""

    ffi: Any
    lib: Any

    def function(self, name: str) -> Any:
        """The function as a cdata pointer."""
        return self.ffi.addressof(self.lib, name)


def load_units(toolchain: Toolchain, units: Sequence[Unit]) -> Loaded:
    """The functions of ``units``, compiled and linked to a plain library."""
    ffi = cffi.FFI()
    ffi.cdef(declarations_of(units))
    return Loaded(ffi, ffi.dlopen(str(build_library(toolchain, units)), os.RTLD_NOW))
