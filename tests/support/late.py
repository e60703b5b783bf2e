"""Modules that are imported when a test first asks for something of them.

Every worker of a parallel run reads every file of tests, and PyTorch with transformers takes 5 s each time.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pytest


class Late:
    """The module ``name``; where it is not installed, the test that needs it is skipped with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self._name, self._reason = name, reason

    @cached_property
    def _module(self) -> Any:
        return pytest.importorskip(self._name, reason=self._reason)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_pytest", "_mock")):  # what pytest asks of everything it finds in a file
            raise AttributeError(name)
        return getattr(self._module, name)
