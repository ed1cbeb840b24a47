from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner, requests

from rayft.artifacts import AdapterArtifact
from rayft.errors import RequestError, ResourceError
from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel
from rayft.models.targets import linear_shapes
from rayft.serving.engine import GenerationRequest, Progress
from rayft.serving.transformers_engine import TransformersEngine
from tests.unit.serving.adapters import random_adapter
from tests.unit.serving.conftest import MakeEngine

LENGTH = 24
PROMPTS = [
    "the capital of France is",
    "a",
    "one two three four five six seven eight nine ten",
    "Hello!",
    "\n",
]


async def ask(engine: TransformersEngine, request: GenerationRequest) -> Progress:
    async with aclosing(engine.submit(request)) as steps:
        found = [step async for step in steps]
    assert [step.finish for step in found[:-1]] == [None] * (len(found) - 1)
    return found[-1]


def ask_all(engine: TransformersEngine, wanted: Sequence[GenerationRequest]) -> list[Progress]:
    async def together() -> list[Progress]:
        return await asyncio.gather(*[ask(engine, request) for request in wanted])

    return asyncio.run(together())


def expected(
    tiny_folder: Path, adapter: str | None, prompt: Sequence[int], length: int = LENGTH
) -> tuple[int, ...]:
    """What the base, or PEFT with this adapter alone, generates by `generate`."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length
    )
    tokens = tuple(made[0, len(prompt) :].tolist())
    return tokens[:-1] if tokens[-1] == model.generation_config.eos_token_id else tokens


def load_all(engine: TransformersEngine, folders: dict[str, str]) -> None:
    for name, folder in folders.items():
        engine.load(name, AdapterArtifact.load(folder).modules)


def tokens_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text)["input_ids"])


def test_a_mixed_batch_gives_each_row_what_its_adapter_alone_gives(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    engine = make_engine(max_running=16)
    load_all(engine, adapter_folders)
    names: list[str | None] = [None, *adapter_folders]
    wanted = [(name, tokens_of(tiny_tokenizer, PROMPTS[i])) for i, name in enumerate(names)]
    # The same prompt for all as well: only the adapter can make a difference then.
    wanted += [(name, tokens_of(tiny_tokenizer, PROMPTS[0])) for name in names]
    jobs = [GenerationRequest(prompt, LENGTH, name) for name, prompt in wanted]

    found = [step.tokens for step in ask_all(engine, jobs)]

    folders = {None: None, **adapter_folders}
    assert found == [expected(tiny_folder, folders[name], prompt) for name, prompt in wanted]
    assert len(set(found[len(names) :])) == len(names)
    assert engine.stats().max_slots_in_forward == len(names)
    assert engine.stats().max_requests_in_forward == len(jobs)


def test_prompts_that_are_read_in_parts_are_answered_right(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    engine = make_engine(max_batch_tokens=16)
    load_all(engine, adapter_folders)
    prompt = tokens_of(tiny_tokenizer, "a long prompt, " * 10)
    assert len(prompt) > 5 * 16
    names: list[str | None] = [None, "small", "picks"]
    found = ask_all(engine, [GenerationRequest(prompt, LENGTH, name) for name in names])
    for name, step in zip(names, found, strict=True):
        assert step.tokens == expected(tiny_folder, adapter_folders.get(name or ""), prompt)


def test_requests_that_lose_their_place_in_the_cache_are_answered_right(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    # Each grows to 125 tokens, so the cache holds two of the four to their end.
    engine = make_engine(cache_tokens=256)
    load_all(engine, adapter_folders)
    prompt = tokens_of(tiny_tokenizer, "hello")
    names: list[str | None] = [None, *list(adapter_folders)[:3]]
    greedy = [GenerationRequest(prompt, 120, name) for name in names]
    found = ask_all(engine, greedy)
    for name, step in zip(names, found, strict=True):
        assert step.tokens == expected(tiny_folder, adapter_folders.get(name or ""), prompt, 120)
    # More tokens went through the model than they have: some were read again.
    assert engine.stats().tokens > len(names) * (len(prompt) + 119)
    sampled = [GenerationRequest(prompt, 120, name, temperature=0.8, seed=3) for name in names]
    assert ask_all(engine, sampled) == [ask_all(engine, [job])[0] for job in sampled]


def test_a_request_reports_growing_tokens_and_why_it_ended(
    make_engine: MakeEngine, loaded: LoadedModel, tiny_tokenizer: Any
) -> None:
    engine = make_engine()
    prompt = tokens_of(tiny_tokenizer, "hello")

    async def steps() -> list[Progress]:
        return [step async for step in engine.submit(GenerationRequest(prompt, 50))]

    found = asyncio.run(steps())
    assert found[-1].finish == "length"
    assert (found[-1].generated, len(found[-1].tokens)) == (50, 50)
    assert all(found[-1].tokens[: len(step.tokens)] == step.tokens for step in found)


def test_an_end_token_ends_a_request_and_is_not_given(
    make_engine: MakeEngine, loaded: LoadedModel, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    prompt = tokens_of(tiny_tokenizer, "hello")
    free = expected(tiny_folder, None, prompt)
    loaded.model.generation_config.eos_token_id = [free[5], 0]
    step = ask_all(make_engine(), [GenerationRequest(prompt, LENGTH)])[0]
    cut = free.index(free[5])
    assert (step.tokens, step.generated, step.finish) == (free[:cut], cut + 1, "stop")


def test_seeded_draws_do_not_depend_on_the_batch(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    engine = make_engine()
    prompt = tokens_of(tiny_tokenizer, "hello")
    jobs = [GenerationRequest(prompt, 30, temperature=1.0, top_p=0.95, seed=seed) for seed in range(4)]
    jobs.append(GenerationRequest(prompt, 30))
    together = ask_all(engine, jobs)
    assert together == [ask_all(engine, [job])[0] for job in jobs]
    assert len({step.tokens for step in together}) == len(jobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_that_overflows_spoils_no_other_row(
    make_engine: MakeEngine,
    loaded: LoadedModel,
    adapter_folders: dict[str, str],
    tiny_tokenizer: Any,
    temperature: float,
) -> None:
    factors = random_adapter("huge", linear_shapes(loaded.model)).modules
    huge = {path: LoraFactors(1e20 * f.a, 1e5 * f.b, 1.0) for path, f in factors.items()}
    engine = make_engine()
    load_all(engine, adapter_folders)
    engine.load("huge", huge)
    prompt = tokens_of(tiny_tokenizer, "hello")
    good = [GenerationRequest(prompt, LENGTH, name) for name in (None, "small", "picks")]
    alone = ask_all(engine, good)

    async def together() -> list[Progress | BaseException]:
        bad = GenerationRequest(prompt, LENGTH, "huge", temperature=temperature)
        return await asyncio.gather(*[ask(engine, job) for job in (bad, *good)], return_exceptions=True)

    failed, *found = asyncio.run(together())
    assert isinstance(failed, RequestError)
    assert "NaN" in str(failed)
    assert found == alone
    assert engine.stats().alive


def test_a_closed_request_frees_its_place(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    engine = make_engine(max_running=1)
    prompt = tokens_of(tiny_tokenizer, "hello")

    async def scenario() -> Progress:
        async with aclosing(engine.submit(GenerationRequest(prompt, 900))) as steps:
            await anext(steps)
            assert engine.stats().running == 1
        assert engine.stats().running == 0
        # There is one place: this would wait for 900 steps if the first one still held it.
        before = engine.stats().forwards
        answer = await ask(engine, GenerationRequest(prompt, 5))
        assert engine.stats().forwards - before < 50
        return answer

    assert asyncio.run(scenario()).generated == 5


def test_a_stopped_engine_refuses(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    engine = make_engine()
    engine.stop()
    assert not engine.stats().alive
    with pytest.raises(ResourceError, match="stopped"):
        ask_all(engine, [GenerationRequest(tokens_of(tiny_tokenizer, "a"), 2)])


def test_an_unloaded_adapter_is_gone(
    make_engine: MakeEngine, loaded: LoadedModel, adapter_folders: dict[str, str], tiny_tokenizer: Any
) -> None:
    engine = make_engine()
    load_all(engine, adapter_folders)
    for name in adapter_folders:
        engine.unload(name)
    tables = [module.table for module in loaded.model.modules() if hasattr(module, "table")]
    assert tables
    assert not any(tables)
    with pytest.raises(KeyError):
        ask_all(engine, [GenerationRequest(tokens_of(tiny_tokenizer, "a"), 2, "small")])


class TestPrivateInternals:
    """What `transformers_engine` relies on; a failure here means that file must follow transformers."""

    def test_a_step_runs_between_preparation_and_update_of_the_same_batch(self) -> None:
        body = inspect.getsource(continuous_api.ContinuousBatchingManager._generation_loop_body)
        order = [
            body.index(call) for call in ("prepare_next_batch()", "self._generation_step()", "update_batch()")
        ]
        assert order == sorted(order)

    def test_the_batch_lists_its_requests_in_the_order_of_the_tokens(self) -> None:
        assert {"state", "query_length"} <= set(requests.FutureRequestState.__slots__)
        source = inspect.getsource(input_outputs.ContinuousBatchingIOs.prepare_batch_tensors)
        assert "input_ids.extend(state.tokens_to_process)" in source
        assert "self.requests_in_batch.append(future_state)" in source

    def test_a_restarted_request_keeps_its_name_and_counts_its_tokens(self) -> None:
        state = requests.RequestState("name", [1, 2, 3], max_new_tokens=9, logit_processor_kwargs={"seed": 1})
        state.generated_tokens = [4, 5]
        again = state.create_equivalent_initial_request()
        assert (again.request_id, again.logit_processor_kwargs) == ("name", {"seed": 1})
        assert (again.initial_tokens, again._true_initial_tokens) == ([1, 2, 3, 4, 5], 3)

    def test_processed_scores_are_maximised(self) -> None:
        source = inspect.getsource(model_runner.ModelRunner._forward_process_and_sample)
        assert (
            'self.logit_processor(sliced_input_ids_2d, logits_2d, batch_data["logits_processor_args"])'
            in source
        )
        assert "torch.argmax" in inspect.getsource(model_runner.ModelRunner._sample)

    def test_the_running_manager_has_what_is_set_on_it(
        self, make_engine: MakeEngine, tiny_tokenizer: Any
    ) -> None:
        engine = make_engine()
        ask_all(engine, [GenerationRequest(tokens_of(tiny_tokenizer, "a"), 2)])
        processor = engine._manager.batch_processor
        assert processor is not None
        assert processor.logit_processor is engine._manager.logit_processor
        assert not processor.cache.use_prefix_sharing
        assert not processor.use_async_batching
        assert not processor.model_runner.pad_inputs
        assert isinstance(processor.inputs_and_outputs, input_outputs.ContinuousBatchingIOs)
