"""The size report: lines of every room of the house, beside its budget and what it had before.

    python tools/rooms.py                      # lines now and budget
    python tools/rooms.py --against v0.1.0     # and the lines at that commit
    python tools/rooms.py --markdown           # a table for a change's description
    python tools/rooms.py --update             # the table in docs/design.md, against what was reviewed

Counted are all lines of tracked source files, comments and blank lines included. ``planned`` is what the
design gave a room before it held what it holds today, ``budget`` what that should need; where it is more,
``why``. Neither is a limit to game.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DESIGN = ROOT / "docs" / "design.md"
REVIEWED = "5890bec"  # the commit from which the rooms were planned
_BEGIN, _END = "<!-- rooms: python tools/rooms.py --update -->\n", "<!-- end of rooms -->\n"
SUFFIXES = (".py", ".c", ".h", ".j2", ".md", ".yaml", ".toml")


@dataclass(frozen=True)
class Room:
    """One folder (its name ends with a slash) or file, and the lines that it was planned to have.

    ``planned`` is None where the design names none; ``budget`` None: as planned. ``formerly`` are prefixes of
    paths that now belong here: they count where an older commit is compared.
    """

    name: str
    planned: int | None = None
    budget: int | None = None
    why: str = ""
    formerly: tuple[str, ...] = ()

    def match(self, path: str) -> int:
        """How many characters of ``path`` tell that it belongs here; 0 when it does not."""
        return max((len(p) for p in (self.name, *self.formerly) if path.startswith(p)), default=0)


def _model(*names: str) -> tuple[str, ...]:
    return tuple(f"bitgen/model/{name}.py" for name in names)


ROOMS = (
    Room("bitgen/api.py", 370, 500, "times kernels, exports winners, runs without a tune", ("bitgen/api/",)),
    Room("bitgen/errors.py", 60, 90, "no text of others steers a terminal"),
    Room("bitgen/paths.py", 90, 160, "bundles: installed, shipped and trusted"),
    Room(
        "bitgen/records.py",
        140,
        300,
        "its messages are for people; configs parsed ahead",
        ("bitgen/config.py",),
    ),
    Room("bitgen/whole.py", 60),
    Room("bitgen/reference.py", 60, 360, "the oracle of groups, 4-bit codes and int16 too"),
    Room("bitgen/spec.py", 230, 260, "kinds of weights, sizes of a step"),
    Room(
        "bitgen/families/",
        700,
        1600,
        "families of 4, 3 and 1 bits; scales, offsets and tables of groups",
        ("bitgen/packing.py", "bitgen/space/axes.py", "bitgen/space/presets.py"),
    ),
    Room("bitgen/space.py", 170, 330, "bounds and defaults of groups", ("bitgen/space/",)),
    Room("bitgen/render.py", 260, 460, "forward steps, SVE for each length, values by table"),
    Room(
        "bitgen/hostcode.py",
        100,
        260,
        "Linux, macOS and Windows; each CPU's feature checks",
        ("bitgen/host.py",),
    ),
    Room(
        "bitgen/cpu/",
        600,
        1200,
        "three ways to ask a CPU, the cap, CPUs that are not here, kinds of cores",
        ("bitgen/target/",),
    ),
    Room("bitgen/toolchain/", 680, 1150, "cross compilers, zig, DLLs, a second compiler for kernels"),
    Room("bitgen/measure/", 1850, 2750, "groups and 4 bits in the cases, lanes, preempted repeats"),
    Room("bitgen/search/", 1350, 1950, "two numbers of threads, layouts raced whole, a fleet's session"),
    Room("bitgen/store.py", 400, 700, "winners exported, merged, committed, pinned", ("bitgen/winners.py",)),
    Room("bitgen/trust/", 500, 520),
    Room("bitgen/report/", 700, 1250, "plots are drawn here, without a library"),
    Room("bitgen/fleet/", 900, 2600, "it survives kills, clocks, full disks, liars; queue, rights, locks"),
    Room(
        "bitgen/bundle/",
        1450,
        2950,
        "signed, installed, verified, made for 15 families, transferred, in wheels, one for every CPU",
        ("bitgen/bundle.py", "bitgen/library/"),
    ),
    Room(
        "bitgen/runtime.py",
        350,
        650,
        "groups, codes and int16; one error for each misuse; a self-test of all",
        ("bitgen/self_test.py",),
    ),
    Room("bitgen/energy.py", 150, 370, "three kinds of sensor, and a reason instead of a number"),
    Room(
        "bitgen/formats/",
        2350,
        4600,
        "types of 1 to 4 bits of many programs, tables of our own, RoPE of long contexts, downloads of three",
        ("bitgen/model/",),
    ),
    Room(
        "bitgen/tokenizer/",
        510,
        670,
        "byte fallback, special tokens, both kinds",
        _model("bpe", "sentencepiece", "tokenizer"),
    ),
    Room(
        "bitgen/inference/",
        1770,
        4450,
        "slots, reused and pinned prefixes, two kinds of drafts and their account, grammars, prompt caches, "
        "screened heads, layouts raced, memory by bytes and weights from disk, embeddings, divergence",
        _model("answer", "bench", "chat", "conversation", "engine", "generate", "llm", "packed")
        + _model("perplexity", "rest", "sampling", "synthetic")
        + ("bitgen/llm.py",),  # the class is there because it may build a library
    ),
    Room("bitgen/quantize/", 500, 800, "fit, learn, calibrate, write"),
    Room(
        "bitgen/serve/",
        2200,
        3250,
        "four dialects (OpenAI's two, Anthropic's, Ollama's), tools, embeddings, guard, metrics",
    ),
    Room("bitgen/hf/", 350, 530, "checkpoints, layers and the operator of torch"),
    Room("bitgen/lm_eval.py", 200, 230, "windows as the harness cuts them"),
    Room("bitgen/cli/", 1200, 3200, "25 commands, each with every wrong input in one line; progress"),
    Room("bitgen/"),  # what is in no other room
    Room(
        "csrc/",
        2700,
        4850,
        "ABI 3, bundles opened from C, Windows, groups, codes of 1 to 4 bits, choice of tokens",
        ("templates/host/", "templates/probes/harness"),
    ),
    Room(
        "templates/",
        5700,
        7150,
        "SVE, groups, values by table, int16, 4-bit keys and values, the page of reports",
    ),
    Room("tests/golden/", 4000),
    Room("tests/data/"),
    Room("tests/", 16900, 31000, "a server, a fleet, bundles, formats, quantising and transformers came"),
    Room("benchmarks/"),
    Room("tools/"),
    Room("examples/"),
    Room("docs/"),
    Room("configs/"),
)


def line_counts(revision: str | None = None) -> dict[str, int]:
    """Lines of every tracked source file, in the working tree or at a commit."""
    command = ["git", "grep", "-I", "--count", "", *((revision,) if revision else ()), "--"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise SystemExit(f"rooms: {done.stderr.strip() or 'git grep failed'}")
    counts = {}
    for line in done.stdout.splitlines():
        path, _, count = line.removeprefix(f"{revision}:" if revision else "").rpartition(":")
        if path.endswith(SUFFIXES):
            counts[path] = int(count)
    return counts


def room_of(path: str) -> Room | None:
    """The room whose name, or former name, says most of ``path``."""
    room = max(ROOMS, key=lambda room: room.match(path))
    return room if room.match(path) else None


def totals(counts: dict[str, int]) -> dict[str, int]:
    """Lines of each room by name."""
    lines = dict.fromkeys((room.name for room in ROOMS), 0)
    for path, count in counts.items():
        room = room_of(path)
        if room:
            lines[room.name] += count
    return lines


def rows(now: dict[str, int], before: dict[str, int] | None) -> list[list[str]]:
    """The report: room, lines before (where asked for) and now, planned, budget, how far over it, why."""

    def row(label: str, rooms: Sequence[Room], why: str) -> list[str]:
        lines = sum(now[room.name] for room in rooms)
        planned = sum(room.planned or 0 for room in rooms)
        budget = sum(room.budget or room.planned or 0 for room in rooms)
        over = f"+{lines - budget:,}" if budget and lines > budget else ""
        former = [f"{sum(before[room.name] for room in rooms):,}"] if before is not None else []
        numbers = [f"{number:,}" if number else "" for number in (planned, budget)]
        return [label, *former, f"{lines:,}", *numbers, over, why]

    package = [room for room in ROOMS if room.name.startswith("bitgen/")]
    report = [row(room.name, [room], room.why) for room in package]
    report.append(row("bitgen/, all of it", package, ""))
    return report + [row(room.name, [room], room.why) for room in ROOMS if room not in package]


def show(table: Sequence[Sequence[str]], markdown: bool) -> str:
    """A table, its first row the header, as aligned columns or as Markdown."""
    if markdown:
        header, *body = table
        lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:-1]), line[-1]] for line in table
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def in_document(table: str) -> str:
    """docs/design.md with this table of rooms."""
    head, begin, behind = DESIGN.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, tail = behind.partition(_END)
    return f"{head}{begin}\n{table}\n\n{end}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", metavar="REV", help="a commit to compare with")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--update", action="store_true", help="write the table into docs/design.md")
    args = parser.parse_args(argv)
    if args.update:
        args.against, args.markdown = REVIEWED, True
    before = totals(line_counts(args.against)) if args.against else None
    header = ["room", *(["before"] if args.against else []), "lines", "planned", "budget", "over", "why"]
    table = show([header, *rows(totals(line_counts()), before)], args.markdown)
    if args.update:
        DESIGN.write_text(in_document(table), encoding="utf-8")
    else:
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
