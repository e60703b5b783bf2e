"""Run a model: whole forward passes in one C call each, over a kernel library.

::

    engine = Engine(weights, table, context=2048)
    logits = engine.forward(tokens, positions, sequences, outputs)  # bool: of those that are True
    answers = engine.forward(tokens, positions, sequences, [Nothing(), Hidden(), Best(40, bias={13: -2.0})])

The logits of a token are the same bits whatever the number of threads, the batch it is in, and the ISA level
of the library: every float operation has one order (templates/step), every integer sum is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Context, Decimal
from typing import Any, Literal, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import NDArray

from bitgen.abi import ACTIVATIONS, DENSE_TYPES, KV_TYPES, STAGES, X_TYPES, ffi
from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.formats.architectures import norms_of
from bitgen.formats.config import ModelConfig
from bitgen.formats.weights import DenseMatrix, Weights
from bitgen.inference import FEW
from bitgen.inference.disk import hold, read_rate
from bitgen.inference.kv_memory import Capacity, KvMemory
from bitgen.inference.layouts import pack_smaller, tell_portable
from bitgen.inference.memory import (
    Memory,
    check_fits,
    describe,
    fits,
    is_large,
    mapping_of,
    resident_bytes,
    with_cache_that_fits,
)
from bitgen.inference.numa import place_model, place_rows
from bitgen.inference.rows import check_tokens, logit_rows, want_rows
from bitgen.inference.wants import Answer, Floats, Want
from bitgen.inference.weight_cache import (
    GroupsOf,
    PackedLayer,
    PackedMatrix,
    PackedModel,
    find_groups,
    pack_model,
    packed_bytes,
    quantize_lm_head,
)
from bitgen.progress import Progress, Report
from bitgen.runtime import Activations, KernelTable, aligned_bytes

Ints: TypeAlias = NDArray[np.int32]
Kv: TypeAlias = Literal["f16", "f32", "q8", "q4"]
Head: TypeAlias = Literal["auto", "full", "screened", "q8", "exact"]  # exact: what full was called

_SCREENED = ("f32", "f16", "bf16")  # heads that int8 rows are half of, or less
# Smaller heads stay in the caches, where screening gains nothing: that of the tiny model takes 0.03 ms.
_SCREENED_BYTES = 64 << 20

# What inputs of matrices are rounded to where nobody asks for more. BitNets are trained with int8. Models in
# groups are not, but lose next to nothing by it, and prompts take half as long as with int16
# (docs/reference/activations.md).
OWN_ACTIVATIONS: Activations = "int8"
PREFILL = 512  # tokens of one C call; longer inputs are cut. Work memory grows with it, logits do not change
_ROPE_BLOCK = 1024  # positions whose cosines and sines are made at once: 5 ms

_TOKENS_SIZE, _ROW_SIZE = (ffi.sizeof(f"struct bitgen_{name}") for name in ("tokens", "row"))


class Engine:
    """A model ready to run, with a KV cache of ``max_batch`` sequences of up to ``context`` positions.

    ``kv`` is the type of the KV cache, ``head`` whether logits come from the file's LM head ("full"), from it
    but the best ones by way of int8 rows ("screened": the same bits, half the bytes), or from int8 rows
    made of it ("q8"). "auto" screens heads of 64 MiB and more where memory allows both. ``activations``: what
    the inputs of matrices are quantised to, of all tokens alike; None: the model's own. With a ``capacity``
    the KV cache has its slots instead of ``max_batch`` and takes memory as it is written to; whoever runs the
    engine then keeps what is held (`release`) below what `memory` says. ``fingerprint`` identifies the model
    file: packed weights are then kept in the user's cache and mapped next time. ``from_disk`` runs what is
    larger than memory: what does not fit is read from that file in each step. ``progress`` is called with
    the plan of the memory and while weights are packed. It serves one call at a time, as its table does.
    Where memory is short, weights without groups are packed in the smallest layout that the library has.
    BitgenError when something does not fit: the arguments, the model, the memory.
    """

    def __init__(
        self,
        weights: Weights,
        table: KernelTable,
        *,
        context: int | None = None,
        kv: Kv = "f16",
        head: Head = "full",
        activations: Activations | None = None,
        max_batch: int = 1,
        capacity: Capacity | None = None,
        fingerprint: str | None = None,
        from_disk: bool = False,
        progress: Report | None = None,
    ) -> None:
        config = weights.config
        if from_disk and fingerprint is None:
            raise UsageError("weights come from disk where a model file has been packed: give a fingerprint")
        if head == "q8":  # int8 rows take the place of a ternary head
            weights = replace(weights, ternary_head=None)
        self.weights = weights
        self.config = config
        self.table = table
        self.context = _checked_context(config, context)
        self.max_batch = max_batch = max_batch if capacity is None else capacity.slots
        self.capacity = capacity
        self.lengths = [0] * max_batch  # positions of each sequence in the cache
        self._ffi, self._lib, _ = table.native
        if max_batch < 1:
            raise BitgenError(f"max_batch must be at least 1, not {max_batch}")
        if kv not in KV_TYPES or head not in get_args(Head):
            heads = "auto, full, screened or q8"
            raise BitgenError(f"kv must be f16, f32, q8 or q4, head {heads}, not {kv!r}, {head!r}")
        self.activations: Activations = activations or OWN_ACTIVATIONS
        table.check_activations(self.activations)
        self._sizes(kv)
        groups = find_groups(weights, fingerprint)
        head = self._settled(head, groups)
        self.screens = head == "screened"
        self.memory = self._planned(head, groups, from_disk=from_disk)
        if not fits(self.memory) and pack_smaller(table, weights, groups, progress):
            self.memory = self._planned(head, groups, from_disk=from_disk)
        if progress and (from_disk or is_large(self.memory)):
            progress(Progress(describe(self.memory), lasting=True))
        check_fits(self.memory, from_disk=from_disk)
        # What C reads must live as long as its addresses: everything is kept in these two.
        self._alive: list[Any] = []
        packed = pack_model(weights, table, groups, fingerprint, progress, from_disk=from_disk)
        if progress:
            tell_portable(table, config, packed.layers[0].values(), progress)
        packed = self._from_disk(packed, progress) if from_disk else place_model(packed, table, progress)
        self._places = table.nodes > 1 and not from_disk  # rows that steps read
        self._set_weights(packed, head, fingerprint, progress)
        self._set_cache()
        self._times = np.zeros(len(STAGES), np.int64)
        self._times_pointer = self._ffi.from_buffer("int64_t[]", self._times)
        self._rope_ready = 0

    # ---- Running ----

    @overload
    def forward(self, tokens: Ints, positions: Ints, sequences: Ints, wants: NDArray[np.bool_]) -> Floats: ...

    @overload
    def forward(
        self, tokens: Ints, positions: Ints, sequences: Ints, wants: Sequence[Want]
    ) -> list[Answer]: ...

    def forward(
        self, tokens: Ints, positions: Ints, sequences: Ints, wants: NDArray[np.bool_] | Sequence[Want]
    ) -> Floats | list[Answer]:
        """What ``wants`` asks for each token: `Nothing`, `Hidden`, `Logits` or `Best`.

        All four are of length n, for any n >= 1: token i is at its position of its sequence, which must be
        the next one that is not in the KV cache. The answers are a list of n: None, the hidden state float32
        (hidden), logits float32 (vocab), or `Chosen`. Where ``wants`` is a bool array, True asks for logits
        and the answer is float32 (wants.sum(), vocab).

        BitgenError when they do not fit together, the model or the context, and when NaN or infinity comes
        up. The cache then holds what it held, and the parts of `PREFILL` tokens that were done.
        """
        inputs = [_int32(values) for values in (tokens, positions, sequences)]
        # Lists from here on: after a forward pass the code of numpy is out of the caches, about 10 us a call.
        ids, places, owners = (values.tolist() for values in inputs)
        n = len(ids)
        if not n or {len(places), len(owners), len(wants)} != {n}:
            raise BitgenError("tokens, positions, sequences and wants must be as many, and not none")
        check_tokens(ids, self.config.vocab)
        self._check_places(places, owners)
        self._fill_rope(max(places) + 1)
        if isinstance(wants, np.ndarray) or isinstance(wants[0], (bool, np.bool_)):
            answers = logit_rows(np.asarray(wants).tolist(), self.config)
        else:
            answers = want_rows(wants, self.config)
        for begin in range(0, n, PREFILL):
            end = min(begin + PREFILL, n)
            self._step([a[begin:end] for a in inputs], answers.rows[begin:end])
            for owner, place in zip(owners[begin:end], places[begin:end], strict=True):
                self.lengths[owner] = place + 1
        made: Floats | list[Answer] = answers.result()
        return made

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what a sequence holds from position ``length`` on."""
        self._check_sequence(sequence)
        if not 0 <= length <= self.context:
            raise BitgenError(f"length must be 0 to {self.context}, not {length}")
        self.lengths[sequence] = min(length, self.lengths[sequence])

    def release(self, sequence: int, length: int) -> None:
        """The same, and give the memory behind it back, as far as the system takes it."""
        self.truncate(sequence, length)
        if self._kv_memory is not None:
            whole = self.sequence_bytes(self.context)
            kept = self.sequence_bytes(length) if length else 0
            self._kv_memory.give_back(sequence * whole + kept, (sequence + 1) * whole)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Make sequence ``target`` hold the first ``length`` positions of ``source``; None: all it holds."""
        self._check_sequence(source)
        self._check_sequence(target)
        _, _, context = self.table.native
        length = self.lengths[source] if length is None else min(length, self.lengths[source])
        self.table.check(self._lib.bitgen_cache_copy(context, self._model, source, target, length))
        self.lengths[target] = length

    def cached(self, sequence: int) -> bytes:
        """The bytes of the KV cache that a sequence holds: the same on every machine."""
        return self._part(sequence, self.lengths[sequence]).tobytes()

    def restore(self, sequence: int, length: int, data: bytes) -> None:
        """Make a sequence hold ``length`` positions that `cached` gave. FileError when they do not fit."""
        self._check_sequence(sequence)
        if not 1 <= length <= self.context:
            raise FileError(f"{length} positions do not fit into a context of {self.context}")
        part = self._part(sequence, length)
        if len(data) != part.size:
            raise FileError(f"{length} positions have {part.size} bytes, not {len(data)}")
        part[:] = np.frombuffer(data, np.uint8)
        self.lengths[sequence] = length

    def _part(self, sequence: int, length: int) -> NDArray[np.uint8]:
        """The first positions of a sequence in the cache, up to the end of their last chunk."""
        begin = sequence * self.sequence_bytes(self.context)
        return self._cache[begin : begin + (self.sequence_bytes(length) if length else 0)]

    def sequence_bytes(self, positions: int) -> int:
        """Bytes of a sequence of so many positions, 1 or more: what one more of them takes."""
        model, sizes = self._ffi.new("struct bitgen_model *", self._model[0]), []
        model.context = positions
        for sequences in (1, 2):
            model.sequences = sequences
            size = self._ffi.new("size_t *")
            self.table.check(self._lib.bitgen_cache_bytes(model, size))
            sizes.append(int(size[0]))
        return sizes[1] - sizes[0]

    @property
    def memory_bytes(self) -> int:
        """What the engine holds at most, mapped weights included, the model file's own pages not."""
        return self.memory.total

    @property
    def head_bytes(self) -> int:
        """Bytes of the LM head in the model file's own pages; 0 when it was quantised: part of weights."""
        mapped = not self._quantized_head and self.weights.ternary_head is None
        return int(self.weights.output.data.nbytes) if mapped else 0

    @property
    def times_ns(self) -> dict[str, int]:
        """Nanoseconds spent in each stage of all forward passes since `reset_times`."""
        return dict(zip(STAGES, self._times.tolist(), strict=True))

    def reset_times(self) -> None:
        self._times[:] = 0

    def close(self) -> None:
        """Drop the cache and the mapped weights; the engine cannot run afterwards."""
        self._model.layers = 0  # a forward pass is then an error
        self._alive.clear()

    # ---- Inside ----

    def _step(self, inputs: Sequence[NDArray[Any]], rows: Any) -> None:
        """Tokens, positions and sequences, at most `PREFILL`, and their rows: one call of C."""
        ffi, lib = self._ffi, self._lib
        _, _, context = self.table.native
        tokens, positions, sequences = inputs
        call = ffi.new("struct bitgen_tokens *")
        if not self._gathers:
            x = np.ascontiguousarray(self.weights.embedding.gather(tokens))
            call.x = ffi.from_buffer("float[]", x)
        call.size, call.row_size = _TOKENS_SIZE, _ROW_SIZE
        call.token = ffi.from_buffer("int32_t[]", tokens)
        call.position = ffi.from_buffer("int32_t[]", positions)
        call.sequence = ffi.from_buffer("int32_t[]", sequences)
        call.row = rows
        call.n = len(tokens)
        code = lib.bitgen_step(context, self._model, call, self._times_pointer)
        if code:
            self._check_step(code)

    def _check_step(self, code: int) -> None:
        if code == self._lib.BITGEN_ERROR_NOT_FINITE:
            raise FileError("the model computes NaN or infinity: is its file damaged?")
        self.table.check(code)

    def _check_places(self, positions: list[int], sequences: list[int]) -> None:
        expected = dict(enumerate(self.lengths))
        for position, sequence in zip(positions, sequences, strict=True):
            self._check_sequence(sequence)
            if position != expected[sequence]:
                raise BitgenError(
                    f"position {position} of sequence {sequence} is not its next one, {expected[sequence]}"
                )
            expected[sequence] += 1
            if position >= self.context:
                raise BitgenError(f"the context of {self.context} positions is full")

    def _check_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self.max_batch:
            raise BitgenError(f"sequence {sequence} is not one of {self.max_batch}")

    def _fill_rope(self, positions: int) -> None:
        if positions <= self._rope_ready:
            return
        end = min(-(-positions // _ROPE_BLOCK) * _ROPE_BLOCK, self.context)
        frequency = self._ffi.from_buffer("float[]", self._frequency)
        table = self._ffi.from_buffer("float[]", self._rope)
        half = self.config.head_dim // 2
        self.table.check(self._lib.bitgen_rope(frequency, half, self._rope_ready, end, table))
        if self.config.rope_scale != 1:
            self._rope.reshape(-1, 2 * half)[self._rope_ready : end] *= np.float32(self.config.rope_scale)
        self._rope_ready = end

    # ---- Setting up ----

    def _sizes(self, kv: Kv) -> None:
        """The struct's dimensions: enough to ask for the sizes of everything else."""
        config = self.config
        model = self._model = self._ffi.new("struct bitgen_model *")
        for name in ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab"):
            setattr(model, name, getattr(config, name))
        model.size, model.layer_size = (ffi.sizeof(f"struct bitgen_{name}") for name in ("model", "layer"))
        model.context, model.sequences = self.context, self.max_batch
        model.norm_eps = config.norm_eps
        model.activation = ACTIVATIONS[config.activation]
        model.kv_type = KV_TYPES[kv]
        model.x_type = X_TYPES[self.activations]

    def _from_disk(self, packed: PackedModel, progress: Report | None) -> PackedModel:
        """The matrices that fit in memory, the others mapped; says how fast the disk is, before any step."""
        budget = resident_bytes(self.memory)
        if budget is None:
            return packed
        packed, on_disk = hold(packed, budget)
        if progress and on_disk and packed.path:
            rate = read_rate(packed.path, on_disk)
            part = f"{on_disk >> 20:,} of {self.memory.weights >> 20:,} MiB"
            limit = f"at {rate / 1e9:.2f} GB/s no more than {rate / on_disk:.2f} tokens/s, the rest in memory"
            progress(Progress(f"from disk: {part} in each step, {limit}", lasting=True))
        return packed

    def _settled(self, head: Head, groups: GroupsOf) -> Head:
        """What ``head`` comes to for this model: full, screened or q8."""
        output = self.weights.output
        if head == "q8":
            return head
        if self.weights.ternary_head is not None or output.type not in _SCREENED or head in ("full", "exact"):
            return "full"
        if head == "auto" and (
            output.data.nbytes < _SCREENED_BYTES or not fits(self._plan("screened", groups))
        ):
            return "full"
        return "screened"

    def _plan(self, head: Head, groups: GroupsOf) -> Memory:
        """Everything the engine will hold, before it holds anything."""
        ffi, lib = self._ffi, self._lib
        _, _, context = self.table.native
        size, config = ffi.new("size_t *"), self.config
        self.table.check(lib.bitgen_cache_bytes(self._model, size))
        self._reserved = cache = int(size[0])
        if self.capacity is not None:
            cache = min(self.capacity.bytes_of(self.sequence_bytes(self.context)), cache)
        work = 0
        for tokens in (FEW, PREFILL):  # few tokens may need more: threads then share heads of attention
            tokens = min(tokens, self.context * self.max_batch)
            parallel = self.capacity.parallel if self.capacity else self.max_batch
            best = tokens if tokens <= FEW else min(tokens, parallel) if parallel > FEW else 0
            self.table.check(lib.bitgen_work_bytes(context, self._model, tokens, tokens, best, size))
            work = max(work, int(size[0]))
        work += self.context * config.head_dim * 4  # RoPE
        weights = packed_bytes(self.weights, self.table, groups)
        if head != "full":
            weights += config.vocab * (config.hidden + 12)
        output = self.weights.output.data
        is_read = head == "full" and self.weights.ternary_head is None and mapping_of(output) is not None
        return Memory(weights, cache, work, output.nbytes if is_read else 0)

    def _planned(self, head: Head, groups: GroupsOf, *, from_disk: bool) -> Memory:
        """The plan; with a capacity, keys and values for which there is memory, of one sequence at least."""
        memory = self._plan(head, groups)
        if self.capacity is None:
            return memory
        least = self.sequence_bytes(self.context)
        if memory.cache < least:
            raise UsageError(
                f"{memory.cache / 2**20:.1f} MiB hold no text of {self.context} positions, which takes up to "
                f"{least / 2**20:.1f} MiB: give more (--kv-memory), or a smaller context (-c)"
            )
        return with_cache_that_fits(memory, least, from_disk=from_disk)

    def _set_weights(
        self, packed: PackedModel, head: Head, fingerprint: str | None, progress: Report | None
    ) -> None:
        model, weights = self._model, self.weights
        self.head_error = 0.0  # of the int8 LM head, see QuantizedLmHead
        self._quantized_head = head == "q8"
        self._gathers = weights.embedding.type in DENSE_TYPES  # other types are gathered in numpy
        if self._gathers:
            self._set_dense(model.embedding, weights.embedding)
        if head != "full":
            name = self.config.name or self.config.architecture
            small = quantize_lm_head(weights.output, self.table, fingerprint, progress, name)
            place = model.head if head == "q8" else model.screen
            place.data = self._pointer("uint8_t[]", self._placed(small.data.view(np.uint8)))
            place.scale = self._pointer("float[]", small.scale)
            place.row_bytes = self.config.hidden
            place.type = DENSE_TYPES["i8"]
            model.screen_bound = self._pointer("float[]", small.bound)
            model.screen_norm = self._pointer("float[]", small.norm)
            self.head_error = small.error if head == "q8" else 0.0
        if head == "full" and packed.head is not None:
            self._set_matrix(model.lm_head, packed.head)
        elif head != "q8":
            if weights.output.type not in DENSE_TYPES:
                raise BitgenError(
                    f"{weights.output.name} is {weights.output.type}, which no LM head can be: use --head q8"
                )
            self._set_dense(model.head, replace(weights.output, data=self._placed(weights.output.data)))
        model.final_norm = self._pointer("float[]", weights.final_norm)
        model.layer = self._layers(packed.layers)

    def _layers(self, packed: tuple[PackedLayer, ...]) -> Any:
        structs = self._ffi.new("struct bitgen_layer[]", len(packed))
        windows = self.config.windows or (0,) * len(packed)
        for struct, layer, matrices, window in zip(
            structs, self.weights.layers, packed, windows, strict=True
        ):
            struct.window = window
            for role, matrix in matrices.items():
                self._set_matrix(getattr(struct, role), matrix)
            for name in norms_of(self.config):
                setattr(struct, name, self._pointer("float[]", getattr(layer, name)))
        self._alive.append(structs)
        return structs

    def _set_matrix(self, struct: Any, matrix: PackedMatrix) -> None:
        struct.packed = self._pointer("uint8_t[]", matrix.data)
        struct.group = matrix.group
        if not matrix.group:
            struct.scale = self._pointer("float[]", matrix.scale)
            struct.scale_count = matrix.scale.size

    def _placed(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Rows of a head, where the threads that read them are."""
        return place_rows(rows, self.table) if self._places else rows

    def _set_dense(self, struct: Any, matrix: DenseMatrix) -> None:
        struct.data = self._pointer("uint8_t[]", matrix.data)
        struct.row_bytes = matrix.data.shape[1]
        struct.type = DENSE_TYPES[matrix.type]

    def _set_cache(self) -> None:
        config = self.config
        try:
            self._kv_memory = KvMemory(self._reserved) if self.capacity else None
            cache = self._kv_memory.data if self._kv_memory else aligned_bytes(self._reserved, zeros=True)
            self._rope = np.empty(self.context * config.head_dim, np.float32)
        except MemoryError:
            raise BitgenError(
                f"not enough memory: {self._reserved / 1e9:.1f} GB for keys and values of "
                f"{self.max_batch} x {self.context} positions; ask for a smaller context (-c) or --kv q8, q4"
            ) from None
        self._frequency = inverse_frequencies(config)
        self._cache = cache
        self._model.cache = self._pointer("uint8_t[]", cache)
        self._model.rope = self._pointer("float[]", self._rope)

    def _pointer(self, kind: str, array: NDArray[Any]) -> Any:
        """The address of an array that C reads from now on."""
        contiguous = np.ascontiguousarray(array)
        pointer = self._ffi.from_buffer(kind, contiguous)
        self._alive += [contiguous, pointer]
        return pointer


def inverse_frequencies(config: ModelConfig) -> Floats:
    """1 / rope_theta^(2 i / head_dim) / rope_divisors[i], float32 (head_dim / 2), rounded as PyTorch does.

    The power is computed with 30 decimal digits, not by the machine's libm: the same bits everywhere.
    """
    exact = Context(prec=30)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = [float(exact.power(Decimal(config.rope_theta), Decimal(float(e)))) for e in exponents]
    inverse = np.float32(1) / np.array(powers, np.float32)
    if config.rope_divisors is not None:
        inverse /= config.rope_divisors
    return inverse


def _checked_context(config: ModelConfig, context: int | None) -> int:
    if context is None:
        return config.context
    if not 1 <= context <= config.context:
        raise UsageError(f"context must be 1 to {config.context} positions, not {context}")
    return context


def _int32(values: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, np.int32).reshape(-1)
