"""A page to look at: what one tune measured, from its records, as one HTML file.

`tune` takes a tune out of a store, `kernels` and `course` make sections of it, `plots` is their geometry and
`page` the text that `write` writes. What the records do not hold is left out, with a sentence.
"""

from __future__ import annotations

from bitgen.report.page import MAX_BYTES, render_plot, render_report
from bitgen.report.tune import Tune, tune_of
from bitgen.report.write import write_report

__all__ = ["MAX_BYTES", "Tune", "render_plot", "render_report", "tune_of", "write_report"]
