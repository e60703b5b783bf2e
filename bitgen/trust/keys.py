"""The keys a person trusts, and what was revoked. The store ships empty: nobody is trusted by default.

::

    CONFIG/trust/KEYID.pub      a trusted key each, as minisign writes it; any of them may have signed
    CONFIG/trust/revoked.json   ids of keys and digests of indexes that count no more

A release of bitgen revokes by ``configs/revoked.json`` of the same form; both lists count.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgen.errors import FileError, UnsupportedError, UsageError
from bitgen.paths import config_dir, configs_dir
from bitgen.records import dump, load, load_json
from bitgen.trust.files import private_dir, require_private, write_private
from bitgen.trust.minisign import SIGNATURE_LIMIT, PublicKey, Signature

if TYPE_CHECKING:
    from types import ModuleType

_KEY_ID, _DIGEST = re.compile(r"[0-9A-F]{16}"), re.compile(r"[0-9a-f]{64}")
_REVOKED = "revoked.json"


def signatures() -> ModuleType:
    """`bitgen.trust.ed25519`. UnsupportedError, with what to install, where cryptography is missing."""
    try:
        return importlib.import_module("bitgen.trust.ed25519")
    except ImportError as error:
        raise UnsupportedError("signatures need cryptography: pip install 'bitgen[bundles]'") from error


@dataclass(frozen=True)
class Revocations:
    """What counts no more: ``keys`` by id, ``indexes`` by the sha256 of index.json."""

    keys: frozenset[str] = frozenset()
    indexes: frozenset[str] = frozenset()

    def reason(self, key_id: str | None, index_sha256: str) -> str | None:
        """Why what was signed by ``key_id`` (None: by nobody) must not be used; None when it may."""
        if key_id in self.keys:
            return f"the key {key_id} that signed it was revoked"
        return "this index was revoked" if index_sha256 in self.indexes else None

    def __or__(self, other: Revocations) -> Revocations:
        return Revocations(self.keys | other.keys, self.indexes | other.indexes)


class TrustStore:
    """The trusted keys in ``folder`` (default: the user's), which only its owner may write to."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else config_dir() / "trust"

    def trusted(self) -> list[PublicKey]:
        """All trusted keys, by id. FileError: others can write to the folder, or a file is no key."""
        if not self.folder.is_dir():
            return []
        require_private(self.folder)
        return [_read_key(file) for file in sorted(self.folder.glob("*.pub"))]

    def revoked(self) -> Revocations:
        """What was revoked here and by this release of bitgen."""
        return self._own_revocations() | _read_revocations(configs_dir() / _REVOKED)

    def add(self, key: str) -> PublicKey:
        """Trust ``key``: a file, or the line of one (RW...). UsageError when it was revoked."""
        file = Path(key)
        if re.fullmatch(r"RW[A-Za-z0-9+/]{54}", key):
            public = PublicKey.parse(key, "the key")
        elif file.is_file():
            public = _read_key(file)
        else:
            raise UsageError(f"there is no file {key}, and it is no key of minisign (RW and 54 characters)")
        if public.id in self.revoked().keys:
            raise UsageError(f"the key {public.id} was revoked; it cannot be trusted again")
        write_private(private_dir(self.folder) / f"{public.id}.pub", public.file_text.encode())
        return public

    def revoke(self, what: str) -> str:
        """Never accept again what is named: the id of a key, a file or line of one, or an index's sha256.

        Returns the id or digest. UsageError for anything else.
        """
        own = self._own_revocations()
        if _DIGEST.fullmatch(what.lower()):
            name, new = what.lower(), Revocations(indexes=frozenset([what.lower()]))
        elif _KEY_ID.fullmatch(what.upper()):
            name, new = what.upper(), Revocations(keys=frozenset([what.upper()]))
        elif Path(what).is_file() or what.startswith("RW"):
            public = _read_key(Path(what)) if Path(what).is_file() else PublicKey.parse(what, "the key")
            name, new = public.id, Revocations(keys=frozenset([public.id]))
        else:
            raise UsageError(f"{what!r} is no key, no key id (16 digits) and no sha256 of an index")
        text = json.dumps(dump(own | new), indent=1) + "\n"
        write_private(private_dir(self.folder) / _REVOKED, text.encode())
        (self.folder / f"{name}.pub").unlink(missing_ok=True)
        return name

    def verify(self, data: bytes, signature: Signature, where: str) -> PublicKey:
        """The trusted key that signed ``data``. FileError when there is none, or the signature is wrong."""
        if signature.key_id in self.revoked().keys:
            raise FileError(f"{where} was signed with the key {signature.key_id}, which was revoked")
        keys = [key for key in self.trusted() if key.raw_id == signature.raw_id]
        if not keys:
            raise FileError(
                f"{where} was signed with the key {signature.key_id}, which is not trusted here; "
                "if its owner gave it to you: bitgen trust add KEY"
            )
        signatures().verify(data, signature, keys[0], where)
        return keys[0]

    def _own_revocations(self) -> Revocations:
        if not (self.folder / _REVOKED).exists():
            return Revocations()
        require_private(self.folder / _REVOKED)
        return _read_revocations(self.folder / _REVOKED)


def _read_revocations(file: Path) -> Revocations:
    data: Any = load_json(file)
    return load(Revocations, data, str(file))


def _read_key(file: Path) -> PublicKey:
    try:
        with file.open("rb") as opened:
            text = opened.read(SIGNATURE_LIMIT).decode()
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        text = ""
    return PublicKey.parse(text, str(file))
