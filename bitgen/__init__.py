"""bitgen: from this CPU and a ternary model's shapes to a proven, tuned kernel library."""

from __future__ import annotations

__version__ = "0.1.0"
