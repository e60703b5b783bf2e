"""The command line from outside: whole runs in processes of their own, and every wrong input in one line."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from libraries import share_cache
from model_files import preset_yaml

import bitgen
from bitgen import cli, toolchain
from bitgen import environment as rooms
from bitgen.__main__ import main as bitgen_main
from bitgen.cli import COMMANDS, main
from bitgen.cpu import Cpu, accepted_isas, detect_cpu, find_isa, load_isas
from bitgen.errors import BitgenError, FileError, InterruptError, ToolchainError, UnsupportedError, UsageError
from bitgen.space import space_for
from bitgen.spec import N1, Shape
from bitgen.toolchain import Toolchain, find_compiler, find_compilers
from bitgen.toolchain.cache import ContentCache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BEST = accepted_isas(detect_cpu(), load_isas())[0].name
TINY = preset_yaml("tests/tiny", hidden=256, ffn=512, layers=2, heads=4, kv_heads=2, head_dim=64, vocab=1000)


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "bitgen", *argv]


def environment(home: Path, **changes: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "BITGEN_HOME")}
    return {**env, "BITGEN_HOME": str(home), "PYTHONPATH": str(ROOT), **changes}


def bitgen_in(home: Path, *argv: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
    """`bitgen argv` in an empty working folder, its files in ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command(*argv),
        cwd=home,
        env=environment(home, **changes),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], bitgen_home: Path) -> Callable[..., str]:
    """Run a command here; it must fail with ``code`` and one line on standard error, which is returned."""
    assert bitgen_home.name

    def run(*argv: str, code: int) -> str:
        assert main(argv) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("bitgen: ")
        assert captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


# ---- help


def test_help_names_every_command() -> None:
    text = subprocess.run(command("--help"), check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for name in COMMANDS:
        assert re.search(rf"^\s+{name}\s+\S", text, re.MULTILINE), name


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """--isa of a command that has none would be --isa-cap, and change what the command does."""
    with pytest.raises(SystemExit) as stopped:
        main(["detect", "--isa", "scalar"])
    assert stopped.value.code == UsageError.exit_code
    assert "unrecognized arguments: --isa scalar" in capsys.readouterr().err


def test_help_loads_no_command() -> None:
    """Nor anything slow but what argparse takes for any help: from Python 3.14 on dataclasses, for colors."""
    script = (
        "import argparse, sys\nargparse.ArgumentParser().print_help()\nbefore = set(sys.modules)\n"
        "from bitgen.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "slow = {'dataclasses', 'typing', 'inspect', 'pathlib', 'json', 'bitgen.errors', 'bitgen.cli.tune'}\n"
        "print(*sorted(slow & set(sys.modules) - before), file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == "\n"


@pytest.mark.parametrize("name", ["verify", "check"])
def test_verify_goes_on_under_its_old_name(name: str) -> None:
    args = cli.parser().parse_args([name, "--sample", "3"])
    assert (args.sample, args.run.__module__) == (3, "bitgen.cli.verify")


@pytest.mark.parametrize("argv", [["--help"], ["tune", "--help"], ["--version"], ["render", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    script = (
        "import sys\nfrom bitgen.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\n"
        "heavy = {'optuna', 'numpy', 'jinja2', 'cffi', 'archspec', 'yaml', 'scipy', 'tokenizers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *argv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stderr == "[]\n"
    assert run.stdout


def test_detect_imports_no_search_and_no_renderer() -> None:
    script = (
        "import sys\nfrom bitgen.cli import main\nmain(['detect'])\n"
        "print(sorted({'optuna', 'numpy', 'jinja2'} & set(sys.modules)), file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == "[]\n"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == UsageError.exit_code
    assert "COMMAND" in capsys.readouterr().err


# ---- tables


@pytest.mark.parametrize("argv", [["models"], ["detect"], ["models", "-m", "3B"]])
def test_tables_in_every_form(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for form in ("text", "md", "csv", "json"):
        assert main([*argv, "-o", form]) == 0
        texts[form] = capsys.readouterr().out
    records = [row for rows in json.loads(texts["json"]).values() if isinstance(rows, list) for row in rows]
    assert records
    blocks = [list(csv.reader(io.StringIO(block))) for block in texts["csv"].strip().split("\n\n")]
    assert [list(row) for rows in blocks for row in rows[1:]] == [
        ["" if value is None else str(value) for value in record.values()] for record in records
    ]
    assert blocks[0][0] == list(records[0])
    tables = re.findall(r"^\*\*.+\*\*\n\n(\|.+\|\n\|[-:| ]+\|\n(?:\|.*\|\n)*)", texts["md"], re.MULTILINE)
    assert sum(table.count("\n") - 2 for table in tables) == len(records)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert all(str(next(iter(record.values()))) in texts["text"] for record in records)


def test_models_shows_stacked_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "-m", "3B", "-o", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert row["alias"] == "3B"
    assert "9600x3200 (qkv)" in row["shapes"]
    assert "17280x3200 (gate_up)" in row["shapes"]


def test_detect_shows_compilers_that_do_not_work_and_the_one_in_cc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the gcc of a Mac without its tools: who looks for what is wrong saw nothing else."""
    gcc = tmp_path / "gcc"
    gcc.write_text("#!/bin/sh\necho no tools >&2\nexit 1\n")
    gcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "nocc -g")
    assert main(["detect", "-o", "json"]) == 0
    found = [(row["kind"], row["version"]) for row in json.loads(capsys.readouterr().out)["compilers"]]
    assert found[0][0] == "CC"
    assert "there is no such program" in found[0][1]
    assert ("gcc", "the C compiler is broken: gcc --version failed (1): no tools") in found


def test_detect_gives_a_reason_for_each_rejection(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["isa"] for row in found["isas"]} == {isa.name for isa in load_isas()}
    assert all(bool(row["reason"]) == (row["state"] == "rejected") for row in found["isas"])
    assert any(row["isa"] == "scalar" and row["state"] == "accepted" for row in found["isas"])
    assert found["cpu_record"]["arch"] == detect_cpu().arch


# ---- render


def test_render_prints_c_with_the_knobs_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "render",
        "tl2",
        "--shape",
        "3200x8640",
        "--isa",
        "avx2",
        "--knob",
        "streams=2",
        "--knob",
        "prefetch=0",
    ]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "const int64_t m = 3200, k = 8640;" in captured.out
    assert "streams = 2" in captured.out
    assert "prefetch(" not in captured.out[captured.out.index("static void tile") :]
    for text in (["quantize"], ["tl1_tables"], ["tl2_tables"], ["tl5_wide_tables"]):
        assert main(["render", *text, "--isa", "AVX512-VNNI"]) == 0
        assert "avx512_vnni(" in capsys.readouterr().out


def test_render_prints_the_step_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "step", "--isa", "avx2"]) == 0
    assert "models     any: all sizes are arguments" in capsys.readouterr().out
    assert main(["render", "step", "--isa", "avx2", "--model", "3B"]) == 0
    assert "models     hidden 3200, q_rows 3200, ffn 8640, head_dim 100" in capsys.readouterr().out
    assert main(["render", "i2s", "--model", "3B"]) == UsageError.exit_code
    assert "only the forward step is made for a model" in capsys.readouterr().err


def test_render_lists_the_legal_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "i2s", "--isa", "avx2", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    space = space_for("i2s", find_isa("avx2", load_isas()), N1, Shape(4096, 4096), detect_cpu())
    assert len(lines) == len(space)
    assert sum("(default)" in line for line in lines) == 1


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """`bitgen render ... | head -1`"""
    run = subprocess.Popen(
        command("render", "i2s", "--isa", "avx512", "--list"),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    assert run.stderr.read() == b""
    run.stderr.close()
    assert run.wait(60) == 0


# ---- from tune to bench, in processes


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, tuned and built."""
    home = share_cache(tmp_path_factory.mktemp("cli") / "home")
    (home / "tiny.yaml").write_text(TINY)
    return home


# Trials end it, not the time, even on a loaded machine: short of time a tune asks for less, and a second one,
# which knows the answers, more.
TUNE = ("tune", "-m", "tiny.yaml", "--family", "i2s", "--family", "tl2", "--trials", "2", "--timeout", "1500")


@pytest.fixture(scope="module")
def tuned(workplace: Path) -> subprocess.CompletedProcess[str]:
    return bitgen_in(workplace, *TUNE, "--quick", "-o", "json")


@pytest.fixture(scope="module")
def built(workplace: Path, tuned: subprocess.CompletedProcess[str]) -> Path:
    assert tuned.stdout
    done = bitgen_in(workplace, "build", "-m", "tiny.yaml")
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path.parent == workplace / "generated"
    assert done.stderr == ""
    return path


def test_tune_prints_results_to_stdout_and_progress_to_stderr(
    tuned: subprocess.CompletedProcess[str], workplace: Path
) -> None:
    tables = json.loads(tuned.stdout)
    shapes = {"512x256", "256x256", "1024x256", "256x512"}
    assert {row["shape"] for row in tables["winners"]} == shapes
    assert {row["n"] for row in tables["winners"]} == {1, 128}
    assert {row["family"] for row in tables["winners"]} == {"i2s", "tl2"}
    for shape in shapes:
        chosen = [row for row in tables["winners"] if row["shape"] == shape and row["chosen"] == "yes"]
        assert len({row["layout"] for row in chosen}) == 1, "one layout serves all regimes"
        assert {row["n"] for row in chosen} == {1, 128}
    assert {row["format"] for row in tables["formats"]} == {"i2s", "tl2", "chosen"}
    assert any("DRAM" in row["what"] for row in tables["limits"])
    assert "peaks" in tuned.stderr
    (log,) = (workplace / "tune_logs").glob("*.jsonl")
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_dry_run_proves_kernels_and_records_nothing(workplace: Path) -> None:
    options = ("--family", "i2s", "--family", "tl2", "--regime", "n1", "-t", "1", "--logs", "dry")
    done = bitgen_in(workplace, "tune", "-m", "tiny.yaml", "--dry-run", *options, "-o", "json")
    rows = json.loads(done.stdout)["groups"]
    assert [row["group"].split()[0] for row in rows] == ["I2_S", "TL2"]
    assert {(row["exact"], row["failed"]) for row in rows} == {(2, 0)}
    assert not (workplace / "dry").exists()
    text = bitgen_in(workplace, "tune", "-m", "tiny.yaml", "--dry-run", *options).stdout
    assert "4 kernels compiled, verified exact and run.\nNothing was recorded" in text


def test_a_second_tune_measures_nothing_again(
    workplace: Path, tuned: subprocess.CompletedProcess[str]
) -> None:
    assert tuned.stdout
    text = bitgen_in(workplace, *TUNE, "--quick").stdout
    assert re.search(r"\b0 timed, [1-9][\d,]* from cache", text), text[-600:]
    assert "Next: bitgen build --model" in text


def test_build_makes_a_library_that_python_loads(built: Path, workplace: Path) -> None:
    names = {path.name for path in built.iterdir()}
    assert {"manifest.json", "bitgen.h", "bitgen.pc", "src"} <= names
    assert any(name.startswith("libbitgen-tiny") for name in names)
    with bitgen.load(built) as table:
        assert table.threads >= 1
    shown = bitgen_in(workplace, "show", str(built), "-o", "json").stdout
    ((title, rows),) = json.loads(shown).items()
    assert title.startswith("libbitgen-tiny")
    assert re.search(
        r"; a forward pass for hidden \d+, q_rows \d+, ffn \d+, head_dim \d+, and one for every model$", title
    )
    assert len(list((built / "src").glob("bitgen_step_hidden*"))) == 1
    assert {row["role"] for row in rows} == {"tuned", "default", "portable"}


def test_show_tells_what_is_tuned_and_which_library_is_chosen(built: Path, workplace: Path) -> None:
    tables = json.loads(bitgen_in(workplace, "show", "-o", "json").stdout)
    assert {row["state"] for row in tables["tuned"]} == {"current"}
    (library,) = tables["libraries"]
    assert library["path"] == str(built)
    assert library["state"] == "chosen"


def test_show_tells_why_records_are_stale(built: Path, workplace: Path) -> None:
    second = next((c.kind for c in find_compilers() if c.kind != find_compiler().kind), None)
    if second is None:
        pytest.skip("gcc, clang or zig alone is installed: there is no second compiler")
    assert built.exists()
    tables = json.loads(bitgen_in(workplace, "show", "--cc", second, "-o", "json").stdout)
    assert {row["state"] for row in tables["tuned"]} == {"stale: other compiler"}


def test_bench_compares_the_winners_with_the_defaults(built: Path, workplace: Path) -> None:
    assert built.exists()
    argv = ("bench", "--kernels", "-m", "tiny.yaml", "-n", "1,32", "-r", "2", "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(bitgen_in(workplace, *argv).stdout)))
    assert {(row["shape"], row["n"]) for row in rows} == {
        (shape, n) for shape in ("512x256", "256x256", "1024x256", "256x512") for n in ("1", "32")
    }
    assert {row["state"] for row in rows} == {"tuned"}
    for row in rows:
        assert float(row["time_us"]) > 0
        assert float(row["limit_share"]) > 0


def test_check_prints_how_many_cases_were_exact(workplace: Path) -> None:
    done = bitgen_in(workplace, "check", "--isa", BEST, "--family", "i2s", "--regime", "n1", "--sample", "2")
    assert re.search(
        r"^2 schedules, [1-9]\d* \(schedule, shape, n\) cases: all exact$", done.stdout, re.MULTILINE
    )


def test_export_writes_the_schedules_without_timings(
    tuned: subprocess.CompletedProcess[str], workplace: Path
) -> None:
    assert tuned.stdout
    path = Path(bitgen_in(workplace, "export").stdout.strip())
    assert path.parent == workplace / "tune_logs" / "winners", "never into the installation"
    winners = json.loads(path.read_text())["winners"]
    assert {tuple(w["shape"]) if isinstance(w["shape"], list) else w["shape"] for w in winners}
    assert not re.search(r"time|_ns\b", path.read_text())
    elsewhere = bitgen_in(workplace, "export", "--out", "family").stdout.strip()
    assert (workplace / elsewhere).read_text() == path.read_text()


def test_a_corrupted_cache_entry_is_told_and_made_again(
    built: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a home that has no more than the objects of this library: what tests share must stay whole."""
    before, home, model = (built / "manifest.json").read_bytes(), tmp_path / "home", workplace / "tiny.yaml"
    objects: list[Path] = []
    find = ContentCache.find

    def noted(cache: ContentCache, kind: str, key: str, suffix: str) -> Path | None:
        path = find(cache, kind, key, suffix)
        if path is not None and suffix == ".o":
            kept = home / path.relative_to(workplace)  # not objects[-1]: several threads are here
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
            objects.append(kept)
        return path

    with monkeypatch.context() as patch:
        patch.setenv("BITGEN_HOME", str(workplace))
        patch.delenv("CC", raising=False)  # as in the commands of these tests
        patch.setattr(ContentCache, "find", noted)
        assert main(["build", "-m", str(model), "--out", str(tmp_path / "first")]) == 0
    shutil.copytree(workplace / "tune_logs", home / "tune_logs")
    for broken in objects[-3:]:
        broken.write_bytes(b"not an object")
    done = bitgen_in(home, "build", "-m", str(model))
    assert "corrupted file" in done.stderr
    lines = done.stderr.splitlines()
    assert all("a corrupted file in bitgen's cache is made again: " in line for line in lines)
    assert len(set(lines)) == len(lines) == 3, "each file is told once"
    again = home / "generated" / built.name
    assert (again / "manifest.json").read_bytes() == before
    with bitgen.load(again):
        pass


def test_a_library_for_another_cpu_is_refused(built: Path, workplace: Path, tmp_path: Path) -> None:
    other = tmp_path / "generated" / "other"
    shutil.copytree(built, other, symlinks=True)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["isas"]["avx512_vnni_future"] = ["avx99", "warpdrive"]
    manifest["cpu_family"] = "zen9"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedError, match=r"avx99.*warpdrive"):
        bitgen.load(other)
    (row,) = json.loads(bitgen_in(tmp_path, "show", "-o", "json").stdout)["libraries"]
    assert row["state"] == "rejected"
    assert "avx99" in row["reason"]
    manifest["isas"] = {}
    manifest["files"] = dict.fromkeys(manifest["files"], "0" * 64)
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FileError):
        bitgen.load(other)
    assert workplace.exists()


# ---- Ctrl-C, and a full disk


def processes_of(home: Path) -> list[int]:
    """Processes whose files are in ``home``."""
    marker = f"BITGEN_HOME={home}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                marker in (entry / "environ").read_bytes() + b"\0"
                and b"Z" not in (entry / "stat").read_bytes().split()[2:3]
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 600.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_in_the_middle_of_tune(
    workplace: Path, tuned: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    assert tuned.stdout
    logs = tmp_path / "logs"
    run = subprocess.Popen(
        command("tune", "-m", "tiny.yaml", "--family", "i2s", "--trials", "200", "--logs", str(logs)),
        cwd=workplace,
        env=environment(workplace),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def recorded() -> list[str]:
        return [line for log in logs.glob("*.jsonl") for line in log.read_text().splitlines()]

    try:
        assert wait_until(lambda: len(recorded()) >= 6 or run.poll() is not None)
        assert run.poll() is None, run.communicate()
        before = recorded()
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        out, err = run.communicate(timeout=600)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
    assert run.returncode == InterruptError.exit_code, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("bitgen: interrupted")
    assert out == ""
    after = recorded()
    assert after[: len(before)] == before
    assert all(json.loads(line) for line in after)
    assert wait_until(lambda: not processes_of(workplace)), "something still runs"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if sys.platform != "linux" or os.getuid() != 0 or mount is None or umount is None:
        pytest.skip("mounting a small file system takes root on Linux")
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([umount, "-l", folder], check=True)


def test_a_full_disk_costs_one_trial_at_most(
    small_disk: Path, workplace: Path, tuned: subprocess.CompletedProcess[str]
) -> None:
    assert tuned.stdout
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * 188_000)
    tune = ("tune", "-m", "tiny.yaml", "--family", "i2s", "--regime", "n1", "--logs", str(small_disk))
    done = bitgen_in(workplace, *tune, "--trials", "30", code=FileError.exit_code)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("bitgen: ")
    assert "disk is full" in last or "No space left" in last
    (log,) = small_disk.glob("*.jsonl")
    lines = log.read_bytes().split(b"\n")
    whole = [json.loads(line) for line in lines[:-1]]
    assert whole, "nothing was recorded before the disk was full"
    filler.unlink()
    larger = [shutil.which("mount") or "mount", "-o", "remount,size=8m", str(small_disk)]
    subprocess.run(larger, check=True)  # however much a tune records
    text = bitgen_in(workplace, *tune, "--trials", "2", "--quick").stdout
    assert re.search(r"[1-9][\d,]* from cache", text), text[-500:]


def test_a_library_on_a_full_disk_appears_not_at_all(small_disk: Path, workplace: Path, built: Path) -> None:
    assert built.exists()
    done = bitgen_in(
        workplace, "build", "-m", "tiny.yaml", "--out", str(small_disk), code=FileError.exit_code
    )
    assert done.stderr.count("\n") == 1
    assert "disk is full" in done.stderr
    assert list(small_disk.iterdir()) == []


# ---- wrong input, each with one line


def test_unknown_model(fails: Callable[..., str]) -> None:
    for name in ("tune", "build", "models"):
        assert "unknown model '3C': did you mean 3B" in fails(name, "-m", "3C", code=UsageError.exit_code)
    assert "cannot read" in fails("build", "-m", "nowhere.yaml", code=FileError.exit_code)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TINY.replace("hidden:", "hiden:"), "unknown key 'hiden'; did you mean hidden"),
        (TINY.replace("hidden: 256", "hidden: 0"), "hidden"),
        (TINY.replace("ffn: 512", "ffn: many"), "ffn"),
        (TINY.replace("layers: 2\n", ""), "missing key layers"),
        (TINY + "hidden: 3\n", "is duplicated"),
        ("[1, 2", "not valid YAML"),
        ("", "expected"),
    ],
)
@pytest.mark.parametrize("name", ["tune", "build", "models"])
def test_a_model_file_that_is_wrong(
    name: str, text: str, told: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    line = fails(name, "-m", str(file), code=FileError.exit_code)
    assert told in line
    assert "wrong.yaml" in line


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("render i2s --shape 0x5", "m and k must be at least 1"),
        ("render i2s --shape 5x0", "m and k must be at least 1"),
        ("render i2s --shape 5", "write it as MxK"),
        ("render i2s --shape=-1x5", "write it as MxK"),
        ("render i2s --shape 5x999999999", "k must be at most"),
        ("render tl9", "unknown family 'tl9'"),
        ("render i2s_tables", "it has no lookup tables"),
        ("render tl5_tables", "TL5 has several kinds of lookup tables: tl5_wide_tables, tl5_split_tables"),
        ("render i2s --regime n2", "unknown regime 'n2'"),
        ("render i2s --isa avx1024", "unknown ISA level 'avx1024'"),
        ("render i2s --isa avx2 --algorithm panel", "has no algorithm 'panel'"),
        ("render i2s --isa avx2 --knob streams", "write it as name=integer"),
        ("render i2s --isa avx2 --knob streams=two", "write it as name=integer"),
        ("render i2s --isa avx2 --knob streams=--5", "write it as name=integer"),
        ("render i2s --isa avx2 --knob width=3", "has no knob width"),
        ("render i2s --isa avx2 --knob streams=0", "must be 1 .. 16"),
        ("render i2s --isa avx2 --knob widen_every=17", "int16 partial sums"),
        ("render i2s --isa avx2 --row-block 17", "row_block 17"),
        ("render i2s --isa avx2 --row-block 48", "row_block must be one of 16, 32"),
        ("check --isa none", "unknown ISA level 'none'"),
        ("check --family tl9", "unknown family"),
        ("check --regime n2", "unknown regime"),
        ("check --sample 0", "--sample must be at least 1"),
        ("check --sample -3", "--sample must be at least 1"),
        (
            "tune -m 3B --objective fastest",
            "unknown objective 'fastest'; there are decode, prefill, balanced, serve",
        ),
        ("tune -m 3B --family tl9", "unknown family"),
        ("tune -m 3B --regime n2", "unknown regime"),
        ("tune -m 3B --isa none", "unknown ISA level"),
        ("tune -m 3B --trials 0", "--trials must be at least 1"),
        ("tune -m 3B --timeout 0", "--timeout above 0"),
        ("tune -m 3B --timeout nan", "--timeout above 0"),
        ("tune -m 3B --threads 0", "--threads must be at least 1"),
        ("tune -m 3B --threads two", "give numbers from 0 on"),
        ("tune -m 3B --threads 99999", "--threads 99999: this CPU runs 1 to"),
        ("bench -m 3B --kernels -n 0", "from 1 on"),
        ("bench -m 3B --kernels -n one", "from 1 on"),
        ("bench -m 3B --kernels -r 0", "must be at least 1"),
        ("bench -m 3B --kernels -t 99999", "this CPU runs 1 to"),
        ("bench -m 3B --kernels -t -4", "from 1 on"),
        ("build -m 3B --name a/b", "cannot name files"),
    ],
)
def test_wrong_arguments(argv: str, told: str, fails: Callable[..., str]) -> None:
    assert told in fails(*argv.split(), code=UsageError.exit_code)


def test_nothing_to_export(fails: Callable[..., str]) -> None:
    assert "run bitgen tune" in fails("export", code=BitgenError.exit_code)


def test_an_isa_this_cpu_lacks(
    fails: Callable[..., str], recorded_cpu: Callable[[str], Cpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = recorded_cpu("haswell")
    monkeypatch.setattr(rooms, "detect_cpu", lambda: cpu)
    for argv in (
        ["tune", "-m", "3B", "--isa", "avx512_vnni"],
        ["build", "-m", "3B", "--isa", "avx512_vnni"],
        ["check", "--isa", "avx512_vnni"],
        ["bench", "--kernels", "-m", "3B", "--isa", "avx512_vnni"],
    ):
        line = fails(*argv, code=UnsupportedError.exit_code)
        assert "cannot run avx512_vnni here: this CPU lacks avx512_vnni, avx512bw" in line
        assert "this CPU runs avx2, scalar" in line


def test_no_compiler(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(toolchain.compiler, "_zig_command", lambda: None)
    for argv in (["tune", "-m", "3B"], ["build", "-m", "3B"], ["check"]):
        assert "no C compiler found: install gcc or clang" in fails(*argv, code=ToolchainError.exit_code)
    assert "there is no such program" in fails(
        "build", "-m", "3B", "--cc", "tcc", code=ToolchainError.exit_code
    )


def test_a_program_that_is_no_compiler(fails: Callable[..., str]) -> None:
    assert "neither gcc nor clang nor zig" in fails(
        "build", "-m", "3B", "--cc", "true", code=ToolchainError.exit_code
    )


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_hangs_when_asked_its_name(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = script(tmp_path / "cc", "exec sleep 60")
    monkeypatch.setattr(rooms, "find_compiler", functools.partial(find_compiler, probe_timeout_s=0.2))
    for argv in (["tune", "-m", "3B"], ["build", "-m", "3B"]):
        line = fails(*argv, "--cc", compiler, code=ToolchainError.exit_code)
        assert "the C compiler hangs" in line
        assert "choose another with --cc" in line


def test_a_compiler_that_hangs_while_it_compiles(
    capsys: pytest.CaptureFixture[str], bitgen_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = find_compiler().command[0]
    hangs = f'case " $* " in *" -c "*) exec sleep 60;; esac\nexec {shutil.which(real)} "$@"'
    compiler = script(tmp_path / "cc", hangs)
    monkeypatch.setattr(rooms, "Toolchain", functools.partial(Toolchain, timeout_s=0.5))
    assert main(["build", "-m", "3B", "--cc", compiler]) == ToolchainError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"did not compile .* within 0.5 s and was stopped", line)
    assert not (bitgen_home / "generated").exists() or not list((bitgen_home / "generated").iterdir())


def test_a_folder_that_cannot_be_written(fails: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (f"{file}/below", "/proc/bitgen"):
        assert "cannot write to the folder" in fails(
            "build", "-m", "3B", "--out", folder, code=FileError.exit_code
        )
        line = fails("tune", "-m", "3B", "--logs", folder, "--trials", "1", code=FileError.exit_code)
        assert "cannot write to the folder" in line


def test_show_what_is_not_there(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "is not a bundle" in fails("show", str(tmp_path / "nothing"), code=FileError.exit_code)
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json" in fails("show", str(tmp_path), code=FileError.exit_code)


@pytest.mark.parametrize(
    "argv", ["detect", "models", "render i2s", "tune -m 3B", "build -m 3B", "show", "check"]
)
def test_windows_is_unsupported(
    argv: str, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    line = fails(*argv.split(), code=UnsupportedError.exit_code)
    assert (
        line == "bitgen: bitgen runs on Linux and macOS; this is Windows; "
        "for Windows there is the C library so far, and WSL 2 works\n"
    )


def test_an_interrupt_while_modules_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert bitgen_main() == InterruptError.exit_code
    assert capsys.readouterr().err == "bitgen: interrupted\n"


def test_an_interrupt_of_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitgen.cli.models.run", interrupted)
    assert main(["models"]) == InterruptError.exit_code
    assert capsys.readouterr().err == "bitgen: interrupted\n"
