"""Talk with a model. Ctrl-C stops an answer, Ctrl-D or /exit ends the chat, /help shows the commands."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import add_draft, add_model, add_sampling, open_llm, print_timings, sampling_options
from bitgen.errors import BitgenError, FileError, UsageError

if TYPE_CHECKING:
    from bitgen.inference.conversation import Conversation
    from bitgen.llm import LLM

_HELP = """\
/clear    forget the conversation
/save FILE, /load FILE    keep the conversation and what was computed of it; go on with it
/help     show this
/exit     end the chat (also Ctrl-D)
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_draft(parser)
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="the system message")
    parser.add_argument("-p", "--prompt", help="the first message of the user")
    add_sampling(parser, tokens=-1)
    parser.add_argument(
        "--chat-template", metavar="NAME", help="chatml, llama3, plain, or a file (default: the model's own)"
    )
    parser.add_argument(
        "--thinking", choices=("on", "off"), help="of a model that can think before it answers (its default)"
    )


def run(args: argparse.Namespace) -> int:
    return converse(args, system=args.system_prompt, first=args.prompt)


def converse(args: argparse.Namespace, system: str | None = None, first: str | None = None) -> int:
    """The loop of questions and answers; off a terminal its code is that of the last message that failed."""
    from bitgen.inference.conversation import Conversation

    options = sampling_options(args)
    name = getattr(args, "chat_template", None)
    template = _template(name) if name else None
    with open_llm(args) as llm:
        if template is not None:
            llm.template = template
        elif not llm.template:
            print("bitgen: the file has no chat template: using one that fits its tokens", file=sys.stderr)
        if wanted := getattr(args, "thinking", None):
            _set_thinking(llm, wanted == "on")
        talk = Conversation(llm, system, **options)
        lines = _Lines()
        code = 0
        message = first if first is not None else lines.read()
        while message is not None:
            command = message.strip()
            if command in ("/exit", "/quit"):
                break
            if command == "/clear":
                talk.clear()
            elif command.partition(" ")[0] in ("/save", "/load"):
                _keep(talk, *command.split(None, 1))
            elif command == "/help":
                print(_HELP, file=sys.stderr)
            elif command:
                try:
                    _answer(talk, message)
                except BitgenError as error:  # a message that does not fit; the chat goes on
                    print(f"bitgen: {error.message}", file=sys.stderr)
                    code = 0 if lines.on_terminal else error.exit_code
            message = lines.read()
        if not args.no_perf:
            print_timings(llm)
    return code


def _answer(talk: Conversation, message: str) -> None:
    forgotten = talk.forgotten
    answer = None
    try:
        answer = talk.say(message)
        if talk.forgotten > forgotten:
            count = talk.forgotten - forgotten
            print(
                f"bitgen: the context of {talk.llm.context} positions is full: the {count} oldest messages "
                "are left out from here on (/clear starts over)",
                file=sys.stderr,
            )
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except BitgenError:
        if answer is not None:
            print(flush=True)
            talk.heard(answer)
        raise
    print(flush=True)
    if answer is None:  # stopped before the message was part of the conversation
        return
    if answer.finish == "context":
        print(
            f"bitgen: the answer was cut: the context of {talk.llm.context} positions is full"
            f"{talk.llm.context_hint}",
            file=sys.stderr,
        )
    talk.heard(answer)


def _keep(talk: Conversation, command: str, path: str = "") -> None:
    """Save or load a conversation."""
    if not path:
        print(f"bitgen: {command} needs a file", file=sys.stderr)
        return
    file = Path(path).expanduser()
    try:
        if command == "/save":
            tokens = talk.llm.save_cache(file, talk.messages)
            print(f"bitgen: {len(talk.messages)} messages, {tokens} tokens in {file}", file=sys.stderr)
        else:
            talk.load(talk.llm.load_cache(file))
            print(f"bitgen: {len(talk.messages)} messages from {file}", file=sys.stderr)
    except BitgenError as error:
        print(f"bitgen: {error.message}", file=sys.stderr)


def _set_thinking(llm: LLM, on: bool) -> None:
    from bitgen.inference.chat_template import knows_thinking

    if not knows_thinking(llm.template_text):
        raise UsageError("the model's chat template knows no thinking: leave --thinking out")
    llm.thinking = on


class _Lines:
    """Messages from standard input: with a prompt and editing on a terminal, one a line elsewhere."""

    def __init__(self) -> None:
        self.on_terminal = sys.stdin.isatty()
        if self.on_terminal:
            with contextlib.suppress(ImportError):  # without it there is no editing
                import readline  # noqa: F401 - input() uses it

    def read(self) -> str | None:
        """The next message; None at the end of the input, or after Ctrl-C twice."""
        lines: list[str] = []
        interrupted = False
        while True:
            try:
                line = input(("... " if lines else "> ") if self.on_terminal else "")
            except UnicodeDecodeError as error:
                raise FileError(f"the message is not {error.encoding.upper()} text: {error.reason}") from None
            except EOFError:
                if self.on_terminal:
                    print(file=sys.stderr)
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                if interrupted or not self.on_terminal:
                    return None
                print("\n(Ctrl-C again or Ctrl-D ends the chat)", file=sys.stderr)
                lines, interrupted = [], True
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])


def _template(name: str) -> str:
    from bitgen.inference.chat_template import BUILT_IN

    if name in BUILT_IN:
        return BUILT_IN[name]
    file = Path(name)
    if not file.is_file():
        raise UsageError(f"no chat template {name!r}: give {', '.join(BUILT_IN)} or a file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{file} is not UTF-8 text: {error.reason}") from error
