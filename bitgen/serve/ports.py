"""Where the server listens: its socket, and who has it already."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path

from bitgen.errors import BitgenError, UsageError

_LISTENING = "0A"  # of /proc/net/tcp


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. BitgenError names the process that has the port."""
    family, address = _resolve(host, port)[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except (OSError, OverflowError) as error:
        sock.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise BitgenError(
                f"port {port} of {host} is in use by {holder(port)}: end it, or give another --port"
            ) from None
        raise BitgenError(f"cannot listen on {host}, port {port}: {error}") from None
    return sock


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    return all(
        ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in _resolve(host, 0)
    )


def holder(port: int) -> str:
    """The process that listens on a port of this machine, as far as this user may know (Linux)."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for fields in map(str.split, lines):
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(file.readlink()) in sockets for file in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:  # it ended, or is another user's
            continue
    return "another process"


def _resolve(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port must be 0 to 65535, not {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is no address of this machine: {error}") from None
    return [(family, address) for family, _, _, _, address in found]  # type: ignore[misc]
