"""The size report: lines of every room of the house, beside its budget and what it had before.

    python tools/rooms.py                      # lines now and budget
    python tools/rooms.py --against v0.1.0     # and the lines at that commit
    python tools/rooms.py --markdown           # a table for a change's description

Counted are all lines of tracked source files, comments and blank lines included. A budget is what a room
should need, and no limit to game: a room may stay larger, with a reason; the report says where.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".c", ".h", ".j2", ".md", ".yaml", ".toml")


@dataclass(frozen=True)
class Room:
    """One folder (its name ends with a slash) or file, and the most lines it should have.

    ``budget`` is None where the design names none. ``formerly`` are prefixes of paths that now belong here:
    they count where an older commit is compared.
    """

    name: str
    budget: int | None = None
    formerly: tuple[str, ...] = ()

    def match(self, path: str) -> int:
        """How many characters of ``path`` tell that it belongs here; 0 when it does not."""
        return max((len(p) for p in (self.name, *self.formerly) if path.startswith(p)), default=0)


def _model(*names: str) -> tuple[str, ...]:
    return tuple(f"bitgen/model/{name}.py" for name in names)


ROOMS = (
    Room("bitgen/api.py", 370, ("bitgen/api/",)),
    Room("bitgen/errors.py", 60),
    Room("bitgen/paths.py", 90),
    Room("bitgen/records.py", 140, ("bitgen/config.py",)),
    Room("bitgen/reference.py", 60),
    Room("bitgen/spec.py", 230),
    Room("bitgen/families/", 700, ("bitgen/packing.py", "bitgen/space/axes.py", "bitgen/space/presets.py")),
    Room("bitgen/space.py", 170, ("bitgen/space/",)),
    Room("bitgen/render.py", 260),
    Room("bitgen/hostcode.py", 100, ("bitgen/host.py",)),
    Room("bitgen/cpu/", 600, ("bitgen/target/",)),
    Room("bitgen/toolchain/", 680),
    Room("bitgen/measure/", 1850),
    Room("bitgen/search/", 1350),
    Room("bitgen/store.py", 400, ("bitgen/winners.py",)),
    Room("bitgen/trust/", 500),
    Room("bitgen/report/", 700),
    Room("bitgen/fleet/", 900),
    Room("bitgen/bundle/", 1450, ("bitgen/bundle.py", "bitgen/library/")),
    Room("bitgen/runtime.py", 350),
    Room("bitgen/energy.py", 150),
    Room("bitgen/formats/", 2350, ("bitgen/model/",)),
    Room("bitgen/tokenizer/", 510, _model("bpe", "sentencepiece", "tokenizer")),
    Room(
        "bitgen/inference/",
        1770,
        _model("answer", "bench", "chat", "conversation", "engine", "generate", "llm", "packed")
        + _model("perplexity", "rest", "sampling", "synthetic")
        + ("bitgen/llm.py",),  # the class is there because it may build a library
    ),
    Room("bitgen/serve/", 2200),
    Room("bitgen/hf/", 350),
    Room("bitgen/lm_eval.py", 200),
    Room("bitgen/cli/", 1200),
    Room("bitgen/"),  # what is in no other room
    Room("csrc/", 2700, ("templates/host/", "templates/probes/harness")),
    Room("templates/", 5700),
    Room("tests/golden/", 4000),
    Room("tests/data/"),
    Room("tests/", 16900),
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
    """The report: room, lines before (where asked for), lines now, budget, and how far a room is over it."""

    def row(label: str, rooms: Iterable[Room], budget: int | None) -> list[str]:
        names = [room.name for room in rooms]
        lines = sum(now[name] for name in names)
        over = f"+{lines - budget:,}" if budget is not None and lines > budget else ""
        former = [f"{sum(before[name] for name in names):,}"] if before is not None else []
        return [label, *former, f"{lines:,}", "" if budget is None else f"{budget:,}", over]

    package = [room for room in ROOMS if room.name.startswith("bitgen/")]
    report = [row(room.name, [room], room.budget) for room in package]
    report.append(row("bitgen/, all of it", package, sum(room.budget or 0 for room in package)))
    return report + [row(room.name, [room], room.budget) for room in ROOMS if room not in package]


def show(table: Sequence[Sequence[str]], markdown: bool) -> str:
    """A table, its first row the header, as aligned columns or as Markdown."""
    if markdown:
        header, *body = table
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", metavar="REV", help="a commit to compare with")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    args = parser.parse_args(argv)
    before = totals(line_counts(args.against)) if args.against else None
    header = ["room", *(["before"] if args.against else []), "lines", "budget", "over"]
    print(show([header, *rows(totals(line_counts()), before)], args.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
