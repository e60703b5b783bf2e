"""Ed25519: check signatures, make keys and sign. The only module that imports cryptography.

Who needs it imports it when it is needed, through `bitgen.trust.signatures`, which says what to install.
A key for signing is a file of PKCS#8 (PEM), encrypted with a passphrase; its id is made of the public half,
so the one file is enough.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from bitgen.errors import FileError
from bitgen.trust.minisign import PublicKey, Signature


def verify(data: bytes, signature: Signature, key: PublicKey, where: str) -> None:
    """FileError unless ``key`` signed ``data`` and the trusted comment of ``signature``."""
    public = Ed25519PublicKey.from_public_bytes(key.key)
    comment = signature.trusted_comment.encode()
    try:
        public.verify(signature.signature, hashlib.blake2b(data).digest())
        public.verify(signature.global_signature, signature.signature + comment)
    except InvalidSignature:
        raise FileError(
            f"the signature of {where} is wrong: it is not what the owner of key {key.id} signed"
        ) from None


def generate(passphrase: bytes | None) -> tuple[bytes, PublicKey]:
    """A new key: the text of its secret file (None: not encrypted), and its public half."""
    secret = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), _public(secret)


class Signer:
    """A secret key that was opened. FileError for a file that holds none, or another passphrase."""

    def __init__(self, pem: bytes, passphrase: bytes | None, where: str) -> None:
        try:
            secret = load_pem_private_key(pem, passphrase)
        except TypeError as error:  # a passphrase that is missing, or not needed
            wanted = "needs a passphrase" if passphrase is None else "has no passphrase"
            raise FileError(f"{where} {wanted}") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise FileError(f"{where} is no secret key, or the passphrase is wrong") from error
        if not isinstance(secret, Ed25519PrivateKey):
            raise FileError(f"{where} is no key of Ed25519; `bitgen trust keygen` makes one")
        self._secret = secret
        self.public = _public(secret)

    def sign(self, data: bytes, trusted_comment: str) -> Signature:
        """The signature of ``data``; the same every time."""
        first = self._secret.sign(hashlib.blake2b(data).digest())
        second = self._secret.sign(first + trusted_comment.encode())
        return Signature(self.public.raw_id, first, trusted_comment, second)


def _public(secret: Ed25519PrivateKey) -> PublicKey:
    key = secret.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return PublicKey(hashlib.blake2b(key, digest_size=8, person=b"bitgen key id").digest(), key)
