"""One translation unit, and the functions it defines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitgen.errors import BitgenError

if TYPE_CHECKING:
    from bitgen.cpu import Isa

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_MAX_STEM = 120  # schedules make long names, file names end at 255 bytes


@dataclass(frozen=True)
class Prototype:
    """A C function: its name and its declaration, for example ``void f(const struct s *a)``."""

    name: str
    text: str

    def __post_init__(self) -> None:
        if not _IDENTIFIER.match(self.name) or not re.search(rf"\b{self.name}\s*\(", self.text):
            raise BitgenError(f"{self.text!r} does not declare a function {self.name!r}")

    @classmethod
    def parse(cls, text: str) -> Prototype:
        """The prototype that ``text`` declares. BitgenError when there is no function in it."""
        match = re.search(r"(\w+)\s*\(", text)
        return cls(match[1] if match else "", text)

    @property
    def declaration(self) -> str:
        """The text as a C statement."""
        return self.text.strip().removesuffix(";") + ";"


@dataclass(frozen=True)
class Unit:
    """A translation unit with flags of its own: ``isa`` None is host code at the architecture's baseline.

    ``functions`` are those it defines for Python, ``declarations`` the types their prototypes use (C text
    that cffi can parse). ``headers`` are (file name, text) pairs for its ``#include "..."`` lines.
    """

    name: str
    text: str
    isa: Isa | None = None
    functions: tuple[Prototype, ...] = ()
    declarations: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The name of its files."""
        return re.sub(r"[^A-Za-z0-9_]", "_", self.name)[:_MAX_STEM] or "unit"
