"""Whom bundles are taken from: keys, signatures, revocations, and files that nobody else can change.

A signature says *who* made a bundle, in minisign's format, so that anybody's tools can make or check it. The
store of trusted keys ships empty. Keys and revocations are read without any cryptography; only a signature
needs some (the extra ``bitgen[bundles]``), once, when a bundle is installed.
"""

from __future__ import annotations

from bitgen.trust.files import (
    OpenedFile,
    open_private,
    private_dir,
    require_private,
    write_private,
    writing_to,
)
from bitgen.trust.keys import Revocations, TrustStore, signatures
from bitgen.trust.minisign import PublicKey, Signature

__all__ = [
    "OpenedFile",
    "PublicKey",
    "Revocations",
    "Signature",
    "TrustStore",
    "open_private",
    "private_dir",
    "require_private",
    "signatures",
    "write_private",
    "writing_to",
]
