"""Keys, signatures, revocations, and files that nobody else can change."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitgen import trust
from bitgen.errors import BitgenError, FileError, UnsupportedError, UsageError
from bitgen.trust import PublicKey, Signature, TrustStore, open_private, private_dir, require_private
from bitgen.trust import files as trust_files

ROOT = Path(__file__).parents[2]
MINISIGN = shutil.which("minisign") or ""
DATA = b'{"name": "3B"}'

real_minisign = pytest.mark.skipif(not MINISIGN, reason="minisign is not installed")


@pytest.fixture(scope="module")
def crypto() -> Any:
    pytest.importorskip("cryptography", reason="cryptography (bitgen[bundles]) is not installed")
    return trust.signatures()


@pytest.fixture
def signer(crypto: Any) -> Any:
    secret, _ = crypto.generate(None)
    return crypto.Signer(secret, None, "the key")


@pytest.fixture
def store(tmp_path: Path) -> TrustStore:
    return TrustStore(tmp_path / "trust")


# ---- Signatures ----------------------------------------------------------------


def test_a_signature_survives_its_file_and_is_the_same_every_time(signer: Any, store: TrustStore) -> None:
    store.add(signer.public.text)
    signature = signer.sign(DATA, "bitgen bundle 3B 1.0")
    assert signer.sign(DATA, "bitgen bundle 3B 1.0") == signature
    read = Signature.parse(signature.file_text.encode(), "x")
    assert read == signature
    assert store.verify(DATA, read, "index.json").id == signer.public.id == read.key_id


def test_every_change_of_what_is_signed_or_of_the_signature_is_noticed(
    signer: Any, store: TrustStore
) -> None:
    store.add(signer.public.text)
    signature = signer.sign(DATA, "name 1.0")
    for position in range(len(DATA)):
        changed = DATA[:position] + bytes([DATA[position] ^ 1]) + DATA[position + 1 :]
        with pytest.raises(FileError, match=r"the signature of index\.json is wrong"):
            store.verify(changed, signature, "index.json")
    raw = signature.file_text.encode()
    unread = raw.index(b"\n")  # the untrusted comment is what nobody reads
    for position in range(unread + 1, len(raw)):
        for bit in (1, 0x20):
            changed = raw[:position] + bytes([raw[position] ^ bit]) + raw[position + 1 :]
            with pytest.raises(FileError):
                store.verify(DATA, Signature.parse(changed, "x"), "index.json")


@pytest.mark.parametrize("size", [0, 1, 20, 100, 200, 270])
def test_a_signature_that_was_cut_off_is_one_line(signer: Any, size: int) -> None:
    raw = signer.sign(DATA, "name 1.0").file_text.encode()
    with pytest.raises(FileError, match="not a signature of minisign") as caught:
        Signature.parse(raw[:size], "index.json.minisig")
    assert "\n" not in caught.value.message


def test_a_key_that_nobody_trusts_is_named(signer: Any, store: TrustStore) -> None:
    with pytest.raises(FileError, match=f"{signer.public.id}, which is not trusted here.*bitgen trust add"):
        store.verify(DATA, signer.sign(DATA, ""), "index.json")
    assert not store.folder.exists()  # reading makes nothing


def test_two_keys_are_valid_at_once(crypto: Any, store: TrustStore) -> None:
    both = [crypto.Signer(crypto.generate(None)[0], None, "key") for _ in range(2)]
    for one in both:
        store.add(one.public.text)
    assert {key.id for key in store.trusted()} == {one.public.id for one in both}
    for one in both:
        assert store.verify(DATA, one.sign(DATA, ""), "x").id == one.public.id


def test_the_id_of_another_key_does_not_help(crypto: Any, store: TrustStore) -> None:
    mine, other = (crypto.Signer(crypto.generate(None)[0], None, "key") for _ in range(2))
    store.add(mine.public.text)
    made = other.sign(DATA, "")
    claimed = Signature(mine.public.raw_id, made.signature, made.trusted_comment, made.global_signature)
    with pytest.raises(FileError, match="is wrong"):
        store.verify(DATA, claimed, "x")


@pytest.mark.parametrize("text", ["", "RW", "x" * 56, "untrusted comment: a\n", "RW" + "A" * 53 + "B", "é"])
def test_what_is_no_key_is_one_line(text: str) -> None:
    with pytest.raises(FileError, match="is not a public key of minisign"):
        PublicKey.parse(text, "x.pub")


def test_a_secret_key_opens_with_its_passphrase_only(crypto: Any) -> None:
    secret, public = crypto.generate(b"correct horse")
    assert b"ENCRYPTED" in secret
    assert crypto.Signer(secret, b"correct horse", "k").public == public
    for passphrase, message in ((b"wrong", "passphrase is wrong"), (None, "needs a passphrase")):
        with pytest.raises(FileError, match=message):
            crypto.Signer(secret, passphrase, "k")
    with pytest.raises(FileError, match="is no secret key"):
        crypto.Signer(b"nothing", None, "k")


@real_minisign
def test_minisign_verifies_what_we_sign(signer: Any, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_bytes(DATA)
    (tmp_path / "index.json.minisig").write_text(signer.sign(DATA, "bitgen bundle 3B 1.0").file_text)
    command = [MINISIGN, "-V", "-P", signer.public.text, "-m", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "bitgen bundle 3B 1.0" in done.stdout
    (tmp_path / "key.pub").write_text(signer.public.file_text)
    index.write_bytes(DATA + b" ")
    command = [MINISIGN, "-V", "-p", str(tmp_path / "key.pub"), "-m", str(index)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


@real_minisign
def test_we_verify_what_minisign_signs(crypto: Any, store: TrustStore, tmp_path: Path) -> None:
    del crypto

    def minisign(*argv: str) -> None:
        subprocess.run([MINISIGN, *argv], cwd=tmp_path, check=True, capture_output=True, timeout=60)

    (tmp_path / "index.json").write_bytes(DATA)
    minisign("-G", "-W", "-p", "key.pub", "-s", "key.sec")
    minisign("-S", "-s", "key.sec", "-t", "a comment", "-m", "index.json")
    key = store.add(str(tmp_path / "key.pub"))
    signature = Signature.parse((tmp_path / "index.json.minisig").read_bytes(), "x")
    assert store.verify(DATA, signature, "x") == key
    assert signature.trusted_comment == "a comment"
    # minisign writes the id in its own comment, without the zeros in front
    assert int(key.comment.split()[-1], 16) == int(key.id, 16)
    with pytest.raises(FileError, match="is wrong"):
        store.verify(DATA + b" ", signature, "x")
    minisign("-S", "-l", "-s", "key.sec", "-m", "index.json")
    with pytest.raises(FileError, match="legacy signature"):
        Signature.parse((tmp_path / "index.json.minisig").read_bytes(), "x")


# ---- The store of keys ---------------------------------------------------------


def test_the_store_ships_empty(bitgen_home: Path) -> None:
    store = TrustStore()
    assert store.trusted() == []
    assert store.revoked() == trust.Revocations()
    assert not (bitgen_home / "config").exists()


def test_a_revoked_key_counts_no_more_and_cannot_come_back(signer: Any, store: TrustStore) -> None:
    key = store.add(signer.public.text)
    assert store.revoke(key.id.lower()) == key.id
    assert store.trusted() == []
    with pytest.raises(FileError, match="which was revoked"):
        store.verify(DATA, signer.sign(DATA, ""), "x")
    with pytest.raises(UsageError, match="was revoked; it cannot be trusted again"):
        store.add(signer.public.text)
    store.revoke("a" * 64)
    assert store.revoked() == trust.Revocations(frozenset([key.id]), frozenset(["a" * 64]))
    assert store.revoked().reason(None, "a" * 64) == "this index was revoked"
    assert store.revoked().reason(None, "b" * 64) is None


def test_a_release_revokes_too(
    store: TrustStore, signer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "revoked.json").write_text(f'{{"keys": ["{signer.public.id}"], "indexes": []}}')
    monkeypatch.setattr("bitgen.trust.keys.configs_dir", lambda: tmp_path)
    with pytest.raises(UsageError, match="was revoked"):
        store.add(signer.public.text)


@pytest.mark.parametrize("what", ["", "zen4", "123", "a" * 63, "no/such/file.pub"])
def test_only_keys_and_digests_are_revoked(store: TrustStore, what: str) -> None:
    with pytest.raises(UsageError, match="is no key, no key id"):
        store.revoke(what)


def test_the_store_is_its_owners(signer: Any, store: TrustStore) -> None:
    store.add(signer.public.text)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in store.folder.iterdir()} == {0o600}
    store.folder.chmod(0o777)
    with pytest.raises(FileError, match="every user can write to it"):
        store.trusted()


def test_a_damaged_store_is_one_line(store: TrustStore) -> None:
    private_dir(store.folder)
    (store.folder / "revoked.json").write_text('{"key": []}')
    with pytest.raises(FileError, match="unknown key 'key'"):
        store.revoked()


# ---- No cryptography in the base install -----------------------------------------


def test_nothing_imports_cryptography_until_a_signature_is_checked() -> None:
    code = (
        "import sys, bitgen.runtime, bitgen.bundle.install, bitgen.bundle.pack, bitgen.trust, bitgen.cli\n"
        "from bitgen.trust import TrustStore\n"
        "TrustStore().revoked(), TrustStore().trusted()\n"
        "sys.exit('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0


def test_without_cryptography_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "bitgen.trust.ed25519", raising=False)
    with pytest.raises(UnsupportedError, match=r"pip install 'bitgen\[bundles\]'"):
        trust.signatures()


# ---- Files that nobody else can change -------------------------------------------


def test_the_descriptor_is_what_is_hashed_and_loaded(tmp_path: Path) -> None:
    file = tmp_path / "x.so"
    file.write_bytes(b"first")
    with open_private(file) as opened:
        file.rename(tmp_path / "y.so")
        file.write_bytes(b"second")
        assert opened.sha256() == "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
        if opened.loadable.startswith("/proc"):
            assert Path(opened.loadable).read_bytes() == b"first"


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors have names on Linux only")
def test_two_libraries_on_one_descriptor_stay_two(tmp_path: Path) -> None:
    numbers = set()
    for name in ("_bisect", "_heapq"):
        spec = importlib.util.find_spec(name)
        library = Path(spec.origin or "") if spec else Path()
        if library.suffix != ".so":
            pytest.skip("this Python has no extension modules in files")
        shutil.copy(library, tmp_path / f"{name}.so")
        with open_private(tmp_path / f"{name}.so") as opened:
            numbers.add(opened.descriptor)
            assert hasattr(ctypes.CDLL(opened.loadable), f"PyInit_{name}")
    assert len(numbers) == 1  # the case: glibc would have answered with the first one


@pytest.mark.parametrize("what", ["file", "folder", "above"])
@pytest.mark.parametrize(
    ("mode", "message"), [(0o002, "every user can write"), (0o020, "its group can write")]
)
def test_what_others_can_change_is_refused(
    tmp_path: Path, what: str, mode: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_files, "_is_own_group", lambda _: False)
    folder = tmp_path / "above" / "folder"
    folder.mkdir(parents=True)
    file = folder / "file"
    file.write_bytes(b"")
    with open_private(file):
        pass
    place = {"file": file, "folder": folder, "above": folder.parent}[what]
    place.chmod(place.stat().st_mode | mode)
    for check in (require_private, _opened):
        with pytest.raises(FileError, match=f"cannot trust {place}: {message}"):
            check(file)


def _opened(file: Path) -> None:
    with open_private(file):
        pass


def test_a_link_leads_nowhere_that_others_can_change(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "x.so").write_bytes(b"")
    (tmp_path / "link.so").symlink_to(tmp_path / "shared" / "x.so")
    _opened(tmp_path / "link.so")
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(FileError, match="shared: every user can write"):
        _opened(tmp_path / "link.so")
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: who owns a file keeps it
    _opened(tmp_path / "link.so")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.so"
    file.write_bytes(b"")
    os.chown(file, 12345, 0)
    with pytest.raises(FileError, match=r"x\.so: it belongs to another user \(12345\)"):
        _opened(file)
    os.chown(file, 0, 0)
    os.chown(tmp_path, 12345, 0)
    with pytest.raises(FileError, match="belongs to another user"):
        _opened(file)
    os.chown(tmp_path, 0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: os.mkfifo(path), "is no file"),
        (lambda _: None, "No such file"),
    ],
)
def test_what_is_no_file_is_not_opened(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(FileError, match=message):
        _opened(tmp_path / "x")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust.write_private(tmp_path / "x", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(BitgenError, match=r"cannot write to .*: the disk is full"),
        trust.writing_to(tmp_path),
    ):
        trust.write_private(tmp_path / "x", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x", b"old")]
