"""A conversation of a program: pieces of answers, what is remembered, and what ends it."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass

import pytest

from rayft.errors import ConfigError, ResourceError
from rayft.flow.chat.conversation import Conversation, Piece
from rayft.flow.chat.models import Options
from tests.unit.flow.chat.echo import Echo


@dataclass
class Engine:
    """What a conversation has to free."""

    closed: int = 0

    def close(self) -> None:
        self.closed += 1


def begin(*models: Echo, system: str | None = None, engine: Engine | None = None) -> Conversation:
    return Conversation(models, Options(0.0, 8), system, (engine or Engine()).close)


def test_pieces_come_as_they_are_generated_and_are_remembered() -> None:
    model = Echo()
    with begin(model, system="Be kind") as chat:
        assert chat.models == ("echo",)
        assert [*chat.ask("think")] == [
            Piece(0, "echo", "so "),
            Piece(0, "echo", "", "hm"),
            Piece(0, "echo", "think[/red]"),
        ]
        assert chat.answers("two") == ("so two[/red]",)
        assert [message["content"] for message in chat.messages[0]] == [
            "Be kind", "think", "so think[/red]", "two", "so two[/red]"
        ]  # fmt: skip
        chat.reset()
        assert chat.messages == ([{"role": "system", "content": "Be kind"}],)


def test_two_answer_at_the_same_time_and_each_remembers_its_own() -> None:
    with begin(Echo("one"), Echo("two")) as chat:
        pieces = [*chat.ask("a")]
        assert {(piece.side, piece.model) for piece in pieces} == {(0, "one"), (1, "two")}
        assert chat.answers("b") == ("so b[/red]", "so b[/red]")
        # What a caller does to the messages is not the conversation's.
        chat.messages[0].clear()
        assert [len(messages) for messages in chat.messages] == [4, 4]


def test_an_answer_that_is_left_early_is_stopped_and_kept_as_far_as_it_came() -> None:
    model = Echo()
    with begin(model) as chat:
        asked = chat.ask("sleep")
        assert next(asked).content == "so "
        assert chat.answers("one") == ("so one[/red]",)
        assert [*asked] == []
        assert model.asked[-1] == [("user", "sleep"), ("assistant", "so "), ("user", "one")]
        # Nobody has read the answer, so nothing was asked.
        chat.ask("unread")
        chat.answers("two")
        assert ("user", "unread") not in model.asked[-1]


def test_an_error_is_raised_and_all_forget_its_question() -> None:
    one, two = Echo("one"), Echo("two")
    with begin(one, two) as chat:
        with pytest.raises(ResourceError, match="it is too late"):
            chat.answers("fail")
        assert chat.messages == ([], [])
        assert chat.answers("a") == ("so a[/red]", "so a[/red]")
        with pytest.raises(ConfigError, match="the question is empty"):
            chat.ask(" \n")
        with pytest.raises(ConfigError, match="the question must be str, not 3"):
            chat.ask(3)  # type: ignore[arg-type]


def test_it_frees_the_models_once_and_answers_nothing_afterwards() -> None:
    engine = Engine()
    with begin(Echo(), engine=engine) as chat:
        chat.answers("a")
    chat.close()
    assert engine.closed == 1
    with pytest.raises(ConfigError, match="this conversation is closed"):
        chat.ask("b")
    begin(Echo(), engine=engine)
    gc.collect()
    assert engine.closed == 2


def test_it_works_where_a_loop_is_running_as_in_a_notebook() -> None:
    async def cell() -> tuple[str, ...]:
        with begin(Echo()) as chat:
            return chat.answers("a")

    assert asyncio.run(cell()) == ("so a[/red]",)


@pytest.mark.parametrize(
    ("temperature", "tokens", "problem"),
    [(2.1, 8, "from 0 to 2"), (float("nan"), 8, "from 0 to 2"), (0.0, 0, "max_tokens 0: write 1 or more")],
)
def test_options_out_of_range_are_refused(temperature: float, tokens: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Options(temperature, tokens)
