"""Whose bundles are taken: add and revoke keys, list them, and make the key of a maintainer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bitgen.cli.bundle import PASSPHRASE_VARIABLE, ask_passphrase
from bitgen.cli.options import add_actions
from bitgen.cli.tables import Column, Table, add_output, render_tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = add_actions(parser)
    add = action("add", "trust the owner of a key: what it signed may run here")
    add.add_argument("key", metavar="KEY", help="a file of minisign (x.pub), or the line in it (RW...)")
    add_output(action("list", "the keys that are trusted, and what was revoked"))
    revoke = action("revoke", "never again accept a key, or one index")
    revoke.add_argument("key", metavar="KEY", help="a key (file, line or id), or the sha256 of an index.json")
    keygen = action("keygen", "make the key of a maintainer: a secret file, and OUT.pub to give away")
    keygen.add_argument("out", metavar="OUT", type=Path, help="the new secret file")
    keygen.add_argument("--no-passphrase", action="store_true", help="do not encrypt it")


def run(args: argparse.Namespace) -> None:
    {"add": _add, "list": _list, "revoke": _revoke, "keygen": _keygen}[args.action](args)


def _add(args: argparse.Namespace) -> None:
    from bitgen.trust import TrustStore

    key = TrustStore().add(args.key)
    print(f"the key {key.id} is trusted: bundles that it signed can be installed and run here")


def _list(args: argparse.Namespace) -> None:
    from bitgen.trust import TrustStore

    store = TrustStore()
    revoked = store.revoked()
    rows = [
        (key.id, "revoked" if key.id in revoked.keys else "trusted", key.comment) for key in store.trusted()
    ]
    rows += [(name, "revoked", "") for name in sorted(revoked.keys)]
    rows += [(digest, "revoked", "an index") for digest in sorted(revoked.indexes)]
    columns = (Column("key", "key"), Column("state", "state"), Column("comment", "comment"))
    print(render_tables([Table("keys", columns, rows)], args.output))


def _revoke(args: argparse.Namespace) -> None:
    from bitgen.trust import TrustStore

    print(f"{TrustStore().revoke(args.key)} is revoked: what it stands for is not used any more")


def _keygen(args: argparse.Namespace) -> None:
    from bitgen.errors import FileError
    from bitgen.trust import signatures, write_private

    module, public_file = signatures(), args.out.with_name(args.out.name + ".pub")
    for file in (args.out, public_file):
        if os.path.lexists(file):
            raise FileError(f"{file} exists; keys are never overwritten")
    secret, public = module.generate(None if args.no_passphrase else _new_passphrase())
    write_private(args.out.absolute(), secret)
    public_file.write_text(public.file_text, encoding="utf-8")
    print(f"{args.out}: secret, keep it offline; {public_file}: key {public.id}, give it to everybody")
    print(public.text)


def _new_passphrase() -> bytes:
    """From the environment, or twice from the terminal. UsageError for an empty one."""
    from bitgen.errors import UsageError

    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is None:
        given = ask_passphrase("Passphrase of the new key: ")
        if ask_passphrase("The same again: ") != given:
            raise UsageError("the passphrases differ; no key was made")
    if not given:
        raise UsageError("an empty passphrase protects nothing; --no-passphrase leaves the key unencrypted")
    return given.encode()
