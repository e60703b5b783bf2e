from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from typing import Any

import cffi
import pytest

from bitgen import toolchain as tc
from bitgen.cpu import load_isas
from bitgen.errors import BitgenError, FileError, ToolchainError
from bitgen.toolchain import (
    CompileError,
    Compiler,
    Prototype,
    Toolchain,
    Unit,
    build_library,
    build_module,
    declarations_of,
    find_compiler,
    find_compilers,
    find_cross_compiler,
    find_cross_compilers,
    python_headers,
)
from bitgen.toolchain.linker import exports_text, shared_flags

pytestmark = pytest.mark.slow

COMPILERS = find_compilers()
REAL = COMPILERS[0].command  # the tests need one; without any, collection fails and says so


# An ISA level that every CPU runs and whose flags can be seen in what its code computes.
ISA = replace(load_isas()[0], cc_flags=("-DLEVEL=7",), zig_flags=("-mcpu=baseline", "-DLEVEL=7"))

ADD = Prototype.parse("int64_t add(int64_t a, int64_t b)")
ADD_TEXT = "#include <stdint.h>\nint64_t add(int64_t a, int64_t b)\n{\n    return a + b;\n}\n"
ADD_UNIT = Unit("add", ADD_TEXT, functions=(ADD,))

POINT = "struct point { const float *x; int64_t n; int32_t tag; };"
SUM = Prototype.parse("float point_sum(const struct point *p)")
SUM_TEXT = f"""\
#include <stdint.h>
{POINT}
float point_sum(const struct point *p)
{{
    float sum = 0;
    for (int64_t i = 0; i < p->n; i++)
        sum += p->x[i] * (float)(p->tag + LEVEL);
    return sum;
}}
"""
SUM_UNIT = Unit("point_sum", SUM_TEXT, ISA, (SUM,), POINT)


@pytest.fixture
def chain(tmp_path: Path) -> Toolchain:
    return Toolchain(find_compilers()[0], tmp_path / "cache", werror=True)


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_compiler(path: Path, version: str, *macros: str) -> Path:
    """A program that answers as a compiler does when it is asked who it is."""
    defines = "\n".join(f"#define {macro} 1" for macro in macros)
    return script(path, f'case "$*" in *-dM*) echo "{defines}";; *) echo "{version}";; esac')


def counting(tmp_path: Path, delay_s: float = 0) -> tuple[Toolchain, Path]:
    """A toolchain whose compiler notes every compilation in a file, one line each."""
    log = tmp_path / "runs"
    log.touch()
    body = f'case "$*" in *" -c "*|*" -shared "*) echo run >> {log}; sleep {delay_s};; esac'
    wrapper = script(tmp_path / "cc", f'{body}\nexec {" ".join(REAL)} "$@"')
    return Toolchain(find_compiler(str(wrapper)), tmp_path / "cache"), log


def runs(log: Path) -> int:
    return len(log.read_text().splitlines())


# --- finding compilers -------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: c.kind)
def test_a_compiler_tells_its_version_and_target(compiler: Compiler) -> None:
    assert compiler.kind in compiler.version
    assert "\n" not in compiler.version
    assert any(digit in compiler.version for digit in "0123456789")
    assert compiler.target.split("-")[0] in ("x86_64", "aarch64", "arm64")


def test_order_is_gcc_clang_zig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zig", "clang", "gcc"):
        script(tmp_path / name, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert [(c.kind, c.command) for c in find_compilers()] == [
        ("gcc", ("gcc",)),
        ("clang", ("clang",)),
        ("zig", ("zig", "cc")),
    ]
    (tmp_path / "gcc").unlink()
    assert find_compiler().kind == "clang"


@pytest.mark.parametrize(
    ("machine", "libc", "found"),
    [
        ("x86_64", "glibc", ["gcc"]),  # of a system that does not call it x86_64-linux-gnu-gcc
        ("x86_64", "", []),  # its libraries would need musl
        ("aarch64", "glibc", []),
    ],
)
def test_this_machines_compiler_makes_libraries_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, libc: str, found: list[str]
) -> None:
    script(tmp_path / "gcc", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, "2.36"))
    assert [compiler.kind for compiler in find_cross_compilers("x86_64", "Linux")] == found
    if not found:
        with pytest.raises(ToolchainError, match="pip install ziglang"):
            find_cross_compiler("x86_64", "Linux")


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert find_compilers() == []
    with pytest.raises(
        BitgenError, match="no C compiler found: install gcc or clang, or pip install"
    ) as caught:
        find_compiler()
    assert caught.value.exit_code == ToolchainError.exit_code


def test_the_ziglang_package_counts_as_zig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program is run without Python, which cannot always start in the locale that compilers run in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "jürgen"
    folder.mkdir()
    zig = script(folder / "zig", "exit 0")
    package = ModuleSpec("ziglang", None, is_package=True)
    package.submodule_search_locations = [str(folder)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package if name == "ziglang" else None)
    assert find_compiler("zig").command == (str(zig), "cc")
    assert [one.command[0] for one in find_cross_compilers("aarch64", "Linux")] == [str(zig)]


def test_argument_before_environment_before_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = "someone clang version 1.0\nTarget: x86_64-unknown-linux6.1-gnu"
    clang = fake_compiler(tmp_path / "one", version, "__clang__", "__GNUC__")
    gcc = fake_compiler(tmp_path / "two", "two (Debian 12) 12.2.0", "__GNUC__")
    monkeypatch.setenv("CC", f"{clang} -m64")
    assert find_compiler() == Compiler("clang", (str(clang), "-m64"))
    assert find_compiler().version == "someone clang version 1.0"
    assert find_compiler().target == "x86_64-unknown-linux-gnu"  # not the kernel's version
    assert find_compiler(str(gcc)) == Compiler("gcc", (str(gcc),))
    assert find_compiler(str(gcc)).version == "gcc (Debian 12) 12.2.0"  # the alias is not part of it


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "mycc", f'exec {" ".join(REAL)} "$@"')
    monkeypatch.chdir(tmp_path)
    chain = Toolchain(find_compiler("./mycc"), tmp_path / "cache")
    assert chain.compile_object(ADD_UNIT).is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-cc", "--cc 'no-such-cc': there is no such program"),
        ("true", "neither gcc nor clang nor zig"),
        ("gcc '", "No closing quotation"),
        ("clang -march=native", "-march=native is not allowed"),
    ],
)
def test_a_wrong_name_is_refused(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path / "clang", "clang version 1.0", "__clang__")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ToolchainError, match=words):
        find_compiler(name)


def test_a_compiler_that_hangs_when_asked_is_named(tmp_path: Path) -> None:
    hanging = script(tmp_path / "slow-cc", "sleep 60")
    with pytest.raises(BitgenError, match=r"slow-cc .* did not answer within 0\.2 s"):
        find_compiler(str(hanging), probe_timeout_s=0.2)


def test_a_broken_compiler_is_named(tmp_path: Path) -> None:
    broken = script(tmp_path / "gcc", "echo libmpc.so: not found >&2; exit 127")
    with pytest.raises(BitgenError, match=r"gcc --version failed \(127\): libmpc.so: not found"):
        _ = Compiler("gcc", (str(broken),)).version


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: c.kind)
def test_flags(compiler: Compiler) -> None:
    flags = compiler.flags(ISA)
    assert {"-O3", "-fPIC", "-ffp-contract=off", "-DLEVEL=7"} <= set(flags)
    for one in (flags, compiler.flags(None)):
        assert not {"-march=native", "-ffast-math", "-Ofast"} & set(one)
        assert ("-mcpu=baseline" in one) == (compiler.kind == "zig")


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-march=native"])
def test_flags_that_change_results_are_refused(flag: str, chain: Toolchain) -> None:
    with pytest.raises(BitgenError, match="not allowed"):
        replace(chain, extra_flags=(flag,))
    with pytest.raises(BitgenError, match="not allowed"):
        chain.compile_object(replace(ADD_UNIT, flags=(flag,)))


def test_the_fingerprint_is_json_and_knows_the_flags(chain: Toolchain) -> None:
    plain, special = chain.fingerprint(), chain.fingerprint(ISA)
    assert json.loads(json.dumps(special)) == special
    assert set(special["flags"]) - set(plain["flags"]) == {"-DLEVEL=7"}
    assert special["version"] == chain.compiler.version


# --- objects and their cache -------------------------------------------------------------------------


def test_the_second_time_no_compiler_runs(tmp_path: Path) -> None:
    chain, log = counting(tmp_path)
    first = chain.compile_object(ADD_UNIT)
    assert runs(log) == 1
    fresh = Toolchain(chain.compiler, chain.cache_dir)
    assert fresh.compile_object(ADD_UNIT) == first
    assert runs(log) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"text": ADD_TEXT + "/* */"},
        {"flags": ("-O1",)},
        {"isa": ISA},
        {"headers": (("other.h", "int other;"),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_can_change_the_object_compiles_again(change: dict[str, object], tmp_path: Path) -> None:
    chain, log = counting(tmp_path)
    chain.compile_object(ADD_UNIT)
    chain.compile_object(replace(ADD_UNIT, **change))  # type: ignore[arg-type]
    assert runs(log) == 2


def test_another_version_of_the_compiler_compiles_again(tmp_path: Path) -> None:
    chain, log = counting(tmp_path)
    newer = Compiler(chain.compiler.kind, chain.compiler.command)
    newer.__dict__["version"] = "gcc 99"
    chain.compile_object(ADD_UNIT)
    replace(chain, compiler=newer).compile_object(ADD_UNIT)
    assert runs(log) == 2


def test_headers_are_found(chain: Toolchain) -> None:
    unit = Unit(
        "user",
        '#include "api.h"\nint f(void)\n{\n    return VALUE;\n}\n',
        headers=(("api.h", "#define VALUE 5"),),
    )
    assert chain.compile_object(unit).is_file()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_corrupted_entry_is_made_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain, log = counting(tmp_path)
    path = chain.compile_object(ADD_UNIT)
    good = path.read_bytes()
    bad = {"truncate": good[:100], "flip": bytes([good[0] ^ 1]) + good[1:], "empty": b""}[damage]
    path.write_bytes(bad)
    again = chain.compile_object(ADD_UNIT)
    assert again.read_bytes() == good
    assert runs(log) == 2
    assert "corrupted" in caplog.text
    assert str(path) in caplog.text


def test_objects_do_not_depend_on_where_they_were_made(tmp_path: Path) -> None:
    compiler = COMPILERS[0]
    paths = [Toolchain(compiler, tmp_path / name).compile_object(ADD_UNIT) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_threads_that_want_the_same_object_compile_it_once(tmp_path: Path) -> None:
    chain, log = counting(tmp_path, delay_s=0.2)
    results = chain.compile_objects([ADD_UNIT] * 4, jobs=4)
    assert len(set(results)) == 1
    assert runs(log) == 1


def test_processes_that_want_the_same_object_compile_it_once(tmp_path: Path) -> None:
    chain, log = counting(tmp_path, delay_s=0.3)
    (tmp_path / "job").write_bytes(pickle.dumps((chain, ADD_UNIT)))
    code = (
        "import pickle, sys; chain, unit = pickle.load(sys.stdin.buffer); print(chain.compile_object(unit))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tc.__file__).parents[2])}
    children = []
    for _ in range(2):
        with (tmp_path / "job").open("rb") as job:
            children.append(
                subprocess.Popen(
                    [sys.executable, "-c", code], stdin=job, stdout=subprocess.PIPE, env=environment
                )
            )
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert outputs[0] == outputs[1] != b""
    assert runs(log) == 1


def test_what_a_killed_process_left_is_removed(chain: Toolchain) -> None:
    path = chain.compile_object(ADD_UNIT)
    path.unlink()
    litter = path.parent / "making-dead"
    litter.mkdir()
    (litter / "add.o").write_bytes(b"half")
    assert chain.compile_object(ADD_UNIT) == path
    assert sorted(p.name for p in path.parent.iterdir() if p.name != "lock") == [path.name]


def test_a_lock_that_is_never_released_does_not_stop_us(tmp_path: Path) -> None:
    from filelock import FileLock

    chain, _ = counting(tmp_path)
    path = chain.compile_object(ADD_UNIT)
    path.unlink()
    impatient = replace(chain.cache, lock_timeout_s=0.1)
    with FileLock(path.parent / "lock"):
        made = impatient.make("objects", path.parent.name, ".o", lambda folder: _written(folder / "x", b"x"))
    assert made.read_bytes() == b"x"
    assert made.parent == path.parent


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- failures ----------------------------------------------------------------------------------------


def test_a_compile_error_shows_command_and_words(chain: Toolchain) -> None:
    unit = Unit("wrong", "int f(void)\n{\n    return nonsense;\n}\n")
    with pytest.raises(CompileError) as caught:
        chain.compile_object(unit)
    error = caught.value
    assert error.exit_code == ToolchainError.exit_code
    assert error.command[0] == chain.compiler.command[0]
    assert "wrong.c" in error.command
    assert "could not compile wrong" in error.message
    assert "nonsense" in error.message  # one line holds the cause
    assert "\n" not in error.message
    shown = str(error)
    assert "command: " in shown
    assert "-O3" in shown
    assert "wrong.c:3:12: error:" in shown
    assert "nonsense" in error.stderr


def test_a_long_compile_error_is_trimmed_and_survives_pickling() -> None:
    error = CompileError("cc could not compile x", ("cc", "a b"), "\n".join(["y" * 1000] * 100))
    assert len(str(error).splitlines()) == 2 + 41
    assert "(60 more lines)" in str(error)
    assert max(len(line) for line in str(error).splitlines()) < 320
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(copy), copy.command, copy.stderr, copy.message) == (
        str(error),
        error.command,
        error.stderr,
        error.message,
    )


def test_failures_of_many_units_are_values_in_order(chain: Toolchain) -> None:
    wrong = Unit("wrong", "this is not C")
    results = chain.compile_objects([ADD_UNIT, wrong, SUM_UNIT])
    assert isinstance(results[0], Path)
    assert isinstance(results[1], CompileError)
    assert isinstance(results[2], Path)
    assert results[0] != results[2]


def test_warnings_are_errors_only_when_asked(chain: Toolchain) -> None:
    unit = Unit("warns", "int f(void)\n{\n    int unused;\n    return 0;\n}\n")
    with pytest.raises(CompileError, match="unused"):
        chain.compile_object(unit)
    assert replace(chain, werror=False).compile_object(unit).is_file()


def test_an_undeclared_function_is_always_an_error(chain: Toolchain) -> None:
    unit = Unit("implicit", "int f(void)\n{\n    return missing();\n}\n")
    with pytest.raises(CompileError, match="missing"):
        replace(chain, werror=False).compile_object(unit)


def hanging(tmp_path: Path) -> tuple[Compiler, Path]:
    """A compiler that starts a child, which writes its number to a file, and waits for it for ever."""
    pid = tmp_path / "pid"
    path = script(tmp_path / "hangs", f"sleep 60 & echo $! > {pid}.new; mv {pid}.new {pid}; wait")
    compiler = Compiler("gcc", (str(path),))
    compiler.__dict__.update(version="gcc 1", target="x86_64-linux-gnu")
    return compiler, pid


def assert_ends(pid: Path) -> None:
    number = int(pid.read_text())
    for _ in range(200):
        try:
            # A zombie waiting for init has ended too.
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.05)
    os.kill(number, signal.SIGKILL)
    pytest.fail("the compiler's child still runs")


def test_a_compiler_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    compiler, pid = hanging(tmp_path)
    chain = Toolchain(compiler, tmp_path / "cache", timeout_s=3)  # for the script to start its child
    with pytest.raises(CompileError, match=r"did not compile add within 3 s"):
        chain.compile_object(ADD_UNIT)
    assert_ends(pid)
    assert not list((tmp_path / "cache").rglob("making-*"))


def test_an_interrupt_ends_the_compilers(tmp_path: Path) -> None:
    compiler, pid = hanging(tmp_path)
    chain = Toolchain(compiler, tmp_path / "cache", timeout_s=60)

    def interrupt() -> None:
        while not pid.exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        chain.compile_objects([ADD_UNIT, SUM_UNIT, replace(ADD_UNIT, name="third")], jobs=1)
    thread.join()
    assert_ends(pid)


def test_a_compiler_that_vanished(tmp_path: Path) -> None:
    compiler = Compiler("gcc", (str(tmp_path / "gone"),))
    compiler.__dict__.update(version="gcc 1", target="x86_64-linux-gnu")
    with pytest.raises(BitgenError, match=r"cannot run .*gone: No such file or directory"):
        Toolchain(compiler, tmp_path / "cache").compile_object(ADD_UNIT)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    chain = Toolchain(COMPILERS[0], tmp_path / "file" / "cache")
    with pytest.raises(
        BitgenError, match=r"cannot write to .*cache: Not a directory; .*BITGEN_HOME"
    ) as caught:
        chain.compile_objects([ADD_UNIT])
    assert caught.value.exit_code == FileError.exit_code
    assert not isinstance(caught.value, CompileError)


def test_a_full_disk_while_storing(chain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: Path, _target: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FileError, match="the disk is full; free some space"):
        chain.compile_object(ADD_UNIT)
    assert not list(chain.cache_dir.rglob("making-*"))


def test_a_full_disk_inside_the_compiler_is_not_the_units_fault(tmp_path: Path) -> None:
    full = script(tmp_path / "full", "echo 'Fatal error: add.o: No space left on device' >&2; exit 1")
    compiler = Compiler("gcc", (str(full),))
    compiler.__dict__.update(version="gcc 1", target="x86_64-linux-gnu")
    with pytest.raises(BitgenError, match="the disk is full") as caught:
        Toolchain(compiler, tmp_path / "cache").compile_objects([ADD_UNIT])
    assert not isinstance(caught.value, CompileError)


def test_a_filled_cache_needs_no_permission_to_write(
    chain: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = chain.compile_object(ADD_UNIT)

    def refused(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr("tempfile.mkdtemp", refused)
    assert chain.compile_object(ADD_UNIT) == path
    with pytest.raises(BitgenError, match="Permission denied"):
        chain.compile_object(SUM_UNIT)


# --- shared libraries --------------------------------------------------------------------------------


def test_only_exports_are_visible(chain: Toolchain, tmp_path: Path) -> None:
    two = Unit(
        "two", "int f(void);\nint g(void);\nint f(void) { return 3; }\nint g(void) { return f() + 1; }\n"
    )
    out = tmp_path / "lib" / "libtwo.so"
    made = chain.link_shared([chain.compile_object(two)], out, soname="libtwo.so.0", exports=["g"])
    assert made == out
    assert [p.name for p in out.parent.iterdir()] == ["libtwo.so"]
    assert b"libtwo.so.0\0" in out.read_bytes()
    ffi = cffi.FFI()
    ffi.cdef("int f(void); int g(void);")
    lib: Any = ffi.dlopen(str(out))
    assert lib.g() == 4
    with pytest.raises(AttributeError):
        _ = lib.f


def test_each_linker_is_spoken_to_in_its_words() -> None:
    elf = shared_flags("x86_64-linux-gnu", soname="libx.so.1", exports=True)
    assert elf == (
        "-shared",
        "-Wl,-z,noexecstack",
        "-Wl,-z,defs",
        "-Wl,-soname,libx.so.1",
        "-Wl,--version-script=exports.txt",
    )
    assert shared_flags("x86_64-linux-gnu", undefined=True) == ("-shared", "-Wl,-z,noexecstack")
    assert shared_flags("arm64-apple-darwin23", undefined=True) == (
        "-shared",
        "-Wl,-undefined,dynamic_lookup",
    )
    assert not any("-z," in flag for flag in shared_flags("arm64-apple-darwin23", soname="x", exports=True))
    assert exports_text("x86_64-linux-gnu", ["f", "g"]) == "{ global: f; g; local: *; };\n"
    assert exports_text("arm64-apple-darwin23", ["f", "g"]) == "_f\n_g\n"


def test_an_undefined_symbol_is_a_link_error_and_leaves_the_old_library(
    chain: Toolchain, tmp_path: Path
) -> None:
    out = tmp_path / "lib.so"
    out.write_text("old")
    unit = Unit("calls", "int missing(void);\nint f(void);\nint f(void) { return missing(); }\n")
    with pytest.raises(CompileError) as caught:
        chain.link_shared([chain.compile_object(unit)], out)
    assert re.search(r"could not link lib .*undefined (reference|symbol).*missing", caught.value.message)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "lib.so"]


def test_an_output_folder_that_cannot_be_written(chain: Toolchain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write to the folder"):
        chain.link_shared([chain.compile_object(ADD_UNIT)], tmp_path / "file" / "lib.so")


# --- modules -----------------------------------------------------------------------------------------


@pytest.fixture(params=[build_library, build_module], ids=["library", "module"])
def build(request: pytest.FixtureRequest) -> Callable[[Toolchain, Sequence[Unit]], Path]:
    if request.param is build_module and not python_headers():
        pytest.skip("this Python came without its headers")
    made: Build = request.param
    return made


Build = Callable[[Toolchain, Sequence[Unit]], Path]


def opened(path: Path) -> tuple[Any, Any]:
    ffi = cffi.FFI()
    ffi.cdef(declarations_of([ADD_UNIT, SUM_UNIT]))
    return ffi, ffi.dlopen(str(path), os.RTLD_NOW)


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: c.kind)
def test_a_library_and_a_module_have_the_same_functions(
    build: Build, compiler: Compiler, tmp_path: Path
) -> None:
    chain = Toolchain(compiler, tmp_path / "cache", werror=True)
    ffi, lib = opened(build(chain, [ADD_UNIT, SUM_UNIT]))
    assert lib.add(2**40, 2) == 2**40 + 2
    x = ffi.new("float[3]", [1, 2, 4])
    point = ffi.new("struct point *", {"x": x, "n": 3, "tag": 3})
    assert lib.point_sum(point) == 70  # 7 * (tag 3 + LEVEL 7): its unit's own flags


@pytest.mark.skipif(not python_headers(), reason="this Python came without its headers")
def test_a_module_of_cffi_can_be_imported(chain: Toolchain) -> None:
    path = build_module(chain, [ADD_UNIT, SUM_UNIT])
    name = f"_bitgen_{path.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.lib.add(2, 2) == 4


def test_building_loads_nothing(build: Build, chain: Toolchain) -> None:
    """Not even a unit whose constructor ends the process that loads it."""
    early = "#include <stdlib.h>\n__attribute__((constructor)) static void early(void) { abort(); }\n"
    path = build(chain, [replace(ADD_UNIT, text=early + ADD_TEXT)])
    assert path.is_file()
    code = f"import ctypes; ctypes.CDLL({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGABRT


@pytest.mark.skipif(not python_headers(), reason="this Python came without its headers")
def test_both_are_linked_of_the_same_objects_and_cached(tmp_path: Path) -> None:
    chain, log = counting(tmp_path)
    units = [ADD_UNIT, SUM_UNIT]
    module = build_module(chain, units)
    assert runs(log) == 5  # two units, their link, the glue, the link
    library = build_library(chain, units)
    assert runs(log) == 6  # only the link
    assert (build_module(chain, units), build_library(chain, units)) == (module, library)
    assert runs(log) == 6


def test_a_corrupted_module_is_made_again(build: Build, chain: Toolchain) -> None:
    path = build(chain, [ADD_UNIT])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert build(chain, [ADD_UNIT]).stat().st_size >= len(content) - 64


def test_building_prints_nothing(build: Build, chain: Toolchain, capfd: pytest.CaptureFixture[str]) -> None:
    build(chain, [ADD_UNIT])
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not python_headers(), reason="this Python came without its headers")
@pytest.mark.parametrize(
    ("units", "words"),
    [
        ([], "no function"),
        ([Unit("none", "int x;")], "no function"),
        ([ADD_UNIT, replace(ADD_UNIT, name="other")], "two units define the function add"),
        ([replace(SUM_UNIT, declarations="struct {{{")], "cffi cannot read"),
    ],
)
def test_units_that_make_no_module(units: list[Unit], words: str, chain: Toolchain) -> None:
    with pytest.raises(BitgenError, match=words):
        build_module(chain, units)


def test_an_undefined_function_is_a_link_error_of_either(build: Build, chain: Toolchain) -> None:
    with pytest.raises(CompileError, match="nowhere"):
        build(
            chain, [replace(ADD_UNIT, text=f"void nowhere(void);\n{ADD_TEXT}void f(void) {{ nowhere(); }}\n")]
        )


def test_the_first_failing_unit_fails_the_build(build: Build, chain: Toolchain) -> None:
    with pytest.raises(CompileError, match="could not compile wrong"):
        build(chain, [ADD_UNIT, Unit("wrong", "not C")])


def test_without_pythons_headers_a_module_is_a_library(
    chain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = tmp_path / "include"
    include.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(include))
    assert python_headers() == ()
    assert build_module(chain, [ADD_UNIT]) == build_library(chain, [ADD_UNIT])
    (include / "Python.h").touch()
    assert python_headers() == ()  # pyconfig.h lies elsewhere on some systems
    (include / "pyconfig.h").touch()
    assert python_headers() == (include,)


def test_a_prototype_names_its_function() -> None:
    assert Prototype.parse("const int8_t *f (void);").name == "f"
    assert Prototype.parse("int f(int);").declaration == "int f(int);"
    for name, text in (("g", "int f(int)"), ("f", "int f"), ("", "int"), ("a b", "int a b(int)")):
        with pytest.raises(BitgenError, match="does not declare"):
            Prototype(name, text)


def test_everything_public_is_exported() -> None:
    assert all(hasattr(tc, name) for name in tc.__all__)
    assert shutil.which("sh")  # the wrapper compilers of this file are shell scripts
