"""What `transformers_engine` relies on; a failure here means that file must follow transformers."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner, requests

from rayft.models.load import LoadedModel
from rayft.serving.engine import EngineLimits, GenerationRequest
from rayft.serving.transformers_engine import TransformersEngine
from tests.unit.serving.test_engines import ask_all, tokens_of


def test_a_step_runs_between_preparation_and_update_of_the_same_batch() -> None:
    body = inspect.getsource(continuous_api.ContinuousBatchingManager._generation_loop_body)
    order = [
        body.index(call) for call in ("prepare_next_batch()", "self._generation_step()", "update_batch()")
    ]
    assert order == sorted(order)


def test_the_batch_lists_its_requests_in_the_order_of_the_tokens() -> None:
    assert {"state", "query_length"} <= set(requests.FutureRequestState.__slots__)
    source = inspect.getsource(input_outputs.ContinuousBatchingIOs.prepare_batch_tensors)
    assert "input_ids.extend(state.tokens_to_process)" in source
    assert "self.requests_in_batch.append(future_state)" in source


def test_a_restarted_request_keeps_its_name_and_counts_its_tokens() -> None:
    state = requests.RequestState("name", [1, 2, 3], max_new_tokens=9, logit_processor_kwargs={"seed": 1})
    state.generated_tokens = [4, 5]
    again = state.create_equivalent_initial_request()
    assert (again.request_id, again.logit_processor_kwargs) == ("name", {"seed": 1})
    assert (again.initial_tokens, again._true_initial_tokens) == ([1, 2, 3, 4, 5], 3)


def test_processed_scores_are_maximised() -> None:
    source = inspect.getsource(model_runner.ModelRunner._forward_process_and_sample)
    assert (
        'self.logit_processor(sliced_input_ids_2d, logits_2d, batch_data["logits_processor_args"])' in source
    )
    assert "torch.argmax" in inspect.getsource(model_runner.ModelRunner._sample)


def test_the_running_manager_has_what_is_set_on_it(loaded: LoadedModel, tiny_tokenizer: Any) -> None:
    engine = TransformersEngine(loaded, EngineLimits(8, 64, 2048))
    try:
        ask_all(engine, [GenerationRequest(tokens_of(tiny_tokenizer, "a"), 2)])
        processor = engine._manager.batch_processor
        assert processor is not None
        assert processor.logit_processor is engine._manager.logit_processor
        assert not processor.cache.use_prefix_sharing
        assert not processor.use_async_batching
        assert not processor.model_runner.pad_inputs
        assert isinstance(processor.inputs_and_outputs, input_outputs.ContinuousBatchingIOs)
    finally:
        engine.stop()
