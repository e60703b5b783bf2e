"""What a distribution tells other tools: a bill of materials, and what its libraries were made from.

The statement is not signed by itself: the index names its sha256, and the index is signed. It says what the
maker says; that it is true, only a second build can show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgen import __version__
from bitgen.bundle.manifest import Bundle

SBOM_NAME, PROVENANCE_NAME = "sbom.cdx.json", "provenance.json"
_HOME = "https://bitgen.invalid"  # types of our own need an address, and it need not lead anywhere


def sbom(name: str, version: str, bundles: Mapping[str, Bundle]) -> dict[str, Any]:
    """A CycloneDX 1.6 document: each library, what built it and what it was built with."""
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "bitgen", "version": __version__}]},
            "component": {
                "type": "library",
                "bom-ref": "distribution",
                "name": f"bitgen-kernels-{name}",
                "version": version,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
        },
        "components": [_component(path, bundle) for path, bundle in sorted(bundles.items())],
        "dependencies": [{"ref": "distribution", "dependsOn": sorted(bundles)}],
    }


def _component(path: str, bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    properties = {
        "bitgen:os": manifest.system,
        "bitgen:arch": manifest.arch,
        "bitgen:family": manifest.cpu_family,
        "bitgen:features": " ".join(sorted(manifest.features)),
        "bitgen:label": bundle.label,
        "bitgen:winners": manifest.fingerprint or "none",
        **{f"bitgen:compiler:{isa}": str(values) for isa, values in sorted(manifest.compiler.items())},
    }
    return {
        "type": "library",
        "bom-ref": path,
        "name": f"{path}/{manifest.library}",
        "version": manifest.bitgen_version,
        "hashes": [{"alg": "SHA-256", "content": manifest.files[manifest.library]}],
        "properties": [{"name": key, "value": value} for key, value in properties.items()],
    }


def provenance(bundles: Mapping[str, Bundle]) -> dict[str, Any]:
    """An in-toto statement (SLSA provenance 1): the libraries, and the C text and compiler of each."""
    subjects, sources, parameters = [], [], {}
    for path, bundle in sorted(bundles.items()):
        manifest = bundle.manifest
        digest = {"sha256": manifest.files[manifest.library]}
        subjects.append({"name": f"{path}/{manifest.library}", "digest": digest})
        sources += [
            {"uri": f"{path}/{file}", "digest": {"sha256": sha256}}
            for file, sha256 in sorted(manifest.files.items())
            if file.startswith("src/")
        ]
        parameters[path] = {
            "model": manifest.model,
            "family": manifest.cpu_family,
            "winners": manifest.fingerprint,
            "compiler": manifest.compiler,
        }
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subjects,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": f"{_HOME}/bundle/v1",
                "externalParameters": parameters,
                "resolvedDependencies": sources,
            },
            "runDetails": {"builder": {"id": f"{_HOME}/bitgen", "version": {"bitgen": __version__}}},
        },
    }
