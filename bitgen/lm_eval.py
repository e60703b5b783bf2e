"""bitgen as a model of lm-evaluation-harness.

::

    python -m bitgen.lm_eval run --model bitgen --model_args pretrained=tiny --tasks arc_easy

is the harness' own command line, with one more model. Importing this module registers it, for programs that
call ``lm_eval.simple_evaluate(model="bitgen", ...)``. A context that several choices share, or few-shot
examples that several questions share, are computed once. Needs the extra lm-eval.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from bitgen.errors import BitgenError, UsageError
from bitgen.inference.chat_template import BUILT_IN, render_chat
from bitgen.inference.likelihood import likelihoods
from bitgen.llm import LLM

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    missing = BitgenError(f"{error.name} is not installed: pip install 'bitgen[lm-eval]'")
    if __name__ == "__main__":
        sys.exit(f"bitgen: {missing.message}")
    raise missing from None

_MAX_TOKENS = 256  # of a generated text, where a task does not say
_SLOTS = 8
_DEFAULT_DEVICE = "cuda:0"  # what the harness' command line hands on where nobody said anything
_DRAWN = ("temperature", "top_p", "top_k", "min_p")


@register_model("bitgen")
class BitgenLM(TemplateLM):
    """A model file on bitgen's engine.

    ``pretrained`` is what `bitgen.LLM` takes as its model; ``library``, ``threads``, ``kv`` and ``head`` are
    its options, ``max_length`` its context; ``batch_size`` how many choices or texts run side by side (auto:
    8); ``add_bos_token`` overrides whether texts begin with BOS. ``device`` is cpu.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        library: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        kv: Any = "f16",
        head: Any = "full",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(f"--model bitgen has no argument {', '.join(sorted(unknown))}")
        if device not in (None, "cpu", _DEFAULT_DEVICE):
            raise UsageError(f"bitgen runs on the CPU, not on {device}")
        auto = batch_size is None or str(batch_size).startswith("auto")
        slots = min(_SLOTS if auto else int(batch_size or 1), max_batch_size or 64)
        self.llm = LLM(
            pretrained,
            library=library,
            threads=threads,
            context=max_length,
            kv=kv,
            head=head,
            batch=slots,
        )
        self._add_bos = self.llm.tokenizer.starts_with_bos if add_bos_token is None else add_bos_token

    # ---- Tokens ----

    @property
    def max_length(self) -> int:
        """Positions of a sequence."""
        return self.llm.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. UsageError when the model has none."""
        tokenizer = self.llm.tokenizer
        found = tokenizer.eos if tokenizer.eos is not None else tokenizer.bos
        if found is None:
            raise UsageError("the model's tokenizer has neither BOS nor EOS: give texts a context")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without a context: BOS, or else EOS."""
        bos = self.llm.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; with BOS where the model wants it, unless the text spells it out itself."""
        del kwargs
        tokenizer = self.llm.tokenizer
        ids = tokenizer.encode(string, special=False)
        wanted = self._add_bos if add_special_tokens is None else add_special_tokens and self._add_bos
        if wanted and tokenizer.bos is not None and (add_special_tokens or ids[:1] != [tokenizer.bos]):
            ids.insert(0, tokenizer.bos)
        return ids

    # ---- Likelihoods ----

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        most, found = self.max_length + 1, [(0.0, False)] * len(requests)
        asked = []
        for index, (_, context, ending) in enumerate(requests):
            kept = tuple((context + ending)[-most:])  # cut at its start, as the harness' own models cut
            asked.append((kept[: -len(ending)], kept[-len(ending) :], index))
        asked.sort(key=lambda each: each[:1])
        with tqdm(total=len(asked), desc="Log-likelihoods", disable=disable_tqdm) as bar:
            for context, group in itertools.groupby(asked, key=lambda each: each[0]):
                of = list(group)
                for (_, _, index), each in zip(
                    of, likelihoods(self.llm.scheduler, context, [e for _, e, _ in of]), strict=True
                ):
                    found[index] = (each.logprob, each.greedy)
                    text = requests[index][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, found[index])
                    bar.update()
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context that predict each token once."""
        sums = []
        for (text,) in tqdm([each.args for each in requests], desc="Texts", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    # ---- Texts ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop text, the end, or max_gen_toks."""
        slots = self.llm.engine.max_batch
        asked = [each.args for each in requests]
        texts: list[str] = []
        with tqdm(total=len(asked), desc="Texts", disable=disable_tqdm) as bar:
            for at in range(0, len(asked), slots):
                part = [self._request(*each) for each in asked[at : at + slots]]
                made = self.llm.scheduler.texts([request for request, _ in part])
                for (context, options), (_, stops), text in zip(
                    asked[at : at + slots], part, made, strict=True
                ):
                    texts.append(postprocess_generated_text(text, stops, None))
                    self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
                bar.update(len(part))
        return texts

    def _request(self, context: str, options: dict[str, Any]) -> tuple[Any, list[str]]:
        """What the scheduler runs, and the stop texts."""
        kwargs = normalize_gen_kwargs(options, _MAX_TOKENS)
        stops = handle_stop_sequences(kwargs.pop("until", None), eos=None)
        tokens = int(kwargs["max_gen_toks"])
        room = self.max_length - tokens
        if room < 1:
            raise UsageError(f"{tokens} tokens of text do not fit into {self.max_length} positions")
        sampling = {name: kwargs[name] for name in _DRAWN if kwargs.get(name) is not None}
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
        drawn = {**plain, **sampling} if kwargs.get("do_sample") else {**plain, "temperature": 0.0}
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return self.llm.request(ids, max_tokens=tokens, stop=stops, **drawn), stops

    # ---- Chat ----

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its cache of requests by."""
        return f"bitgen-{len(self.llm.tokenizer.ids)}-{self.llm.config.name}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that `apply_chat_template` uses: the model's, or a built-in one by its name."""
        if isinstance(chat_template, str) and chat_template not in BUILT_IN:
            raise UsageError(f"no chat template {chat_template!r}: there are {', '.join(BUILT_IN)}")
        if isinstance(chat_template, str):
            self.llm.template = BUILT_IN[chat_template]
        return self.llm.template_text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; ``add_generation_prompt`` ends it where the assistant is to speak."""
        tokenizer = self.llm.tokenizer
        return render_chat(
            self.llm.template_text,
            chat_history,
            bos=tokenizer.token(tokenizer.bos),
            eos=tokenizer.token(tokenizer.eos),
            answer=add_generation_prompt,
        )


def main() -> int:
    """The harness' command line; BitgenErrors are one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except BitgenError as error:
        print(f"bitgen: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
