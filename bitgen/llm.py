"""A model that can be asked for text, on any machine with a kernel library or a compiler: `bitgen.LLM`.

::

    llm = LLM("model.gguf", library="generated/3B-zen5")
    for piece in llm.generate("Once upon a time", max_tokens=64):
        print(piece, end="", flush=True)
    texts = llm.generate(["One prompt", "and another"], max_tokens=64)
    logits = llm.logits(llm.tokenizer.encode("Once"))           # float32 (tokens, vocab)
    for piece in llm.chat([{"role": "user", "content": "Hello"}]): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import UsageError
from bitgen.formats.config import ModelConfig, preset_name
from bitgen.formats.model_file import content_digest
from bitgen.formats.open import open_model
from bitgen.formats.pooling import Pooling, pooling_of
from bitgen.inference import FEW
from bitgen.inference.chat_template import BUILT_IN, PLAIN_STOP, Message, render_chat, template_for
from bitgen.inference.draft_model import DraftModel
from bitgen.inference.embedding import embed
from bitgen.inference.engine import OWN_ACTIVATIONS, Head, Kv
from bitgen.inference.generation import Generation
from bitgen.inference.grammar import Grammars
from bitgen.inference.kv_memory import Capacity
from bitgen.inference.opening import (
    config_of_kernels,
    context_for,
    open_engine,
    tuned_shapes,
)
from bitgen.inference.prompt_cache import KV_VERSION, restore, save
from bitgen.inference.protocol import EngineProtocol
from bitgen.inference.sampling import Sampling
from bitgen.inference.scheduler import Scheduler, Timings
from bitgen.inference.sequence import Request
from bitgen.inference.slots import common_start
from bitgen.inference.thread_race import open_table
from bitgen.library import library_for
from bitgen.progress import Report
from bitgen.runtime import Activations, KernelTable
from bitgen.tokenizer.data import TokenizerData
from bitgen.tokenizer.tokenizer import Tokenizer

_OPTIONS = ("max_tokens", "stop", "lookup", "ignore_end", "schema")  # beside those of Sampling
Prompt: TypeAlias = "str | Sequence[int]"


class LLM:
    """A model file with its tokenizer and an engine over a kernel library.

    ``library`` is a bundle, a .so, or None for what `library_for` finds or builds; ``threads`` None means as
    many as a tune, or a race at the first run, found the fastest, else one a physical core; ``context`` the
    number of positions (None: 4096 or what the model has, 0: all it has);
    ``batch`` the number of sequences there is room for from the start (a list of prompts makes more), or a
    ``capacity`` how many run at once, keep what they held, and the memory of them all.
    ``activations`` is what the inputs of matrices are quantised to (None: the model's own);
    ``draft`` is a small model of the same vocabulary, which drafts what the large one checks: the same text.
    ``from_disk`` runs a model larger than memory: each step reads what does not fit from its packed file.
    ``progress`` is called with a `Progress` of what takes long. BitgenError when anything does not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        library: str | Path | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv: Kv = "f16",
        head: Head = "auto",
        activations: Activations | None = None,
        batch: int = 1,
        capacity: Capacity | None = None,
        draft: str | Path | None = None,
        from_disk: bool = False,
        progress: Report | None = None,
    ) -> None:
        started = time.perf_counter()
        file = open_model(model)
        config = file.config
        positions = context_for(config, context)
        tokenizer = file.tokenizer_data  # before the long work: it may be missing
        self.activations = activations or OWN_ACTIVATIONS
        self.precision = (f"kv {kv}", *(["int16"] if self.activations == "int16" else []))
        self.pooling = pooling_of(file)
        self._content = partial(content_digest, file.path, KV_VERSION, *self.precision)
        found = library or library_for(config_of_kernels(file), progress)
        self.table = table = open_table(found, config, threads, progress, from_disk=from_disk)
        self._open = partial(
            open_engine,
            file,
            table,
            context=positions,
            kv=kv,
            head=head,
            activations=self.activations,
            from_disk=from_disk,
            progress=progress,
        )
        self._setup(self._open(batch=batch, capacity=capacity), config, tokenizer, capacity)
        if draft is not None:
            self._add_draft(draft, library, threads, self.scheduler.parallel, progress)
        self.scheduler.timings.load_s = time.perf_counter() - started
        self._note_untuned(table, model)
        if error := self.engine.head_error:
            self.notes.append(f"the int8 head differs from the exact one by {error:.2%} (root mean square)")

    @classmethod
    def over(cls, engine: EngineProtocol, config: ModelConfig, tokenizer: TokenizerData) -> LLM:
        """The same on an engine that is already there."""
        llm = cls.__new__(cls)
        llm._setup(engine, config, tokenizer)
        return llm

    def _setup(
        self,
        engine: EngineProtocol,
        config: ModelConfig,
        data: TokenizerData,
        capacity: Capacity | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.tokenizer = Tokenizer(data)
        self.scheduler = Scheduler(engine, self.tokenizer, capacity=capacity)
        self.template = data.chat_template
        self.thinking: bool | None = None  # for a template that asks (`knows_thinking`); None: its default
        self.notes = list(self.tokenizer.notes)  # what a user should know

    table: KernelTable | None = None  # None for `over`
    activations: Activations = "int8"  # of all prompts, steps and drafts that are checked
    precision: tuple[str, ...] = ()  # what makes other bits of the same model and text
    pooling: Pooling | None = None  # how a vector of a text is made, where the file says it
    _draft_table: KernelTable | None = None
    _drafts: DraftModel | None = None
    _content: Callable[[], str] = staticmethod(lambda: "")  # what the bytes of the KV cache depend on
    _open: Callable[..., EngineProtocol] | None = None  # makes the engine again, for another batch

    def _add_draft(
        self, path: str | Path, library: str | Path | None, threads: int | None, batch: int, progress: Any
    ) -> None:
        """Let a small model draft. UsageError when its vocabulary is another one."""
        file = open_model(path)
        same = file.config.vocab == self.config.vocab
        if not same or Tokenizer(file.tokenizer_data).ids != self.tokenizer.ids:
            raise UsageError(f"{path} has another vocabulary than the model that it is to draft for")
        positions = min(self.context, file.config.context)
        if positions < self.context:
            self.notes.append(f"the draft model has {positions} positions: behind them nothing is drafted")
        found = library or library_for(config_of_kernels(file), progress)
        self._draft_table = open_table(found, file.config, threads, progress)
        engine = open_engine(file, self._draft_table, context=positions, batch=batch, progress=progress)
        self.scheduler.drafts = self._drafts = DraftModel(Scheduler(engine))

    def _make_room(self, sequences: int) -> None:
        """An engine for as many sequences at once, up to what the kernels for small batches take."""
        wanted = min(sequences, FEW)
        if self._open is not None and wanted > self.engine.max_batch:
            timings = self.scheduler.timings
            self.engine = self._open(batch=wanted)
            self.scheduler = Scheduler(self.engine, self.tokenizer)
            self.scheduler.timings = timings

    def _note_untuned(self, table: KernelTable, model: str | Path) -> None:
        """Say how to tune when the library holds no kernel that was tuned for this model."""
        if not tuned_shapes(self.config, (kernel.shape for kernel in table.kernels)):
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
        self.engine.close()
        if self._drafts is not None:
            self._drafts.close()
        for table in (self.table, self._draft_table):
            if table is not None:
                table.close()

    @property
    def context(self) -> int:
        """Positions of a sequence."""
        return self.engine.context

    @property
    def timings(self) -> Timings:
        return self.scheduler.timings

    @property
    def memory(self) -> tuple[int, int, int]:
        """Bytes of packed weights, of the KV cache, and of work memory; known before they are used."""
        memory = self.engine.memory
        return memory.weights, memory.cache, memory.work

    @property
    def head_bytes(self) -> int:
        """Bytes of the LM head that is read from the mapped model file; 0 for one that was packed."""
        return self.engine.head_bytes

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
        full), ``stop`` (a text or several), ``lookup``, ``ignore_end``, ``schema`` (a JSON schema that the
        text follows; the extra json), and the fields of `Sampling` (temperature, top_k, top_p, min_p,
        repeat_penalty, repeat_last_n, frequency_penalty, presence_penalty, logit_bias, seed); ``logit_bias``
        may be a mapping of tokens.
        """
        if not hasattr(prompt, "__len__"):
            raise UsageError(
                f"a prompt is a text, token ids, or a list of these, not {type(prompt).__name__}"
            )
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer))):
            return Generation(self.scheduler, self.request(prompt, **options))
        self._make_room(len(prompt))
        return self.scheduler.texts([self.request(each, **options) for each in prompt])

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer the last of ``messages``; the options of `generate`, but ``max_tokens`` is None."""
        return self.answer(self.chat_prompt(messages), **options)

    def answer(self, prompt: Sequence[int], **options: Any) -> Generation:
        """What follows a prompt made by `chat_prompt`."""
        options.setdefault("max_tokens", None)
        if self.template_text == BUILT_IN["plain"]:
            options["stop"] = (*_texts(options.get("stop", ())), *PLAIN_STOP)
        return Generation(self.scheduler, self.request(prompt, **options))

    def logits(self, ids: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """Logits float32 (len(ids) - first, vocab) of the tokens from ``first`` on, each for the next one."""
        parts = list(self.logit_parts(ids, first))
        return np.concatenate(parts) if parts else np.empty((0, self.config.vocab), np.float32)

    def logit_parts(self, ids: Sequence[int], first: int = 0) -> Iterator[NDArray[np.float32]]:
        """The same in parts of at most 64 MiB (32 tokens where that is more)."""
        return self.scheduler.score(self._checked(ids), first)

    def request(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 128,
        stop: str | Iterable[str] = (),
        lookup: bool = False,
        ignore_end: bool = False,
        schema: Any = None,
        **sampling: Any,
    ) -> Request:
        """What `generate` runs. UsageError names an option that is wrong."""
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {max_tokens}")
        unknown = set(sampling) - set(Sampling.__dataclass_fields__)
        if unknown:
            known = ", ".join((*_OPTIONS, *Sampling.__dataclass_fields__))
            raise UsageError(f"unknown option {', '.join(sorted(unknown))}; there are {known}")
        bias = sampling.get("logit_bias", ())
        sampling["logit_bias"] = tuple(bias.items() if isinstance(bias, Mapping) else bias)
        self._checked([token for token, _ in sampling["logit_bias"]])
        ids = self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids and isinstance(prompt, str):
            start = next((i for i in (self.tokenizer.bos, self.tokenizer.eos) if i is not None), None)
            ids = [] if start is None else [start]
        self.scheduler.check(ids)
        return Request(
            prompt=tuple(ids),
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
            stop=_texts(stop),
            ignore_end=ignore_end and schema is None,
            lookup=lookup,
            grammar=None if schema is None else self.grammars.json_schema(schema),
        )

    @cached_property
    def grammars(self) -> Grammars:
        """Grammars of this model's tokens. BitgenError without llguidance."""
        return Grammars(self.tokenizer, self.config.vocab)

    def limit_stall(self, seconds: float) -> None:
        """Compute prompts in parts that take no longer, with steps of running texts between them."""
        self.scheduler.max_stall_s = seconds
        if self._drafts is not None:
            self._drafts.limit_stall(seconds)

    def pin(self, system: str) -> int:
        """Compute a system prompt and keep it for every chat that starts with it; the number of its tokens.

        BitgenError when the chat template takes none, or there is no room (`Scheduler.pin`).
        """
        asked = ("a", "b")  # what chats have in common before the user's first word
        first, second = (
            self.chat_prompt([{"role": "system", "content": system}, {"role": "user", "content": text}])
            for text in asked
        )
        tokens = first[: common_start(first, second)]
        self.scheduler.pin(tokens)
        return len(tokens)

    # ---- Vectors ----

    def embed(self, texts: Iterable[str], pooling: Pooling | None = None) -> Iterator[NDArray[np.float32]]:
        """Of each text a vector float32 (hidden) of length 1: what the model makes of it as a whole.

        ``pooling``: the state of the last token ("last"), or of all on average ("mean"); None: as the model's
        file says, else the last. A text gives the same bits whatever the others are.
        """
        ids = [self._checked(self.tokenizer.encode(text)) for text in texts]
        return embed(self.scheduler, ids, pooling or self.pooling or "last")

    # ---- Prompt cache files ----

    def save_cache(self, path: str | Path, messages: Sequence[Message] = ()) -> int:
        """Write what the KV cache holds, and maybe a conversation, to a file; the number of tokens."""
        return save(Path(path), self.scheduler, self._content(), [dict(each) for each in messages])

    def load_cache(self, path: str | Path) -> list[dict[str, str]]:
        """Hold what a file holds, so that a prompt that starts like it costs only the rest; its conversation.

        FileError when it is of another model, damaged, or cannot be read.
        """
        return restore(Path(path), self.scheduler, self._content())

    # ---- Chat ----

    @property
    def template_text(self) -> str:
        """The model's chat template, or the built-in one that fits its vocabulary."""
        return self.template or BUILT_IN[template_for(self.tokenizer.ids)]

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        thinking: bool | None = None,
        *,
        begun: str = "",
    ) -> list[int]:
        """The ids of a conversation, up to where the assistant is to speak, or to go on after ``begun``.

        ``tools`` and ``thinking``: see `render_chat`; None is as ``LLM.thinking`` says.
        """
        tokenizer = self.tokenizer
        text = render_chat(
            self.template_text,
            messages,
            tools=tools,
            bos=tokenizer.token(tokenizer.bos),
            eos=tokenizer.token(tokenizer.eos),
            thinking=self.thinking if thinking is None else thinking,
        )
        ids = tokenizer.encode(text + begun, special=False)
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
