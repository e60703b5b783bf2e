"""Bundles from elsewhere: install, list, remove and verify them, see which this CPU gets, and make them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import PRESET_HELP
from bitgen.cli.options import add_actions
from bitgen.cli.tables import Column, Table, add_output, render_tables

if TYPE_CHECKING:
    from bitgen.bundle import Bundle
    from bitgen.bundle.pack import Signer

PASSPHRASE_VARIABLE = "BITGEN_KEY_PASSPHRASE"  # noqa: S105 - a name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = add_actions(parser)
    install = action("install", "install a signed zip, a folder, or what is at an https address")
    install.add_argument("source", metavar="SOURCE", help="x.zip, https://... or a folder with index.json")
    install.add_argument("--allow-unsigned", action="store_true", help="take it without any signature")
    install.add_argument("--downgrade", action="store_true", help="also one older than what is installed")
    add_output(action("list", "what is installed, and who signed it"))
    action("remove", "remove what is installed").add_argument("name", metavar="NAME")
    verify = action("verify", "check the signature and every file of a zip or folder")
    verify.add_argument("path", metavar="PATH", type=Path)
    verify.add_argument("--allow-unsigned", action="store_true", help="check the files of an unsigned one")
    verify.add_argument("--rebuild", action="store_true", help="build the libraries again from their C text")
    pick = action("pick", "which bundle this CPU gets and why, with its kernels")
    how = pick.add_mutually_exclusive_group()
    how.add_argument(
        "--measure", action="store_true", help="race those that run here, and remember the winner"
    )
    how.add_argument(
        "--path", action="store_true", help="print the folder of the chosen one, and nothing else"
    )
    add_output(pick)
    make = action("make", "make the bundles of CPU families from committed winners: a folder, zips, wheels")
    make.add_argument("-m", "--model", required=True, help=PRESET_HELP)
    make.add_argument(
        "--families", required=True, help="zen4,neoverse-v1,universal-x86_64,... (see --target)"
    )
    make.add_argument("-o", "--out", required=True, type=Path, help="folder that gets them")
    make.add_argument("--release", metavar="VERSION", help="its version (default: that of bitgen)")
    make.add_argument("--sign", metavar="KEY", type=Path, help="secret key made by `bitgen trust keygen`")
    make.add_argument("--cc", help="C compiler (default: zig, else a cross compiler that is here)")
    pack = action("pack", "put built bundles into a distribution with an index, and sign it")
    pack.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="bundles, or one distribution")
    pack.add_argument("-o", "--out", required=True, type=Path, help="x.zip, or a new folder")
    pack.add_argument("--name", help="of the distribution (default: the model of its bundles)")
    pack.add_argument("--release", metavar="VERSION", help="its version (default: that of bitgen)")
    pack.add_argument("--sign", metavar="KEY", type=Path, help="secret key made by `bitgen trust keygen`")


def run(args: argparse.Namespace) -> None:
    {
        "install": _install,
        "list": _list,
        "remove": _remove,
        "verify": _verify,
        "pick": _pick,
        "make": _make,
        "pack": _pack,
    }[args.action](args)


def _install(args: argparse.Namespace) -> None:
    from bitgen.bundle.install import install

    receipt = install(
        args.source, allow_unsigned=args.allow_unsigned, downgrade=args.downgrade, report=_to_stderr
    )
    print(f"{receipt.name} {receipt.version} installed, {receipt.signed}; `bitgen bundle pick` shows its use")


def _list(args: argparse.Namespace) -> None:
    from bitgen.bundle.installed import index_of, receipts

    found, errors = receipts()
    rows = []
    for receipt in found:
        index = index_of(receipt)
        bundles = ", ".join(f"{entry.path} ({entry.label})" for entry in index.bundles)
        rows.append((receipt.name, receipt.version, receipt.key_id, bundles, receipt.index_sha256))
    columns = (
        Column("name", "bundle"),
        Column("version", "version"),
        Column("key", "signed by"),
        Column("bundles", "for"),
        Column("index", "sha256 of its index"),
    )
    print(render_tables([Table("installed", columns, rows)], args.output))
    if errors:
        raise errors[0]


def _remove(args: argparse.Namespace) -> None:
    from bitgen.bundle.install import remove

    receipt = remove(args.name, _to_stderr)
    print(f"{receipt.name} {receipt.version} removed")


def _verify(args: argparse.Namespace) -> None:
    from bitgen.bundle.install import verify

    examine = _rebuild if args.rebuild else None
    verified = verify(args.path, allow_unsigned=args.allow_unsigned, examine=examine)
    index = verified.index
    print(f"{index.name} {index.version}: {len(index.bundles)} bundles, {len(index.files)} files as indexed")
    print(f"signed by {verified.key_id}" if verified.key_id else "unsigned: nobody vouches for it")
    print(f"sha256 of its index: {verified.sha256}")


def _rebuild(bundle: Bundle) -> None:
    from bitgen.bundle.rebuild import rebuild

    print(f"{bundle.path.name}: built again, the same library, sha256 {rebuild(bundle)}", flush=True)


def _pick(args: argparse.Namespace) -> None:
    from bitgen.bundle import all_bundles, choose_bundle, ranked, refused_features
    from bitgen.bundle.measured import recall, remember
    from bitgen.cli.show import library_table
    from bitgen.cpu import accepted_isas, detect_cpu, load_isas
    from bitgen.errors import UnsupportedError

    (bundles, errors), cpu = all_bundles(), detect_cpu()
    refused, measured = refused_features(cpu), recall(cpu)
    chosen, decisions = choose_bundle(bundles, cpu, refused, measured)
    if args.measure and chosen is not None:
        from bitgen.inference.race import race

        measured = race([decision.bundle for decision in decisions if decision.accepted])
        remember(cpu, measured)
        chosen, decisions = choose_bundle(bundles, cpu, refused, measured)
    if args.path:
        if chosen is None:
            raise UnsupportedError("no bundle runs on this CPU: bitgen bundle pick tells why")
        print(chosen.path)
        return
    rows: list[tuple[object, ...]] = []
    for rank, (decision, above) in enumerate(ranked(decisions, cpu, measured), 1):
        taken = measured.of(decision.bundle)
        reason = "; ".join(filter(None, (decision.reason, above)))
        state = "chosen" if decision.bundle == chosen else "accepted"
        rows.append((*_whence(decision.bundle), state, rank, taken / 1e3 if taken else None, reason))
    for decision in decisions:
        if not decision.accepted:
            rows.append((*_whence(decision.bundle), "rejected", None, None, decision.reason))
    rows += [("-", "-", "-", "-", "rejected", None, None, error.message) for error in errors]
    columns = (
        Column("bundle", "bundle"),
        Column("from", "from"),
        Column("key", "signed by"),
        Column("bitgen", "made by bitgen"),
        Column("state", "state"),
        Column("rank", "rank", "d"),
        Column("race_us", "race us", ",.1f"),
        Column("reason", "why"),
    )
    tables = [Table("candidates", columns, rows)]
    level = None
    if chosen is not None:
        runs = [isa.name for isa in accepted_isas(cpu, load_isas())]
        level = next((name for name in runs if name in chosen.manifest.isas), None)
        tables.append(library_table(chosen.path))
    if args.output == "text":
        path = f"{chosen.path}, ISA level {level}" if chosen else "none; the first use builds one"
        print(f"this CPU ({cpu.family}) gets {path}")
        print(f"its kernels: {_origin(chosen, level)}\n" if chosen and chosen.manifest.origin else "")
    facts = {"chosen": str(chosen.path) if chosen else None, "isa": level, "family": cpu.family}
    print(render_tables(tables, args.output, facts))


def _origin(bundle: Bundle, level: str | None) -> str:
    """How its kernels were found; of a universal library those of the level that runs here."""
    parts = bundle.manifest.origin.split("; ") if bundle.manifest.dispatches else []
    own = (part for part in parts if part.startswith(f"{level}: "))
    return next(own, f"{level}: default schedules" if parts else bundle.manifest.origin)


def _whence(bundle: Bundle) -> tuple[str, str, str, str]:
    """Its folder, what it came with, who signed that, and which bitgen made it."""
    origin, age = bundle.origin, bundle.manifest.bitgen_version
    if origin is None:
        return bundle.path.name, "built here", "-", age
    return bundle.path.name, f"{origin.name} {origin.version}", origin.signed, age


def _make(args: argparse.Namespace) -> None:
    from bitgen import __version__
    from bitgen.bundle.make import Release, make_release
    from bitgen.cli.progress import ProgressBar
    from bitgen.formats.open import preset_of

    names = tuple(name.strip() for name in args.families.split(",") if name.strip())
    release = Release(preset_of(args.model), names, args.release or __version__, args.cc)
    signer = _signer(args.sign)
    with ProgressBar() as line:
        made = make_release(release, args.out, signer=signer, progress=line.show)
    rows = [
        (
            b.manifest.name,
            b.manifest.system,
            b.manifest.arch,
            b.label,
            b.library.stat().st_size,
        )
        for b in made.bundles
    ]
    columns = (
        Column("bundle", "bundle"),
        Column("os", "system"),
        Column("arch", "architecture"),
        Column("label", "kernels"),
        Column("bytes", "bytes", ",d"),
    )
    print(render_tables([Table("bundles", columns, rows)], "text"))
    for bundle in made.bundles:
        print(f"{bundle.manifest.name}: {bundle.manifest.origin}")
    print(f"\n{made.folder.path}: {'signed' if made.folder.signed else 'unsigned'}")
    for path in made.containers:
        print(f"{path}: {path.stat().st_size:,} bytes")


def _signer(key: Path | None) -> Signer | None:
    from bitgen.errors import FileError
    from bitgen.trust import signatures

    if key is None:
        return None
    try:
        secret = key.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {key}: {error.strerror or error}") from error
    signer: Signer = signatures().Signer(secret, passphrase(secret, str(key)), str(key))
    return signer


def _pack(args: argparse.Namespace) -> None:
    from bitgen.bundle.pack import pack

    signer = _signer(args.sign)
    packed = pack(args.folders, args.out, name=args.name, version=args.release, signer=signer)
    index = packed.index
    print(f"{packed.path}: {index.name} {index.version}, {len(index.bundles)} bundles")
    print("signed" if packed.signed else "unsigned: who installs it must say --allow-unsigned")
    print(f"sha256 of its index: {packed.sha256}")


def passphrase(secret: bytes, where: str) -> bytes | None:
    """What opens a secret key: from the environment or the terminal; None for one that is not encrypted."""
    if b"ENCRYPTED" not in secret.partition(b"\n")[0]:
        return None
    given = os.environ.get(PASSPHRASE_VARIABLE)
    return (ask_passphrase(f"Passphrase of {where}: ") if given is None else given).encode()


def ask_passphrase(prompt: str) -> str:
    """What a person types into the terminal, unseen. UsageError where there is none."""
    import getpass
    import warnings

    from bitgen.errors import UsageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)  # it would read where all can see it
            return getpass.getpass(prompt)
    except (getpass.GetPassWarning, EOFError):
        message = f"there is no terminal to ask for the passphrase: give it in {PASSPHRASE_VARIABLE}"
        raise UsageError(message) from None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
