"""What `rayft chat` talks to in this process: bases and adapters, at their ranks."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import (
    ArtifactError,
    BadRequestError,
    BaseMismatchError,
    ConfigError,
    ModelError,
    RayftError,
    ResourceError,
    SqueezeError,
)
from rayft.flow.chat.models import ChatModel, Options, ServedModel, open_local, open_models, open_served
from rayft.models.fingerprint import source_fingerprint
from rayft.models.load import ModelConfig, load_skeleton, resolve
from rayft.models.targets import linear_shapes
from rayft.peft.folder import PeftFolder
from rayft.squeeze.rank import squeeze
from tests.unit.serving.adapters import random_adapter

QUESTION = [{"role": "user", "content": "What is in box 3?"}]


def text(model: ChatModel, messages: Sequence[dict[str, str]] = QUESTION, tokens: int = 12) -> str:
    async def collect() -> str:
        return "".join([part.content async for part in model.answer(messages, Options(0.0, tokens))])

    return asyncio.run(collect())


def texts(*names: str, base: str | None = None) -> list[str]:
    with open_local(names, base) as models:
        assert [model.name for model in models] == [*names]
        return [text(model) for model in models]


@pytest.fixture
def adapter(prepared: None, tmp_path: Path) -> AdapterArtifact:
    """A random adapter of rank 4 on the tiny model, which names its base, saved as `adapter`."""
    config = ModelConfig(name="tiny-llama")
    skeleton = load_skeleton(config)
    known = source_fingerprint(skeleton, resolve(config), None) or ""
    found = random_adapter("chat", linear_shapes(skeleton), known)
    found = replace(found, meta=found.meta.model_copy(update={"base_model": "tiny-llama"}))
    found.save(tmp_path / "adapter")
    return found


def test_adapters_and_their_base_answer_each_in_its_own_way(
    adapter: AdapterArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(tmp_path / "adapter")
    whole, base = texts(place, "base")
    assert whole != base
    assert texts("tiny-llama") == [base]
    assert texts("base", place) == [base, whole]
    # At its own rank it is the same; the ranks below are those of its exact squeeze.
    low, full = texts(f"{place}@r1", f"{place}@r4")
    assert full == whole
    squeeze(adapter, rank=1).save(tmp_path / "low")
    assert texts(str(tmp_path / "low")) == [low]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("# sweep 1\n")
    assert texts(".") == [whole]


def test_the_base_of_an_adapter_that_names_none_is_asked_for(
    adapter: AdapterArtifact, tmp_path: Path
) -> None:
    bare = replace(adapter, meta=adapter.meta.model_copy(update={"base_model": ""}))
    place = str(bare.save(tmp_path / "bare"))
    with pytest.raises(ArtifactError, match="name it with --base"):
        texts(place)
    assert texts(place, base="tiny-llama") == texts(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("{}/adapter@r5", SqueezeError, "has rank 4; ask for 1 to 4, not 5"),
        ("{}/adapter@r0", SqueezeError, "ask for 1 to 4, not 0"),
        ("tiny-llama@r2", SqueezeError, "tiny-llama is no adapter, so it has no rank; leave out @r2"),
        ("tiny-lama", RayftError, "did you mean 'tiny-llama'"),
        ("base", ConfigError, "'base' is the base of the other model"),
        ("{}/other", BaseMismatchError, "other can't be used: the adapter was made for the base"),
        ("{}/plain", ModelError, "plain has no chat template, so it can't be talked to"),
    ],
)
def test_what_can_not_be_talked_to_is_refused(
    adapter: AdapterArtifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: type[Exception],
    match: str,
) -> None:
    meta = adapter.meta.model_copy(update={"base_fingerprint": "0" * 16})
    replace(adapter, meta=meta).save(tmp_path / "other")
    plain = shutil.copytree(resolve(ModelConfig(name="tiny-llama")), tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    monkeypatch.setattr("rayft.flow.chat.models.start_engine", None)
    with pytest.raises(error, match=match):
        texts(name.format(tmp_path))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            peft.LoHaConfig(),
            "is no LoRA, and the engine runs nothing else; extract a LoRA from it by `rayft sq",
        ),
        (
            peft.LoraConfig(use_dora=True),
            "runs nothing else; the update of DoRA has full rank, so train lora",
        ),
    ],
)
def test_an_adapter_without_factors_is_refused_with_what_can_be_done(
    prepared: None, tmp_path: Path, settings: Any, match: str
) -> None:
    PeftFolder.made(settings, {"a": torch.ones(1)}, {}, ArtifactMeta(base_model="tiny-llama")).save(
        tmp_path / "other"
    )
    with pytest.raises(ArtifactError, match=match):
        texts(str(tmp_path / "other"))


def test_an_adapter_is_read_once(adapter: AdapterArtifact, tmp_path: Path) -> None:
    with mock.patch.object(AdapterArtifact, "load", wraps=AdapterArtifact.load) as load:
        texts(str(tmp_path / "adapter"), "base")
    assert load.call_count == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"base": "tiny-llama"},
            "--base is for adapters, and tiny-llama is a model of its own: leave it out",
        ),
        ({"uri": "sqlite:///x.db"}, "--uri is for models:/…, and tiny-llama is none"),
        ({"base": ""}, "--base is empty; write a path"),
        ({"url": "http://127.0.0.1:9", "base": "tiny-llama"}, "--base is for models in this process"),
        ({"url": "http://127.0.0.1:9", "uri": "sqlite:///x.db"}, "--uri is for models in this process"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match), open_models(["tiny-llama"], **options):
        pass


def test_a_conversation_that_is_too_long_is_refused_and_an_answer_ends_at_the_context(prepared: None) -> None:
    with open_local(["tiny-llama"]) as (model,):
        with pytest.raises(BadRequestError, match=r"begin again \(/reset\)"):
            text(model, [{"role": "user", "content": "x" * 2000}])
        assert len(text(model, [{"role": "user", "content": "x" * 900}], tokens=10_000)) < 200


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(RayftError, match=r"127\.0\.0\.1:9/v1/ can't be reached .* with --url"):
        open_served("http://127.0.0.1:9", ["base"])
    with pytest.raises(RayftError, match=r"--url .* is not a URL"):
        open_served("http://a:b", ["base"])


@contextmanager
def speaking(answer: bytes, kind: str = "text/event-stream") -> Iterator[ServedModel]:
    """Yield a model of a server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Write nothing to the terminal."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield ServedModel("base", f"http://127.0.0.1:{server.server_port}/v1")
    finally:
        server.shutdown()
        server.server_close()


def test_answers_of_other_servers_are_read_or_refused() -> None:
    event = '{"choices": [{"delta": {"content": "%s"}}]}'
    with speaking(
        f": hello\n\ndata:{event % 'a'}\n\ndata: {event % 'b'}\n\ndata: [DONE]\n\n".encode()
    ) as model:
        assert text(model) == "ab"
    for answer, kind, problem in [
        (b"data: {\n\n", "text/event-stream", "the server sends what is no part of an answer: {"),
        (b"data: []\n\n", "text/event-stream", "what is no part of an answer"),
        (b"<html>", "text/html", "does not stream its answers"),
        (b'data: {"error": {"message": "too hot"}}\n\n', "text/event-stream", "ended the answer: too hot"),
        # A server that dies closes the connection, as one that has ended an answer does.
        (f"data: {event % 'a'}\n\n".encode(), "text/event-stream", "ended the answer in its middle"),
    ]:
        with speaking(answer, kind) as model, pytest.raises(ResourceError, match=problem):
            text(model)
