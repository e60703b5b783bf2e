"""The one exception a user sees, and the exit codes of the command line."""

from __future__ import annotations

EXIT_FAILURE = 1  # anything without a code of its own
EXIT_USAGE = 2  # a wrong argument: unknown model, m = 0, unknown ISA level (argparse uses 2 as well)
EXIT_UNSUPPORTED = 3  # this machine cannot do it: operating system, CPU feature
EXIT_TOOLCHAIN = 4  # no compiler, a compiler that fails or hangs
EXIT_FILE = 5  # a file, folder or library that cannot be read, written or trusted
EXIT_INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells report it


class BitgenError(Exception):
    """A failure the user can act on: one line that says what was wrong and what to do.

    The command line prints ``message`` and exits with ``exit_code``; it never prints a traceback for it.
    Whitespace of any kind, newlines included, is folded to single spaces so that a message stays one line
    even when it quotes text of another program; other control characters, which could steer a terminal, are
    shown escaped.
    """

    def __init__(self, message: str, exit_code: int = EXIT_FAILURE) -> None:
        folded = " ".join(message.split())
        self.message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in folded)
        self.exit_code = exit_code
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type[BitgenError], tuple[str, int]]:
        # Errors cross process boundaries (measured children, worker pools); the default would drop exit_code.
        return type(self), (self.message, self.exit_code)
