"""The types of requests: what can be answered is typed, and everything else is refused by its name.

A field is one of three kinds:

- one that is declared here, and changes the answer;
- one of OpenAI's that changes nothing in an answer (`HARMLESS`), which is accepted and ignored;
- one that is known but not supported (`NEUTRAL`), which may only ask for nothing: null, or its default.

Any other name is a mistake of the client's, and is refused with the nearest name that is accepted. The same
holds for the fields of messages, of their parts and of `stream_options`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rayft.config import nearest
from rayft.errors import BadRequestError
from rayft.serving.allowed import check_allowed
from rayft.serving.body import read_json, where
from rayft.serving.messages import BASE_NAME, NAME

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "LoadRequest",
    "Message",
    "StreamOptions",
    "TextRequest",
    "parse_request",
]

HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields of OpenAI's that change nothing in an answer: who asks, how it is billed, cached or stored.

`prediction` makes OpenAI's answers faster and not different; `parallel_tool_calls` says how tools are called,
and there are none.
"""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's.
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's.
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mm_processor_kwargs": (),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Known fields that are not supported → the values that ask for nothing (null always does)."""


class Strict(BaseModel):
    """An object of a request, which holds no field that would be ignored without a word."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra=lambda schema, cls: cls._describe(schema),
    )
    harmless: ClassVar[tuple[str, ...]] = ()
    """Fields that are accepted and ignored, since they change nothing."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not supported → the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """Refuse unknown and unsupported fields, and leave out those that change nothing."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.neutral:
                cls._check_neutral(name, value)
            elif name not in cls.harmless:
                raise _problem(name, f"there is no such field{nearest(name, cls.model_fields)}")
        return kept

    @classmethod
    def _check_neutral(cls, name: str, value: object) -> None:
        values = cls.neutral[name]
        if value is None or any(_same(value, allowed) for allowed in values):
            return
        instead = f" or send {json.dumps(values[0])}" if values else ""
        raise _problem(name, f"this is not supported here; leave it out{instead}")

    @classmethod
    def _describe(cls, schema: dict[str, Any]) -> None:
        """Add the fields that are ignored, and those that may only ask for nothing, to the JSON schema."""
        fields = schema.setdefault("properties", {})
        for name in cls.harmless:
            fields[name] = {"description": "Accepted and ignored: it changes nothing in an answer."}
        for name, values in cls.neutral.items():
            fields[name] = {
                "enum": [*values, None],
                "description": "Not supported: it may only ask for nothing.",
            }


def _problem(field: str, message: str) -> PydanticCustomError:
    """Make the error of a field that the object it is raised for has no type for."""
    return PydanticCustomError("field", "{problem}", {"field": field, "problem": message})


class StreamOptions(Strict):
    """What a stream holds beside the text."""

    neutral = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False
    """End with a chunk that counts tokens."""


def _text_or_list(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else None


Token = Annotated[int, Field(ge=0)]


class TextRequest(Strict):
    """What chat and plain completions have in common."""

    default_max_tokens: ClassVar[int | None] = None
    """Tokens where no limit is given, as far as they fit; None for as many as fit."""
    harmless = HARMLESS
    neutral = NEUTRAL

    model: Annotated[str, Field(max_length=4096)]
    """A served name."""
    stream: bool = False
    """Answer by server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token; 1 where it is not given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that hold this share of the probability."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Draw from this many of the likeliest tokens; 0 or -1 for all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw from the tokens that are at least this share as likely as the likeliest one."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divide positive logits of tokens of the prompt and the answer by it, and multiply negative ones."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Decides every draw; drawn itself where it is not given."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Answers to each prompt, drawn apart; 1 where it is not given."""
    stop: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[str], Tag("list")],
            Discriminator(
                _text_or_list,
                custom_error_type="form",
                custom_error_message="this must be a string or a list of them",
            ),
        ]
        | None
    ) = None
    """Strings that end the text (and are not part of it); at most four, as OpenAI allows."""
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    """Tokens that end the text (and are not part of it), beside the model's own."""

    @model_validator(mode="after")
    def _consistent(self) -> TextRequest:
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("'stream_options' needs 'stream': true", param="stream_options")
        if len(self.stops) > 4 or "" in self.stops:
            raise BadRequestError("'stop' takes up to 4 strings, none of them empty", param="stop")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens to tell with each token's log-probability; None for nothing."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, where the request says so."""
        return self.max_tokens

    @property
    def characters(self) -> int:
        """Characters of text that are to be tokenized."""
        raise NotImplementedError


RequestT = TypeVar("RequestT", bound=BaseModel)


OTHER_PARTS = {
    "file": "files",
    "image": "images",
    "image_url": "images",
    "input_audio": "audio",
    "input_file": "files",
    "input_image": "images",
    "video_url": "videos",
}
"""Types of parts that a language model can't read → what they hold."""


class Part(Strict):
    """A piece of a message."""

    harmless = ("prompt_cache_breakpoint",)

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind in OTHER_PARTS:
            raise _problem("type", f"{OTHER_PARTS[kind]} are not supported here; send parts of type 'text'")
        return data


class Message(Strict):
    """One turn of a conversation."""

    # What OpenAI's client sends back of an answer to it.
    neutral = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "name": (),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Part], Field(min_length=1), Tag("list")],
        Discriminator(
            _text_or_list,
            custom_error_type="form",
            custom_error_message="this must be a string or a list of parts",
        ),
    ]
    reasoning_content: str | None = None
    """What the assistant wrote before its answer; handed to the chat template, which may leave it out."""

    @model_validator(mode="after")
    def _reasons(self) -> Message:
        if self.reasoning_content is not None and self.role != "assistant":
            raise _problem("reasoning_content", "only messages of the assistant have it")
        return self

    def plain(self) -> dict[str, str]:
        """Return the turn as chat templates want it."""
        role = "system" if self.role == "developer" else self.role
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        reasoning = {} if self.reasoning_content is None else {"reasoning_content": self.reasoning_content}
        return {"role": role, "content": content, **reasoning}


class ChatRequest(TextRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Tell each token's log-probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Only with `logprobs`: also those of this many of the likeliest tokens."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Values that the chat template is given, such as `enable_thinking`."""

    @model_validator(mode="after")
    def _scores(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        return self

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens to tell with each token's log-probability; None for nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, where the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def characters(self) -> int:
        """Characters of text that are to be tokenized."""
        return sum(len(message.plain()["content"]) for message in self.messages)


def _form_of_prompt(value: object) -> str | None:
    """Return which form a prompt has, by its first element."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    if isinstance(first, str | list):
        return "texts" if isinstance(first, str) else "token lists"
    return "tokens" if type(first) is int else None


class CompletionRequest(TextRequest):
    """The body of `/v1/completions`."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[int], Tag("tokens")]
        | Annotated[list[str], Field(max_length=128), Tag("texts")]
        | Annotated[list[list[int]], Field(min_length=1, max_length=128), Tag("token lists")],
        Discriminator(
            _form_of_prompt,
            custom_error_type="form",
            custom_error_message="this must be a text, a list of token ids, or a list of either",
        ),
    ]
    """A text or token ids, or several of them."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Tell each token's log-probability, and those of this many of the likeliest tokens."""

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens to tell with each token's log-probability; None for nothing."""
        return self.logprobs

    @property
    def characters(self) -> int:
        """Characters of text that are to be tokenized."""
        return sum(len(prompt) for prompt in self.prompts if isinstance(prompt, str))

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class LoadRequest(Strict):
    """The body of `POST /v1/adapters`."""

    name: Annotated[str, Field(pattern=f"^{NAME}$", max_length=128)]
    """What it is called in the `model` field of requests."""
    source: Annotated[str, Field(min_length=1, max_length=4096)]
    """A folder, `models:/name@alias`, `models:/name/3`, or a URL."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the name's traffic; below 1 it is a canary beside what is served."""
    pinned: bool = False
    """Keep it on the device."""

    def check(self, roots: Sequence[str]) -> None:
        """Refuse names and places that may not be used.

        Raises:
            BadRequestError: saying why.
        """
        if self.name == BASE_NAME:
            raise BadRequestError(f"'{BASE_NAME}' is the base itself; take another name", param="name")
        check_allowed(self.source, roots)


def _same(value: object, allowed: object) -> bool:
    # In Python 0 is False, but "logprobs": 0 asks for something and "logprobs": false does not.
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def parse_request(cls: type[RequestT], body: bytes) -> RequestT:
    """Read a request's body.

    Raises:
        BadRequestError: if it is no JSON object, or a field is missing, wrong, unknown or not supported; its
            `param` is the place in the body, as in `messages[0].content`.
    """
    data = read_json(body)
    try:
        return cls.model_validate(data, strict=True)
    except ValidationError as error:
        # One mistake may cause others: a field that is missing is most often one that is misspelt.
        problems = error.errors(include_url=False)
        problem = min(problems, key=lambda one: one["type"] == "missing")
        path = _path(data, problem["loc"])
        if problem["type"] == "missing":
            path.append(str(problem["loc"][-1]))
        elif problem["type"] == "field":
            path.append(problem["ctx"]["field"])
        place = where(path)
        what = f"'{place}' is missing" if problem["type"] == "missing" else f"'{place}': {problem['msg']}"
        raise BadRequestError(what, param=place or None) from error


def _path(data: Any, location: Sequence[str | int]) -> list[str | int]:
    """Return the place of a problem in the body, without the members of unions that pydantic names in it."""
    found: list[str | int] = []
    for part in location:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            data = data[part]
            found.append(part)
    return found
