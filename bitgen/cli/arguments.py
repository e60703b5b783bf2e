"""What commands share: arguments that several of them have, opening a model, the timings at the end."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitgen.energy import Meter
    from bitgen.inference.kv_memory import Capacity
    from bitgen.inference.scheduler import Timings
    from bitgen.llm import LLM


MODEL_HELP = "a .gguf file, a Hugging Face folder, hf:owner/repo[:file], a name of `bitgen list`"
PRESET_HELP = "a preset (see `bitgen models`), a YAML file or a model file"


def add_compiler(parser: argparse.ArgumentParser, only: str = "") -> None:
    """--cc; ``only`` tells when it counts ("with --kernels: ")."""
    parser.add_argument("--cc", help=f"{only}C compiler: gcc, clang, zig or a path")


def add_logs(parser: argparse.ArgumentParser, only: str = "") -> None:
    """--logs; ``only`` as for `add_compiler`."""
    parser.add_argument("--logs", type=Path, help=f"{only}folder of the records (tune_logs/)")


def add_spaces(parser: argparse.ArgumentParser, isas: str, regimes: str = "all") -> None:
    """--isa, --family and --regime, each of which may be given several times."""
    again = "; may be given again"
    parser.add_argument("--isa", action="append", default=[], help=f"ISA level (default: {isas}){again}")
    parser.add_argument(
        "--family",
        action="append",
        default=[],
        help=f"i2s, tl1, tl2, t5 or tl5 (default: all), or of weights that are not ternary q1, t3, t4, q4 or "
        f"q4m{again}",
    )
    parser.add_argument(
        "--regime", action="append", default=[], help=f"n1, small or large (default: {regimes}){again}"
    )


def add_library(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--library", type=Path, help="kernel library: a bundle or a .so (default: the best here)"
    )


def add_head(parser: argparse._ActionsContainer, default: str, text: str) -> None:
    choices = ("auto", "full", "screened", "q8", "exact")
    parser.add_argument("--head", choices=choices, default=default, help=f"{text} ({default})")


def add_kv(parser: argparse._ActionsContainer) -> None:
    choices = ("f16", "f32", "q8", "q4")
    parser.add_argument("--kv", choices=choices, default="f16", help="keys and values (f16)")


def add_from_disk(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="run a model larger than memory: each step reads from its packed file what does not fit",
    )


def add_activations(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--activations",
        choices=("int8", "int16"),
        help="what inputs of matrices are rounded to, in prompts and steps alike (default: the model's own)",
    )


def add_model(parser: argparse.ArgumentParser, *, context: int | None = None, head: str = "auto") -> None:
    """The model and how it runs. ``context`` replaces the default of -c, ``head`` is that of --head."""
    group = parser.add_argument_group("the model")
    group.add_argument("-m", "--model", required=True, help=MODEL_HELP)
    group.add_argument(
        "-t", "--threads", type=int, help="threads (default: one a core, or what a first race found)"
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=context,
        dest="context",
        metavar="N",
        help="positions of the context; 0: all the model has"
        + (f" ({context})" if context else " (4096, or what the model has)"),
    )
    add_kv(group)
    add_activations(group)
    add_head(
        group,
        head,
        "full (once exact): the output matrix as the file has it; screened: the same bits, but the best "
        "tokens found by way of int8 rows, half the bytes; auto: screened where the matrix is large; q8: "
        "int8 rows alone, slightly other logits",
    )
    add_library(group)
    add_from_disk(group)


def add_energy(parser: argparse._ActionsContainer) -> None:
    """--energy and --energy-command; `metered` opens what they name."""
    parser.add_argument(
        "--energy",
        action="store_true",
        help="joules a token, where this machine has a sensor that counts them",
    )
    parser.add_argument(
        "--energy-command",
        metavar="COMMAND",
        help="a program and its arguments that print joules or watts (1234.5 J, 35.2 W), in its place",
    )


@contextmanager
def metered(args: argparse.Namespace) -> Iterator[Meter | None]:
    """The meter that the arguments ask for; None, and a line that says why, where there is no sensor."""
    from bitgen.energy import Meter, NoSensorError, open_source

    meter = None
    if args.energy or args.energy_command is not None:
        try:
            meter = Meter(open_source(args.energy_command))
        except NoSensorError as error:
            print(f"bitgen: energy: not available ({error.message})", file=sys.stderr)
    with meter or nullcontext():
        yield meter


def add_draft(parser: argparse.ArgumentParser) -> None:
    """--draft-model, of the commands that make texts."""
    parser.add_argument(
        "-md",
        "--draft-model",
        metavar="MODEL",
        help="a small model of the same vocabulary that drafts tokens: the same text, sooner where it pays",
    )


def add_sampling(parser: argparse.ArgumentParser, *, tokens: int) -> None:
    """How tokens are chosen; names and defaults are llama.cpp's."""
    group = parser.add_argument_group("the text")
    group.add_argument(
        "-n",
        "--n-predict",
        "--predict",
        type=int,
        default=tokens,
        metavar="N",
        help=f"tokens at most; -1: until the model ends or the context is full ({tokens})",
    )
    group.add_argument(
        "--temp", "-temp", "--temperature", type=float, default=0.8, help="0: the likeliest (0.8)"
    )
    group.add_argument("--top-k", type=int, default=40, metavar="N", help="0: all (40)")
    group.add_argument("--top-p", type=float, default=0.95, metavar="P", help="1: all (0.95)")
    group.add_argument("--min-p", type=float, default=0.05, metavar="P", help="0: all (0.05)")
    group.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="1: none (1.0)")
    group.add_argument("--repeat-last-n", type=int, default=64, metavar="N", help="-1: the whole text (64)")
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="for each time it was said (0.0)"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="for what was said at all (0.0)"
    )
    group.add_argument(
        "-l",
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID+X",
        help="add X to the logit of a token (ID-X: take it off); repeatable",
    )
    group.add_argument(
        "-s", "--seed", type=int, default=-1, help="the same seed gives the same text (-1: any)"
    )
    group.add_argument(
        "--stop",
        "-r",
        "--reverse-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT",
    )
    group.add_argument(
        "-j",
        "--json-schema",
        metavar="SCHEMA",
        help="a JSON schema that the text follows, or @FILE with one ({}: any JSON); the extra json",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on where the model wants to end")
    group.add_argument(
        "--lookup", action="store_true", help="draft tokens from the text so far: the same text, often sooner"
    )
    group.add_argument("--no-perf", action="store_true", help="no timings at the end")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `LLM.generate`. UsageError for a value that is out of range."""
    from bitgen.errors import UsageError
    from bitgen.inference.sampling import Sampling

    if args.n_predict == 0:
        raise UsageError("-n must be 1 or more, or -1 for no limit")
    sampling = Sampling(
        temperature=args.temp,
        top_k=max(0, args.top_k),
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        logit_bias=tuple(map(_bias, args.logit_bias)),
        seed=None if args.seed < 0 else args.seed,
    )
    return {
        **asdict(sampling),
        "max_tokens": None if args.n_predict < 0 else args.n_predict,
        "stop": args.stop,
        "ignore_end": args.ignore_eos,
        "lookup": args.lookup,
        "schema": None if args.json_schema is None else _schema(args.json_schema),
    }


def _schema(text: str) -> Any:
    """JSON, or that of a file."""
    from bitgen.errors import FileError, UsageError

    try:
        return json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except OSError as error:
        raise FileError(f"cannot read {text[1:]}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--json-schema is no JSON: {error}") from None


def _bias(text: str) -> tuple[int, float]:
    """The token and the number of ID+X or ID-X."""
    from bitgen.errors import UsageError

    found = re.fullmatch(r"(\d+)([+-]\d+(?:\.\d*)?)", text)
    if not found:
        raise UsageError(f"--logit-bias is a token id, + or -, and a number, as in 15043-1.5, not {text!r}")
    return int(found[1]), float(found[2])


def open_llm(args: argparse.Namespace, *, capacity: Capacity | None = None) -> LLM:
    """The model of the arguments, for one sequence or a ``capacity``; its notes go to standard error."""
    # numpy's BLAS starts threads when it is imported, 60 ms, and no model is multiplied by it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from bitgen.cli.progress import ProgressBar
    from bitgen.llm import LLM

    with ProgressBar() as line:
        llm = LLM(
            args.model,
            library=args.library,
            threads=args.threads,
            context=args.context,
            kv=args.kv,
            head=args.head,
            activations=args.activations,
            capacity=capacity,
            draft=getattr(args, "draft_model", None),
            from_disk=args.from_disk,
            progress=line.show,
        )
    for note in llm.notes:
        print(f"bitgen: {note}", file=sys.stderr)
    return llm


def load_cache(llm: LLM, path: Path) -> None:
    """Start from a prompt cache file where there is one; a note where it cannot be used."""
    from bitgen.errors import FileError

    if path.exists():
        try:
            llm.load_cache(path)
        except FileError as error:
            print(f"bitgen: {error.message}: it will be written anew", file=sys.stderr)


def energy_lines(meter: Meter | None, timings: Timings) -> list[str]:
    """Joules a token of prompts and of decoding, or why they are not known; nothing without a meter."""
    if meter is None:
        return []
    if meter.error:
        return [f"{'energy':>17} = not available ({meter.error})"]
    watts = meter.idle_watts
    lines = [f"{'energy':>17} = {meter.scope}" + ("" if watts is None else f", {watts:.2f} W idle")]
    for phase, count in (("prompt", timings.prompt_tokens), ("decode", timings.step_tokens)):
        spent = meter.spent.get(phase)
        if not spent or not count:
            continue
        text = f"{f'{phase} energy':>17} = "
        if not meter.enough(phase):
            lines.append(text + f"not available ({1e3 * spent.seconds:.0f} ms are too short for the sensor)")
            continue
        without = "" if watts is None else f", {spent.a_token(count, watts):.4g} without idle"
        lines.append(
            text
            + f"{spent.joules:10.2f} J  / {count:5d} tokens ({spent.a_token(count):.4g} J per token{without})"
        )
    return lines


def print_timings(llm: LLM, seed: int | None = None, meter: Meter | None = None) -> None:
    """The lines that llama.cpp prints at the end, on standard error."""

    def line(name: str, seconds: float, count: int, noun: str) -> str:
        each = (
            f"{1e3 * seconds / count:9.2f} ms per token, {count / max(seconds, 1e-9):9.2f} tokens per second"
        )
        return f"{name:>17} = {1e3 * seconds:10.2f} ms / {count:5d} {noun:<6} ({each})"

    t = llm.timings
    lines = [f"{'load time':>17} = {1e3 * t.load_s:10.2f} ms"]
    if t.prompt_tokens:
        lines.append(line("prompt eval time", t.prompt_s, t.prompt_tokens, "tokens"))
    if t.step_tokens:
        lines.append(line("eval time", t.step_s, t.step_tokens, "runs"))
    if t.sampled:
        lines.append(line("sampling time", t.sample_s, t.sampled, "runs"))
    total = t.prompt_s + t.step_s + t.sample_s
    lines.append(f"{'total time':>17} = {1e3 * total:10.2f} ms / {t.prompt_tokens + t.step_tokens:5d} tokens")
    if t.drafted:
        share = t.accepted / t.drafted
        lines.append(f"{'drafts':>17} = {t.accepted} of {t.drafted} accepted ({share:.0%})")
    weights, cache, work = (part / 2**20 for part in llm.memory)
    head = f"{llm.head_bytes / 2**20:.2f} MiB head, " if llm.head_bytes else ""
    lines.append(
        f"{'memory':>17} = {weights:10.2f} MiB weights, {head}{cache:.2f} MiB for {llm.context} positions, "
        f"{work:.2f} MiB work"
    )
    if seed is not None:
        lines.append(f"{'seed':>17} = {seed}")
    lines += energy_lines(meter, t)
    print("", *(f"bitgen: {text}" for text in lines), sep="\n", file=sys.stderr)
