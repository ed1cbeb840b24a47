"""Landscapes: many points in one forward against each point multiplied out, and what is put back."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from rayft.analysis import landscape
from rayft.analysis.directions import random_directions, trajectory_directions
from rayft.analysis.landscape import grid_1d, grid_2d, grid_around, losses, repeated
from rayft.analysis.record import Landscape
from rayft.data.example import Example, Message
from rayft.data.pack import Batch, ClassBatch, ImageBatch, collate_rows, rows_of
from rayft.data.template import encode_all
from rayft.errors import BaseMismatchError, DataError, MethodError, ModelError
from rayft.evaluate.loss import mean_loss, target_losses
from rayft.methods.base import AdapterLinear, LoraFactors, MethodConfig
from rayft.models.inject import factors_of, inject, refit, wrap
from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.models.tiny import TINY
from rayft.numerics import assert_close, generator
from tests.unit.data.pictures import example, noise

TASKS = {"tiny-bert": "sequence_classification", "tiny-vit": "image_classification"}


def load(folder, name: str, dtype: torch.dtype = torch.float64) -> LoadedModel:
    config = {"name": str(folder), "task": TASKS.get(name, "causal_lm"), "num_labels": 3}
    if name not in TASKS:
        del config["num_labels"]
    return load_model(ModelConfig.model_validate(config), dtype)


def batches_for(loaded: LoadedModel, name: str) -> list:
    """Two batches of different shapes; texts of the first share rows."""
    if name == "tiny-vit":
        examples = [example(noise(number), number % 3) for number in range(5)]
    elif name == "tiny-bert":
        examples = [Example(text="word " * n, label=n % 3, label_name="x") for n in (1, 3, 2, 5, 4)]
    else:
        examples = [
            Example(messages=(Message("user", "ab" * n), Message("assistant", "cd" * (4 - n % 3))))
            for n in (1, 4, 2, 6, 3)
        ]
    encoded = encode_all(examples, loaded.tokenizer, 120)
    rows = rows_of(encoded, 120)
    cut = 2 if name in TASKS else max(1, len(rows) - 1)
    return [collate_rows(rows[:cut], 0), collate_rows(rows[cut:], 0)]


def adapter_for(model, rank: int = 2) -> dict[str, LoraFactors]:
    found = {}
    for name, (outputs, inputs) in linear_shapes(model).items():
        draw = generator("adapter", name)
        a = torch.randn(rank, inputs, generator=draw) / math.sqrt(inputs)
        b = 0.3 * torch.randn(outputs, rank, generator=draw)
        found[name] = LoraFactors(a.double(), b.double(), 0.7)
    return found


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gpt2", "tiny-bert", "tiny-vit"])
def case(request, tmp_path_factory):
    loaded = load(TINY[request.param](tmp_path_factory.mktemp("model")), request.param)
    return loaded.model, batches_for(loaded, request.param)


@pytest.fixture
def llama(tiny_folder):
    loaded = load(tiny_folder, "tiny-llama")
    return loaded.model, batches_for(loaded, "tiny-llama")


def multiplied_out(model, batches, modules, directions, point) -> float:
    """The loss of a copy whose weights hold the point."""
    wrap(model)
    moved = copy.deepcopy(model)
    for name, factors in modules.items():
        change = factors.delta()
        for share, direction in zip(point, directions, strict=True):
            along = direction[name]
            change = change + share * (along.delta() if isinstance(along, LoraFactors) else along)
        moved.get_submodule(name).matrix.data += change
    loss, targets = mean_loss(moved, batches)
    return loss / targets


def check_points(model, batches, modules, directions, points, at_once: int = 3) -> None:
    found = losses(model, batches, modules, directions, points, at_once)
    expected = [
        multiplied_out(model, batches, modules, directions, point) for point in points.double().tolist()
    ]
    assert len({round(value, 3) for value in expected}) > 1
    assert_close(found, torch.tensor(expected, dtype=torch.float64), torch.float32, 100)


def test_points_evaluated_together_equal_updates_multiplied_out(case) -> None:
    model, batches = case
    modules = adapter_for(model)
    directions = random_directions(modules, 2, seed=3)
    points = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-2.0, 0.0], [0.0, 1.5]])
    check_points(model, batches, modules, directions, points)


def test_along_one_direction_of_some_modules(llama) -> None:
    model, batches = llama
    modules = adapter_for(model)
    (whole,) = random_directions(modules, 1, seed=3)
    kept = dict(list(whole.items())[:4])
    points = grid_1d(4, 1.5)
    some = losses(model, batches, modules, [kept], points, 4)
    filled = {name: kept.get(name, torch.zeros_like(value)) for name, value in whole.items()}
    assert_close(some, losses(model, batches, modules, [filled], points, 4), torch.float32, 100)
    check_points(model, batches, modules, [whole], points)


def test_factored_directions_and_those_of_too_many_ranks(llama) -> None:
    model, batches = llama
    ends = [adapter_for(model, rank) for rank in (1, 3, 2)]
    directions = trajectory_directions(ends).directions
    low = [
        d for d in directions[0].values() if d.rank * sum((d.b.shape[0], d.a.shape[1])) < d.delta().numel()
    ]
    assert len(low) > 0
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, -3.0]])
    check_points(model, batches, ends[-1], directions, points)
    # More ranks than the dense matrix has numbers to spare: the adapter multiplies it out.
    wide = {
        name: LoraFactors(torch.cat([d.a] * 40), torch.cat([d.b / 40] * 40, 1), d.scale)
        for name, d in directions[0].items()
    }
    check_points(model, batches, ends[-1], [wide, directions[1]], points)


def test_a_path_is_found_again_at_its_own_coordinates(llama) -> None:
    model, batches = llama
    # Three points lie in their plane exactly.
    path = [adapter_for(model, rank) for rank in (1, 2, 3)]
    found = trajectory_directions(path)
    at = losses(model, batches, path[-1], found.directions, found.coordinates, 3)
    expected = [multiplied_out(model, batches, modules, [], []) for modules in path]
    assert_close(at, torch.tensor(expected, dtype=torch.float64), torch.float32, 100)


def test_the_point_0_has_the_adapters_loss(case) -> None:
    model, batches = case
    modules = adapter_for(model)
    inject(model, MethodConfig(name="lora", rank=1), seed=0)
    refit(model, modules)
    loss, targets = mean_loss(model, batches)
    points = grid_2d(3, 1.0)
    at = losses(model, batches, modules, random_directions(modules, 2, 1), points, 9)
    assert points[4].tolist() == [0, 0]
    assert_close(at[4], torch.tensor(loss / targets, dtype=torch.float64), torch.float32, 100)


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_how_many_points_go_together_changes_nothing(llama, at_once: int) -> None:
    model, batches = llama
    modules = adapter_for(model)
    directions, points = random_directions(modules, 2, 1), grid_2d(2, 1.0)
    expected = losses(model, batches, modules, directions, points, 4)
    assert_close(losses(model, batches, modules, directions, points, at_once), expected, torch.float32, 100)


@pytest.mark.parametrize("by", [4.0, -3.0])
def test_rescaled_factors_have_the_same_surface(llama, by: float) -> None:
    model, batches = llama
    modules = adapter_for(model)
    other = {name: LoraFactors(f.a / by, f.b * by, f.scale) for name, f in modules.items()}
    points = grid_2d(3, 1.0)
    one, same = (
        losses(model, batches, given, random_directions(given, 2, 1), points, 9) for given in (modules, other)
    )
    assert_close(same, one, torch.float32, 100)


def test_a_16_bit_model_keeps_small_updates(tiny_folder) -> None:
    loaded, exact = load(tiny_folder, "tiny-llama", torch.bfloat16), load(tiny_folder, "tiny-llama")
    batches = batches_for(loaded, "tiny-llama")
    modules = {
        name: LoraFactors(f.a.bfloat16(), f.b.bfloat16(), f.scale / 3000)
        for name, f in adapter_for(loaded.model).items()
    }
    directions, points = random_directions(modules, 1, 1), torch.tensor([[-20.0], [20.0]])
    expected = losses(exact.model, batches, modules, directions, points, 2).diff()
    found = losses(loaded.model, batches, modules, directions, points, 2).diff()
    low, high = (
        multiplied_out(loaded.model, batches, modules, directions, point) for point in points.tolist()
    )
    # Multiplied out, most of updates this small is lost in the weights' rounding.
    assert float((found - expected).abs()) < 0.5 * abs(high - low - float(expected))


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_in_the_model_are_restored(llama, monkeypatch, fails: bool) -> None:
    model, batches = llama
    inject(model, MethodConfig(name="lora", rank=3, targets=["q_proj"], dropout=0.5), seed=0)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}
    adapters = {name: layer.adapter for name, layer in before.items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    assert any(adapters.values())
    assert not all(adapters.values())
    modules = {name: f for name, f in adapter_for(model).items() if "v_proj" in name}
    directions = random_directions(modules, 1, 0)

    def broken(*args):
        raise BrokenError

    if fails:
        monkeypatch.setattr(landscape, "target_losses", broken)
        with pytest.raises(BrokenError):
            losses(model, batches, modules, directions, grid_1d(3, 1.0), 2)
    else:
        # The adapter that was in has no part in the surface.
        found = losses(model, batches, modules, directions, grid_1d(3, 1.0), 2)
        factors_of(model)["model.layers.0.self_attn.q_proj"].b.fill_(1.0)
        assert torch.equal(losses(model, batches, modules, directions, grid_1d(3, 1.0), 2), found)
    assert {name: layer.adapter for name, layer in before.items()} == adapters
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_memory_that_runs_out_halves_the_points(llama, monkeypatch) -> None:
    model, batches = llama
    modules = adapter_for(model)
    directions, points = random_directions(modules, 1, 0), grid_1d(7, 1.0)
    expected = losses(model, batches, modules, directions, points, 7)
    rows, seen = [len(batch.input_ids) for batch in batches], []

    def small(model, batch):
        seen.append(len(batch.input_ids))
        if len(batch.input_ids) > 2 * max(rows):
            raise torch.OutOfMemoryError
        return target_losses(model, batch)

    monkeypatch.setattr(landscape, "target_losses", small)
    assert_close(losses(model, batches, modules, directions, points, 6), expected, torch.float32, 100)
    assert seen[:2] == [6 * rows[0], 3 * rows[0]]

    def none(model, batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(landscape, "target_losses", none)
    with pytest.raises(torch.OutOfMemoryError):
        losses(model, batches, modules, directions, points, 6)


def test_mistakes_are_refused(llama) -> None:
    model, batches = llama
    modules = adapter_for(model)
    directions, points = random_directions(modules, 1, 0), grid_1d(3, 1.0)
    with pytest.raises(DataError, match="1 coordinates"):
        losses(model, batches, modules, directions, grid_2d(2, 1.0), 1)
    with pytest.raises(DataError, match="at least one batch"):
        losses(model, [], modules, directions, points, 1)
    with pytest.raises(BaseMismatchError):
        losses(model, batches, {"elsewhere": next(iter(modules.values()))}, directions, points, 1)
    inject(model, MethodConfig(name="paca", rank=2), seed=0)
    with pytest.raises(MethodError, match="can't be put aside"):
        losses(model, batches, modules, directions, points, 1)


def test_a_layer_that_mixes_rows_is_refused(llama) -> None:
    model, batches = llama
    modules = adapter_for(model)
    wrap(model)
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[:-1],))
    with pytest.raises(ModelError, match=r"down_proj gets .* points_at_once=1"):
        losses(model, batches, modules, random_directions(modules, 1, 0), grid_1d(3, 1.0), 3)
    handle.remove()


def test_copies_of_a_batch_have_the_losses_of_the_batch(case) -> None:
    model, batches = case
    for batch in batches:
        once = target_losses(model, batch)
        copies = repeated(batch, 3)
        assert {len(copies.input_ids)} == {3 * len(batch.input_ids)}
        for share in target_losses(model, copies).view(3, -1):
            assert_close(share, once, torch.float32, 100)


def test_all_fields_of_a_batch_are_copied() -> None:
    packed = Batch(
        input_ids=torch.arange(6).view(2, 3),
        position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]]),
        offsets=torch.tensor([0, 2, 3, 6], dtype=torch.int32),
        completion_index=torch.tensor([0, 4]),
        targets=torch.tensor([1, 5]),
    )
    copies = repeated(packed, 2)
    assert copies.completion_index.tolist() == [0, 4, 6, 10]
    assert copies.targets.tolist() == [1, 5, 1, 5]
    assert torch.equal(copies.input_ids.flatten()[copies.completion_index + 1], copies.targets)
    assert copies.offsets.tolist() == [0, 2, 3, 6, 8, 9, 12]
    for field in ("input_ids", "position_ids"):
        assert torch.equal(getattr(copies, field), torch.cat([getattr(packed, field)] * 2))
    texts = ClassBatch(torch.arange(6).view(2, 3), torch.ones(2, 3).long(), torch.tensor([0, 2]))
    images = ImageBatch(torch.rand(2, 1, 4, 5), torch.tensor([1, 0]))
    for batch in (texts, images):
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            assert torch.equal(getattr(repeated(batch, 3), field.name), torch.cat([value] * 3))


def test_grids_have_the_adapter_in_the_middle() -> None:
    assert grid_1d(3, 2.0).tolist() == [[-2], [0], [2]]
    assert grid_2d(2, 1.0).tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    around = grid_around(torch.tensor([[0.0, 0.0], [4.0, -2.0]]), 2, margin=0.5)
    assert around.tolist() == [[-2, -3], [-2, 1], [6, -3], [6, 1]]


def surface(**values) -> Landscape:
    plain = {
        "kind": "trajectory",
        "norm": None,
        "coordinates": ((0.1, 1 / 3), (-2.0, 1e-17)),
        "losses": (math.pi, math.inf),
        "seed": 3,
        "targets": 11,
        "path": ((0.5, 0.25), (0.0, 0.0)),
        "explained": (0.7, 0.2),
    }
    return Landscape(**{**plain, **values})


@pytest.mark.parametrize("side", [5, 6])
def test_the_rise_is_over_the_adapter(side: int) -> None:
    points = [tuple(point) for point in grid_2d(side, 1.0).tolist()]
    bowl = surface(coordinates=tuple(points), losses=tuple(2.0 + x * x + 3 * y * y for x, y in points))
    axis = np.linspace(-1, 1, side)
    lowest = 0.0 if side == 5 else 4 * 0.2**2
    assert bowl.rise == pytest.approx(4 * np.mean(axis**2) - lowest)
    assert surface(losses=(1.0, math.inf)).rise == math.inf


def test_json_gives_back_exactly_what_was_saved() -> None:
    for saved in (surface(), surface(kind="random", norm="update", path=(), explained=())):
        text = json.dumps(saved.to_json(), allow_nan=False)
        assert Landscape.from_json(json.loads(text)) == saved
    broken = Landscape.from_json(json.loads(json.dumps(surface(losses=(math.nan, 1.0)).to_json())))
    assert math.isnan(broken.losses[0])


@pytest.mark.parametrize("change", [{"losses": [1.0]}, {"losses": None}, {"other": 1}, {"kind": "none"}])
def test_data_that_is_no_landscape_is_refused(change) -> None:
    with pytest.raises(DataError, match="measure it again"):
        Landscape.from_json({**surface().to_json(), **change})
