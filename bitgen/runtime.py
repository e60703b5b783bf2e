"""Call a kernel library from Python: pack weights once, multiply on numpy arrays without copies.

Nothing here compiles, renders or searches::

    table = load("generated/3B-zen5")
    linear = table.linear(w, scale)      # w int8 (m, k) in {-1, 0, 1}, scale a float or float32 (m,)
    linear = table.linear(w, scale, group=128)     # scale float32 (m, ceil(k / 128))
    linear = table.linear(w, scale, activations="int16")
    y = linear(x)                        # x float32 (n, k) -> float32 (n, m)
    acc = linear.accumulate(xq)          # xq int8 (n, k) -> int32 (n, m), exact
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.abi import ABI_VERSION, X_TYPES, constants, ffi, has_function
from bitgen.bundle import Bundle, is_bundle, read_bundle, require_runnable
from bitgen.cpu import cap_note, detect_cpu
from bitgen.errors import BitgenError, FileError, UnsupportedError, UsageError
from bitgen.families.base import GROUPS, TERNARY, Codes
from bitgen.reference import are_halves
from bitgen.spec import Shape
from bitgen.trust import open_private

Floats: TypeAlias = NDArray[np.float32]
Generic: TypeAlias = Literal["never", "fallback", "only"]
Activations: TypeAlias = Literal["int8", "int16"]  # what the inputs of matrices are quantised to
_ALIGNMENT = 64
# cffi unmaps a library that nobody refers to, whatever of it is still to be called: contexts, which end their
# threads when they are collected. What was opened stays.
_opened: list[Any] = []
_CTYPES = {"uint8": "uint8_t[]", "int8": "int8_t[]", "float32": "float[]"}


class ArgumentTypeError(UsageError, TypeError):
    """An argument of the wrong type or dtype."""


class ArgumentValueError(UsageError, ValueError):
    """An argument of the right type with a wrong shape, order or value."""


class BusyError(BitgenError):
    """The table serves a call of another thread: give each thread a table of its own."""


@dataclass(frozen=True)
class KernelInfo:
    """A kernel of a library. ``shape`` None: it serves every shape; ``threads`` 0: it was not tuned."""

    name: str
    isa: str
    family: str
    schedule: str
    shape: Shape | None
    n_min: int
    n_max: int
    threads: int
    row_block: int


def load(path: Path | str | Bundle, threads: int | None = None, *, generic: Generic = "never") -> KernelTable:
    """Open the library at ``path``, or the one of the bundle in the folder ``path`` or that was read.

    ``threads`` counts the calling thread; None means one a physical core this process may use.
    ``generic`` tells when to use the library's generic kernels (slow, exact): never, as a fallback on a CPU
    the library is not for, or only them.
    FileError for a file that is missing, damaged, no such library or one that others can change,
    UnsupportedError for a library of another CPU.
    """
    if isinstance(path, Bundle):
        bundle: Bundle | None = path
    else:
        bundle = _bundle_of(Path(path))
    if bundle is None:
        return KernelTable(Path(str(path)), threads, None, generic)
    if generic == "never":
        require_runnable(bundle, detect_cpu())
    return KernelTable(bundle.library, threads, bundle, generic)


def _bundle_of(path: Path) -> Bundle | None:
    """The bundle that ``path`` is, or whose library it is; its library is verified when it is opened."""
    if path.is_dir():
        return read_bundle(path, hashed=False)  # of a folder that is none it says why
    if path.is_file() and is_bundle(path.parent):
        bundle = read_bundle(path.parent, hashed=False)
        return bundle if bundle.library.samefile(path) else None
    return None


def _open(path: Path, sha256: str | None) -> Any:
    """The library's functions, once its ABI is known to be ours.

    The file is opened once: what is checked (nobody else can change it, its ``sha256``) is what is loaded.
    """
    if not path.is_file():
        raise FileError(f"cannot open the library {path}: there is no such file")
    with open_private(path) as file:
        if sha256 is not None and file.sha256() != sha256:
            raise FileError(f"{path} is not the file its manifest describes (sha256 differs): build it again")
        name = file.loadable
        try:
            lib = ffi.dlopen(name)
            _opened.append(lib)
        except OSError as error:
            why = str(error).replace(name, str(path))
            raise FileError(f"cannot open the library {path}: {why}") from error
    try:
        version = lib.bitgen_abi_version()
        sizes = ffi.new("int32_t[2]")
        lib.bitgen_struct_sizes(sizes, sizes + 1)
    except (AttributeError, ffi.error) as error:
        why = str(error).replace(name, str(path))
        raise FileError(f"{path} is not a bitgen library: {why}") from error
    if version != ABI_VERSION:
        raise FileError(f"{path} has ABI version {version}, not {ABI_VERSION}: build it again")
    _check_sizes(path, list(sizes), "kernel_info", "packed_header")
    sizes = ffi.new("int32_t[4]")
    lib.bitgen_model_sizes(sizes, sizes + 1, sizes + 2, sizes + 3)
    _check_sizes(path, list(sizes), "layer", "model", "tokens", "row")
    return lib


def _check_sizes(path: Path, found: list[int], *structs: str) -> None:
    expected = [ffi.sizeof(f"struct bitgen_{name}") for name in structs]
    if found != expected:
        raise FileError(f"{path} has structs of {found} bytes, not {expected}: build it again")


class KernelTable:
    """An open library with a pool of threads. It serves one call at a time; BusyError for a second.

    Use it in a ``with`` statement, or let it be collected.
    """

    def __init__(
        self,
        library: Path,
        threads: int | None = None,
        bundle: Bundle | None = None,
        generic: Generic = "never",
    ) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise ArgumentTypeError(f"threads must be an int or None, not {threads!r}")
        if threads is not None and not 1 <= threads <= 1024:
            raise ArgumentValueError(f"threads must be 1 to 1024, not {threads}")
        self.path = library
        self.bundle = bundle
        self._lib = _open(library, bundle.manifest.files[library.name] if bundle else None)
        lib = self._lib
        flags = {"never": 0, "fallback": lib.BITGEN_ALLOW_GENERIC, "only": lib.BITGEN_ONLY_GENERIC}.get(
            generic
        )
        if flags is None:
            raise ArgumentValueError(f"generic must be never, fallback or only, not {generic!r}")
        out = ffi.new("bitgen_context **")
        self.check(self._lib.bitgen_context_create(out, threads or 0, flags))
        self._context = ffi.gc(out[0], self._lib.bitgen_context_destroy)

    def __repr__(self) -> str:
        return f"<KernelTable {self.path}, {self.threads} threads>"

    def __enter__(self) -> KernelTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads. The table and its layers cannot be called afterwards."""
        if self._context != ffi.NULL:
            ffi.release(self._context)
            self._context = ffi.NULL

    @property
    def threads(self) -> int:
        """The number of threads, the calling one included; 0 when closed."""
        return int(self._lib.bitgen_context_threads(self._context))

    @property
    def nodes(self) -> int:
        """NUMA nodes that the threads are on: 1, but on machines of several; 0 when closed."""
        if not has_function(self._lib, "bitgen_context_nodes"):
            return 1
        return int(self._lib.bitgen_context_nodes(self._context))

    def copy_to_nodes(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A copy (64-byte aligned) of packed weights or rows, each part on the node whose threads read it."""
        copy = aligned_bytes(data.nbytes)
        source = ffi.from_buffer("uint8_t[]", np.ascontiguousarray(data))
        target = ffi.from_buffer("uint8_t[]", copy)
        self.check(self._lib.bitgen_copy_to_nodes(self._context, source, target, data.nbytes))
        return copy.reshape(data.shape)

    @property
    def version(self) -> str:
        """The version of bitgen that built the library."""
        return _text(self._lib.bitgen_version())

    @property
    def kernels(self) -> tuple[KernelInfo, ...]:
        """What the library holds: tuned kernels, then defaults, then generic ones."""
        return tuple(self._kernel(i) for i in range(self._lib.bitgen_kernel_count()))

    def linear(
        self,
        w: NDArray[np.int8],
        scale: float | Floats,
        *,
        group: int = 0,
        activations: Activations = "int8",
    ) -> Linear:
        """Pack ``w`` int8 (m, k) in {-1, 0, 1}; ``scale`` is a float or float32 (m,), one a row.

        With ``group``, 32, 64, 128 or 256, it is float32 (m, ceil(k / group)), one for each so many weights
        along k, and activations are quantised by the same groups. ``activations``: to int8 or int16.
        ArgumentTypeError, ArgumentValueError (BitgenErrors) name the argument that is wrong.
        """
        _check_array("w", w, np.int8, (2,))
        self.check_activations(activations)
        shape = Shape(*w.shape)
        if group:
            checked = _group_scales(scale, shape, group)
            groups = Groups.of(checked, group)
            packed = aligned_bytes(self.packed_bytes(shape, groups))
            self.pack_rows(w, 0, shape, packed, groups, checked)
            return Linear(self, shape, packed, np.empty(0, np.float32), group, activations)
        scales = _scales(scale, shape.m)
        packed = aligned_bytes(self.packed_bytes(shape))
        self.pack_rows(w, 0, shape, packed)
        return Linear(self, shape, packed, scales, activations=activations)

    def check_activations(self, activations: str) -> None:
        """ArgumentValueError where it is no type of activations, FileError where the library is too old."""
        if activations not in X_TYPES:
            known = " or ".join(X_TYPES)
            raise ArgumentValueError(f"activations must be {known}, not {activations!r}")
        if activations != "int8" and not has_function(self._lib, "bitgen_matmul_as"):
            raise FileError(f"{self.path} knows no {activations} activations: build it again")

    # ---- Packed weights, for those who keep them elsewhere than in a `Linear` ----

    def kernel_for(self, packed: Any, n: int) -> KernelInfo:
        """The kernel that multiplies packed weights (an address, or uint8) with ``n`` rows of int8."""
        data = ffi.from_buffer("uint8_t[]", packed) if isinstance(packed, np.ndarray) else packed
        index = ffi.new("int32_t *")
        self.check(self._lib.bitgen_kernel_choice(self._context, data, n, index))
        return self._kernel(index[0])

    def layout_name(self, shape: Shape, groups: Groups | None = None) -> str:
        """The layout that weights of this shape are packed in, for example "i2s_r16" or "i2s_r16_g128"."""
        lib, header = self._lib, ffi.new("struct bitgen_packed_header *")
        if groups is None:
            code = lib.bitgen_packed_layout(self._context, shape.m, shape.k, header)
        elif groups.weights != TERNARY:
            code = lib.bitgen_codes_packed_layout(self._context, shape.m, shape.k, groups.coded(), header)
        else:
            code = lib.bitgen_group_packed_layout(self._context, shape.m, shape.k, *groups.native, header)
        self.check(code)
        return f"{_text(header.family)}_r{header.row_block}" + (f"_g{header.group}" if header.group else "")

    def prefer(self, shape: Shape, family: str | None, row_block: int = 0) -> bool:
        """Pack weights of this shape without groups in another layout from now on; None: the best one again.

        False where the library has no kernels for it, or is too old to be told.
        """
        if not has_function(self._lib, "bitgen_prefer_layout"):
            return False
        name = ffi.NULL if family is None else ffi.new("char[]", family.encode())
        code = self._lib.bitgen_prefer_layout(self._context, shape.m, shape.k, name, row_block)
        if code != self._lib.BITGEN_ERROR_LAYOUT:
            self.check(code)
        return bool(code == self._lib.BITGEN_OK)

    def packed_bytes(self, shape: Shape, groups: Groups | None = None) -> int:
        """Bytes of packed weights of this shape."""
        lib, size = self._lib, ffi.new("size_t *")
        if groups is None:
            code = lib.bitgen_packed_bytes(self._context, shape.m, shape.k, size)
        elif groups.weights != TERNARY:
            code = lib.bitgen_codes_packed_bytes(self._context, shape.m, shape.k, groups.coded(), size)
        else:
            code = lib.bitgen_group_packed_bytes(self._context, shape.m, shape.k, *groups.native, size)
        self.check(code)
        return int(size[0])

    def pack_rows(
        self,
        w: NDArray[np.int8],
        begin: int,
        shape: Shape,
        packed: NDArray[np.uint8],
        groups: Groups | None = None,
        scales: Floats | None = None,
    ) -> None:
        """Pack rows of a matrix, from ``begin`` on, w int8 (rows, k), into ``packed`` (64-byte aligned).

        ``scales`` float32 (rows, groups along k), of weights in groups. Call it with all rows in order, each
        ``begin`` a multiple of 256; ``packed`` is valid after the last.
        """
        rows = (begin, begin + w.shape[0], shape.m, shape.k)
        out = (ffi.from_buffer("uint8_t[]", packed), packed.size)
        codes = ffi.from_buffer("int8_t[]", w)
        if groups is None or scales is None:
            code = self._lib.bitgen_pack_rows(self._context, codes, *rows, *out)
        else:
            values = ffi.from_buffer("float[]", scales)
            code = self._lib.bitgen_pack_group_rows(self._context, codes, values, *rows, *groups.native, *out)
        self.check(code)

    def pack_codes(
        self, rows: Codes, begin: int, shape: Shape, packed: NDArray[np.uint8], groups: Groups
    ) -> None:
        """As `pack_rows`, of codes: ``rows`` has those of rows from ``begin`` on."""
        m = len(rows.codes)
        struct, alive = groups.coded(), []
        for name in ("codes", "scales", "offsets", "tables", "selectors"):
            if (values := getattr(rows, name)) is not None and values.size:
                alive.append(ffi.from_buffer(_CTYPES[values.dtype.name], np.ascontiguousarray(values)))
                setattr(struct, name, alive[-1])
        struct.table_count = 0 if rows.tables is None else len(rows.tables)
        where = (begin, begin + m, shape.m, shape.k, ffi.from_buffer("uint8_t[]", packed), packed.size)
        self.check(self._lib.bitgen_pack_codes(self._context, struct, *where))

    def coded(self, rows: Codes, groups: Groups, scale: float | Floats = 1.0) -> Linear:
        """Pack a matrix of codes, as `linear` does ternary weights.

        ``scale``: of weights without groups (``groups.group`` 0, which Q1 has) a float or float32 (m,).
        """
        shape = Shape(*rows.codes.shape)
        packed = aligned_bytes(self.packed_bytes(shape, groups))
        self.pack_codes(rows, 0, shape, packed, groups)
        scales = np.empty(0, np.float32) if groups.group else _scales(scale, shape.m)
        return Linear(self, shape, packed, scales, groups.group)

    def is_packed(self, packed: NDArray[np.uint8], shape: Shape) -> bool:
        """Whether ``packed`` opens like weights of this shape that the library can multiply with."""
        data = ffi.from_buffer("uint8_t[]", packed)
        code = self._lib.bitgen_check_packed(self._context, data, packed.size, shape.m, shape.k)
        return bool(code == self._lib.BITGEN_OK)

    @property
    def native(self) -> tuple[Any, Any, Any]:
        """(ffi, functions, context) of the library: for what this class has no method for."""
        return ffi, self._lib, self._context

    def check(self, code: int) -> None:
        """Raise what the code of a library call means; nothing for BITGEN_OK."""
        lib = self._lib
        if code == lib.BITGEN_OK:
            return
        message = _text(lib.bitgen_error_message(code))
        if code == lib.BITGEN_ERROR_UNSUPPORTED_CPU:
            missing = _text(lib.bitgen_missing_features())
            reason = f"this CPU lacks {missing}{cap_note()}"
            raise UnsupportedError(f"cannot use {self.path}: {reason}")
        if code == lib.BITGEN_ERROR_ISA_CAP:
            raise UsageError(f"cannot use {self.path}: {message}")
        if code == lib.BITGEN_ERROR_NULL and not self.threads:
            raise BitgenError("the kernel table is closed")
        if code == lib.BITGEN_ERROR_NOT_FINITE:
            raise ArgumentValueError("x holds NaN or infinity")
        if code == lib.BITGEN_ERROR_SCALES:
            raise ArgumentValueError(f"scale: {message}")
        if code == lib.BITGEN_ERROR_CODES:
            raise ArgumentValueError(f"codes: {message}")
        if code == lib.BITGEN_ERROR_NOT_TERNARY:
            raise ArgumentValueError("w must hold -1, 0 and 1 only")
        raise (BusyError if code == lib.BITGEN_ERROR_BUSY else BitgenError)(f"{self.path.name}: {message}")

    def _kernel(self, index: int) -> KernelInfo:
        info = ffi.new("struct bitgen_kernel_info *")
        self.check(self._lib.bitgen_kernel_info(index, info))
        return KernelInfo(
            name=_text(info.name),
            isa=_text(info.isa),
            family=_text(info.family),
            schedule=_text(info.schedule),
            shape=Shape(info.m, info.k) if info.m else None,
            n_min=info.n_min,
            n_max=info.n_max,
            threads=info.threads,
            row_block=info.row_block,
        )


@dataclass(frozen=True)
class Groups:
    """A scale for each ``group`` weights along k; ``half``: stored as half floats, else as floats.

    ``weights``: ternary, or a kind of codes (`bitgen.families.base.Family.weights`). ``group`` 0: codes with
    a scale a row, outside.
    """

    group: int
    half: bool = True
    weights: str = TERNARY

    @classmethod
    def of(cls, scales: Floats, group: int) -> Groups:
        """Those of ``scales``, all of one matrix: half floats where each is one exactly."""
        return cls(group, are_halves(scales))

    @property
    def native(self) -> tuple[int, int]:
        """(group, scale type) as the library's functions take them."""
        half = self.half and self.group
        return self.group, constants.BITGEN_SCALE_F16 if half else constants.BITGEN_SCALE_F32

    def coded(self) -> Any:
        """The same of codes: a struct bitgen_codes without rows."""
        group, scale_type = self.native
        kind = getattr(constants, f"BITGEN_WEIGHTS_{self.weights.upper()}")
        fields = {"group": group, "scale_type": scale_type, "kind": kind}
        return ffi.new("struct bitgen_codes *", {"size": ffi.sizeof("struct bitgen_codes"), **fields})


class Linear:
    """Packed weights with their scales: y = x w^T. Made by `KernelTable.linear`."""

    def __init__(
        self,
        table: KernelTable,
        shape: Shape,
        packed: NDArray[np.uint8],
        scales: Floats,
        group: int = 0,
        activations: Activations = "int8",
    ) -> None:
        self.table = table
        self.shape = shape
        self.packed = packed  # (packed bytes,), 64-byte aligned: header and blocks
        self.scales = scales  # (1,) or (m,); (0,) of weights in groups
        self.group = group  # weights along k that share a scale; 0: scales lie outside
        self.activations = activations
        # Made once: a pointer into an array costs 0.4 us, and these two never move.
        self._packed = ffi.from_buffer("uint8_t[]", packed)
        self._scales = ffi.NULL if group else ffi.from_buffer("float[]", scales)

    def __call__(self, x: Floats) -> Floats:
        """Y of x: float32 (n, k) -> (n, m), or (k,) -> (m,). NaN and infinity raise ArgumentValueError."""
        n = self._tokens("x", x, np.float32)
        y = np.empty((n, self.shape.m), np.float32)
        table, lib = self.table, self.table._lib
        is_int8 = self.activations == "int8"  # libraries from before there were others have only this
        code = (lib.bitgen_matmul if is_int8 else lib.bitgen_matmul_as)(
            table._context,
            self._packed,
            self._scales,
            self.scales.size,
            *(() if is_int8 else (X_TYPES[self.activations],)),
            ffi.from_buffer("float[]", x),
            n,
            self.shape.m,
            self.shape.k,
            ffi.from_buffer("float[]", y),
        )
        table.check(code)
        return y if x.ndim == 2 else y[0]

    def accumulate(self, xq: NDArray[np.int8]) -> NDArray[np.int32]:
        """The exact integers of xq: int8 (n, k) -> int32 (n, m), or (k,) -> (m,); not in groups."""
        n = self._tokens("xq", xq, np.int8)
        acc = np.empty((n, self.shape.m), np.int32)
        table = self.table
        code = table._lib.bitgen_accumulate(
            table._context,
            self._packed,
            ffi.from_buffer("int8_t[]", xq),
            n,
            self.shape.m,
            self.shape.k,
            ffi.from_buffer("int32_t[]", acc),
        )
        table.check(code)
        return acc if xq.ndim == 2 else acc[0]

    def kernel(self, n: int) -> KernelInfo:
        """The kernel that multiplies ``n`` tokens; int16 activations are two rows of int8 for each."""
        return self.table.kernel_for(self._packed, n if self.activations == "int8" else 2 * n)

    def _tokens(self, name: str, x: Any, dtype: type[np.generic]) -> int:
        """The number of tokens in an activation array that is right."""
        _check_array(name, x, dtype, (1, 2))
        if x.shape[-1] != self.shape.k:
            raise ArgumentValueError(f"{name} must have {self.shape.k} columns (k), not shape {x.shape}")
        return 1 if x.ndim == 1 else int(x.shape[0])


def _check_array(name: str, array: Any, dtype: type[np.generic], dimensions: tuple[int, ...]) -> None:
    """Type, dtype, dimensions, order and emptiness of an argument; the error names it."""
    if not isinstance(array, np.ndarray):
        raise ArgumentTypeError(f"{name} must be a numpy array, not {type(array).__name__}")
    if array.dtype != dtype:
        raise ArgumentTypeError(f"{name} must be {np.dtype(dtype)}, not {array.dtype}")
    if array.ndim not in dimensions:
        allowed = " or ".join(map(str, dimensions))
        raise ArgumentValueError(f"{name} must have {allowed} dimensions, not shape {array.shape}")
    if array.size == 0:
        raise ArgumentValueError(f"{name} is empty: shape {array.shape}")
    if not array.flags.c_contiguous:
        raise ArgumentValueError(f"{name} is not C-contiguous: pass numpy.ascontiguousarray({name})")
    if not array.flags.aligned:
        raise ArgumentValueError(f"{name} is not aligned to its elements: pass a copy")


def _scales(scale: Any, m: int) -> Floats:
    """The weight scale as float32 (1,) or (m,), a copy."""
    if isinstance(scale, np.ndarray) and scale.ndim:
        _check_array("scale", scale, np.float32, (1,))
        if scale.size not in (1, m):
            raise ArgumentValueError(f"scale must have 1 or {m} values, not {scale.size}")
        return _finite(scale.copy())
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.floating, np.integer, np.ndarray)):
        raise ArgumentTypeError(f"scale must be a float or a float32 array, not {type(scale).__name__}")
    with np.errstate(over="ignore"):  # beyond float32 is infinity, which is refused
        return _finite(np.array([scale], np.float32))


def _group_scales(scale: Any, shape: Shape, group: int) -> Floats:
    """The weight scales of groups as they are, float32 (m, groups)."""
    if group not in GROUPS:
        raise ArgumentValueError(f"group must be one of {', '.join(map(str, GROUPS))}, not {group!r}")
    _check_array("scale", scale, np.float32, (2,))
    wanted = (shape.m, -(-shape.k // group))
    if scale.shape != wanted:
        raise ArgumentValueError(f"scale must have the shape {wanted}, not {scale.shape}")
    checked: Floats = scale
    return _finite(checked)


def _finite(scale: Floats) -> Floats:
    if not np.isfinite(scale).all():
        raise ArgumentValueError("scale holds NaN or infinity")
    return scale


def aligned_bytes(size: int, *, zeros: bool = False) -> NDArray[np.uint8]:
    """``size`` bytes at a multiple of 64, uninitialised unless ``zeros``."""
    memory = (np.zeros if zeros else np.empty)(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]


def _text(chars: Any) -> str:
    return str(ffi.string(chars).decode())
