"""Spec -> C text: the only module that reads kernel templates.

The text is a pure function of the spec: no date, host or path is in it, so golden files, content hashes and
diffs are honest. C knows instructions (templates/isa/*.h), Jinja knows counts (templates/kernels/*.c.j2).
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from typing import Any

import jinja2

from bitgen.cpu import Isa, find_isa, load_isas
from bitgen.errors import BitgenError, UsageError
from bitgen.paths import csrc_dir, templates_dir
from bitgen.space import headroom_lines
from bitgen.spec import (
    EVERY_FAMILY,
    QUANTIZE_PROTOTYPE,
    TABLES_PROTOTYPE,
    KernelSpec,
    Layout,
    StepSizes,
    family_named,
    regime_named,
)

_OP_MARK, _PART_MARK = "//: ", "//== "
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Source:
    """One generated C file: its text, the ISA whose flags it needs, and the prototypes of what it defines."""

    name: str
    text: str
    isa: str
    prototypes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def parse_ops(text: str) -> dict[str, str]:
    """Split an ISA header into its ops: name -> C text, in file order.

    Text before the first is dropped, and so is what a line ``//== TITLE`` opens.
    """
    ops: dict[str, str] = {}
    for part in re.split(rf"^(?={_OP_MARK}|{_PART_MARK})", text, flags=re.MULTILINE)[1:]:
        if part.startswith(_PART_MARK):
            continue
        name, _, body = part.removeprefix(_OP_MARK).partition("\n")
        ops[name.strip()] = body.strip("\n") + "\n"
    return ops


@cache
def vector_ops(isa_name: str) -> Mapping[str, str]:
    """All ops of an ISA level: its parents' first, each replaced by the level's own of the same name."""
    ops: dict[str, str] = {}
    for level in isa_named(isa_name).headers:
        path = templates_dir() / "isa" / f"{level}.h"
        ops.update(parse_ops(path.read_text(encoding="utf-8")))
    return ops


def isa_named(name: str) -> Isa:
    return find_isa(name, load_isas())


def ops_used(ops: Mapping[str, str], body: str) -> list[str]:
    """The names of the ops that ``body`` needs, directly or through another op, in their order."""
    seen: set[str] = set()
    pending = set(_IDENTIFIER.findall(body)) & ops.keys()
    while pending:
        name = pending.pop()
        seen.add(name)
        pending |= (_identifiers(ops[name]) & ops.keys()) - seen
    return [name for name in ops if name in seen]


@cache
def _identifiers(op: str) -> frozenset[str]:
    """What the text of an op names; the same few hundred ops are in thousands of kernels."""
    return frozenset(_IDENTIFIER.findall(op))


def _environment() -> jinja2.Environment:
    # Delimiters that a C compiler's reader tolerates, so that a template is still C to eye and editor.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(templates_dir())),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - C text, no HTML
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="/*%",
        block_end_string="%*/",
        comment_start_string="/*#",
        comment_end_string="#*/",
        line_statement_prefix="//%",
    )
    environment.globals.update(plus=_plus, times=_times, numbers=_numbers)
    environment.filters["at_column"] = _at_column
    return environment


def _plus(*terms: str | int) -> str:
    """A sum as C text: ``plus("w", 8, "k", -8)`` is "w + k". Numbers are added up, and a 0 is dropped."""
    number = sum(term for term in terms if isinstance(term, int))
    words = [str(term) for term in terms if not isinstance(term, int) and term != "0"]
    return " + ".join([*words, *([str(number)] if number or not words else [])])


def _times(factor: int, term: str) -> str:
    """A product as C text, for sums: ``times(64, "c + 1")`` is "64 * (c + 1)", ``times(1, x)`` is x."""
    if factor in (0, 1):
        return term if factor else "0"
    return f"{factor} * {term}" if term.isidentifier() else f"{factor} * ({term})"


def _numbers(values: Sequence[int], column: int) -> str:
    """The rows of an array initialiser, 16 numbers a line; all but the first line start at ``column``."""
    lines = [", ".join(map(str, values[i : i + 16])) for i in range(0, len(values), 16)]
    return (",\n" + " " * column).join(lines)


@lru_cache(4096)
def _at_column(text: str, column: int) -> str:
    """Lines of C (a macro's) moved to start at ``column``, without empty lines around and between them."""
    lines = [line for line in text.splitlines() if line.strip()]
    margin = min((len(line) - len(line.lstrip(" ")) for line in lines), default=0)
    indent = " " * column
    return "\n".join([indent + line[margin:] for line in lines])


@dataclass(frozen=True)
class Tile:
    """How a kernel template names what a tile holds: C text by row, token and field.

    Row ``r`` is a sub-block of 16 rows; a tile has those of ``b0``, then those of ``b1``, ... when it walks
    several row blocks (streams ``w0``, ``w1``, ...) at once.
    """

    layout: Layout
    one_token: bool

    @staticmethod
    def sums(name: str, r: int, t: int, f: int | None = None) -> str:
        """A register of sums: ``acc_r0_t1``, or ``acc_r0_t1_f2`` of one field."""
        return f"{name}_r{r}_t{t}" + (f"_f{f}" if f is not None else "")

    @classmethod
    def acc(cls, r: int, t: int, f: int | None = None) -> str:
        """The int32 accumulator of a sub-block and a token."""
        return cls.sums("acc", r, t, f)

    def row(self, r: int) -> str:
        """The first matrix row of a sub-block."""
        stream, sub_block = divmod(r, self.layout.sub_blocks)
        return _plus(_times(self.layout.row_block, f"b{stream}"), 16 * sub_block)

    def weights(self, r: int, c: str, byte: int = 0, stream: str = "w{}") -> str:
        """The address of byte ``byte`` of chunk ``c`` of a sub-block."""
        which, sub_block = divmod(r, self.layout.sub_blocks)
        size = EVERY_FAMILY[self.layout.family].chunk_bytes
        return _plus(stream.format(which), _times(size * self.layout.sub_blocks, c), size * sub_block + byte)

    def tail(self, r: int, stream: str = "w{}") -> str:
        """The address of a sub-block's tail, behind all whole chunks of a group of its row block."""
        which, sub_block = divmod(r, self.layout.sub_blocks)
        family, group = EVERY_FAMILY[self.layout.family], self.layout.group
        chunks = self.layout.sub_blocks * (group // family.k_chunk) * family.chunk_bytes
        return _plus(stream.format(which), chunks + 4 * family.tail(group) * sub_block)

    def scale(self, r: int, stream: str = "w{}") -> str:
        """The address of a sub-block's scales, behind all chunks of a group of its row block.

        Its offsets, where there are any, are 16 scales behind.
        """
        which, sub_block = divmod(r, self.layout.sub_blocks)
        family = EVERY_FAMILY[self.layout.family]
        codes = self.layout.sub_blocks * family.group_bytes(self.layout.group)
        return _plus(stream.format(which), codes, _times(16 * family.scales * sub_block, "scale_bytes"))

    def table(self, r: int, group: str = "g", head: str = "head{}") -> str:
        """The address of the values that a group's codes of a sub-block stand for."""
        which, sub_block = divmod(r, self.layout.sub_blocks)
        head = head.format(which)
        selector = _plus(64 + sub_block, _times(self.layout.sub_blocks, group))
        return f"{head} + 16 * ({head}[{selector}] & 3)"

    def trailer(self, r: int) -> str:
        """The address of a sub-block's trailer, behind all chunks of its row block."""
        which, sub_block = divmod(r, self.layout.sub_blocks)
        family = EVERY_FAMILY[self.layout.family]
        chunks = _times(family.chunk_bytes * self.layout.sub_blocks, "chunks")
        return _plus(f"w{which}", chunks, family.trailer_bytes * sub_block)


@cache
def _template(name: str) -> jinja2.Template:
    try:
        return _environment().get_template(name)
    except jinja2.TemplateNotFound:
        raise BitgenError(f"there is no template {name} under {templates_dir()}") from None


def _expand(template: str, isa: Isa, banner: Sequence[str], values: Mapping[str, Any]) -> str:
    """Banner, includes, the vector ops that the body uses, and the body."""
    try:
        body = _template(template).render(isa=isa, **values)
    except jinja2.UndefinedError as error:
        hint = "a macro that also serves algorithms without this knob asks schedule.get(KNOB, VALUE)"
        raise BitgenError(f"{template}: {error}; {hint}") from error
    # What macros leave behind: no empty line within a function, one between two.
    body = re.sub(r"\n\n+(?= )", "\n", re.sub(r"\n{3,}", "\n\n", body))
    ops = vector_ops(isa.name)
    used = ops_used(ops, body)
    text = [f" * {line}".rstrip() for line in banner]
    lines = ["/*", *text, " */", "#include <stdint.h>", "#include <string.h>", ops["includes"]]
    lines += ["#define OP static inline __attribute__((always_inline, unused))", ""]
    lines += [f"/* The ops of {isa.name} used here. */", ops["types"]]
    lines += [ops[name] for name in used if name not in ("types", "includes")]
    return "\n".join(lines) + "\n" + matmul_struct() + "\n" + body.rstrip() + "\n"


def render_kernel(spec: KernelSpec) -> Source:
    """The C file of one kernel. BitgenError for a schedule that its space does not hold."""
    isa = isa_named(spec.isa)
    family = EVERY_FAMILY[spec.family]
    regime = regime_named(spec.regime)
    last = regime.n_max or "any"
    banner = [
        spec.name,
        "",
        f"Generated by bitgen from templates/kernels/{family.template or family.name}.c.j2 and "
        f"templates/isa/{isa.headers[-1]}.h:",
        *_continued(render_command(spec)),
        "",
        *_formulas(spec),
        "",
        f"shape      {spec.shape.name if spec.shape else 'any m x k: both are arguments'}",
        f"tokens     n = {regime.n_min} .. {last}",
        f"weights    {family.title}, {spec.layout.bits_a_weight:.3f} bits a weight; "
        f"row blocks of {spec.layout.row_block}, chunks of {family.k_chunk} along k",
        *_labelled(
            "schedule", f"{spec.schedule.algorithm}: {', '.join(f'{k} = {v}' for k, v in spec.schedule)}"
        ),
        *(f"{'bound' if i == 0 else '':10} {line}" for i, line in enumerate(headroom_lines(spec))),
    ]
    values = {
        "spec": spec,
        "family": family,
        "regime": regime,
        "layout": spec.layout,
        "schedule": spec.schedule,
        "tile": Tile(spec.layout, regime.n_max == 1),
        "tiles": _token_tiles(spec),
        **family.constants,
        **spec.knobs,
    }
    text = _expand(f"kernels/{family.template or family.name}.c.j2", isa, banner, values)
    return Source(spec.name, text, spec.isa, (spec.prototype, spec.scratch_prototype))


def _formulas(spec: KernelSpec) -> tuple[str, ...]:
    """What a kernel computes, for its banner."""
    family = EVERY_FAMILY[spec.family]
    values = f"in {{-1, {'0, ' if family.codes > 2 else ''}1}}"
    if not spec.layout.group:
        return (
            f"acc[n, m] = sum over k of w[m, k] * xq[n, k]            w {values}, xq int8, acc int32, exact",
            "y[n, m] = (float)acc[n, m] * (x_scale[n] * w_scale[m])  one order of operations on every ISA",
        )
    if family.by_table:
        values = f"one of {family.codes} int8"
    elif family.codes > 3:
        values = f"= q - {family.bias}, q = 0 .. {family.codes - 1}".replace(" - 0", "")
    lines = [
        f"acc[n, m, g] = sum over k of group g, {spec.layout.group} columns, of w[m, k] * xq[n, k]",
        f"                                                        w {values}, xq int8, acc int32, exact",
        "y[n, m] = 0; for g = 0, 1, ...: y[n, m] = "
        "fma((float)acc[n, m, g], w_scale[m, g] * x_scale[n, g], y[n, m])",
    ]
    if family.scales > 1:
        lines.append(
            "    then y[n, m] = fma(offset[m, g], x_scale[n, g] * (float)x_sum[n, g], y[n, m])",
        )
    indent = " " * 56
    return (*lines, f"{indent}one order of operations on every ISA")


def inherits(spec: KernelSpec) -> str | None:
    """The parent of the spec's ISA level, when that level's kernel of the same schedule is the same text.

    None when the level changes an op that the kernel uses, or has no parent. The two are compiled with flags
    of their own, so their machine code may differ.
    """
    parent = isa_named(spec.isa).parent
    if parent is None:
        return None
    own, inherited = (_body(one) for one in (spec, replace(spec, isa=parent)))
    return parent if own == inherited else None


def _body(spec: KernelSpec) -> str:
    """The C text below the banner, without the name of the ISA level."""
    text = render_kernel(spec).text.partition(" */\n")[2]
    return text.replace(f"__{spec.isa}", "").replace(f"ops of {spec.isa} used", "ops used")


def _token_tiles(spec: KernelSpec) -> list[int]:
    """The tile heights a direct kernel holds: nr, and smaller powers of two for what is left of n."""
    nr = spec.schedule.get("nr", 1)
    smaller = [t for t in (1, 2, 4, 8) if t < nr and spec.regime != "n1"]
    return [*smaller, nr]


def _labelled(label: str, text: str) -> list[str]:
    """Text as lines of a comment, behind a label of at most ten columns."""
    return textwrap.wrap(text, 115, initial_indent=f"{label:10} ", subsequent_indent=" " * 11)


def _continued(command: str) -> list[str]:
    """A command as lines of a comment; a backslash joins them, as in a shell."""
    lines = textwrap.wrap(command, 104, break_long_words=False, break_on_hyphens=False)
    return [f"    {line}{end}" for line, end in zip(lines, [" \\"] * (len(lines) - 1) + [""], strict=True)]


def render_command(spec: KernelSpec) -> str:
    """The command that makes the file again."""
    shape = f" --shape {spec.shape.name}" if spec.shape else ""
    group = f" --group {spec.layout.group}" if spec.layout.group else ""
    knobs = " ".join(f"--knob {k}={v}" for k, v in spec.schedule)
    return (
        f"bitgen render {spec.family}{shape} --isa {spec.isa} --regime {spec.regime} "
        f"--row-block {spec.layout.row_block}{group} --algorithm {spec.schedule.algorithm} {knobs}"
    )


def render_quantize(isa_name: str) -> Source:
    """The activation quantiser of an ISA level: float32 (k) -> int8, scale and sum, for one token."""
    isa = isa_named(isa_name)
    name = f"bitgen_quantize__{isa.name}"
    prototype = QUANTIZE_PROTOTYPE.format(isa=isa.name)
    banner = [
        name,
        "",
        f"Generated by bitgen from templates/kernels/quantize.c.j2 and templates/isa/{isa.headers[-1]}.h:",
        f"    bitgen render quantize --isa {isa.name}",
    ]
    text = _expand("kernels/quantize.c.j2", isa, banner, {"prototype": prototype})
    return Source(name, text, isa.name, (prototype,))


def render_tables(family_name: str, isa_name: str, algorithm: str | None = None) -> Source:
    """The builder of a token's lookup tables, for a family that looks sums up.

    ``algorithm``: whose tables; None where the family has one kind.
    """
    isa, family = isa_named(isa_name), family_named(family_name)
    if not family.looks_up:
        raise UsageError(f"{family.title} multiplies: it has no lookup tables")
    kinds = dict(family.tables)
    if algorithm is None and len(kinds) == 1:
        algorithm = next(iter(kinds))
    builder = family.builder(algorithm or "")
    if builder is None:
        known = ", ".join(f"{family.name}_{kind}_tables" for kind in kinds)
        raise UsageError(f"{family.title} has several kinds of lookup tables: {known}")
    name = f"bitgen_{builder}__{isa.name}"
    prototype = TABLES_PROTOTYPE.format(builder=builder, isa=isa.name)
    banner = [
        name,
        "",
        f"Generated by bitgen from templates/kernels/{builder}.c.j2 and templates/isa/{isa.headers[-1]}.h:",
        f"    bitgen render {builder} --isa {isa.name}",
    ]
    values = {"prototype": prototype, "family": family, **family.algorithm(algorithm or "").constants}
    text = _expand(f"kernels/{builder}.c.j2", isa, banner, values)
    return Source(name, text, isa.name, (prototype,))


def render_step(isa_name: str, sizes: StepSizes | None = None) -> Source:
    """The parts of the forward step beside its matmuls, for an ISA level; they include step.h.

    ``sizes``: of the models that it serves, constants in its text; None: it serves every model.
    """
    isa = isa_named(isa_name)
    known = asdict(sizes) if sizes else {field.name: 0 for field in fields(StepSizes)}
    which = f"_{sizes.name}" if sizes else ""
    name = f"bitgen_step{which}__{isa_name}"
    models = ", ".join(f"{size} {known[size]}" for size in known) if sizes else "any: all sizes are arguments"
    banner = [
        name,
        "",
        f"Generated by bitgen from templates/step/ops.c.j2 and templates/isa/{isa.headers[-1]}.h:",
        f"    bitgen render step --isa {isa.name}{' --model NAME  (any of these sizes)' if sizes else ''}",
        "",
        f"models     {models}",
        "",
        "Norms, activations, RoPE, attention, embedding and head. Each has one order of float operations:",
        "the same bits on every ISA level.",
    ]
    quantize = QUANTIZE_PROTOTYPE.format(isa=isa_name)
    values = {
        "quantize_prototype": quantize,
        "ops": f"bitgen_step_ops{which}__{isa_name}",
        **known,
        **_STEP_TILES.get(isa.vector_bytes, _STEP_TILES[0]),
    }
    return Source(name, _expand("step/ops.c.j2", isa, banner, values), isa_name, ())


# What is held in registers, by the bytes of a register (0: any other). attention_tiles: query rows, blocks of
# 16 keys for scores, 16-lane vectors for values; head_tiles: rows of the head, tokens; screen_tiles: the same
# of its screen, with two sums each. More sums than the latency of an fma hides are useless, more than the
# registers hold spill.
_STEP_TILES: Mapping[int, Mapping[str, Any]] = {
    64: {
        "attention_tiles": [(1, 8, 8), (2, 4, 8), (4, 4, 4), (8, 2, 2)],
        "head_tiles": [(4, 4), (8, 1)],
        "screen_tiles": [(4, 4), (4, 2), (8, 1)],
    },
    32: {
        "attention_tiles": [(1, 4, 4), (2, 2, 2), (4, 1, 1)],
        "head_tiles": [(2, 2), (4, 1)],
        "screen_tiles": [(2, 2), (4, 1)],
    },
    16: {
        "attention_tiles": [(1, 4, 4), (2, 2, 2), (4, 1, 1)],
        "head_tiles": [(2, 2), (4, 1)],
        "screen_tiles": [(2, 2), (4, 1)],
    },
    0: {"attention_tiles": [(1, 1, 1)], "head_tiles": [(1, 1)], "screen_tiles": [(1, 1)]},
}


def render_probe(name: str, isa_name: str, **values: Any) -> Source:
    """A kernel that measures the machine (templates/probes/): its prototypes are the template's own."""
    isa = isa_named(isa_name)
    function = f"bitgen_probe_{name}__{isa_name}" + "".join(f"_{v}" for v in values.values())
    banner = [function, "", f"Generated by bitgen from templates/probes/{name}.c.j2."]
    text = _expand(f"probes/{name}.c.j2", isa, banner, {"function": function, **values})
    prototypes = tuple(
        re.findall(rf"^(?!static)(\w[\w *]*\b{function}\w*\([^)]*\))", text, flags=re.MULTILINE)
    )
    return Source(function, text, isa_name, prototypes)


def render_table(**values: Any) -> str:
    """The table of a library's kernels, table.c."""
    return _template("table.c.j2").render(**values)


@cache
def matmul_struct() -> str:
    """The C declaration of ``struct bitgen_matmul``, the argument of every kernel: csrc/matmul.h."""
    return (csrc_dir() / "matmul.h").read_text(encoding="utf-8")
