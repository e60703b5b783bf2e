"""Minisign's files: public keys and signatures as text. What computes is in `bitgen.trust.ed25519`.

A signature is Ed25519 over the BLAKE2b-512 of a file ("ED"; the older "Ed" over the whole file is refused),
and a second one over the first and the trusted comment::

    untrusted comment: TEXT
    base64(algorithm 2 | key id 8 | signature 64)
    trusted comment: TEXT
    base64(signature 64 of signature and trusted comment)

Both decoders take one spelling of each value, so a changed character is always noticed, except in the
untrusted comment, which nothing reads.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from bitgen.errors import FileError

_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
_KEY, _PREHASHED = b"Ed", b"ED"
SIGNATURE_LIMIT = 4096  # bytes of a file with a signature or a key; minisign's own are below 500


def shown_id(key_id: bytes) -> str:
    """A key id as minisign prints it: 16 hexadecimal digits, the last byte first."""
    return key_id[::-1].hex().upper()


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with: 8 bytes that name it, and the 32 of Ed25519."""

    raw_id: bytes
    key: bytes
    comment: str = ""

    @property
    def id(self) -> str:
        """Its id as minisign prints it."""
        return shown_id(self.raw_id)

    @property
    def text(self) -> str:
        """The one line that stands for it: RW and 54 more characters."""
        return base64.b64encode(_KEY + self.raw_id + self.key).decode()

    @property
    def file_text(self) -> str:
        """What a file of minisign holds: a comment and `text`."""
        return f"{_UNTRUSTED}{self.comment or f'minisign public key {self.id}'}\n{self.text}\n"

    @classmethod
    def parse(cls, text: str, where: str) -> PublicKey:
        """The key of a file's text, or of its one line alone. FileError names ``where`` and what is wrong."""
        lines = text.splitlines()
        comment = lines.pop(0).removeprefix(_UNTRUSTED) if lines and lines[0].startswith(_UNTRUSTED) else ""
        raw = _decoded(lines[0], 42) if len(lines) == 1 else None
        if raw is None or raw[:2] != _KEY:
            raise FileError(f"{where} is not a public key of minisign (a line that begins with RW)")
        return cls(raw[2:10], raw[10:], "".join(filter(str.isprintable, comment)))  # terminals show it


@dataclass(frozen=True)
class Signature:
    """A signature of a file, and what it says of itself; true once `bitgen.trust.ed25519.verify` agrees."""

    raw_id: bytes
    signature: bytes
    trusted_comment: str
    global_signature: bytes

    @property
    def key_id(self) -> str:
        """The id of the key it was made with, as minisign prints it."""
        return shown_id(self.raw_id)

    @property
    def file_text(self) -> str:
        """What a .minisig file holds."""
        first = base64.b64encode(_PREHASHED + self.raw_id + self.signature).decode()
        second = base64.b64encode(self.global_signature).decode()
        comment = f"{_UNTRUSTED}signature made by bitgen with the key {self.key_id}"
        return f"{comment}\n{first}\n{_TRUSTED}{self.trusted_comment}\n{second}\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> Signature:
        """The signature of a .minisig file's bytes. FileError names ``where`` and what is wrong."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = ""
        lines = text.removesuffix("\n").split("\n")
        whole = len(data) <= SIGNATURE_LIMIT and len(lines) == 4
        if not whole or not lines[0].startswith(_UNTRUSTED) or not lines[2].startswith(_TRUSTED):
            raise FileError(f"{where} is not a signature of minisign, or was cut off")
        first, second = _decoded(lines[1], 74), _decoded(lines[3], 64)
        if first is None or second is None or first[:2] not in (_KEY, _PREHASHED):
            raise FileError(f"{where} is not a signature of minisign, or is damaged")
        if first[:2] == _KEY:
            raise FileError(f"{where} is a legacy signature of minisign; sign again without -l")
        return cls(first[2:10], first[10:], lines[2].removeprefix(_TRUSTED), second)


def _decoded(line: str, size: int) -> bytes | None:
    """The ``size`` bytes of a line of base64, None for anything else."""
    try:
        raw = base64.b64decode(line, validate=True)
    except (ValueError, binascii.Error):
        return None
    # Bits behind the last byte are ignored by decoders: only the spelling of our own encoder counts.
    return raw if len(raw) == size and base64.b64encode(raw).decode() == line else None
