"""One translation unit, and the lines that make the compiler check it against what Python believes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from bitgen.errors import BitgenError

if TYPE_CHECKING:
    import cffi

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

    ``functions`` are the functions it defines for others, ``declarations`` the types their prototypes use
    (C text that cffi can parse). ``headers`` are (file name, text) pairs for its ``#include "..."`` lines.
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

    @property
    def checked_text(self) -> str:
        """``text``, then the prototypes and struct layouts that Python will call it with.

        The definitions stand above in the same translation unit, so whatever differs is a compile error
        there. A declaration in the caller's unit alone would be believed, and link.
        """
        if not self.functions:
            return self.text
        prototypes = [function.declaration for function in self.functions]
        used = "\n".join(prototypes)
        layouts = [
            check
            for struct, check in _layout_checks(self.declarations)
            if re.search(rf"\bstruct {struct}\b", used)
        ]
        banner = "/* What Python calls: it must agree with the definitions above. */"
        return "\n".join((self.text.rstrip("\n"), "", banner, *layouts, *prototypes, ""))


@lru_cache(maxsize=16)
def _layout_checks(declarations: str) -> tuple[tuple[str, str], ...]:
    """For each struct of ``declarations``: its name and C assertions of its fields' sizes and offsets."""
    if not declarations.strip():
        return ()
    import cffi  # lazily: pycparser costs 50 ms

    ffi = cffi.FFI()
    try:
        ffi.cdef(declarations)
        _, structs, _ = ffi.list_types()
        return tuple((name, _struct_check(ffi, f"struct {name}")) for name in structs)
    except (cffi.CDefError, cffi.FFIError) as error:
        raise BitgenError(f"cffi cannot read these C declarations: {error}") from error


def _struct_check(ffi: cffi.FFI, struct: str) -> str:
    lines = [_static_assert(f"sizeof({struct})", ffi.sizeof(struct), struct)]
    for name, fld in ffi.typeof(struct).fields or ():
        what = f"{struct}.{name}"
        lines.append(_static_assert(f"__builtin_offsetof({struct}, {name})", fld.offset, what))
        lines.append(_static_assert(f"sizeof((({struct} *)0)->{name})", ffi.sizeof(fld.type), what))
    return "\n".join(lines)


def _static_assert(expression: str, value: int, what: str) -> str:
    return f'_Static_assert({expression} == {value}, "{what} is not what Python expects");'
