"""The library through Python: exact on every shape, and an exception that names what is wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import libraries
import numpy as np
import pytest
from control_groups import REAL_GROUPS, run_in_group
from libraries import TL1_SHAPE, TL2_SHAPE

from bitgen import runtime, self_test
from bitgen.abi import ABI_VERSION
from bitgen.cpu import detect_cpu
from bitgen.errors import BitgenError, FileError
from bitgen.reference import linear as reference_linear
from bitgen.reference import pack, ternary_matmul
from bitgen.runtime import ArgumentTypeError, ArgumentValueError, BusyError, KernelTable, load
from bitgen.spec import Shape
from bitgen.toolchain import Unit

RAGGED = (Shape(1, 1), Shape(5, 127), Shape(33, 200), Shape(17, 961), TL1_SHAPE, TL2_SHAPE)


@pytest.fixture(scope="module")
def table(bundle: Path) -> Iterator[KernelTable]:
    with load(bundle, 2) as table:
        yield table


def weights(shape: Shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (shape.m, shape.k), dtype=np.int8)


@pytest.mark.parametrize("generic", ["never", "only"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", RAGGED, ids=lambda shape: shape.name)
def test_every_shape_and_n_equals_numpy(
    bundle: Path, shape: Shape, threads: int, generic: runtime.Generic
) -> None:
    rng = np.random.default_rng(1)
    w, row_scale = weights(shape), rng.uniform(0.1, 3, shape.m).astype(np.float32)
    with load(bundle, threads, generic=generic) as table:
        for scale in (0.75, row_scale):
            linear = table.linear(w, scale)
            for n in (1, 2, 7, 16, 17, 33):
                x = rng.normal(size=(n, shape.k)).astype(np.float32)
                xq = rng.integers(-128, 128, (n, shape.k), dtype=np.int8)
                assert np.array_equal(linear.accumulate(xq), ternary_matmul(xq, w))
                expected = reference_linear(x, w, np.atleast_1d(np.float32(scale)))
                assert np.array_equal(linear(x), expected)


def test_packed_weights_are_those_of_numpy(table: KernelTable) -> None:
    for shape in (*RAGGED, Shape(300, 700)):
        w = weights(shape)
        blocks = table.linear(w, 1.0).packed[64:]
        expected = pack(libraries.layout_of(shape), w)
        assert np.array_equal(blocks[: expected.size], expected)
        assert blocks.size - expected.size < 64
        assert not blocks[expected.size :].any()


def test_activations_need_no_alignment_and_no_write_access(table: KernelTable) -> None:
    w = weights(Shape(40, 333))
    linear = table.linear(w, 1.0)
    memory = np.random.default_rng(2).normal(size=3 * 333 + 1).astype(np.float32)
    x = memory[1:].reshape(3, 333)
    x.flags.writeable = False
    assert np.array_equal(linear(x), reference_linear(x, w, np.ones(1, np.float32)))


def test_one_token_may_have_one_dimension(table: KernelTable) -> None:
    linear = table.linear(weights(Shape(7, 30)), 1.0)
    x = np.linspace(-1, 1, 30, dtype=np.float32)
    assert linear(x).shape == (7,)
    assert np.array_equal(linear(x), linear(x[None])[0])
    assert linear.accumulate(np.ones(30, np.int8)).shape == (7,)


def test_all_zero_activations_give_zeros(table: KernelTable) -> None:
    linear = table.linear(weights(TL2_SHAPE), 3.0)
    assert not linear(np.zeros((3, TL2_SHAPE.k), np.float32)).any()


def test_the_worst_sums_are_exact(table: KernelTable) -> None:
    for shape in (TL1_SHAPE, TL2_SHAPE, Shape(20, 8640)):
        for weight in (1, -1):
            linear = table.linear(np.full((shape.m, shape.k), weight, np.int8), 1.0)
            for value in (127, -128):
                for n in (1, 3, 18):
                    acc = linear.accumulate(np.full((n, shape.k), value, np.int8))
                    assert (acc == weight * value * shape.k).all()


def test_kernels_are_chosen_by_shape_tokens_and_threads(bundle: Path) -> None:
    cpu = detect_cpu()
    specs = [choice.spec for choice in libraries.choices(cpu)]
    for threads, n, shape, expected in (
        (1, 1, TL2_SHAPE, specs[0].name),
        (2, 1, TL2_SHAPE, specs[1].name),
        (4, 1, TL2_SHAPE, specs[1].name),  # the nearest lower thread count
        (1, 50, TL2_SHAPE, specs[2].name),  # no lower one: the nearest higher
        (2, 2, TL1_SHAPE, specs[3].name),
    ):
        with load(bundle, threads) as table:
            kernel = table.linear(weights(shape), 1.0).kernel(n)
            assert (kernel.name, kernel.shape) == (expected, shape)
    with load(bundle, 1) as table:
        # A regime nobody tuned, and a shape nobody tuned: default kernels, of the same layout.
        for shape, n in ((TL2_SHAPE, 5), (Shape(99, 500), 1), (Shape(99, 500), 40)):
            kernel = table.linear(weights(shape), 1.0).kernel(n)
            assert (kernel.shape, kernel.threads) == (None, 0)
            assert kernel.family == libraries.layout_of(shape).family
            assert kernel.n_min <= n <= kernel.n_max
    with load(bundle, 1, generic="only") as table:
        assert table.linear(weights(TL1_SHAPE), 1.0).kernel(1).isa == "scalar"


def test_without_a_number_threads_are_the_usable_cores(bundle: Path) -> None:
    with load(bundle) as table:
        assert table.threads == detect_cpu().usable_threads


@pytest.mark.parametrize("name", REAL_GROUPS)
def test_the_library_sees_a_control_group(bundle: Path, name: str) -> None:
    """A quota and a cpuset that are real, as C reads them."""
    code = f"from bitgen.runtime import load; print(load({str(bundle)!r}).threads)"
    assert run_in_group(name, code) == "1"


def test_the_self_test_notices_a_wrong_kernel(table: KernelTable, monkeypatch: pytest.MonkeyPatch) -> None:
    matmuls = 24 + 24 + 6  # with scales outside, in groups, and of int16 activations
    assert self_test.self_test(table) == matmuls
    monkeypatch.setattr(self_test, "ternary_matmul", lambda xq, w: ternary_matmul(xq, w) + 1)
    with pytest.raises(BitgenError, match=r"bitgen_tl2_n1\w* computes wrong results for 5x127, n = 1"):
        self_test.self_test(table)


W = np.zeros((4, 6), np.int8)
X = np.zeros((2, 6), np.float32)


@pytest.mark.parametrize(
    ("w", "scale", "kind", "message"),
    [
        ([[1]], 1.0, ArgumentTypeError, "w must be a numpy array, not list"),
        (W.astype(np.int16), 1.0, ArgumentTypeError, "w must be int8, not int16"),
        (W[0], 1.0, ArgumentValueError, r"w must have 2 dimensions, not shape \(6,\)"),
        (W[:0], 1.0, ArgumentValueError, "w is empty"),
        (W.T, 1.0, ArgumentValueError, r"w is not C-contiguous: pass numpy.ascontiguousarray\(w\)"),
        (W + np.int8(2), 1.0, ArgumentValueError, "w must hold -1, 0 and 1 only"),
        (W - np.int8(2), 1.0, ArgumentValueError, "w must hold -1, 0 and 1 only"),
        (W, "1", ArgumentTypeError, "scale must be a float or a float32 array, not str"),
        (W, True, ArgumentTypeError, "scale must be a float"),
        (W, np.ones(4), ArgumentTypeError, "scale must be float32, not float64"),
        (W, np.ones(3, np.float32), ArgumentValueError, "scale must have 1 or 4 values, not 3"),
        (W, np.ones((4, 1), np.float32), ArgumentValueError, "scale must have 1 dimensions"),
        (W, float("nan"), ArgumentValueError, "scale holds NaN or infinity"),
        (W, 1e39, ArgumentValueError, "scale holds NaN or infinity"),
        (W, np.array([1, 1, np.inf, 1], np.float32), ArgumentValueError, "scale holds NaN or infinity"),
    ],
)
def test_wrong_weights_are_named(
    table: KernelTable, w: np.ndarray, scale: object, kind: type[BitgenError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        table.linear(w, scale)  # type: ignore[arg-type]
    assert isinstance(caught.value, (TypeError, ValueError))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        ([0.0] * 6, ArgumentTypeError, "x must be a numpy array, not list"),
        (X.astype(np.float64), ArgumentTypeError, "x must be float32, not float64"),
        (X.astype(">f4"), ArgumentTypeError, "x must be float32, not >f4"),
        (X[:, :5].copy(), ArgumentValueError, r"x must have 6 columns \(k\), not shape \(2, 5\)"),
        (X[None], ArgumentValueError, "x must have 1 or 2 dimensions"),
        (X[:0], ArgumentValueError, "x is empty"),
        (np.zeros((6, 2), np.float32).T, ArgumentValueError, "x is not C-contiguous"),
        (X + np.float32("nan"), ArgumentValueError, "x holds NaN or infinity"),
        (X - np.float32("inf"), ArgumentValueError, "x holds NaN or infinity"),
        (np.frombuffer(b"\0" * 25, np.uint8)[1:].view(np.float32), ArgumentValueError, "x is not aligned"),
    ],
)
def test_wrong_activations_are_named(
    table: KernelTable, x: np.ndarray, kind: type[BitgenError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        table.linear(W, 1.0)(x)


def test_wrong_integers_are_named(table: KernelTable) -> None:
    with pytest.raises(ArgumentTypeError, match="xq must be int8, not uint8"):
        table.linear(W, 1.0).accumulate(np.zeros((1, 6), np.uint8))


@pytest.mark.parametrize("threads", [0, -1, 2000, 1.5, True])
def test_wrong_thread_counts_are_named(bundle: Path, threads: int) -> None:
    with pytest.raises(BitgenError, match="threads must be"):
        load(bundle, threads)


def test_a_wrong_fallback_is_named(bundle: Path) -> None:
    with pytest.raises(ArgumentValueError, match="generic must be never, fallback or only"):
        load(bundle, 1, generic="always")  # type: ignore[arg-type]


def test_a_second_call_at_the_same_time_is_refused(bundle: Path) -> None:
    # Portable kernels: the call of the other thread lasts long enough to be met.
    with load(bundle, 1, generic="only") as table:
        linear = table.linear(weights(Shape(2000, 2000)), 1.0)
        x = np.ones((64, 2000), np.float32)
        started = threading.Event()
        refused: list[str] = []

        def long_call() -> None:
            started.set()
            try:
                linear(x)
            except BusyError as error:  # it may be this one that is refused
                refused.append(error.message)

        for _ in range(20):
            other = threading.Thread(target=long_call)
            other.start()
            started.wait()
            try:
                while other.is_alive() and not refused:
                    linear(x[:1])
            except BusyError as error:
                refused.append(error.message)
            other.join()
            started.clear()
            if refused:
                break
        assert refused
        assert "serves another call" in refused[0]
        assert linear(x[:1]).shape == (1, 2000)  # and afterwards it serves again


def test_a_forked_child_is_refused(bundle: Path) -> None:
    with load(bundle, 2) as table:
        linear = table.linear(W, 1.0)
        child = os.fork()
        if child == 0:
            try:
                linear(X)
            except BitgenError as error:
                os._exit(7 if "parent process" in error.message else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert linear(X).shape == (2, 4)


def test_a_closed_table_says_so(bundle: Path) -> None:
    with load(bundle, 1) as table:
        linear = table.linear(W, 1.0)
    assert table.threads == 0
    with pytest.raises(BitgenError, match="the kernel table is closed"):
        linear(X)
    table.close()  # a second time is no error


def test_a_library_alone_can_be_loaded(bundle: Path, tmp_path: Path) -> None:
    alone = tmp_path / "kernels.so"
    alone.write_bytes((bundle / "libbitgen-tests.so").read_bytes())
    with load(alone, 1) as table:
        assert table.bundle is None
        assert table.linear(W, 1.0)(X).shape == (2, 4)
    with load(bundle / "libbitgen-tests.so", 1) as table:
        assert table.bundle is not None
        assert table.version == table.bundle.manifest.bitgen_version
        assert [k.name for k in table.kernels] == [k.spec.name for k in table.bundle.manifest.kernels]


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_what_is_no_library_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "kernels.so"
    file.write_bytes(content)
    with pytest.raises(FileError, match="cannot open the library"):
        load(file)


STRANGER = "int stranger(void);\nint stranger(void) { return 1; }\n"
FUTURE = """\
#include <stdint.h>
int32_t bitgen_abi_version(void);
int32_t bitgen_struct_sizes(int32_t *a, int32_t *b);
int32_t bitgen_abi_version(void) { return VERSION; }
int32_t bitgen_struct_sizes(int32_t *a, int32_t *b) { *a = *b = 1; return 0; }
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STRANGER, "is not a bitgen library"),
        (FUTURE.replace("VERSION", "99"), f"has ABI version 99, not {ABI_VERSION}"),
        (FUTURE.replace("VERSION", str(ABI_VERSION)), r"has structs of \[1, 1\] bytes"),
    ],
)
def test_another_library_is_not_taken_for_ours(tmp_path: Path, text: str, message: str) -> None:
    toolchain = libraries.toolchain_of()
    library = toolchain.link_shared([toolchain.compile_object(Unit("other", text))], tmp_path / "other.so")
    with pytest.raises(FileError, match=message):
        load(library)


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BitgenError, match="cannot open the library"):
        load(tmp_path / "nothing.so")
    with pytest.raises(BitgenError, match=r"is not a bundle: there is no manifest\.json in it"):
        load(tmp_path)


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(ArgumentValueError("x is empty")))  # noqa: S301 - our own bytes
    assert (type(error), error.message) == (ArgumentValueError, "x is empty")


def test_a_table_that_nobody_keeps_ends_its_threads(bundle: Path) -> None:
    """Whichever of the table, its context and its library Python takes apart first."""
    for last in ("load({!r}, 2)", "table = load({!r}, 2); table.beyond = table"):
        script = f"from bitgen.runtime import load\n{last.format(str(bundle))}\n"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
