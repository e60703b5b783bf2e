"""A library that works without Python, in a folder: its manifest, choosing one, and writing it.

A bundle holds::

    NAME/libbitgen-NAME.so      the library;  libbitgen-NAME.so.6 is a link to it, for programs that load it
    NAME/bitgen.h               its public header
    NAME/bitgen.pc              for pkg-config; the folder may be moved
    NAME/manifest.json          what is inside, with digests
    NAME/src/                   the C text it was made from, and a Makefile

What reads and chooses is here, and imports no compiler. `bitgen.bundle.write` makes a bundle: the kernels of
`bitgen.bundle.contents`, rendered, compiled and executed once before they are kept. `bitgen.bundle.pack` puts
bundles into a distribution with a signed index, `bitgen.bundle.install` takes one from elsewhere.
"""

from __future__ import annotations

from bitgen.bundle.installed import all_bundles
from bitgen.bundle.manifest import (
    DEFAULT,
    MANIFEST_NAME,
    PORTABLE,
    TUNED,
    Bundle,
    KernelEntry,
    Manifest,
    find_bundles,
    is_bundle,
    read_bundle,
    sha256_of,
)
from bitgen.bundle.select import (
    Decision,
    choose_bundle,
    describe,
    judge,
    level_below_best,
    ranked,
    refused_features,
    require_runnable,
)

__all__ = [
    "DEFAULT",
    "MANIFEST_NAME",
    "PORTABLE",
    "TUNED",
    "Bundle",
    "Decision",
    "KernelEntry",
    "Manifest",
    "all_bundles",
    "choose_bundle",
    "describe",
    "find_bundles",
    "is_bundle",
    "judge",
    "level_below_best",
    "ranked",
    "read_bundle",
    "refused_features",
    "require_runnable",
    "sha256_of",
]
