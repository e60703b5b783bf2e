"""`bitgen bundle` and `bitgen trust`: whole rounds, attacks (one line, nothing left), kills, full disks."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from distributions import distribution, fake_bundle, manifest, rewritten, tree

from bitgen.abi import ABI_VERSION
from bitgen.bundle import all_bundles
from bitgen.bundle import container as container_module
from bitgen.bundle import install as install_module
from bitgen.bundle import receive as receive_module
from bitgen.bundle.install import install
from bitgen.bundle.installed import receipts
from bitgen.bundle.pack import pack
from bitgen.cli import main
from bitgen.errors import FileError, UnsupportedError, UsageError
from bitgen.trust import TrustStore, signatures, write_private

pytest.importorskip("cryptography", reason="cryptography (bitgen[bundles]) is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def signer() -> Any:
    secret, _ = signatures().generate(None)
    return signatures().Signer(secret, None, "the key")


@pytest.fixture
def home(bitgen_home: Path, signer: Any) -> Path:
    """A home in which the key of `signer` is trusted."""
    TrustStore().add(signer.public.text)
    return bitgen_home


@pytest.fixture(scope="module")
def one(signer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed zip, version 1.0.0."""
    return distribution(tmp_path_factory.mktemp("one") / "one.zip", signer, library=b"the first").path


@pytest.fixture(scope="module")
def two(signer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed zip of the same name, version 1.10.0."""
    out = tmp_path_factory.mktemp("two") / "two.zip"
    return distribution(out, signer, "1.10.0", library=b"the second").path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `bitgen argv` here: what it prints. With another ``code`` than 0: its one line of error."""

    def run(*argv: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main([str(word) for word in argv]) == code
        said = capsys.readouterr()
        if not code:
            return said.out
        assert said.out == ""
        assert said.err.startswith("bitgen: ")
        assert said.err.count("\n") == 1
        return said.err

    return run


def left(home: Path) -> set[str]:
    """What lies in the folder of installed bundles, but the lock."""
    folder = home / "bundles"
    return {path.name for path in folder.iterdir()} - {".lock"} if folder.is_dir() else set()


def installed(home: Path) -> dict[str, bytes]:
    """The files of the one distribution that is installed, whole and alone."""
    (receipt,), errors = receipts()
    assert not errors
    assert left(home) == {"3B.json", receipt.folder}
    bundles, errors = all_bundles()
    assert (len(bundles), errors) == (1, [])
    return tree(home / "bundles" / receipt.folder)


def unpacked(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


# ---- A person, and a maintainer --------------------------------------------------


def test_from_a_new_key_to_a_picked_bundle(
    run: Callable[..., str], bitgen_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITGEN_KEY_PASSPHRASE", "correct horse")
    key, out = tmp_path / "maintainer", tmp_path / "x.zip"
    line = run("trust", "keygen", key).splitlines()[-1]
    assert line in (tmp_path / "maintainer.pub").read_text()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "exists" in run("trust", "keygen", key, code=FileError.exit_code)
    bundle = fake_bundle(tmp_path / "native")
    said = run("bundle", "pack", bundle, "-o", out, "--release", "1.2.0", "--sign", key)
    assert "3B 1.2.0, 1 bundles\nsigned\n" in said
    assert "not trusted here" in run("bundle", "install", out, code=FileError.exit_code)
    run("trust", "add", f"{key}.pub")
    key_id = json.loads(run("trust", "list", "-o", "json"))["keys"][0]["key"]
    assert f"signed by {key_id}" in run("bundle", "verify", out)
    assert left(bitgen_home) == set()
    assert "3B 1.2.0 installed, signed by" in run("bundle", "install", out)
    (row,) = json.loads(run("bundle", "list", "-o", "json"))["installed"]
    assert (row["name"], row["version"], row["key"]) == ("3B", "1.2.0", key_id)
    assert row["bundles"] == "native (tuned)"
    picked = json.loads(run("bundle", "pick", "-o", "json"))
    (row,) = picked["candidates"]
    assert (row["from"], row["state"], row["reason"]) == ("3B 1.2.0", "chosen", "tuned, for this CPU family")
    assert picked["isa"] == "scalar"
    assert "3B 1.2.0 removed" in run("bundle", "remove", "3B")
    assert left(bitgen_home) == set()
    assert "no bundle '3B' is installed" in run("bundle", "remove", "3B", code=UsageError.exit_code)


def test_a_wrong_passphrase_signs_nothing(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITGEN_KEY_PASSPHRASE", "")
    assert "an empty passphrase" in run("trust", "keygen", tmp_path / "k", code=UsageError.exit_code)
    monkeypatch.setenv("BITGEN_KEY_PASSPHRASE", "right")
    run("trust", "keygen", tmp_path / "k")
    monkeypatch.setenv("BITGEN_KEY_PASSPHRASE", "wrong")
    pack_it = ("bundle", "pack", fake_bundle(tmp_path / "b"), "-o", tmp_path / "x.zip", "--sign")
    assert "the passphrase is wrong" in run(*pack_it, tmp_path / "k", code=FileError.exit_code)
    assert "cannot read" in run(*pack_it, tmp_path / "nothing", code=FileError.exit_code)
    assert not (tmp_path / "x.zip").exists()


def test_without_a_terminal_a_passphrase_is_a_variable(tmp_path: Path) -> None:
    """A job of CI: nothing is read from where it could be seen, and no traceback."""
    env = {name: value for name, value in os.environ.items() if name != "BITGEN_KEY_PASSPHRASE"}
    done = subprocess.run(
        [sys.executable, "-m", "bitgen", "trust", "keygen", str(tmp_path / "k")],
        input="secret\nsecret\n",
        capture_output=True,
        text=True,
        env=env,
        start_new_session=True,  # without the terminal of whoever runs the tests
        check=False,
    )
    assert done.returncode == UsageError.exit_code
    said = "bitgen: there is no terminal to ask for the passphrase: give it in BITGEN_KEY_PASSPHRASE\n"
    assert (done.stdout, done.stderr) == ("", said)
    assert not list(tmp_path.iterdir())


def test_equal_bundles_make_equal_bytes(signer: Any, tmp_path: Path) -> None:
    made = []
    for name, mask in (("a", 0o022), ("b", 0o077)):
        before = os.umask(mask)
        try:
            bundles = [fake_bundle(tmp_path / name / folder) for folder in ("x", "w")]
            os.utime(bundles[0] / "bitgen.h", (0, 0))
            out = pack(bundles[:: -1 if mask else 1], tmp_path / f"{name}.zip", signer=signer).path
        finally:
            os.umask(before)
        made.append(out.read_bytes())
    assert made[0] == made[1]
    assert unpacked(tmp_path / "a.zip").keys() >= {"index.json", "index.json.minisig", "w/manifest.json"}


def test_a_folder_can_be_signed_elsewhere_and_then_packed(
    home: Path, run: Callable[..., str], signer: Any, tmp_path: Path
) -> None:
    packed = distribution(tmp_path / "dist")
    data = (packed.path / "index.json").read_bytes()
    assert "is not signed" in run("bundle", "install", packed.path, code=FileError.exit_code)
    signature = signer.sign(data, "from a safe machine").file_text
    (packed.path / "index.json.minisig").write_text(signature)
    run("bundle", "pack", packed.path, "-o", tmp_path / "x.zip")
    run("bundle", "install", tmp_path / "x.zip")
    assert installed(home)["index.json.minisig"].decode() == signature
    assert (home / "bundles").stat().st_mode & 0o777 == 0o700
    for path in (home / "bundles").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.fixture(scope="module")
def pair(signer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed zip of two bundles, ``a`` and ``b``, with one header and one C text."""
    folder = tmp_path_factory.mktemp("pair")
    bundles = [fake_bundle(folder / name, name.encode() * 1000) for name in ("a", "b")]
    return pack(bundles, folder / "pair.zip", signer=signer).path


@pytest.mark.parametrize("has_links", [True, False])
def test_files_that_bundles_share_are_kept_once(
    home: Path, pair: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Where the file system has no second names, they are copied."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    install(str(pair))
    (receipt,), _ = receipts()
    folder = home / "bundles" / receipt.folder
    assert tree(folder) == unpacked(pair)
    twice = {name for name in unpacked(pair) if (folder / name).stat().st_nlink > 1}
    shared = {f"{bundle}/{file}" for bundle in "ab" for file in ("bitgen.h", "src/run.c")}
    assert twice == (shared if has_links else set())


def test_a_file_that_is_there_already_is_not_read_again_but_verified(
    home: Path, run: Callable[..., str], pair: Path, tmp_path: Path
) -> None:
    second = rewritten(pair, tmp_path / "b.zip", lambda files: files.update({"b/bitgen.h": b"other"}))
    message = "b/bitgen.h in .* is not the file that its index names"
    assert re.search(message, run("bundle", "verify", second, code=FileError.exit_code))
    lacks = rewritten(pair, tmp_path / "x.zip", lambda files: files.pop("b/bitgen.h"))
    assert "there is no b/bitgen.h" in run("bundle", "install", lacks, code=FileError.exit_code)
    first = rewritten(pair, tmp_path / "a.zip", lambda files: files.update({"a/bitgen.h": b"other"}))
    said = run("bundle", "install", first, code=FileError.exit_code)
    assert "a/bitgen.h" in said
    assert left(home) == set()
    run("bundle", "install", second)
    (receipt,), _ = receipts()
    assert tree(home / "bundles" / receipt.folder) == unpacked(pair)  # what the index names, nothing else


def test_the_bill_of_materials_and_the_statement_are_what_others_read(tmp_path: Path) -> None:
    packed = distribution(tmp_path / "dist")
    files = tree(packed.path)
    statement = json.loads(files["provenance.json"])
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    (subject,) = statement["subject"]
    assert subject["digest"]["sha256"] == packed.index.files[subject["name"]]
    assert set(files) - {"index.json"} == set(packed.index.files)
    bom = json.loads(files["sbom.cdx.json"])
    (component,) = bom["components"]
    assert component["hashes"] == [{"alg": "SHA-256", "content": packed.index.files[component["name"]]}]


@pytest.mark.slow
def test_the_bill_of_materials_is_valid(tmp_path: Path) -> None:
    schema = pytest.importorskip("cyclonedx.schema", reason="cyclonedx-python-lib is not installed")
    validation = pytest.importorskip("cyclonedx.validation.json")
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    text = (distribution(tmp_path / "dist").path / "sbom.cdx.json").read_text()
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace("SHA-256", "SHA")) is not None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "bitgen.h").write_text("other"), "is not the file its manifest names"),
        (lambda p: (p / "bitgen.h").unlink(), "there is no bitgen.h"),
        (lambda p: (p / "libbitgen-test.so").write_text(""), "sha256 differs"),
        (lambda p: (p / "manifest.json").unlink(), "is not a bundle"),
    ],
)
def test_a_spoilt_bundle_is_not_packed(
    tmp_path: Path, run: Callable[..., str], spoil: Callable[[Path], object], message: str
) -> None:
    bundle = fake_bundle(tmp_path / "b")
    spoil(bundle)
    assert message in run("bundle", "pack", bundle, "-o", tmp_path / "x.zip", code=FileError.exit_code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "../x"), "cannot name files"),
        (("--release", "new"), "is no version"),
        (("--release", ""), "is no version"),
    ],
)
def test_a_name_or_version_that_is_none(
    tmp_path: Path, run: Callable[..., str], options: tuple[str, ...], message: str
) -> None:
    bundle = fake_bundle(tmp_path / "b")
    said = run("bundle", "pack", bundle, "-o", tmp_path / "x.zip", *options, code=UsageError.exit_code)
    assert message in said


# ---- Attacks ---------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_refused(
    home: Path, run: Callable[..., str], signer: Any, tmp_path: Path
) -> None:
    whole = distribution(tmp_path / "dist", signer).path
    for name, data in tree(whole).items():
        # The middle, and for a signature the second line: the first is a comment that nobody reads.
        position = len(data) // 2
        changed = bytearray(data)
        changed[position] ^= 1
        (whole / name).write_bytes(changed)
        run("bundle", "install", whole, code=FileError.exit_code)
        run("bundle", "verify", whole, code=FileError.exit_code)
        assert left(home) == set(), name
        (whole / name).write_bytes(data)
    run("bundle", "install", whole)


def test_a_flipped_bit_in_a_zip_never_installs_something_else(home: Path, one: Path, tmp_path: Path) -> None:
    data, right = one.read_bytes(), unpacked(one)
    draw = random.Random(1)
    refused = 0
    for _ in range(60):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "x.zip").write_bytes(changed)
        try:
            install(str(tmp_path / "x.zip"))
        except (FileError, UsageError):
            refused += 1
            assert left(home) <= {"3B.json", *(receipt.folder for receipt in receipts()[0])}
        else:
            assert installed(home) == right  # a time or a mode in the zip, which nobody uses
    assert refused > 20


def test_a_zip_that_was_cut_off_is_refused(
    home: Path, run: Callable[..., str], one: Path, tmp_path: Path
) -> None:
    data = one.read_bytes()
    for size in (0, 1, len(data) // 4, len(data) // 2, len(data) - 1):
        (tmp_path / "x.zip").write_bytes(data[:size])
        said = run("bundle", "install", tmp_path / "x.zip", code=FileError.exit_code)
        assert "is not a zip file, or is damaged or cut off" in said
        assert left(home) == set()


def swap(files: dict[str, bytes]) -> None:
    first, second = "native/bitgen.h", "native/src/run.c"
    files[first], files[second] = files[second], files[first]


def replace_index(files: dict[str, bytes]) -> None:
    files["index.json"] = files["index.json"].replace(b'"1.0.0"', b'"9.0.0"')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, "is not the file that its index names"),
        (replace_index, "the signature of index.json of .* is wrong"),
        (lambda files: files.pop("index.json"), "there is no index.json"),
        (lambda files: files.pop("index.json.minisig"), "is not signed; --allow-unsigned"),
        (lambda files: files.pop("native/bitgen.h"), "there is no native/bitgen.h"),
        (lambda files: files.update({"more": b""}), "'more', which its index does not name"),
        (lambda files: files.update({"../evil": b""}), "evil', which its index does not name"),
        (lambda files: files.update({"/evil": b""}), "evil', which its index does not name"),
        (lambda files: files.update({"native/../../evil": b""}), "evil', which its index does not name"),
        (lambda files: files.update({"index.json.minisig": b"x" * 5000}), "is larger than 4,096 bytes"),
        (lambda files: files.update({"index.json": b"[" * (5 << 20)}), "is larger than 4,194,304 bytes"),
    ],
)
def test_what_was_changed_after_signing_is_refused(
    home: Path,
    run: Callable[..., str],
    one: Path,
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], object],
    message: str,
) -> None:
    archive = rewritten(one, tmp_path / "x.zip", change)
    said = run("bundle", "install", archive, code=FileError.exit_code)
    assert re.search(message, said), said
    assert left(home) == set()
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil", "is not a path below its folder"),
        ("/evil", "is not a path below its folder"),
        ("native/../../evil", "is not a path below its folder"),
        ("native/.hidden", "is not a path below its folder"),
        ("a\\..\\evil", "is not a path below its folder"),
        ("NATIVE/bitgen.h", "is duplicated"),
        ("index.json", "is duplicated"),
    ],
)
def test_even_a_signed_index_leads_nowhere_else(
    home: Path, run: Callable[..., str], one: Path, signer: Any, tmp_path: Path, name: str, message: str
) -> None:
    def change(files: dict[str, bytes]) -> None:
        index = json.loads(files["index.json"])
        index["files"][name] = "0" * 64
        files["index.json"] = json.dumps(index).encode()
        files["index.json.minisig"] = signer.sign(files["index.json"], "").file_text.encode()

    said = run("bundle", "install", rewritten(one, tmp_path / "x.zip", change), code=FileError.exit_code)
    assert message in said
    assert left(home) == set()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(
    home: Path, run: Callable[..., str], one: Path, tmp_path: Path, kind: int
) -> None:
    shutil.copy(one, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        entry = zipfile.ZipInfo("native/evil")
        entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    said = run("bundle", "install", tmp_path / "x.zip", code=FileError.exit_code)
    assert "a link or a device" in said
    assert left(home) == set()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(
    home: Path, run: Callable[..., str], one: Path, tmp_path: Path
) -> None:
    shutil.copy(one, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("native/bitgen.h", "other")
    assert "two files of one name" in run("bundle", "install", tmp_path / "x.zip", code=FileError.exit_code)
    assert left(home) == set()


def test_links_in_a_folder_are_refused(
    home: Path, run: Callable[..., str], signer: Any, tmp_path: Path
) -> None:
    whole = distribution(tmp_path / "dist", signer).path
    header = whole / "native" / "bitgen.h"
    header.rename(tmp_path / "bitgen.h")
    header.symlink_to(tmp_path / "bitgen.h")
    assert "is a link" in run("bundle", "install", whole, code=FileError.exit_code)
    header.unlink()
    os.mkfifo(header)
    assert "is no file" in run("bundle", "install", whole, code=FileError.exit_code)
    assert left(home) == set()


def test_sizes_are_limited(
    home: Path, run: Callable[..., str], one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in (
        (container_module, "ZIP_LIMIT", 100),
        (container_module, "UNPACKED_LIMIT", 100),
        (container_module, "FILES_LIMIT", 2),
        (receive_module, "UNPACKED_LIMIT", 100),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            said = run("bundle", "install", one, code=FileError.exit_code)
        assert "larger than 100 bytes" in said or "unpacks to more than" in said
        assert left(home) == set()


def test_a_file_larger_than_it_says_is_refused(
    home: Path, run: Callable[..., str], one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = zipfile.ZipFile.infolist

    def small(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        entries = real(archive)
        entries[-1].file_size = 3
        return entries

    monkeypatch.setattr(zipfile.ZipFile, "infolist", small)
    run("bundle", "install", one, code=FileError.exit_code)
    assert left(home) == set()


def test_an_older_version_is_refused_unless_asked_for(
    home: Path, run: Callable[..., str], one: Path, two: Path
) -> None:
    run("bundle", "install", one)
    run("bundle", "install", two)  # 1.10.0 is newer than 1.0.0 (and than 1.9)
    said = run("bundle", "install", one, code=FileError.exit_code)
    assert "3B 1.0.0 is older than what is installed, 1.10.0; --downgrade" in said
    assert installed(home) == unpacked(two)
    run("bundle", "install", two)
    run("bundle", "install", one, "--downgrade")
    assert installed(home) == unpacked(one)


def test_unsigned_ones_need_to_be_asked_for(home: Path, run: Callable[..., str], tmp_path: Path) -> None:
    plain = distribution(tmp_path / "x.zip")
    assert "is not signed" in run("bundle", "install", plain.path, code=FileError.exit_code)
    assert "is not signed" in run("bundle", "verify", plain.path, code=FileError.exit_code)
    assert left(home) == set()
    assert "unsigned: nobody vouches" in run("bundle", "verify", plain.path, "--allow-unsigned")
    assert "unsigned" in run("bundle", "install", plain.path, "--allow-unsigned")
    assert json.loads(run("bundle", "list", "-o", "json"))["installed"][0]["key"] is None
    run("trust", "revoke", plain.sha256)
    said = run("bundle", "install", plain.path, "--allow-unsigned", code=FileError.exit_code)
    assert "this index was revoked" in said


def test_a_wrong_signature_is_refused_even_where_none_is_needed(
    home: Path, run: Callable[..., str], one: Path, tmp_path: Path
) -> None:
    archive = rewritten(one, tmp_path / "x.zip", replace_index)
    assert "is wrong" in run("bundle", "install", archive, "--allow-unsigned", code=FileError.exit_code)
    assert left(home) == set()


def test_another_key_is_refused(bitgen_home: Path, run: Callable[..., str], one: Path) -> None:
    other = signatures().Signer(signatures().generate(None)[0], None, "k")
    TrustStore().add(other.public.text)
    assert "not trusted here" in run("bundle", "install", one, code=FileError.exit_code)
    assert left(bitgen_home) == set()


def test_what_a_revoked_key_signed_is_not_used(
    home: Path, run: Callable[..., str], one: Path, signer: Any
) -> None:
    run("bundle", "install", one)
    assert len(all_bundles()[0]) == 1
    run("trust", "revoke", signer.public.id)
    bundles, (error,) = all_bundles()
    assert bundles == []
    assert f"the key {signer.public.id} that signed it was revoked" in error.message
    (row,) = json.loads(run("bundle", "pick", "-o", "json"))["candidates"]
    assert (row["state"], row["reason"]) == ("rejected", error.message)
    said = run("bundle", "install", one, code=FileError.exit_code)
    assert "which was revoked" in said
    run("bundle", "remove", "3B")
    assert left(home) == set()


def test_another_abi_is_refused(
    home: Path, run: Callable[..., str], one: Path, signer: Any, tmp_path: Path
) -> None:
    for abi, advice in (
        (ABI_VERSION + 1, "install a newer bitgen"),
        (ABI_VERSION - 1, "get a newer version"),
    ):

        def change(files: dict[str, bytes], abi: int = abi) -> None:
            files["index.json"] = json.dumps({**json.loads(files["index.json"]), "abi_version": abi}).encode()
            files["index.json.minisig"] = signer.sign(files["index.json"], "").file_text.encode()

        said = run("bundle", "install", rewritten(one, tmp_path / "x.zip", change), code=FileError.exit_code)
        assert f"abi_version is {abi}, this bitgen reads {ABI_VERSION}: {advice}" in said
        assert left(home) == set()


def test_what_this_cpu_cannot_run_is_refused(
    home: Path, run: Callable[..., str], signer: Any, tmp_path: Path
) -> None:
    lacking: dict[str, Any] = {"isas": {"future": ("warp_drive",)}, "cpu_family": "zen99"}
    only = distribution(tmp_path / "a.zip", signer, **lacking).path
    said = run("bundle", "install", only, code=UnsupportedError.exit_code)
    assert "no bundle of 3B 1.0.0 runs here: native: it is for zen99, this CPU" in said
    assert "lacks warp_drive" in said
    elsewhere = distribution(tmp_path / "b.zip", signer, arch="riscv64").path
    assert "on riscv64" in run("bundle", "install", elsewhere, code=UnsupportedError.exit_code)
    assert left(home) == set()


def test_an_index_that_says_other_than_the_manifest_is_refused(
    home: Path, run: Callable[..., str], one: Path, signer: Any, tmp_path: Path
) -> None:
    def change(files: dict[str, bytes]) -> None:
        index = json.loads(files["index.json"])
        index["bundles"][0]["family"] = "zen99"
        files["index.json"] = json.dumps(index).encode()
        files["index.json.minisig"] = signer.sign(files["index.json"], "").file_text.encode()

    said = run("bundle", "install", rewritten(one, tmp_path / "x.zip", change), code=FileError.exit_code)
    assert "the index and the manifest of native differ in family" in said
    assert left(home) == set()


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("http://example.org/x.zip", UsageError, "http://example.org/x.zip is not an https address"),
        ("file:///x.zip", UsageError, "is not an https address"),
        ("ftp://example.org/x.zip", UsageError, "is not an https address"),
        ("https:///x.zip", UsageError, "is not an https address"),
        ("http://me:secret@example.org/x.zip?token=secret", UsageError, "example.org/x.zip is not"),
        ("nothing.zip", FileError, "there is no file or folder"),
    ],
)
def test_other_sources_are_refused(
    home: Path, run: Callable[..., str], source: str, code: type[FileError], message: str
) -> None:
    said = run("bundle", "install", source, code=code.exit_code)
    assert message in said
    assert "secret" not in said
    assert left(home) == set()


def test_a_built_folder_must_be_packed_first(home: Path, run: Callable[..., str], tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "b")
    said = run("bundle", "install", bundle, code=FileError.exit_code)
    assert "`bitgen bundle pack` makes one for it" in said
    assert left(home) == set()


# ---- https -------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """An https server with a certificate of its own, which is trusted here: its address, its answers."""
    certificate(tmp_path / "server.pem")
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path)
            if isinstance(answer, str):
                self.send_response(302)
                self.send_header("Location", answer)
                self.end_headers()
                return
            self.send_response(200 if answer is not None else 404)
            self.send_header("Content-Length", str(len(answer or b"")))
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
    monkeypatch.setenv("no_proxy", "*")
    yield f"https://127.0.0.1:{http.server_port}", answers
    http.shutdown()
    thread.join()
    http.server_close()


def certificate(path: Path) -> None:
    """A key and a certificate of 127.0.0.1, signed by itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(*form) + made.public_bytes(serialization.Encoding.PEM))


def test_from_an_https_address(
    home: Path,
    run: Callable[..., str],
    one: Path,
    server: tuple[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, answers = server
    answers.update({"/x.zip": one.read_bytes(), "/there": "/x.zip", "/away": "http://127.0.0.1:1/x.zip"})
    said = run("bundle", "install", f"{address}/away", code=UsageError.exit_code)
    assert "http://127.0.0.1/x.zip is not an https address" in said
    assert "Not Found" in run("bundle", "install", f"{address}/nothing", code=FileError.exit_code)
    with monkeypatch.context() as patch:
        patch.setattr(container_module, "ZIP_LIMIT", 1000)
        assert "is larger than" in run("bundle", "install", f"{address}/x.zip", code=FileError.exit_code)
    assert left(home) == set()
    run("bundle", "install", f"{address}/there")
    assert installed(home) == unpacked(one)
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    said = run("bundle", "install", f"{address}/x.zip", code=FileError.exit_code)
    assert "certificate" in said.lower()


# ---- Kills, full disks, two at once --------------------------------------------------


def in_child(task: Callable[[], object]) -> int:
    """Run ``task`` in a fork of this process: its exit status as `os.waitpid` tells it."""
    child = os.fork()
    if not child:
        code = 70
        try:
            os.close(1)
            os.close(2)
            code = int(task() or 0)  # type: ignore[call-overload]
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def die_at(event: int, root: Path, argv: list[str]) -> int:
    """Run a command that SIGKILL ends just before its n-th step on files below ``root``."""
    seen = 0

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if name.split(".")[0] in ("open", "os", "shutil", "tempfile") and str(root) in str(arguments):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["install", "remove"])
def test_a_command_killed_at_any_step_leaves_the_old_or_the_new_whole(
    home: Path, one: Path, two: Path, command: str
) -> None:
    install(str(one))
    argv = ["bundle", "install", str(two)] if command == "install" else ["bundle", "remove", "3B"]
    old, new = unpacked(one), unpacked(two) if command == "install" else {}
    states, event = set(), 0
    while True:
        event += 1
        status = in_child(partial(die_at, event, home / "bundles", argv))
        assert not all_bundles()[1]
        receipt = next(iter(receipts()[0]), None)
        found = tree(home / "bundles" / receipt.folder) if receipt else {}
        assert found in (old, new)
        states.add(found == new)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        if found == new:  # back to the start, which also removes what the killed one left
            install(str(one), downgrade=True)
            assert installed(home) == old
    assert event > 5
    assert states == {False, True}
    install(str(two))
    assert installed(home) == unpacked(two)


@pytest.mark.slow
def test_an_install_killed_at_random_moments(home: Path, one: Path, two: Path) -> None:
    install(str(one))
    draw = random.Random(5)
    command = [sys.executable, "-m", "bitgen", "bundle", "install", "--downgrade"]
    for turn in range(10):
        source = (two, one)[turn % 2]
        process = subprocess.Popen([*command, str(source)], cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, 1.2))
        process.kill()
        process.wait(timeout=60)
        (receipt,), errors = receipts()
        assert not errors
        assert tree(home / "bundles" / receipt.folder) in (unpacked(one), unpacked(two))
    install(str(two))
    assert installed(home) == unpacked(two)


def test_a_disk_that_is_full_at_any_file_leaves_the_old_one(
    home: Path, run: Callable[..., str], one: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(str(one))
    real_create, real_write = receive_module._create, write_private
    for full_at in range(len(unpacked(two)) + 1):
        count = 0

        def room(task: Callable[..., Any], *arguments: Any, full_at: int = full_at) -> Any:
            nonlocal count
            if count == full_at:
                raise OSError(28, "No space left on device")
            count += 1
            return task(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(receive_module, "_create", partial(room, real_create))
            patch.setattr(install_module, "write_private", partial(room, real_write))
            said = run("bundle", "install", two, code=FileError.exit_code)
        assert "the disk is full; nothing was changed" in said
        assert installed(home) == unpacked(one)
    run("bundle", "install", two)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root can mount a small disk")
def test_a_full_disk_leaves_the_old_one(
    home: Path, run: Callable[..., str], one: Path, signer: Any, tmp_path: Path
) -> None:
    folder = home / "bundles"
    folder.mkdir(mode=0o700)
    mount = [
        shutil.which("mount") or "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=256k,mode=700",
        "tmpfs",
        str(folder),
    ]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        run("bundle", "install", one)
        noise = random.Random(2).randbytes(1000)
        large = distribution(tmp_path / "large.zip", signer, "2.0.0", library=noise).path
        said = run("bundle", "install", large, code=FileError.exit_code)
        assert "the disk is full; nothing was changed" in said
        assert installed(home) == unpacked(one)
    finally:
        subprocess.run([shutil.which("umount") or "umount", str(folder)], check=True, capture_output=True)


def test_installs_at_once_take_turns(home: Path, one: Path, two: Path) -> None:
    children = []
    for turn in range(6):
        child = os.fork()
        if not child:
            code = 70
            try:
                for source in (one, two) if turn % 2 else (two, one):
                    install(str(source), downgrade=True)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert installed(home) in (unpacked(one), unpacked(two))


# ---- Choice ------------------------------------------------------------------------


def test_pick_gives_a_reason_for_every_candidate(
    home: Path, run: Callable[..., str], signer: Any, tmp_path: Path
) -> None:
    makes: dict[str, dict[str, Any]] = {
        "mine": {},
        "other": {"cpu_family": "zen99"},
        "mac": {"system": "Plan9"},
        "risc": {"arch": "riscv64"},
        "far": {"isas": {"future": ("warp_drive",)}},
        "plain": {"kernels": manifest().kernels[1:]},
    }
    bundles = [fake_bundle(tmp_path / name, **changes) for name, changes in makes.items()]
    install(str(pack(bundles, tmp_path / "x.zip", signer=signer).path))
    fake_bundle(home / "generated" / "own")
    fake_bundle(home / "generated" / "own-untuned", kernels=manifest().kernels[1:])
    fake_bundle(home / "generated" / "abi", abi_version=ABI_VERSION + 1)
    picked = json.loads(run("bundle", "pick", "-o", "json"))
    rows = {row["bundle"]: (row["state"], row["rank"], row["reason"]) for row in picked["candidates"]}
    assert rows["own"] == ("chosen", 1, "tuned, for this CPU family")
    assert rows["mine"] == ("accepted", 2, "tuned, for this CPU family; the one above was built here")
    searched = "the one above has better tuned kernels"
    assert rows["own-untuned"] == ("accepted", 3, f"untuned, for this CPU family; {searched}")
    assert rows["plain"][:2] == ("accepted", 4)
    above = "the one above is for this CPU family"
    assert rows["other"] == ("accepted", 5, f"tuned, for zen99, which also runs here; {above}")
    assert rows["mac"][0] == rows["risc"][0] == rows["far"][0] == "rejected"
    assert "it is for Plan9" in rows["mac"][2]
    assert "riscv64" in rows["risc"][2]
    assert "lacks warp_drive" in rows["far"][2]
    assert f"abi_version is {ABI_VERSION + 1}" in rows["-"][2]
    assert "this CPU" in run("bundle", "pick")


def test_pick_on_a_machine_with_nothing(bitgen_home: Path, run: Callable[..., str]) -> None:
    assert "gets none; the first use builds one" in run("bundle", "pick")
    assert not (bitgen_home / "config").exists()
    assert not (bitgen_home / "bundles").exists()


def test_nothing_is_taken_from_the_working_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: Path
) -> None:
    for name in ("native", "generated/native", "bundles/native"):
        fake_bundle(tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    assert all_bundles() == ([], [])
    install(str(one))
    assert all(bundle.path.is_relative_to(home) for bundle in all_bundles()[0])


@pytest.mark.parametrize("name", ["index.json", "native/manifest.json", "native/libbitgen-test.so"])
def test_an_installed_file_that_changed_is_noticed(
    home: Path, run: Callable[..., str], one: Path, name: str
) -> None:
    receipt = install(str(one))
    file = home / "bundles" / receipt.folder / name
    file.write_bytes(file.read_bytes().replace(b"0.1.0", b"0.1.1") + b" ")
    bundles, (error,) = all_bundles()
    assert bundles == []
    assert error.message.startswith("3B 1.0.0: ")
    run("bundle", "install", one)
    assert installed(home) == unpacked(one)


def test_a_folder_that_others_can_write_to_is_not_read(
    home: Path, run: Callable[..., str], one: Path
) -> None:
    install(str(one))
    (home / "bundles").chmod(0o777)
    bundles, (error,) = all_bundles()
    assert bundles == []
    assert "every user can write to it" in error.message
    assert "every user can write" in run("bundle", "install", one, code=FileError.exit_code)


# ---- A real library ------------------------------------------------------------------


@pytest.mark.slow
def test_an_installed_library_multiplies_and_needs_no_compiler(
    home: Path, signer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitgen
    from bitgen.api import untuned_library
    from bitgen.runtime import load
    from bitgen.self_test import self_test

    built = untuned_library()
    archive = pack([built], tmp_path / "x.zip", name="default", signer=signer).path
    install(str(archive))
    shutil.rmtree(home / "generated")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with bitgen.load() as table:
        assert table.path.is_relative_to(home / "bundles")
        assert self_test(table) > 0
        library = table.path
    library.chmod(0o666)
    with pytest.raises(FileError, match="every user can write"):
        load(library.parent)
    library.chmod(0o600)
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.unlink()  # it is mapped: written over, the next dlopen of this process would read what is gone
    library.write_bytes(data)
    with pytest.raises(FileError, match="sha256 differs"):
        load(library.parent)
