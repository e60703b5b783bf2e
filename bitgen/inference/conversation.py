"""A chat that goes on: its messages, and what happens when they no longer fit into the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bitgen.errors import UsageError
from bitgen.inference.chat_template import Message

if TYPE_CHECKING:
    from bitgen.inference.generation import Generation
    from bitgen.llm import LLM

_ROOM = 256  # tokens that are kept free for an answer, at most a quarter of the context


class Conversation:
    """Messages with a model; what the engine holds of earlier turns is not computed again.

    When a conversation fills the context, its oldest turns are left out, never the system message;
    ``forgotten`` counts the messages that the model no longer sees.
    """

    def __init__(self, llm: LLM, system: str | None = None, **options: Any) -> None:
        self.llm = llm
        self.options = options
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.forgotten = 0

    def say(self, text: str) -> Generation:
        """Add a message of the user; iterate over the answer, then call `heard` with it.

        UsageError when the message alone does not fit; the conversation then is as before.
        """
        kept, ids, forgotten = self._fit([*self.messages, {"role": "user", "content": text}])
        answer = self.llm.answer(ids, **self.options)
        self.messages, self.forgotten = kept, self.forgotten + forgotten
        return answer

    def heard(self, answer: Generation) -> None:
        """Remember the answer, or the part that came before it was stopped."""
        if answer.text.strip():
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            self.messages.pop()  # nothing was said: the question is as if never asked

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[: self._system()]
        self.forgotten = 0

    def load(self, messages: Sequence[Message]) -> None:
        """Go on with another conversation."""
        self.messages, self.forgotten = list(messages), 0

    def _system(self) -> int:
        return 1 if self.messages and self.messages[0]["role"] == "system" else 0

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int], int]:
        """The messages that fit with room for an answer, their ids, and how many had to go."""
        context = self.llm.context
        room = min(_ROOM, context // 4)
        head = 1 if messages[0]["role"] == "system" else 0
        forgotten = 0
        while True:
            ids = self.llm.chat_prompt(messages)
            turns = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
            if len(ids) + room <= context or not turns:
                break
            forgotten += turns[0] - head
            messages = [*messages[:head], *messages[turns[0] :]]
        if len(ids) >= context:
            raise UsageError(
                f"the message has {len(ids)} tokens and the context holds {context}: shorten it or ask for a "
                "larger context (-c)",
            )
        return messages, ids, forgotten
