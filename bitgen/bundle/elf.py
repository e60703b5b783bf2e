"""What a shared library of Linux asks of its system: other libraries, and versions of their symbols.

A reader of the few tables of ELF (64-bit, little-endian) that say so, System V ABI chapters 4 and 5 and the
Linux Standard Base on symbol versions. Pure: no loader and no binutils.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitgen.errors import FileError

_MACHINES = {62: "x86_64", 183: "aarch64"}
_DYNAMIC, _VERNEED = 6, 0x6FFFFFFE
_NEEDED = 1
_NUMBER = re.compile(r"\d+")
_GLIBC = re.compile(r"GLIBC_(\d+(?:\.\d+)+)")


@dataclass(frozen=True)
class Requirements:
    """``needed``: names of libraries; ``versions``: (library, version) of symbols, from .gnu.version_r."""

    arch: str
    needed: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]

    @property
    def glibc(self) -> tuple[int, ...] | None:
        """The newest version of glibc whose symbols it uses; None when it uses none of glibc's."""
        found = [match[1] for _, version in self.versions if (match := _GLIBC.fullmatch(version))]
        return max((tuple(map(int, text.split("."))) for text in found), default=None)

    @property
    def wheel_tag(self) -> str:
        """The tag of a wheel that holds it, by PEP 600 (glibc) or PEP 656 (musl); never less than is true."""
        if self.glibc is None and "libc.so" in self.needed:
            return f"py3-none-musllinux_1_2_{self.arch}"
        major, minor = max((self.glibc or (2, 17))[:2], (2, 17))
        older = f".manylinux2014_{self.arch}" if (major, minor) == (2, 17) else ""
        return f"py3-none-manylinux_{major}_{minor}_{self.arch}{older}"


def common_tag(libraries: Sequence[Requirements]) -> str:
    """The tag of a wheel that holds all of the ``libraries``, of one architecture and C library."""
    return max(
        (library.wheel_tag for library in libraries), key=lambda tag: [*map(int, _NUMBER.findall(tag))]
    )


def read_requirements(path: Path) -> Requirements:
    """What the library at ``path`` needs. FileError when it is no such library."""
    data = path.read_bytes()
    try:
        return _read(data)
    except (struct.error, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is no shared library of Linux, or is damaged: {error}") from error


def _read(data: bytes) -> Requirements:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it is not ELF of 64 bits")
    machine = struct.unpack_from("<H", data, 18)[0]
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    # (type, offset, size, link, info) of each section
    sections = [struct.unpack_from("<4xI16xQQII", data, table + i * size) for i in range(count)]
    needed: list[str] = []
    versions: list[tuple[str, str]] = []
    for kind, offset, length, link, info in sections:
        strings = sections[link][1] if link < count else 0
        if kind == _DYNAMIC:
            entries = struct.iter_unpack("<QQ", data[offset : offset + length])
            needed += [_text(data, strings + value) for tag, value in entries if tag == _NEEDED]
        elif kind == _VERNEED:
            versions += _versions(data, offset, info, strings)
    return Requirements(_MACHINES[machine], tuple(needed), tuple(sorted(versions)))


def _versions(data: bytes, at: int, count: int, strings: int) -> list[tuple[str, str]]:
    found = []
    for _ in range(count):
        _, entries, file, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(entries):
            name, after = struct.unpack_from("<8xII", data, entry)
            found.append((_text(data, strings + file), _text(data, strings + name)))
            entry += after
        at += following
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
