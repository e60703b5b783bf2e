"""I2_S kernels written by hand: one that is right, and ways to be wrong, to crash and to hang.

They claim to be for the scalar ISA level and n = 1; each is told from the others by its knob.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitgen.errors import BitgenError
from bitgen.measure import Status
from bitgen.render import Source, matmul_struct
from bitgen.spec import KernelSpec, Layout, Schedule

_KERNEL = """\
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <signal.h>
#include <unistd.h>
/*PRELUDE*/
{struct}
/*SCRATCH TYPE*/int64_t/**/ {name}_scratch(int64_t m, int64_t k, int64_t n) {{
    (void)m; (void)k; (void)n;
    return /*SCRATCH*/0/**/;
}}
void {name}(/*ARGUMENT*/const struct bitgen_matmul *a/**/) {{
    const int64_t chunks = (a->k + 15) / 16;
    const int64_t row_begin = /*BEGIN*/a->row_begin/**/, row_end = /*END*/a->row_end/**/;
    const int64_t tokens = a->n, columns = /*COLUMNS*/a->k/**/;
    /*START*/
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t row = row_begin; row < row_end; ++row) {{
            const uint8_t *const block = a->w + row / 16 * chunks * 64;
            /*TYPE*/int32_t/**/ sum = 0;
            for (int64_t i = 0; i < columns; ++i) {{
                const int code = block[i / 16 * 64 + 4 * (row % 16) + i % 4] >> (2 * (i % 16 / 4)) & 3;
                sum += (code - 1) * a->x[t * a->x_stride + i];
            }}
            if (a->acc) {{
                a->acc[t * a->out_stride + row] = sum;
                continue;
            }}
            const float scale = a->w_scale[a->w_scale_stride ? row : 0];
            a->y[t * a->out_stride + row] = /*Y*/(float)sum * (a->x_scale[t] * scale)/**/;
        }}
    /*FINISH*/
}}
"""

# A write to *p that the compiler must keep.
_POKE = "*(volatile uint8_t *)(uintptr_t)({}) = 1;"
_PEEK = "(void)*(const volatile uint8_t *)(uintptr_t)({});"


@dataclass(frozen=True)
class Broken:
    """``edits``: marker -> what stands there; the answer has ``status`` and its detail holds ``says``."""

    name: str
    edits: dict[str, str]
    status: Status
    says: str = ""


RIGHT = Broken("right", {}, Status.OK)
# Right and slow: twice the work where it is timed.
SLOW = Broken("slow", {"START": "for (volatile int64_t i = a->m > 600 ? 200000 : 0; i; --i) ;"}, Status.OK)

ALL = (
    RIGHT,
    SLOW,
    # Wrong numbers.
    Broken("int16 sums overflow", {"TYPE": "int16_t"}, Status.INCORRECT, "2113"),
    Broken("the last columns are left out", {"COLUMNS": "a->k / 4 * 4"}, Status.INCORRECT, "1x1"),
    Broken("another order of scaling", {"Y": "(float)sum * a->x_scale[t] * scale"}, Status.INCORRECT, "y of"),
    Broken(
        "only wrong for many rows", {"END": "(a->m > 600 ? a->m - 1 : a->row_end)"}, Status.INCORRECT, "timed"
    ),
    Broken(
        "trusts its scratch to be zero",
        {"SCRATCH": "4", "FINISH": "if (a->acc) a->acc[row_begin] += *(int32_t *)a->scratch;"},
        Status.INCORRECT,
        "row 0",
    ),
    # Writes where it must not, on pages that are there.
    Broken("rows it was not given", {"END": "a->m"}, Status.INCORRECT, "outside its row range"),
    Broken(
        "a row behind the last",
        {"END": "a->row_end + (a->out_stride > a->m)"},
        Status.INCORRECT,
        "outside the rows",
    ),
    Broken(
        "in front of its output",
        {"START": "if (a->acc) a->acc[-1] = 7;"},
        Status.INCORRECT,
        "outside the rows",
    ),
    Broken(
        "behind its scratch",
        {"SCRATCH": "100", "START": "((char *)a->scratch)[100] = 1;"},
        Status.INCORRECT,
        "outside its scratch",
    ),
    Broken("scratch without end", {"SCRATCH": "INT64_C(1) << 40"}, Status.INCORRECT, "bytes of scratch"),
    # Guard pages.
    Broken(
        "reads behind the weights",
        {"START": _PEEK.format("a->w + (a->m + 15) / 16 * chunks * 64")},
        Status.CRASHED,
        "SIGSEGV in acc of 1x1",
    ),
    Broken(
        "reads behind the activations",
        {"START": _PEEK.format("a->x + a->n * a->x_stride")},
        Status.CRASHED,
        "SIGSEGV in acc of 1x1",
    ),
    Broken(
        "reads behind the sums",
        {"START": _PEEK.format("a->x_sum + a->n")},
        Status.CRASHED,
        "SIGSEGV in acc of 1x1",
    ),
    Broken(
        "writes behind the output",
        {"START": "if (a->y) " + _POKE.format("a->y + a->n * a->out_stride")},
        Status.CRASHED,
        "SIGSEGV in y of 1x1",
    ),
    Broken("writes to the weights", {"START": _POKE.format("a->w")}, Status.CRASHED, "SIGSEGV in acc of 1x1"),
    # Ends or keeps the process.
    Broken("aborts", {"START": "abort();"}, Status.CRASHED, "SIGABRT"),
    Broken("exits", {"START": "_exit(0);"}, Status.CRASHED, "ended the process"),
    Broken(
        "crashes when timed", {"START": "if (a->m > 600) raise(SIGSEGV);"}, Status.CRASHED, "in the timing of"
    ),
    Broken("hangs", {"START": "for (;;) sleep(1);"}, Status.TIMEOUT, "in acc of 1x1"),
    Broken("hangs when timed", {"START": "while (a->m > 600) sleep(1);"}, Status.TIMEOUT, "in the timing of"),
    Broken("kills its parent", {"START": "kill(getppid(), SIGKILL);"}, Status.CRASHED, "was killed"),
    # Does it to whoever loads it.
    Broken(
        "crashes when loaded",
        {"PRELUDE": "__attribute__((constructor)) static void early(void) { raise(SIGSEGV); }"},
        Status.CRASHED,
        "SIGSEGV while it was loaded",
    ),
    # Is not what kernel.h says.
    Broken(
        "another struct",
        {"STRUCT": matmul_struct().replace("int64_t m, k, n;", "int64_t k, m, n;")},
        Status.COMPILE_ERROR,
        "bitgen_matmul",
    ),
    Broken("another argument", {"ARGUMENT": "struct bitgen_matmul *a"}, Status.COMPILE_ERROR, "incompatible"),
    Broken("another result", {"SCRATCH TYPE": "int32_t"}, Status.COMPILE_ERROR, "incompatible"),
    # Does not compile.
    Broken("no C", {"START": "this is no C;"}, Status.COMPILE_ERROR, "error"),
    Broken(
        "an undefined function",
        {"PRELUDE": "void nowhere(void);", "START": "nowhere();"},
        Status.COMPILE_ERROR,
        "nowhere",
    ),
    Broken("no text", {"RENDER": ""}, Status.COMPILE_ERROR, "has no text"),
)


def spec_of(kernel: Broken) -> KernelSpec:
    index = ALL.index(kernel)
    return KernelSpec("i2s", "scalar", "n1", Layout("i2s", 16), Schedule("direct", (("index", index),)))


def render(spec: KernelSpec) -> Source:
    """The stand-in for `bitgen.render.render_kernel`."""
    return source_of(spec, ALL[spec.schedule["index"]])


def source_of(spec: KernelSpec, kernel: Broken) -> Source:
    """The C file of ``kernel``, which claims to be that of ``spec``."""
    text = _KERNEL.format(name=spec.name, struct=kernel.edits.get("STRUCT", matmul_struct()))
    for marker, replacement in kernel.edits.items():
        if marker == "STRUCT":
            continue
        if marker == "RENDER":
            raise BitgenError(f"{kernel.name}: it has no text")
        head, _, tail = text.partition(f"/*{marker}*/")
        line, newline, rest = tail.partition("\n")
        if "/**/" in line:
            line = line.partition("/**/")[2]
        text = f"{head}{replacement}{line}{newline}{rest}"
    return Source(spec.name, text, spec.isa, (spec.prototype, spec.scratch_prototype))
