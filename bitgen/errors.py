"""The exceptions a user sees, one class for each exit code of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class BitgenError(Exception):
    """A failure the user can act on: one line that says what was wrong and what to do.

    The command line prints ``message`` and exits with ``exit_code``; it never prints a traceback for it.
    Whitespace of any kind, newlines included, is folded to single spaces so that a message stays one line
    even when it quotes text of another program; other control characters, which could steer a terminal, are
    shown escaped.
    """

    exit_code = 1  # anything without a class of its own

    def __init__(self, message: str) -> None:
        folded = " ".join(message.split())
        self.message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in folded)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries (workers, pools): made anew from the message alone.
        return type(self), (self.message,)


class UsageError(BitgenError):
    """A wrong argument: unknown model, m = 0, unknown ISA level (argparse exits with 2 as well)."""

    exit_code = 2


class UnsupportedError(BitgenError):
    """This machine cannot do it: operating system, CPU feature."""

    exit_code = 3


class ToolchainError(BitgenError):
    """No compiler, or a compiler that fails or hangs."""

    exit_code = 4


class FileError(BitgenError):
    """A file, folder or library that cannot be read, written or trusted."""

    exit_code = 5


class InterruptError(BitgenError):
    """Ctrl-C: 128 + SIGINT, as shells report it."""

    exit_code = 130


def nearest_names(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of ``names`` that look like ``name``, whatever their case, best first."""
    import difflib  # only for what was misspelled

    by_folded = {known.casefold(): known for known in names}
    folded = name.casefold()
    close = difflib.get_close_matches(folded, by_folded, n=3, cutoff=0.5)
    # "3b-instruct" is near to "3B" for a person, and not for difflib.
    contained = [k for k in by_folded if k not in close and (k in folded or (folded and folded in k))]
    return [by_folded[k] for k in (close + sorted(contained, key=len, reverse=True))[:3]]


def suggestion(name: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest known ones, else all of them."""
    names = list(known)
    near = nearest_names(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a ``name`` that no ``kind`` ("ISA level") has."""
    return UsageError(f"unknown {kind} {name!r}; {suggestion(name, known)}")
