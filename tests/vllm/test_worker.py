"""The workers' adapters under vLLM's own layers, on a CPU. Several workers are played one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rayft.artifacts import AdapterArtifact
from rayft.errors import ResourceError
from rayft.kernels.grouped_lora import ALIGNED, DECODE, UNIT
from rayft.kernels.segment_lora import SlotFactors
from rayft.methods.base import LoraFactors
from rayft.serving.engine.vllm.image import factors_of
from rayft.serving.engine.vllm.plugin import ANSWERS
from rayft.serving.engine.vllm.shard import parts_of
from tests.unit.serving.adapters import random_adapter, window_chain
from tests.vllm.layers import (
    BYTES,
    FUSED,
    MLP,
    SHAPES,
    Quantised,
    activate,
    check,
    configuration,
    inputs_of,
    linear,
    load,
    managed,
    new_model,
    new_weights,
    outputs_of,
    until_loaded,
    worker,
    written,
)

LoRARequest = pytest.importorskip("vllm.lora.request").LoRARequest
mixin = pytest.importorskip("vllm.v1.worker.lora_model_runner_mixin")


def some(artifact: AdapterArtifact, *names: str) -> AdapterArtifact:
    """Return an adapter of the layers whose names end so."""
    return AdapterArtifact({name: layer for name, layer in artifact.modules.items() if name.endswith(names)})


def adapters() -> dict[int, AdapterArtifact]:
    """Adapters of different ranks and kinds by number; the last one selects two inputs of the first half."""
    few = {
        name: LoraFactors(torch.eye(inputs)[[3, 1]], torch.randn(outputs, 2), 1.5, (3, 1))
        for name, (outputs, inputs) in SHAPES.items()
    }
    return {
        5: random_adapter("five", SHAPES, rank=4),
        6: some(random_adapter("six", SHAPES, rank=19), "q_proj", "v_proj", "down_proj"),
        9: random_adapter("nine", SHAPES, rank=6, selector=True),
        12: window_chain("twelve", SHAPES, rank=7),
        1500: AdapterArtifact(few),
    }


MIXED = [0, 5, 9, 6, 12, 6, 1500, 5, 0, 77]
"""Numbers of tokens' adapters; 77 is not loaded."""


@pytest.mark.parametrize("method", [linear.UnquantizedLinearMethod, Quantised], ids=["dense", "quantised"])
@pytest.mark.parametrize("tokens", [len(MIXED), DECODE + 5], ids=["decode", "prefill"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_each_token_has_its_own_adapter(
    workers: int, tokens: int, method: type[Any], play: Callable[[int, int], None]
) -> None:
    weights, known, x = new_weights(), adapters(), inputs_of(tokens)
    numbers = (MIXED * DECODE)[:tokens]
    results, bases = [], []
    for rank in range(workers):
        play(rank, workers)
        model = new_model(weights)
        for fused in FUSED:
            layer: Any = model.get_submodule(fused)
            layer.quant_method = method()
            if method is Quantised:
                layer.weight.data /= 2
        manager = managed(model)
        for number, artifact in known.items():
            assert load(manager, number, artifact) == []
        activate(manager, numbers)
        results.append(outputs_of(model, x))
        activate(manager, [0] * tokens)
        bases.append(outputs_of(model, x))
        manager.remove_all_adapters()
        assert manager.free_bytes == BYTES
    check(results, x, weights, numbers, {number: factors_of(known[number]) for number in known})
    check(bases, x, weights, numbers, {})


def test_a_step_without_adapters_is_exactly_vllms() -> None:
    weights, x = new_weights(), inputs_of(5)
    expected = outputs_of(new_model(weights), x)
    model = new_model(weights)
    manager = managed(model)
    assert load(manager, 5, adapters()[5]) == []
    activate(manager, [5] * 5)
    assert not torch.equal(outputs_of(model, x)[f"{MLP}.router"], expected[f"{MLP}.router"])
    activate(manager, [0] * 5)
    assert all(torch.equal(y, expected[fused]) for fused, y in outputs_of(model, x).items())


@pytest.mark.parametrize("numbers", [[77] * 5, [5000] * 5, [77, 0, 5000, 5, 0]], ids=str)
def test_a_number_that_is_not_loaded_counts_as_the_base(numbers: list[int]) -> None:
    weights, x = new_weights(), inputs_of(5)
    model = new_model(weights)
    manager = managed(model)
    five = adapters()[5]
    assert load(manager, 5, five) == []
    activate(manager, [5] * 5)
    outputs_of(model, x)
    activate(manager, numbers)
    check([outputs_of(model, x)], x, weights, numbers, {5: factors_of(five)})


def test_an_adapter_is_served_from_its_folder(tmp_path: Path) -> None:
    weights, x = new_weights(), inputs_of(3)
    model = new_model(weights)
    manager = managed(model)
    known = {}
    for number, artifact in adapters().items():
        folder = artifact.save(tmp_path / f"{number}")
        known[number] = LoRARequest(f"{number}", number, str(folder))
    assert [manager.add_adapter(known[5]) for _ in range(2)] == [True, False]
    # The second one is loaded by the step that needs it. The folder of the third one is missing.
    missing = LoRARequest("missing", 8, str(tmp_path / "missing"))
    activate(manager, [5, 9, 8], [known[5], known[9], missing])
    assert manager.list_adapters() == {5, 9}
    saved = {number: factors_of(AdapterArtifact.load(tmp_path / f"{number}")) for number in (5, 9)}
    check([outputs_of(model, x)], x, weights, [5, 9, 8], saved)


def test_a_view_has_the_first_ranks_of_its_adapter() -> None:
    weights, x = new_weights(), inputs_of(4)
    model = new_model(weights)
    manager = managed(model)
    known = adapters()
    for number in (5, 9):
        assert load(manager, number, known[number]) == []
    used = manager.free_bytes
    assert [manager.view(20, 5, 3), manager.view(2100, 9, 1)] == [[], []]
    assert manager.free_bytes == used, "a view has no memory of its own"
    expected = {
        number: {
            name: SlotFactors(
                b=found.b[:, :rank],
                scale=found.scale,
                a=None if found.a is None else found.a[:rank],
                columns=None if found.columns is None else found.columns[:rank],
            )
            for name, found in factors_of(known[of]).items()
        }
        for number, of, rank in ((20, 5, 3), (2100, 9, 1))
    } | {5: factors_of(known[5])}
    activate(manager, [20, 2100, 5, 0])
    check([outputs_of(model, x)], x, weights, [20, 2100, 5, 0], expected)
    assert [manager.remove_adapter(number) for number in (20, 20, 5)] == [True, False, True]
    activate(manager, [20, 2100, 5, 0])
    del expected[20], expected[5]
    check([outputs_of(model, x)], x, weights, [20, 2100, 5, 0], expected)
    manager.remove_all_adapters()
    assert manager.free_bytes == BYTES


def test_another_adapter_is_loaded_where_one_was() -> None:
    weights, x = new_weights(), inputs_of(3)
    model = new_model(weights)
    manager = managed(model)
    for turn in range(5):
        artifact = random_adapter(f"turn {turn}", SHAPES, rank=3 + turn, selector=turn % 2 == 1)
        assert load(manager, 7, artifact) == []
        activate(manager, [7, 0, 7])
        check([outputs_of(model, x)], x, weights, [7, 0, 7], {7: factors_of(artifact)})
        assert manager.remove_adapter(7)
        assert manager.free_bytes == BYTES


def test_the_number_of_an_adapter_that_is_gone_is_not_the_next_ones() -> None:
    weights, x = new_weights(), inputs_of(3)
    model = new_model(weights)
    manager = managed(model)
    known = adapters()
    assert load(manager, 5, known[5]) == []
    assert manager.remove_adapter(5)
    assert load(manager, 9, known[9]) == []
    activate(manager, [5, 9, 5])
    check([outputs_of(model, x)], x, weights, [5, 9, 5], {9: factors_of(known[9])})


def test_rows_are_aligned_and_padded_with_zeros_as_the_kernels_need() -> None:
    manager = managed(new_model(new_weights()))
    # NaN, as left by another adapter.
    manager._arena.memory.fill_(255)
    for number, artifact in adapters().items():
        assert load(manager, number, artifact) == []
    found = [factors for layer in manager._table.layers for factors in layer.values()]
    assert len(found) == sum(len(artifact.modules) for artifact in adapters().values())
    memory = manager._arena.memory
    places = range(memory.data_ptr(), memory.data_ptr() + len(memory))
    for factors in found:
        (outputs, rank), width = factors.b.shape, factors.b.stride(0)
        assert width % UNIT == factors.b.data_ptr() % ALIGNED == 0
        assert not factors.b.as_strided((outputs, width), (width, 1))[:, rank:].any()
        second = factors.columns if factors.a is None else factors.a
        assert second.is_contiguous()
        assert second.data_ptr() % ALIGNED == 0
        assert factors.b.data_ptr() in places, "B is copied"
        assert second.data_ptr() in places, "A is copied"


def test_an_adapter_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker, "PIECE", 1536)
    weights, x = new_weights(), inputs_of(3)
    model = new_model(weights)
    manager = managed(model)
    known = adapters()
    for number in (5, 6, 9):
        assert load(manager, number, known[number]) == []
    activate(manager, [5, 6, 9])
    check([outputs_of(model, x)], x, weights, [5, 6, 9], {n: factors_of(known[n]) for n in (5, 6, 9)})
    manager.remove_all_adapters()
    # From their folders.
    for number in (5, 6, 9):
        folder = known[number].save(tmp_path / f"{number}")
        assert manager.add_adapter(LoRARequest(f"{number}", number, str(folder)))
        known[number] = AdapterArtifact.load(folder)
    activate(manager, [9, 6, 5])
    check([outputs_of(model, x)], x, weights, [9, 6, 5], {n: factors_of(known[n]) for n in (5, 6, 9)})


def reshaped(name: str, outputs: int, inputs: int, columns: tuple[int, ...] | None = None) -> AdapterArtifact:
    """Return an adapter with one layer of another shape."""
    good = random_adapter("good", SHAPES, rank=2)
    factors = LoraFactors(torch.randn(2, inputs), torch.randn(outputs, 2), 1.0, columns)
    return AdapterArtifact({**good.modules, name: factors})


REFUSED = {
    "outputs": (reshaped(f"{MLP}.router", 7, 32), "ArtifactError", r"router is 6x32.*its own base"),
    "inputs": (reshaped(f"{MLP}.down_proj", 32, 32), "ArtifactError", r"down_proj is 32x48"),
    "columns": (reshaped(f"{MLP}.router", 6, 32, (0, 32)), "ArtifactError", r"router is 6x32"),
    "negative columns": (reshaped(f"{MLP}.router", 6, 32, (0, -1)), "ArtifactError", r"router is 6x32"),
    "layer": (reshaped("lm_head", 64, 32), "ArtifactError", r"no linear layer lm_head.*engine: cpu"),
    "rank": (random_adapter("wide", SHAPES, rank=257), "ArtifactError", r"rank 257.*up to 256.*squeeze"),
    "room": (random_adapter("big", SHAPES, rank=120), "NoRoomError", r"does not fit.*raise device_bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_refused_leaves_nothing(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manager = managed(new_model(new_weights()), configuration(200_000))
    before = manager.free_bytes
    artifact, kind, message = REFUSED[case]
    with monkeypatch.context() as context:
        # A folder can't hold all of them.
        context.setattr(AdapterArtifact, "load", lambda _: artifact)
        manager.begin(4, str(tmp_path))
        problem = until_loaded(manager, 4)
    assert problem[0] == kind
    assert re.search(message, problem[1]), problem[1]
    assert load(manager, 5, artifact) == problem, "the engine says the same"
    # The engine asks again if another worker was not ready.
    assert manager.loaded(4) == problem
    assert manager.list_adapters() == set()
    assert manager.free_bytes == before
    assert not manager.remove_adapter(4)
    assert load(manager, 4, random_adapter("good", SHAPES, rank=2)) == []
    assert manager.loaded(4) == [], "the former problem is gone"


def test_a_file_that_can_not_be_read_is_a_problem_too(tmp_path: Path) -> None:
    manager = managed(new_model(new_weights()))
    (tmp_path / "broken").write_bytes(b"no image")
    with written(manager, adapters()[5]) as path:
        (tmp_path / "short").write_bytes(path.read_bytes()[:-1000])
    for number, name in enumerate(("missing", "broken", "short"), 3):
        manager.begin(number, str(tmp_path / name))
        assert until_loaded(manager, number)[0] == "ResourceError"
        assert manager.free_bytes == BYTES


def test_a_failed_copy_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no pinned memory")

    manager = managed(new_model(new_weights()))
    monkeypatch.setattr(manager, "_copy", fail)
    assert load(manager, 3, adapters()[5]) == ["ResourceError", "RuntimeError: no pinned memory"]
    assert manager.free_bytes == BYTES


def test_without_a_free_slot_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SLOTS", 3)
    manager = managed(new_model(new_weights()))
    one = adapters()[5]
    assert [load(manager, number, one) for number in (1, 2)] == [[], []]
    before = manager.free_bytes
    for problem in (load(manager, 3, one), manager.view(4, 1, 2)):
        assert problem[0] == "NoRoomError"
        assert "2 adapters are loaded" in problem[1]
    assert manager.free_bytes == before
    assert manager.remove_adapter(1)
    assert load(manager, 3, one) == []


def test_an_adapter_that_is_removed_while_it_is_read_leaves_nothing() -> None:
    manager = managed(new_model(new_weights()))
    for number, artifact in adapters().items():
        with written(manager, artifact) as path:
            manager.begin(number, str(path))
            manager.remove_adapter(number)
            manager._threads.submit(lambda: None).result()
    assert manager.free_bytes == BYTES
    assert manager.list_adapters() == set()


def test_an_adapter_that_can_not_be_added_is_an_error(tmp_path: Path) -> None:
    manager = managed(new_model(new_weights()))
    folder = random_adapter("other", {"other": (4, 4)}).save(tmp_path / "other")
    with pytest.raises(ResourceError, match="no linear layer other"):
        manager.add_adapter(LoRARequest("other", 3, str(folder)))
    assert manager.list_adapters() == set()


def test_dummies_decide_whether_a_step_has_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM captures graphs of steps with and without adapters by them."""
    monkeypatch.setattr(worker, "SLOTS", 9)
    weights, x = new_weights(), inputs_of(16)
    model = new_model(weights)
    manager = managed(model, configuration(captured=[16]))
    runner = mixin.LoRAModelRunnerMixin()
    runner.lora_manager = manager
    config = SimpleNamespace(max_loras=8, max_lora_rank=256)
    tokens = np.ones(16, dtype=np.int32)
    with runner.maybe_setup_dummy_loras(config):
        assert len(runner.list_loras()) == 8
        with runner.maybe_setup_dummy_loras(config, remove_lora=False):
            assert len(runner.list_loras()) == 8
        for count in (0, 9, 0, 4):
            with runner.maybe_select_dummy_loras(config, tokens, num_active_loras=count):
                assert manager._batch.active is (count > 0)
                check([outputs_of(model, x)], x, weights, [0] * 16, {})
    assert not runner.list_loras()
    assert manager.free_bytes == BYTES


def test_the_runners_calls_are_answered(tmp_path: Path) -> None:
    runner = mixin.LoRAModelRunnerMixin()
    runner.lora_manager = managed(new_model(new_weights()))
    folder = adapters()[5].save(tmp_path / "five")
    assert runner.add_lora(LoRARequest("five", 5, str(folder)))
    assert runner.list_loras() == {5}
    assert [runner.pin_lora(number) for number in (5, 6)] == [True, False]
    assert [runner.remove_lora(5), runner.remove_lora(5)] == [True, False]
    runner.maybe_remove_all_loras(SimpleNamespace())
    assert not runner.lora_manager.supports_tower_connector_lora()


def test_the_extension_calls_the_runners_adapters() -> None:
    extension = worker.WorkerExtension()
    manager = managed(new_model(new_weights()))
    extension.model_runner = SimpleNamespace(lora_manager=manager)
    with written(manager, adapters()[5]) as path:
        extension.rayft_load(5, str(path))
        until_loaded(SimpleNamespace(loaded=extension.rayft_loaded), 5)
    assert extension.rayft_view(6, 5, 2) == []
    assert manager.list_adapters() == {5, 6}
    assert extension.rayft_unload([]) < BYTES
    assert extension.rayft_unload([5, 6]) == BYTES


class _OwnForward(linear.ReplicatedLinear):  # type: ignore[misc, name-defined]
    """A layer that reads its weight itself."""

    def forward(self, x: torch.Tensor) -> Any:
        return x @ self.weight.T


def test_layers_that_can_not_have_adapters_are_left_out(play: Callable[[int, int], None]) -> None:
    names = [f"in_{part}" for part in range(5)]
    for workers, expected in ((1, {"unlisted": 16, "plain": 8}), (2, {"plain": 4})):
        play(0, workers)
        model = nn.Module()
        model.packed_modules_mapping = {"five": names}  # type: ignore[assignment]
        model.lm_head = linear.ReplicatedLinear(8, 64, bias=False)
        model.five = linear.MergedColumnParallelLinear(8, [8] * 5, bias=False)
        model.unlisted = linear.MergedColumnParallelLinear(8, [8, 8], bias=False)
        model.plain = linear.ColumnParallelLinear(8, 8, bias=False)
        model.other = nn.Linear(8, 8)
        model.own = _OwnForward(8, 8, bias=False)
        # As attention over a latent has it.
        model.attention = nn.Module()
        model.attention.kv_lora_rank = 4  # type: ignore[assignment]
        model.attention.kv_b_proj = linear.ColumnParallelLinear(8, 8, bias=False)
        found = {part.name: part.size for _, _, parts in worker.fused_layers(model) for part in parts}
        assert found == expected


def test_a_worker_reports_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    managed(new_model(new_weights()))
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setenv(ANSWERS, str(tmp_path))
    managed(new_model(new_weights()))
    (answer,) = tmp_path.glob("*.json")
    assert {part.name: part.shape for part in parts_of(answer.read_text())} == SHAPES


def test_too_little_memory_is_the_users_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "Arena", fail)
    with pytest.raises(ResourceError, match=r"1,048,576 bytes of adapters.*lower device_bytes"):
        managed(new_model(new_weights()))
