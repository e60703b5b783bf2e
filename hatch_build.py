"""Puts a kernel library into a wheel of bitgen. `tools/wheels.py` sets what it reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUNDLE, TAG = "BITGEN_WHEEL_BUNDLE", "BITGEN_WHEEL_TAG"


class WheelHook(BuildHookInterface[Any]):
    """A bundle in the folder of BITGEN_WHEEL_BUNDLE makes a wheel of the platform BITGEN_WHEEL_TAG."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        bundle = os.environ.get(BUNDLE, "")
        if not bundle or version == "editable":
            return
        folder = Path(bundle)
        for file in sorted(folder.iterdir()):
            build_data["force_include"][str(file)] = f"bitgen/_data/bundles/{folder.name}/{file.name}"
        build_data["pure_python"] = False  # the library has no ABI of Python's, only one of its platform's
        build_data["tag"] = os.environ[TAG]
