"""What README and the documents promise: links lead somewhere, commands run, Python compiles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from bitgen import cli
from bitgen.errors import BitgenError

ROOT = Path(__file__).parents[2]
DECISIONS = ROOT / "docs" / "decisions"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "generated")),
]
# Commands that need no compiler, no model and no time; the others are only parsed.
CHEAP = {"detect", "models", "render", "show", "cache"}
# Inline code of these pages holds whole commands, not flags that the text is about.
WHOLE_COMMANDS = ("README.md", "CONTRIBUTING.md", "docs/reference/cli.md")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it opens, its language, its lines."""

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@lru_cache
def read(page: Path) -> tuple[str, tuple[Block, ...]]:
    """The text of a page without its fenced blocks, and these."""
    prose: list[str] = []
    blocks: list[Block] = []
    inside: list[str] | None = None
    language, opened = "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```") and inside is None:
            inside, language, opened = [], line[3:], number
        elif line.startswith("```") and inside is not None:
            blocks.append(Block(page, opened, language, tuple(inside)))
            inside = None
        else:
            (prose if inside is None else inside).append(line)
    assert inside is None, f"{page}: the block of line {opened} has no end"
    return "\n".join(prose), tuple(blocks)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", read(page)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The relative links of a page, whose text may go over the end of a line."""
    prose = re.sub(r"`[^`]*`", "", read(page)[0])
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link} has no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    coming = [ROOT / "README.md"]
    while coming:
        page = coming.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = ((page.parent / link.partition("#")[0]).resolve() for link in links(page))
        coming.extend(target for target in targets if target.suffix == ".md")
    documents = set((ROOT / "docs").rglob("*.md"))
    assert not {name_of(page) for page in documents - reached}


def test_the_index_of_decisions_is_complete() -> None:
    expected = []
    for page in sorted(DECISIONS.glob("[0-9]*.md")):
        title, blank, dated = page.read_text(encoding="utf-8").splitlines()[:3]
        found = re.fullmatch(r"(\d{4}-\d\d-\d\d), (proposed|accepted|superseded)", dated)
        assert found, f"{page.name}: the third line is its date and status"
        assert not blank
        number = page.name[:4]
        expected.append(f"| [{number}]({page.name}) | {title.removeprefix('# ')} | {found[1]} | {found[2]} |")
    numbers = [row[3:7] for row in expected]
    assert len(set(numbers)) == len(numbers), "two decisions have one number"
    index = (DECISIONS / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in index if line.startswith("| [")] == expected


def commands() -> Iterator[tuple[str, list[str]]]:
    """(place, arguments) of every bitgen command in fenced blocks, and in inline code where it is whole."""
    for page in PAGES:
        prose, blocks = read(page)
        lines = [
            (block.line + i, line)
            for block in blocks
            if not block.language
            for i, line in enumerate(block.lines, 1)
        ]
        if name_of(page) in WHOLE_COMMANDS:
            codes = re.findall(
                r"`(bitgen [^`]+)`", prose
            )  # `bitgen build` alone is a name, not a command line
            lines += [(0, code) for code in codes if len(code.split()) > 2 or code.split()[1] in CHEAP]
        for number, line in lines:
            for part in line.removeprefix("$ ").split("&&"):
                if re.match(r"\s*bitgen [a-z]", part):
                    yield f"{name_of(page)}:{number}", shlex.split(part, comments=True)[1:]
                elif found := re.search(r"emulated\.py bitgen (.*)", part):
                    yield f"{name_of(page)}:{number}", shlex.split(found[1], comments=True)


COMMANDS = [pytest.param(argv, id=f"{place} {shlex.join(argv)}") for place, argv in commands()]


@pytest.mark.parametrize("argv", COMMANDS)
def test_commands_are_accepted(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        cli.parser().parse_args(argv)
    except SystemExit as stopped:
        refused = bool(stopped.code)
    else:
        refused = False
    assert not refused, capsys.readouterr().err


def test_the_commands_of_the_session_are_among_them() -> None:
    found = [shlex.join(argv) for _, argv in commands()]
    assert {"detect", "tune --model 3B", "build --model 3B", "verify --isa avx_vnni"} <= set(found)


@pytest.mark.usefixtures("bitgen_home")
@pytest.mark.parametrize(
    "argv",
    sorted({tuple(argv) for _, argv in commands() if argv[0] in CHEAP and not argv[-1].isupper()}),
    ids=shlex.join,
)
def test_cheap_commands_run(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    assert capsys.readouterr().out


def test_the_reference_lists_every_command() -> None:
    prose = read(ROOT / "docs" / "reference" / "cli.md")[0]
    listed = re.findall(r"^\| `bitgen (\w+)", prose, re.MULTILINE)
    assert sorted(listed) == sorted(cli.COMMANDS)


def test_the_reference_lists_every_exit_code() -> None:
    classes: list[type[BitgenError]] = [BitgenError, *BitgenError.__subclasses__()]
    classes = [c for c in classes if c.__module__ == "bitgen.errors"]  # others share the code of a parent
    prose = read(ROOT / "docs" / "reference" / "cli.md")[0]
    listed = re.findall(r"^\| (\d+) \| `(\w+)`", prose, re.MULTILINE)
    assert listed == sorted(((str(c.exit_code), c.__name__) for c in classes), key=lambda row: int(row[0]))


PYTHON = [block for page in PAGES for block in read(page)[1] if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{name_of(block.page)}:{block.line}")
def test_python_compiles(block: Block) -> None:
    compile(block.text, f"{name_of(block.page)}:{block.line}", "exec")


def test_scripts_and_tests_that_are_run_exist() -> None:
    for page in PAGES:
        for block in read(page)[1]:
            for place in re.findall(
                r"(?:python|pytest)[^&#\n]*? ((?:benchmarks|tests|tools)/[\w/.]+)", block.text
            ):
                assert (ROOT / place).exists(), f"{name_of(page)}:{block.line}: {place}"


PLACES = (
    r"\b(?:bitgen|benchmarks|configs|csrc|docs|examples|models|templates|tests|tools|tune_logs)/[\w./-]*\w/?"
)


@pytest.mark.parametrize("page", [page for page in PAGES if "lab" not in page.parts], ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    for code in re.findall(r"`([^`]+)`", read(page)[0]):
        for place in re.findall(PLACES, code):
            if re.fullmatch(PLACES, code) and not re.search(r"[A-Z]{4}", place):
                assert (ROOT / place).exists(), f"{name_of(page)}: {place}"
