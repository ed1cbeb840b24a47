"""64 clients at once while adapters are loaded, replaced, canaried and unloaded: no answer is wrong."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayft.artifacts import AdapterArtifact
from tests.integration.serving import Base, replica_stats, serving
from tests.unit.serving.adapters import LENGTH, chain_of, generated, reference

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CLIENTS = 64
CHANGES = 4
ENOUGH = 10
"""Number of answers that each model must have given before the clients stop."""
DEADLINE = 300.0
# The last one is longer than the prompt tokens of one forward here.
PROMPTS = ("hello", "the capital of France is", "one two three " * 12)
TURNING, PASSING = "turning", "passing"
Content = tuple[str | None, str]
"""The fingerprint of an answer (None for the base), and the rank in its `model` (or an empty string)."""


@dataclass(frozen=True)
class Adapters:
    served: dict[str, str]
    """Name → folder of the adapters that are served all the time."""
    turning: list[str]
    """Folders that are served in turn under one name."""
    passing: list[str]
    """Folders that are loaded and unloaded under another name."""
    texts: dict[tuple[Content, str, int], str]
    """Content, prompt, token limit → the text that PEFT's `generate` gives for it alone."""


@dataclass
class Load:
    """The requests and answers of 64 clients."""

    url: str
    adapters: Adapters
    wrong: list[Any] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    """Number of right answers of each model."""
    contents: set[tuple[str, str | None]] = field(default_factory=set)
    """Pairs of a served name and the fingerprint of an answer."""
    statuses: Counter[int] = field(default_factory=Counter)
    changes: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def models(self) -> list[str]:
        return ["base", *self.adapters.served, "squeezed@r2", TURNING, PASSING]

    def missing(self) -> list[str]:
        """Return the models that have not answered often enough, or not with all of their contents."""
        seen = Counter(name for name, _ in self.contents)
        many = {TURNING: len(self.adapters.turning), PASSING: len(self.adapters.passing)}
        return [
            model
            for model in self.models
            if self.answers[model] < ENOUGH or seen[model.partition("@")[0]] < many.get(model, 1)
        ]

    async def client(self, seed: int) -> None:
        """Send requests without a pause: for whole answers, streams, and streams that are closed early."""
        draw = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.url, timeout=DEADLINE) as http:
            while not self.done:
                model, prompt, limit = (
                    draw.choice(self.models),
                    draw.choice(PROMPTS),
                    draw.choice((3, LENGTH)),
                )
                body = {"model": model, "prompt": prompt, "max_tokens": limit, "temperature": 0}
                kind = draw.choices(("whole", "stream", "leave"), (6, 3, 1))[0]
                if kind == "whole":
                    await self._whole(http, body)
                else:
                    await self._stream(http, body, leave=kind == "leave")

    async def _whole(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        answer = await http.post("/v1/completions", json=body)
        if await self._accepted(answer, body):
            made = answer.json()
            self._compare(body, made["system_fingerprint"], made["choices"][0]["text"])

    async def _stream(self, http: httpx.AsyncClient, body: dict[str, Any], *, leave: bool) -> None:
        text, chunk = "", None
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if not await self._accepted(answer, body):
                return
            async for line in answer.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if leave or "choices" not in chunk:
                    break
                text += chunk["choices"][0]["text"]
        if chunk is None or "error" in chunk:
            self.wrong.append((body, chunk))
        elif not leave:
            self._compare(body, chunk["system_fingerprint"], text)

    async def _accepted(self, answer: httpx.Response, body: dict[str, Any]) -> bool:
        self.statuses[answer.status_code] += 1
        # 429 asks the client to try again, and the adapter that is loaded and unloaded may be missing.
        known = {200, 429, 404} if body["model"] == PASSING else {200, 429}
        if answer.status_code not in known:
            self.wrong.append((body, answer.status_code, (await answer.aread()).decode()))
        return answer.status_code == 200

    def _compare(self, body: dict[str, Any], fingerprint: str | None, text: str) -> None:
        name, _, rank = body["model"].partition("@")
        want = self.adapters.texts.get(((fingerprint, rank), body["prompt"], body["max_tokens"]))
        if text != want:
            self.wrong.append((body, fingerprint, text, want))
        self.answers[body["model"]] += 1
        self.contents.add((name, fingerprint))

    async def change(self) -> None:
        """Load, replace, promote, roll back and unload, until all models have answered often enough."""
        async with httpx.AsyncClient(base_url=self.url, timeout=DEADLINE) as http:

            async def call(verb: str, path: str, **body: Any) -> None:
                answer = await http.request(verb, f"/v1/adapters{path}", json=body or None)
                self.changes.append(answer.status_code)

            turn = 0
            while turn < CHANGES or self.missing():
                first, second, third = (self.adapters.turning[(turn + i) % 3] for i in range(3))
                await call("POST", "", name=TURNING, source=first)
                await call("POST", "", name=PASSING, source=self.adapters.passing[turn % 2])
                await call("POST", "", name=TURNING, source=second, weight=0.3)
                await call("POST", f"/{TURNING}/promote")
                await call("POST", "", name=TURNING, source=third)
                await call("POST", f"/{TURNING}/rollback")
                await call("DELETE", f"/{PASSING}")
                turn += 1
        self.done = True

    async def run(self) -> None:
        """Run clients and changes at once, for a limited time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks:
                for seed in range(CLIENTS):
                    tasks.create_task(self.client(seed))
                tasks.create_task(self.change())


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.read(tiny_folder, tmp_path_factory.mktemp("roots"))


@pytest.fixture(scope="module")
def adapters(base: Base, tiny_tokenizer: Any) -> Adapters:
    links = [base.adapter(f"link{link}") for link in range(3)]
    served = {f"r{rank}": base.adapter(f"r{rank}", rank) for rank in (1, 2, 4, 8, 16)}
    served |= {f"picks{rank}": base.adapter(f"picks{rank}", rank, selector=True) for rank in (3, 6)}
    served |= {"chain": chain_of(links), "squeezed": base.squeezed("squeezed", 6)}
    turning = [base.adapter("a", 2), base.adapter("b", 12), base.adapter("c", 5, selector=True)]
    passing = [base.adapter("d", 3), chain_of(links[:2])]
    texts = {}

    def save(name: str, artifact: AdapterArtifact | None, rank: str = "") -> str:
        """Save an adapter, and compute its answers."""
        folder = base.save(name, artifact) if artifact is not None else None
        whole = served["squeezed"] if rank else artifact
        content: Content = (whole.content_hash if whole is not None else None, rank)
        alone = reference(base.model, folder)
        for prompt in PROMPTS:
            tokens = generated(alone, tiny_tokenizer(prompt)["input_ids"])
            for limit in (3, LENGTH):
                texts[content, prompt, limit] = decode(tiny_tokenizer, tokens[:limit])
        return str(folder)

    save("base", None)
    save("squeezed-2", served["squeezed"].at_rank(2), "r2")
    folders = {name: save(name, artifact) for name, artifact in served.items()}
    made = [[save(f"{kind}-{i}", one) for i, one in enumerate(found)]
            for kind, found in ((TURNING, turning), (PASSING, passing))]  # fmt: skip
    return Adapters(folders, *made, texts)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@pytest.fixture(scope="module")
def url(local_ray: None, base: Base, adapters: Adapters) -> Iterator[str]:
    first = {**adapters.served, TURNING: adapters.turning[0]}
    with serving(base, adapters=first, replicas=2, max_batch_tokens=64) as found:
        yield found


def test_each_answer_is_its_versions_while_adapters_change(url: str, adapters: Adapters) -> None:
    # Otherwise an answer of the wrong adapter could count as right.
    long = [text for (_, _, limit), text in adapters.texts.items() if limit == LENGTH]
    assert len(set(long)) == len(long)
    load = Load(url, adapters)
    asyncio.run(load.run())
    assert not load.wrong, load.wrong[:3]
    assert {status // 100 for status in load.changes} == {2}
    assert not load.missing()
    for one in replica_stats():
        assert one["engine"]["max_slots_in_forward"] > len(adapters.served) // 2
        # Requests that were closed, and adapters that were replaced or unloaded, hold no place.
        assert one["engine"]["running"] == 0
        assert {name.partition("@")[0] for name in one["tiers"]} == {*adapters.served, TURNING}
