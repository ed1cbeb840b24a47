"""The bodies of requests as pydantic models.

A field belongs to one of four kinds:

- supported: it is declared here and affects the answer;
- ignored (`HARMLESS`): OpenAI defines it, it does not affect the answer, and it is accepted;
- not supported (`NEUTRAL`): OpenAI or vLLM defines it, and it is accepted only with null or its default;
- unknown, most often misspelt: it is refused, and the error names the nearest field that is accepted.

The same holds for the fields of messages, of their parts and of `stream_options`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from rayft.config import nearest
from rayft.errors import BadRequestError
from rayft.serving.control.allowed import check_allowed
from rayft.serving.messages import BASE_NAME, NAME

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "LoadRequest",
    "Message",
    "StreamOptions",
    "TextRequest",
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
"""Fields of OpenAI's interface that do not affect an answer: who asks, how it is billed, cached or stored.

`prediction` only makes OpenAI's answers faster. `parallel_tool_calls` controls calls of tools, of which there
are none here.
"""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's.
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
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
"""Fields that are known but not supported → the values that are accepted because they request nothing.

Null is always accepted.
"""

FIRST = Field(fail_fast=True)
"""Ends the validation of a list at its first wrong value: errors of 450,000 values take 0.8 GB and 6 s."""

MAX_SCHEMA = 64 * 1024
"""Size of the largest JSON schema that is accepted, in bytes."""

MESSAGE = 16
"""Number of characters that count for a message without text."""


class Strict(BaseModel):
    """Base of all objects in requests: it refuses unknown fields and converts no values."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra=lambda schema, cls: cls._describe(schema),
    )
    harmless: ClassVar[tuple[str, ...]] = ()
    """Fields that are accepted and ignored, because they do not affect the answer."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not supported → the values that are accepted."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """Refuse unknown and unsupported fields, and drop the ignored ones."""
        if not isinstance(data, dict):
            return data
        kept, fields = {}, cls._fields()
        for name, value in data.items():
            if name in fields:
                kept[name] = value
            elif name in cls.neutral:
                cls._check_neutral(name, value)
            elif name not in cls.harmless:
                raise _problem(name, f"there is no such field{nearest(name, fields)}")
        return kept

    @classmethod
    @cache
    def _fields(cls) -> frozenset[str]:
        """Return the names of the supported fields."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def _check_neutral(cls, name: str, value: object) -> None:
        values = cls.neutral[name]
        if value is None or any(_same(value, allowed) for allowed in values):
            return
        instead = f" or send {json.dumps(values[0])}" if values else ""
        raise _problem(name, f"this is not supported here; leave it out{instead}")

    @classmethod
    def _describe(cls, schema: dict[str, Any]) -> None:
        """Add the ignored and the unsupported fields to the JSON schema."""
        fields = schema.setdefault("properties", {})
        for name in cls.harmless:
            fields[name] = {"description": "Accepted and ignored: it does not affect the answer."}
        for name, values in cls.neutral.items():
            fields[name] = {
                "enum": [*values, None],
                "description": "Not supported: only values that request nothing are accepted.",
            }


def _problem(field: str, message: str) -> PydanticCustomError:
    """Return an error about one field, to be raised by the validator of the object that contains it."""
    return PydanticCustomError("field", "{problem}", {"field": field, "problem": message})


class StreamOptions(Strict):
    """What a stream contains besides the text."""

    neutral = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False
    """End the stream with a chunk that has the number of tokens."""


class JsonSchema(Strict):
    """A named JSON schema."""

    # The answer always follows the schema strictly, and the model does not see the schema.
    harmless = ("description", "strict")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    """The schema itself."""

    @model_validator(mode="after")
    def _small(self) -> JsonSchema:
        if (size := len(self.text)) > MAX_SCHEMA:
            raise _problem("schema", f"this has {size:,} bytes as JSON; at most {MAX_SCHEMA:,} are accepted")
        return self

    @property
    def text(self) -> str:
        """The schema as JSON text."""
        return json.dumps(self.schema_)


class ResponseFormat(Strict):
    """The form of an answer: any text, a JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _problem("json_schema", "this belongs to 'type': 'json_schema', which needs it")
        return self


def _text_or_list(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else None


Token = Annotated[int, Field(ge=0)]


class TextRequest(Strict):
    """The fields that chat completions and plain completions share."""

    default_max_tokens: ClassVar[int | None] = None
    """Most tokens to generate if the request sets no limit; None for as many as the context has room for."""
    harmless = HARMLESS
    neutral = NEUTRAL

    model: Annotated[str, Field(max_length=4096)]
    """Name of a served model: `base`, or an adapter as `name`, `name@version`, `name@alias`, `name@r8`."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Options of the stream; only with `stream`."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Largest number of tokens to generate."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Temperature of sampling; 0 always takes the most likely token. The default is 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the most likely tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Sample from this number of most likely tokens; 0 or -1 for all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample from the tokens whose probability is at least this fraction of the most likely token's."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divide the positive logits of tokens in the prompt and the answer by it, and multiply negative ones."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Seed of all sampling; random by default."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Number of answers to each prompt, sampled independently. The default is 1."""
    stop: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[str], FIRST, Tag("list")],
            Discriminator(
                _text_or_list,
                custom_error_type="form",
                custom_error_message="this must be a string or a list of them",
            ),
        ]
        | None
    ) = None
    """Strings that end the text and are not part of it; at most four, as in OpenAI's interface."""
    stop_token_ids: Annotated[list[Token], FIRST, Field(max_length=1024)] | None = None
    """Tokens that end the text and are not part of it, in addition to the model's own."""
    response_format: ResponseFormat | None = None
    """Form of the answer: `text`, or one of JSON, which the engine on GPUs supports."""

    @model_validator(mode="after")
    def _consistent(self) -> TextRequest:
        if self.stream_options is not None and not self.stream:
            raise _problem("stream_options", "this needs 'stream': true")
        if len(self.stops) > 4 or "" in self.stops:
            raise _problem("stop", "send up to 4 strings, none of them empty")
        return self

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def scored(self) -> int | None:
        """Number of most likely tokens to return beside each token's log-probability; None for neither."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def json_schema(self) -> str | None:
        """JSON schema, as JSON text, that the answer has to follow; None for any text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return '{"type": "object"}' if form.json_schema is None else form.json_schema.text

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Largest number of tokens to generate, if the request sets one."""
        return self.max_tokens

    @property
    def characters(self) -> int:
        """Number of characters that have to be tokenized."""
        raise NotImplementedError


OTHER_PARTS = {
    "file": "files",
    "image": "images",
    "image_url": "images",
    "input_audio": "audio",
    "input_file": "files",
    "input_image": "images",
    "video_url": "videos",
}
"""Types of message parts that a language model can't read → the name of what they contain, in the plural."""


class Part(Strict):
    """One part of a message."""

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

    # OpenAI's client sends these fields when it sends back a message that it was answered.
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
        Annotated[str, Tag("text")] | Annotated[list[Part], FIRST, Field(min_length=1), Tag("list")],
        Discriminator(
            _text_or_list,
            custom_error_type="form",
            custom_error_message="this must be a string or a list of parts",
        ),
    ]
    reasoning_content: str | None = None
    """The assistant's reasoning before its answer; passed to the chat template, which may omit it."""

    @model_validator(mode="after")
    def _reasons(self) -> Message:
        if self.reasoning_content is not None and self.role != "assistant":
            raise _problem("reasoning_content", "only messages with the role assistant may have it")
        return self

    def plain(self) -> dict[str, str]:
        """Return the message in the form that chat templates expect."""
        role = "system" if self.role == "developer" else self.role
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        reasoning = {} if self.reasoning_content is None else {"reasoning_content": self.reasoning_content}
        return {"role": role, "content": content, **reasoning}


class ChatRequest(TextRequest):
    """The body of `/v1/chat/completions`."""

    neutral = {**NEUTRAL, "echo": (False,)}

    messages: Annotated[list[Message], FIRST, Field(min_length=1)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Return the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Also return those of this number of most likely tokens; only with `logprobs`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as `enable_thinking`."""

    @model_validator(mode="after")
    def _scores(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _problem("top_logprobs", "this needs 'logprobs': true")
        return self

    @property
    def scored(self) -> int | None:
        """Number of most likely tokens to return beside each token's log-probability; None for neither."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Largest number of tokens to generate, if the request sets one."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def characters(self) -> int:
        """Number of characters that have to be tokenized."""
        # Templates write some text for each message, and may write its reasoning.
        return sum(MESSAGE + sum(map(len, message.plain().values())) for message in self.messages)


def _form_of_prompt(value: object) -> str | None:
    """Return the tag of a prompt's form, judged by the prompt's first element."""
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
        | Annotated[list[int], FIRST, Tag("tokens")]
        | Annotated[list[str], FIRST, Field(max_length=128), Tag("texts")]
        | Annotated[
            list[Annotated[list[int], FIRST]], FIRST, Field(min_length=1, max_length=128), Tag("token lists")
        ],
        Discriminator(
            _form_of_prompt,
            custom_error_type="form",
            custom_error_message="this must be a text, a list of token ids, or a list of either",
        ),
    ]
    """One prompt or several, each a text or a list of token ids."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Return the log-probability of each token, and those of this number of most likely tokens."""
    echo: bool | None = None
    """Begin the text with the prompt, and the log-probabilities with those of the prompt's tokens."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Largest number of tokens to generate; 0 only with `echo`."""

    @model_validator(mode="after")
    def _generates(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise _problem("max_tokens", "this must be at least 1, or 0 with 'echo': true")
        return self

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return bool(self.echo)

    @property
    def scored(self) -> int | None:
        """Number of most likely tokens to return beside each token's log-probability; None for neither."""
        return self.logprobs

    @property
    def characters(self) -> int:
        """Number of characters that have to be tokenized."""
        return sum(len(prompt) for prompt in self.prompts if isinstance(prompt, str))

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class LoadRequest(Strict):
    """The body of `POST /v1/adapters`."""

    name: Annotated[str, Field(pattern=f"^{NAME}$", max_length=128)]
    """Name that requests put into their `model` field."""
    source: Annotated[str, Field(min_length=1, max_length=4096)]
    """Place of the adapter: a folder, `models:/name@alias`, `models:/name/3`, or a URL."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the name's traffic; below 1 the adapter becomes a canary beside the version that is served."""
    pinned: bool = False
    """Keep the adapter on the device."""

    def check(self, roots: Sequence[str]) -> None:
        """Refuse reserved names, and places outside the server's roots.

        Raises:
            BadRequestError: with the reason.
        """
        if self.name == BASE_NAME:
            raise BadRequestError(f"'{BASE_NAME}' is the base itself; use another name", param="name")
        check_allowed(self.source, roots)


def _same(value: object, allowed: object) -> bool:
    # In Python 0 equals False, but "logprobs": 0 requests something and "logprobs": false does not.
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
