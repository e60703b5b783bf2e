"""Remake the pictures of the documents from reports, with Chromium and without a window.

    python tools/pictures.py report         # docs/guide/report.png, of this machine's newest tune of 3B
    python tools/pictures.py fleet          # docs/guide/fleet.png: eight workers through kills, two minutes
    python tools/pictures.py page FILE.html --section fleet --out fleet.png

`report` takes the records of `bitgen tune --model 3B` (--records names others). `fleet` starts PostgreSQL in
a temporary folder, eight workers of two kinds of CPU whose times are made up, and a coordinator; it kills and
stops them and the database at random, and fails where the winners are not those of one process alone. What
happened is printed: it is the text beside the picture.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitgen.errors import BitgenError
from bitgen.report import write_report

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guide"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Of a copy of the page: it is measured by a script, which the page itself forbids, and has no scroll bars.
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
MEASURE = (
    "<script>document.title = 'high ' + Math.ceil(document.documentElement.getBoundingClientRect().height)"
    "</script></body>"
)
NO_BARS = "<style>::-webkit-scrollbar { display: none }</style></head>"
ALONE = "<style>section:first-of-type h2 { margin: 0; border: 0 }</style></head>"  # it begins the picture


def browser() -> str:
    """The path of Chromium or Chrome. BitgenError where there is none."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise BitgenError(f"there is none of {', '.join(BROWSERS)} on the PATH (apt install chromium)")


def only(page: str, sections: list[str]) -> str:
    """The page with no more than these sections; all of it, with its title, where none is named."""
    if not sections:
        return page
    known = re.findall(r'<section id="([^"]+)">', page)
    if missing := [name for name in sections if name not in known]:
        raise BitgenError(f"the page has no section {', '.join(missing)}; it has {', '.join(known)}")
    found = [re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL) for name in sections]
    head = page[: page.index("<body>")].replace("</head>", ALONE)
    return "\n".join([head, "<body>", *(match[0] for match in found if match), "</body></html>"])


def shoot(page: str, out: Path, width: int, height: int | None) -> None:
    """Write the PNG of a page in light colours, as high as it is or ``height`` pixels at the most."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        plain = POLICY.sub("", page).replace("</head>", NO_BARS, 1)
        file.write_text(plain.replace("</body>", MEASURE, 1), encoding="utf-8")
        words = [
            browser(),
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/own",
        ]
        words += ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium as root has none
        said = _run([*words, f"--window-size={width},600", "--dump-dom", file.as_uri()])
        high = re.search(r"<title>high (\d+)</title>", said)
        if not high:
            raise BitgenError(f"{words[0]} does not say how high the page is")
        tall = min(int(high[1]), height or int(high[1]))
        size = f"--window-size={width},{tall}"
        _run([*words, size, f"--screenshot={out.resolve()}", file.as_uri()])
    print(f"{out}: {width} x {tall} pixels, {out.stat().st_size / 1e3:,.0f} kB")


def _run(words: list[str]) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise BitgenError(f"{words[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


# ---- What is on them ----


def page_of(records: Path | None, model: str | None, against: Path | None = None) -> str:
    """The report of a tune."""
    with tempfile.TemporaryDirectory() as folder:
        out = write_report(records, model=model, against=against, out=Path(folder) / "report.html")
        return out.read_text(encoding="utf-8")


def fleet_page(kinds: tuple[str, str], seed: str, sleep_s: float) -> str:
    """The report of a fleet that was tuned through kills; prints what happened to it."""
    sys.path[:0] = [str(ROOT / "tests" / "support")]
    import postgres

    if postgres.missing():
        raise BitgenError(postgres.missing())
    from fleet_processes import Fleet, Trouble, check_outcome, replayed

    with tempfile.TemporaryDirectory() as place:
        folder, server = Path(place), postgres.Postgres()
        fleet = Fleet(server, "fleet", folder)
        try:
            draw = random.Random(seed)  # noqa: S311 - no secret
            trouble = Trouble(fleet, kinds, 4, sleep_s, draw, pause_s=(0.5, 3.0))
            began = time.monotonic()
            if trouble.run(60.0):
                raise BitgenError(f"the tune failed: {fleet.said('coordinator').strip().splitlines()[-1]}")
            seconds = time.monotonic() - began
            check_outcome(fleet, {kind: replayed(folder, kind) for kind in kinds})
            again = fleet.sql("SELECT count(*) FROM results WHERE attempt > 0")[0][0]
            counts = ", ".join(f"{count} {what}" for what, count in trouble.counts.items())
            print(f"{seconds:.0f} s with {counts} (killed, stopped, cut); {again} jobs were taken over;")
            print(
                f"{fleet.results()} results, the winners of one process alone; load {os.getloadavg()[0]:.1f}"
            )
            first, second = (folder / "logs" / "fleet" / f"{kind}.jsonl" for kind in kinds)
            return page_of(first, None, second)
        finally:
            fleet.close()
            server.close()


def _add_picture(parser: argparse.ArgumentParser, out: Path, width: int, height: int | None) -> None:
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--height", type=int, default=height, help="at the most")
    parser.add_argument("--section", action="append", help="this one of the page alone; may be given again")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="what", required=True)
    report = actions.add_parser("report", help="the top of the report of a tune")
    report.add_argument("--records", type=Path, help="a file or folder of records (this machine's)")
    report.add_argument("-m", "--model", default="3B")
    fleet = actions.add_parser("fleet", help="the timeline of eight workers of two kinds of CPU")
    fleet.add_argument("--seed", default="1", help="of what is killed when (1)")
    fleet.add_argument("--sleep", type=float, default=0.5, help="seconds that a kernel takes (0.5)")
    page = actions.add_parser("page", help="a page that is there")
    page.add_argument("page", type=Path)
    _add_picture(report, GUIDE / "report.png", 1100, 1650)
    _add_picture(fleet, GUIDE / "fleet.png", 960, None)
    _add_picture(page, Path("page.png"), 1100, None)
    args = parser.parse_args()
    sections = args.section or (["fleet"] if args.what == "fleet" else [])
    if args.what == "report":
        text = page_of(args.records, args.model)
    elif args.what == "fleet":
        text = fleet_page(("zen4", "zen3"), args.seed, args.sleep)
    else:
        text = args.page.read_text(encoding="utf-8")
    shoot(only(text, sections), args.out, args.width, args.height)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BitgenError, OSError) as error:
        sys.exit(f"error: {error}")
