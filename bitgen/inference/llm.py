"""A model that can be asked for text.

::

    llm = LLM("model.gguf", library="generated/3B-zen5")
    for piece in llm.generate("Once upon a time", max_tokens=64):
        print(piece, end="", flush=True)
    texts = llm.generate(["One prompt", "and another"], max_tokens=64)
    logits = llm.logits(llm.tokenizer.encode("Once"))           # float32 (tokens, vocab)
    for piece in llm.chat([{"role": "user", "content": "Hello"}]): ...

`bitgen.LLM` is this class with one thing more: without a library it builds one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from bitgen.bundle import Bundle, choose_bundle, find_bundles, judge
from bitgen.cpu import detect_cpu
from bitgen.errors import FileError, UsageError
from bitgen.formats.config import ModelConfig
from bitgen.inference.chat_template import BUILT_IN, PLAIN_STOP, Message, render_chat, template_for
from bitgen.inference.sampling import Sampling
from bitgen.inference.scheduler import Engine, Generator, Progress, Timings
from bitgen.inference.sequence import Answer, Finish, Request
from bitgen.paths import generated_dir
from bitgen.spec import Shape
from bitgen.tokenizer.data import TokenizerData
from bitgen.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bitgen.formats.model_file import ModelFile
    from bitgen.formats.weights import Weights
    from bitgen.inference.engine import Engine as CompiledEngine
    from bitgen.runtime import KernelTable

KV: TypeAlias = Literal["f16", "f32", "q8"]
Head: TypeAlias = Literal["exact", "q8"]
Prompt: TypeAlias = "str | Sequence[int]"

BATCH_MAX = 16  # sequences that run at once
CONTEXT_DEFAULT = 4096  # positions, where the model has as many and nobody asks for more


class Generation:
    """The text of one answer as it comes: iterate over its pieces.

    ``text`` is what came so far, ``finish`` why it ended (None before): end (the model ended it), stop (a
    stop text), length (max_tokens) or context (the context is full).
    """

    def __init__(self, llm: LLM, request: Request, progress: Progress | None = None) -> None:
        self.request = request
        self._answer: Answer | None = None
        self._pieces = self._run(llm, request, progress)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def text(self) -> str:
        return self._answer.text if self._answer else ""

    @property
    def tokens(self) -> list[int]:
        """The tokens that were drawn."""
        return list(self._answer.tokens) if self._answer else []

    @property
    def finish(self) -> Finish | None:
        return self._answer.finish if self._answer else None

    @property
    def seed(self) -> int | None:
        """The seed it was drawn with; None before the first token."""
        return self._answer.seed if self._answer else None

    def _run(self, llm: LLM, request: Request, progress: Progress | None) -> Iterator[str]:
        for answer, piece in llm.generator.run([request], progress):
            self._answer = answer
            if piece:
                yield piece


class LLM:
    """A model file with its tokenizer and an engine over a kernel library.

    ``library`` is a bundle, a .so, or None for the best bundle in generated/; ``threads`` None means one a
    physical core; ``context`` the number of positions (None: 4096 or what the model has, 0: all it has);
    ``batch`` the number of sequences there is room for from the start (a list of prompts makes more).
    ``progress(text)`` is told what takes long. BitgenError when anything does not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        library: str | Path | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv: KV = "f16",
        head: Head = "exact",
        batch: int = 1,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        from bitgen.formats.open import open_model
        from bitgen.runtime import load

        started = time.perf_counter()
        file = open_model(model)
        config = file.config
        positions = context_for(config, context)
        tokenizer = file.tokenizer_data  # before the long work: it may be missing
        self.table = load(library or self._find_library(config, progress), threads)
        self._open = partial(
            open_engine, file, self.table, context=positions, kv=kv, head=head, progress=progress
        )
        self._setup(self._open(batch=batch), config, tokenizer)
        self.generator.timings.load_s = time.perf_counter() - started
        self._note_untuned(model)
        error = getattr(self.engine, "head_error", 0.0)
        if error:
            self.notes.append(f"the int8 head differs from the exact one by {error:.2%} (root mean square)")

    @classmethod
    def over(cls, engine: Engine, config: ModelConfig, tokenizer: TokenizerData) -> LLM:
        """The same on an engine that is already there."""
        llm = cls.__new__(cls)
        llm._setup(engine, config, tokenizer)
        return llm

    def _setup(self, engine: Engine, config: ModelConfig, data: TokenizerData) -> None:
        self.engine = engine
        self.config = config
        self.tokenizer = Tokenizer(data)
        self.generator = Generator(engine, self.tokenizer)
        self.template = data.chat_template
        self.notes = list(self.tokenizer.notes)  # what a user should know

    _open: Callable[..., Engine] | None = None  # makes the engine again, for another batch

    def _make_room(self, sequences: int) -> None:
        """An engine for as many sequences at once, up to what the kernels for small batches take."""
        wanted = min(sequences, BATCH_MAX)
        if self._open is not None and wanted > self.engine.max_batch:
            timings = self.generator.timings
            self.engine = self._open(batch=wanted)
            self.generator = Generator(self.engine, self.tokenizer)
            self.generator.timings = timings

    def _find_library(
        self,
        config: ModelConfig,
        progress: Callable[[str], None] | None,  # noqa: ARG002 - for those who build one
    ) -> str | Path:
        """The library to use when none was named."""
        bundle = find_library(config)
        if bundle is None:
            raise FileError(
                "there is no kernel library for this CPU: make one with `bitgen build --model NAME`",
            )
        return bundle.path

    def _note_untuned(self, model: str | Path) -> None:
        """Say how to tune when the library holds no kernel that was tuned for this model."""
        if not tuned_shapes(self.config, (kernel.shape for kernel in self.table.kernels)):
            name = preset_name(self.config) or model
            how = f"`bitgen tune --model {name}`, then `bitgen build --model {name}`"
            self.notes.append(f"running on untuned kernels; for faster ones: {how}")

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine's memory and end its threads."""
        for each in (self.engine, getattr(self, "table", None)):
            close = getattr(each, "close", None)
            if close:
                close()

    @property
    def context(self) -> int:
        """Positions of a sequence."""
        return self.engine.context

    @property
    def timings(self) -> Timings:
        return self.generator.timings

    @property
    def memory(self) -> tuple[int, int, int]:
        """Bytes of packed weights, of keys and values, and of work memory; known before they are used."""
        memory = getattr(self.engine, "memory", None)
        return (memory.weights, memory.cache, memory.work) if memory else (0, 0, 0)

    @property
    def head_bytes(self) -> int:
        """Bytes of the head that steps read from the mapped model file; 0 for one that was packed."""
        return int(getattr(self.engine, "head_bytes", 0))

    @property
    def context_hint(self) -> str:
        """What to add to a message that the context is full."""
        return "; -c makes it larger" if self.context < self.config.context else ", all that the model has"

    # ---- Text ----

    @overload
    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[str]: ...

    def generate(self, prompt: Any, **options: Any) -> Generation | list[str]:
        """Continue a text: one prompt gives a `Generation`, a list of prompts the list of their texts.

        A prompt is a text or a list of token ids. Options: ``max_tokens`` (128; None: until the context is
        full), ``stop`` (a text or several), ``lookup``, ``ignore_end``, and the fields of `Sampling`
        (temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed).
        """
        if not hasattr(prompt, "__len__"):
            raise UsageError(
                f"a prompt is a text, token ids, or a list of these, not {type(prompt).__name__}"
            )
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer))):
            return Generation(self, self.request(prompt, **options))
        texts = [""] * len(prompt)
        self._make_room(len(prompt))
        requests = [self.request(each, **options) for each in prompt]
        for answer, _ in self.generator.run(requests):
            texts[answer.index] = answer.text
        return texts

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer the last of ``messages``; the options of `generate`, but ``max_tokens`` is None."""
        return self.answer(self.chat_prompt(messages), **options)

    def answer(self, prompt: Sequence[int], **options: Any) -> Generation:
        """What follows a prompt made by `chat_prompt`."""
        options.setdefault("max_tokens", None)
        if self.template_text == BUILT_IN["plain"]:
            options["stop"] = (*_texts(options.get("stop", ())), *PLAIN_STOP)
        return Generation(self, self.request(prompt, **options))

    def logits(self, ids: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """Logits float32 (len(ids) - first, vocab) of the tokens from ``first`` on, each for the next one."""
        parts = list(self.logit_parts(ids, first))
        return np.concatenate(parts) if parts else np.empty((0, self.config.vocab), np.float32)

    def logit_parts(self, ids: Sequence[int], first: int = 0) -> Iterator[NDArray[np.float32]]:
        """The same in parts of at most 64 MiB (32 tokens where that is more)."""
        return self.generator.logits(self._checked(ids), first)

    def request(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 128,
        stop: str | Iterable[str] = (),
        lookup: bool = False,
        ignore_end: bool = False,
        **sampling: Any,
    ) -> Request:
        """What `generate` runs. UsageError names an option that is wrong."""
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {max_tokens}")
        unknown = set(sampling) - set(Sampling.__dataclass_fields__)
        if unknown:
            known = ", ".join(("max_tokens", "stop", "lookup", "ignore_end", *Sampling.__dataclass_fields__))
            raise UsageError(f"unknown option {', '.join(sorted(unknown))}; there are {known}")
        ids = self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids and isinstance(prompt, str):
            start = next((i for i in (self.tokenizer.bos, self.tokenizer.eos) if i is not None), None)
            ids = [] if start is None else [start]
        self.generator.check(ids)
        return Request(
            prompt=tuple(ids),
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
            stop=_texts(stop),
            ignore_end=ignore_end,
            lookup=lookup,
        )

    # ---- Chat ----

    @property
    def template_text(self) -> str:
        """The model's chat template, or the built-in one that fits its vocabulary."""
        return self.template or BUILT_IN[template_for(self.tokenizer.ids)]

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the assistant is to speak."""
        tokenizer = self.tokenizer
        text = render_chat(
            self.template_text,
            messages,
            bos=tokenizer.token(tokenizer.bos),
            eos=tokenizer.token(tokenizer.eos),
        )
        ids = tokenizer.encode(text, special=False)
        if tokenizer.add_bos and tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
            ids.insert(0, tokenizer.bos)
        return ids

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        """``tokens`` as a list of ids, all of which the model knows."""
        if not all(isinstance(i, (int, np.integer)) for i in tokens):
            raise UsageError("token ids must be integers")
        ids = [int(i) for i in tokens]
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab), None)
        if wrong is not None:
            raise UsageError(
                f"token {wrong} is outside the model's vocabulary of {self.config.vocab}: does the tokenizer "
                "belong to the model?",
            )
        return ids


def _texts(texts: str | Iterable[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


# ---- What a model needs ----


def context_for(config: ModelConfig, asked: int | None) -> int:
    """The number of positions to make room for. BitgenError when the model does not have as many."""
    if asked is None:
        return min(CONTEXT_DEFAULT, config.context)
    if asked < 0 or asked > config.context:
        raise UsageError(f"the context must be 1 to {config.context} positions (0: all of them), not {asked}")
    return asked or config.context


def shapes_of(config: ModelConfig) -> tuple[Shape, ...]:
    """The distinct matrices a token is multiplied with, stacked as they run."""
    q, kv = config.q_rows, config.kv_rows
    shapes = (
        Shape(q + 2 * kv, config.hidden),
        Shape(config.hidden, q),
        Shape(2 * config.ffn, config.hidden),
        Shape(config.hidden, config.ffn),
    )
    return tuple(dict.fromkeys(shapes))


def tuned_shapes(config: ModelConfig, tuned: Iterable[Shape | None]) -> set[Shape]:
    """Those of the model's matrix shapes that are among the ``tuned`` ones of a library's kernels."""
    return set(shapes_of(config)) & {shape for shape in tuned if shape}


def preset_name(config: ModelConfig) -> str | None:
    """The preset with the same matrices, for `bitgen tune --model`."""
    from bitgen.config import load_models

    wanted = set(shapes_of(config))
    found = (m.alias for m in load_models() if {Shape(each.m, each.k) for each in m.matmuls} == wanted)
    return next(found, None)


def find_library(config: ModelConfig) -> Bundle | None:
    """The bundle in generated/ to run a model with on this CPU: tuned for its matrices before any other."""
    cpu = detect_cpu()
    bundles = [bundle for bundle in find_bundles(generated_dir())[0] if judge(bundle, cpu).accepted]

    def fitting(bundle: Bundle) -> int:
        return len(tuned_shapes(config, (kernel.shape for kernel in bundle.manifest.kernels)))

    most = max(map(fitting, bundles), default=0)
    return choose_bundle([bundle for bundle in bundles if fitting(bundle) == most], cpu)[0]


def open_engine(
    model: ModelFile | Weights,
    table: KernelTable,
    *,
    context: int,
    kv: KV = "f16",
    head: Head = "exact",
    batch: int = 1,
    progress: Callable[[str], None] | None = None,
) -> CompiledEngine:
    """The compiled step over a kernel library; the weights of a file are packed once and then mapped."""
    from bitgen.formats.weights import Weights
    from bitgen.inference.engine import Engine as CompiledEngine

    def packing(done: int, total: int) -> None:
        if progress:
            progress(f"packing weights for these kernels, once: {done / max(1, total):.0%}")

    weights, fingerprint = (
        (model, None) if isinstance(model, Weights) else (model.weights, model.fingerprint.key)
    )
    return CompiledEngine(
        weights,
        table,
        context=context,
        kv=kv,
        head=head,
        max_batch=batch,
        fingerprint=fingerprint,
        progress=packing,
    )
