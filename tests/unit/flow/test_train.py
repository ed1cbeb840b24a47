"""Which run a configuration describes, and what is refused before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.config import parse, read_yaml
from rayft.errors import BaseMismatchError, ConfigError, MethodError
from rayft.flow.config import TrainConfig
from rayft.flow.data import look
from rayft.flow.sweep.preflight import preflight
from rayft.flow.train import as_sweep, ignored_space
from rayft.methods.base import LoraFactors
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.sweep.result import TrialResult, trial_folder, write_result
from rayft.sweep.space import points
from rayft.train.run import RunConfig
from rayft.train.trainer import TrainResult

BASE = """
name: one
model: {name: tiny-llama}
data:
  source: reasoning_gym
  name: needle_haystack
  params: {min_num_statements: 1, max_num_statements: 2}
  train: 8
  val: 2
  test: 2
optim: {steps: 8, lr: 3e-3}
seed: 5
"""


def config(text: str = "", **changes: Any) -> TrainConfig:
    return parse(TrainConfig, {**read_yaml(BASE + text), **changes})


def run_of(config: TrainConfig) -> RunConfig:
    """Return the only trial of the sweep that a run is."""
    sweep = as_sweep(config, False)
    (point,) = points(sweep.sweep, sweep.run(False))
    return point.run


def test_a_run_is_what_method_optim_and_seed_say() -> None:
    method = "{name: c3la, rank: 4, alpha: 3.0, targets: [q_proj], dropout: 0.1, chain: {links: 2}}"
    run = run_of(config(f"method: {method}"))
    assert run.method == config(f"method: {method}").method
    assert (run.optim.lr, run.optim.steps, run.seed) == (3e-3, 8, 5)
    assert run_of(config("method: {rank: 8}\nanneal: {rank: 2}")).final_rank == 2


def test_without_a_method_it_is_lora_at_rank_16() -> None:
    run = run_of(config())
    assert (run.method.name, run.method.rank) == ("lora", 16)


def test_a_sweep_of_one_trial_is_that_run() -> None:
    run = run_of(config("sweep: {methods: {cla: {ranks: [4], lr: [2e-2]}}, seeds: [3]}"))
    assert (run.method.name, run.method.rank, run.optim.lr, run.seed) == ("cla", 4, 2e-2, 3)


SEVERAL = "sweep: {methods: {lora: {ranks: [4, 8], lr: [2e-2]}}, executor: isolated}"


def test_a_space_of_several_trials_needs_a_method() -> None:
    with pytest.raises(ConfigError, match=r"has 2 trials, .*--set method.name=lora --set method.rank=4"):
        as_sweep(config(SEVERAL))
    chosen = config(f"{SEVERAL}\nmethod: {{rank: 32}}")
    run = run_of(chosen)
    assert (run.method.rank, run.optim.lr, run.seed) == (32, 3e-3, 5)
    assert as_sweep(chosen).sweep.executor == "isolated"
    assert "sweep is not used" in ignored_space(chosen)
    assert ignored_space(config()) == ""


def test_rayft_data_needs_no_sweep(prepared: None) -> None:
    assert look(config(), 0).rows > 0


def test_a_mistake_is_found_before_anything_starts() -> None:
    with pytest.raises(MethodError, match="unknown method 'lroa'; did you mean 'lora'"):
        as_sweep(config("method: {name: lroa}"))
    with pytest.raises(MethodError, match="anneal is for lora and lora_plus"):
        run_of(config("method: {name: cla}\nanneal: {rank: 2}"))


@pytest.fixture
def adapter(tmp_path: Path, prepared: None) -> AdapterArtifact:
    """A LoRA of rank 3 of two layers of the tiny model, whose base is not recorded."""
    shapes = linear_shapes(load_skeleton(ModelConfig(name="tiny-llama")))
    modules = {
        name: LoraFactors(torch.ones(3, inputs), torch.zeros(outputs, 3), 2.0)
        for name, (outputs, inputs) in list(shapes.items())[:2]
    }
    return AdapterArtifact(modules, meta=ArtifactMeta())


def starting(adapter: AdapterArtifact, folder: Path, text: str = "") -> TrainConfig:
    adapter.save(folder / "start")
    return config(text, start=str(folder / "start"), output=str(folder / "out"))


def test_a_run_takes_the_rank_of_the_adapter_that_it_starts_from(
    adapter: AdapterArtifact, tmp_path: Path
) -> None:
    plan = preflight(as_sweep(starting(adapter, tmp_path)))
    (point,) = plan.points
    assert point.name.startswith("lora-r3-")
    assert point.run.start == str(tmp_path / "start")
    assert plan.identity.start == adapter.content_hash


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("method: {rank: 16}", ConfigError, r"has rank 3, and method\.rank is 16; set method\.rank: 3$"),
        ("method: {name: cla}", MethodError, "start is for lora and lora_plus, not for 'cla'"),
        ("method: {name: lora, rank: 2}", ConfigError, "or `rayft squeeze` the adapter to rank 2 first"),
        ("method: {targets: [q_proj]}", ConfigError, "method.targets does nothing"),
        (
            "sweep: {methods: {lora: {ranks: [3, 16]}}}\nmethod: {name: paca}",
            MethodError,
            "start is for lora and lora_plus",
        ),
        ("sweep: {methods: {lora: {}}}", ConfigError, "has rank 3, and lora-r16.* trains at rank 16"),
    ],
)
def test_a_run_that_does_not_fit_its_start_is_refused(
    adapter: AdapterArtifact, tmp_path: Path, text: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        preflight(as_sweep(starting(adapter, tmp_path, text)))
    assert not (tmp_path / "out").exists()


def test_a_start_for_another_base_is_refused(adapter: AdapterArtifact, tmp_path: Path) -> None:
    other = AdapterArtifact(adapter.modules, meta=ArtifactMeta(base_fingerprint="0" * 16))
    with pytest.raises(BaseMismatchError, match="was made for the base"):
        preflight(as_sweep(starting(other, tmp_path)))
    elsewhere = AdapterArtifact({"model.nothing": next(iter(adapter.modules.values()))})
    with pytest.raises(BaseMismatchError, match=r"no linear layer model\.nothing"):
        preflight(as_sweep(starting(elsewhere, tmp_path)))


def test_a_start_that_has_changed_since_is_noticed(adapter: AdapterArtifact, tmp_path: Path) -> None:
    plan = preflight(as_sweep(starting(adapter, tmp_path)))
    (point,) = plan.points
    saved = adapter.save(trial_folder(plan.output, point.key) / "adapter")
    result = TrainResult(
        finished=True, steps=8, val_loss=1.0, val_curve=[(8, 1.0)], folder=str(saved),
        content_hash=adapter.content_hash,
    )  # fmt: skip
    write_result(saved.parent, TrialResult(result, "", plan.identity.brief))
    changed = {name: LoraFactors(f.a + 1, f.b, f.scale) for name, f in adapter.modules.items()}
    with pytest.raises(ConfigError, match="/start has changed"):
        preflight(as_sweep(starting(AdapterArtifact(changed, meta=adapter.meta), tmp_path)))
