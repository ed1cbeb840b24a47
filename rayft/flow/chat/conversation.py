"""A conversation with a model, or with two that are asked the same: what was said, and how answers come."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType

from rayft.errors import ConfigError, RayftError
from rayft.flow.chat.models import ChatModel, Message, Options

__all__ = ["Conversation", "Piece", "Side"]

STOPPED = "(stopped)"


@dataclass
class Side:
    """One model and its conversation."""

    model: ChatModel
    system: str | None
    messages: list[Message] = field(default_factory=list)
    content: str = ""
    """The answer so far."""
    reasoning: str = ""
    note: str = ""
    """Why there is no more of it."""
    error: RayftError | None = None
    """What ended it, if that was an error."""

    def __post_init__(self) -> None:
        """Begin."""
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, question: str) -> None:
        """Add a question."""
        self.messages.append({"role": "user", "content": question})
        self.content = self.reasoning = self.note = ""
        self.error = None

    def keep(self) -> None:
        """Keep the answer, as far as it came; without one, the question was not asked."""
        if self.content:
            self.messages.append({"role": "assistant", "content": self.content})
        else:
            self.messages.pop()

    async def answer(self, options: Options, show: Callable[[Side, str, str], None]) -> None:
        """Answer the last question, and show each part as it comes."""
        try:
            async with aclosing(self.model.answer(self.messages, options)) as parts:
                async for part in parts:
                    self.content += part.content
                    self.reasoning += part.reasoning
                    show(self, part.content, part.reasoning)
        except RayftError as error:
            self.error = error
            self.note = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            self.note = STOPPED
            raise


@dataclass(frozen=True)
class Piece:
    """A piece of an answer."""

    side: int
    """Which model it is from: 0, or 1 for the one beside it."""
    model: str
    """Name of that model."""
    content: str
    """Text of the answer; empty while the model thinks."""
    reasoning: str = ""
    """Text that the model thinks before its answer; it is no part of the conversation."""


class Conversation:
    """A conversation with one model, or with two that are asked the same; each remembers its own answers.

    It is a context manager. The models stay in memory until it is closed.
    """

    def __init__(
        self,
        models: Sequence[ChatModel],
        options: Options,
        system: str | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin a conversation.

        Args:
            models: one or two.
            options: how answers are generated.
            system: message at the beginning, which the models follow.
            close: frees the models.
        """
        self.models: tuple[str, ...] = tuple(model.name for model in models)
        """Names of the models."""
        self._sides = [Side(model, system) for model in models]
        self._options = options
        self._answering: Generator[Piece, None, None] | None = None
        # Also when the conversation is forgotten without being closed, or the process ends.
        self._closing = weakref.finalize(self, close)

    @property
    def messages(self) -> tuple[list[Message], ...]:
        """The messages so far, for each model: role and content."""
        return tuple([dict(message) for message in side.messages] for side in self._sides)

    def ask(self, question: str) -> Iterator[Piece]:
        """Ask a question, and return an iterator over the pieces of the answers as they come.

        Two models answer at the same time. When the iteration is left early, or another question is asked,
        the answers stop, and are kept as far as they came.

        Raises:
            ConfigError: if the question is empty or no text, or the conversation is closed.
            RayftError: during the iteration, if a model can't answer. All models then forget the question.
        """
        if not self._closing.alive:
            raise ConfigError("this conversation is closed; begin another one")
        if not isinstance(question, str):
            raise ConfigError(f"the question must be str, not {question!r}")
        if not question.strip():
            raise ConfigError("the question is empty; write something to answer")
        self.stop()
        self._answering = self._pieces(question)
        return self._answering

    def answers(self, question: str) -> tuple[str, ...]:
        """Ask a question, and return the whole answer of each model; errors are those of `ask`."""
        for _ in self.ask(question):
            pass
        return tuple(side.content for side in self._sides)

    def stop(self) -> None:
        """Stop the answers to the last question, if they have not ended, and keep what has come of them."""
        if self._answering is not None:
            self._answering.close()

    def reset(self) -> None:
        """Begin again: forget all questions and answers."""
        self.stop()
        for side in self._sides:
            side.reset()

    def close(self) -> None:
        """End the conversation, and free the models."""
        self.stop()
        self._closing()

    def __enter__(self) -> Conversation:
        """Return the conversation."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _pieces(self, question: str) -> Generator[Piece, None, None]:
        ready: SimpleQueue[Piece | None] = SimpleQueue()

        def show(side: Side, content: str, reasoning: str) -> None:
            if content or reasoning:
                ready.put(Piece(self._sides.index(side), side.model.name, content, reasoning))

        for side in self._sides:
            side.ask(question)
        background = _Background(self._sides, self._options, show, done=lambda: ready.put(None))
        try:
            while (piece := ready.get()) is not None:
                yield piece
        finally:
            background.stop()
            failed = next((side.error for side in self._sides if side.error), None)
            for side in self._sides:
                if failed:
                    side.messages.pop()
                else:
                    side.keep()
        if failed:
            raise failed
        background.check()


class _Background:
    """Lets all sides answer in a thread of its own; in a notebook the caller's has a loop that is running."""

    def __init__(
        self,
        sides: Sequence[Side],
        options: Options,
        show: Callable[[Side, str, str], None],
        done: Callable[[], None],
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._done = done
        self._task = self._loop.create_task(self._answer(sides, options, show))
        self._thread = threading.Thread(target=self._run, name="rayft-chat", daemon=True)
        self._thread.start()

    async def _answer(
        self, sides: Sequence[Side], options: Options, show: Callable[[Side, str, str], None]
    ) -> None:
        await asyncio.gather(*(side.answer(options, show) for side in sides))

    def _run(self) -> None:
        try:
            # `check` raises what it has raised.
            with suppress(asyncio.CancelledError, Exception):
                self._loop.run_until_complete(self._task)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
            self._done()

    def stop(self) -> None:
        """Cancel what has not ended, and wait for the thread."""
        # The loop is closed if all has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def check(self) -> None:
        """Raise the error that ended it, which is a mistake in the program."""
        if not self._task.cancelled() and (error := self._task.exception()):
            raise error
