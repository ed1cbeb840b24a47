"""Runs that start from an adapter folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.config import parse
from rayft.errors import ArtifactError, BaseMismatchError, ConfigError, MethodError, TrainError
from rayft.methods.base import LoraFactors, MethodConfig
from rayft.models.inject import attach
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close, generator
from rayft.squeeze.anneal import AnnealConfig
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, validation_loss
from rayft.train.worker import Worker
from tests.unit.train.curves import WIDEST, assert_same_losses
from tests.unit.train.runs import DieAt, changed

STILL = {"lr": 1e-300, "steps": 1}
"""A learning rate that is zero in float32, so that a step changes nothing."""
RANKS = {"q_proj": 5, "down_proj": 2, "v_proj": 3}


@pytest.fixture
def adapter(session: Session) -> AdapterArtifact:
    """An adapter of some modules only, each with its own rank and scale; one column of q_proj is dead."""
    modules = {}
    for name, (outputs, inputs) in linear_shapes(session.loaded.model).items():
        last = name.rsplit(".", 1)[-1]
        if last in RANKS:
            draw, rank = generator("start", name), RANKS[last]
            a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
            if last == "q_proj":
                a[1], b[:, 1] = 0, 0
            modules[name] = LoraFactors(0.1 * a, 0.1 * b, 0.5 * rank)
    meta = AdapterArtifact({}).meta.model_copy(update={"base_fingerprint": session.loaded.fingerprint})
    return AdapterArtifact(modules, meta=meta)


def starting(run: RunConfig, adapter: AdapterArtifact, folder: Path, **sections: Any) -> RunConfig:
    adapter.save(folder / "start")
    method = sections.pop("method", {})
    return changed(run, method=MethodConfig(**{"rank": 5, **method}), start=str(folder / "start"), **sections)


@pytest.mark.parametrize(("zero", "name"), [(0, "lora"), (2, "lora_plus"), (3, "lora")])
def test_a_run_starts_with_the_outputs_of_its_adapter(
    run: RunConfig, session: Session, adapter: AdapterArtifact, tmp_path: Path, zero: int, name: str
) -> None:
    attach(session.loaded.model, adapter)
    there = validation_loss(session)
    scale = {"zero": zero}
    run = starting(run, adapter, tmp_path, method={"name": name}, optim=STILL, scale=scale)
    session = Session.open(run, Worker()) if zero == 3 else session
    result = Trainer(run, session, Reporter(), tmp_path / "run").fit()
    assert_close(torch.tensor([result.val_loss]), torch.tensor([there]), torch.float32, WIDEST)
    found = AdapterArtifact.load(result.folder)
    assert found.meta.method == name
    assert found.meta.parent == adapter.content_hash
    assert found.modules.keys() == adapter.modules.keys()
    for module, factors in adapter.modules.items():
        assert found.modules[module].scale == factors.scale
        assert torch.equal(found.modules[module].b, factors.b)
        living = factors.a.any(1)
        assert torch.equal(found.modules[module].a[living], factors.a[living])
        # The column that could never learn has a row of A again.
        assert found.modules[module].a.any(1).all()
    assert result.trainable == sum(f.a.numel() + f.b.numel() for f in adapter.modules.values())


def test_a_run_trains_its_adapter_further_and_dead_columns_learn(
    run: RunConfig, session: Session, adapter: AdapterArtifact, tmp_path: Path
) -> None:
    run = starting(run, adapter, tmp_path)
    result = Trainer(run, session, Reporter(), tmp_path / "run").fit()
    assert result.val_curve[-1][1] < result.val_curve[0][1] < result.train_curve[0][1]
    found = AdapterArtifact.load(result.folder)
    for module, factors in found.modules.items():
        assert factors.b.any(0).all()
        assert not torch.equal(factors.a, adapter.modules[module].a)
    # The adapter on disk is unchanged.
    assert AdapterArtifact.load(tmp_path / "start").content_hash == adapter.content_hash


def test_zero_3_gives_the_same_losses_from_an_adapter(
    run: RunConfig, adapter: AdapterArtifact, tmp_path: Path
) -> None:
    run = starting(run, adapter, tmp_path, optim={"lr": 2e-3, "steps": 3}, evaluate={"every": None})
    plain = Trainer(run, Session.open(run, Worker()), Reporter(), tmp_path / "0").fit()
    sharded = changed(run, scale={"zero": 3})
    assert_same_losses(
        plain, Trainer(sharded, Session.open(sharded, Worker()), Reporter(), tmp_path / "3").fit()
    )


def test_an_annealed_run_starts_at_the_rank_of_its_adapter(
    run: RunConfig, session: Session, adapter: AdapterArtifact, tmp_path: Path
) -> None:
    run = starting(run, adapter, tmp_path, anneal=AnnealConfig(rank=2))
    result = Trainer(run, session, Reporter(), tmp_path / "run").fit()
    found = AdapterArtifact.load(result.folder)
    assert {factors.rank for factors in found.modules.values()} == {2}
    assert {f.scale for f in found.modules.values()} == {f.scale for f in adapter.modules.values()}
    assert found.meta.parent == adapter.content_hash
    other = changed(run, method={"rank": 16})
    with pytest.raises(ConfigError, match=r"rank 5, and method\.rank is 16; set method\.rank: 5"):
        Trainer(other, session, Reporter(), tmp_path / "other").fit()


def test_a_head_starts_from_the_adapters_head(run: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text(
        "\n".join(f'{{"text": "{w} {i}", "label": "{w}"}}' for w in ("red", "blue") for i in range(8))
    )
    data = type(run.data)(
        source="jsonl", name=str(file), val=3, test=3, max_length=64, format="classification"
    )
    run = changed(run, data=data, model={"task": "sequence_classification"}, optim={"steps": 2})
    session = Session.open(run, Worker())
    first = AdapterArtifact.load(Trainer(run, session, Reporter(), tmp_path / "first").fit().folder)
    still = starting(run, first, tmp_path, method={"rank": 4}, optim=STILL)
    second = AdapterArtifact.load(Trainer(still, session, Reporter(), tmp_path / "second").fit().folder)
    assert second.heads.keys() == first.heads.keys() == {"score.weight"}
    assert torch.equal(second.heads["score.weight"], first.heads["score.weight"])
    fresh = AdapterArtifact.load(
        Trainer(changed(run, optim=STILL), session, Reporter(), tmp_path / "fresh").fit().folder
    )
    assert not torch.equal(fresh.heads["score.weight"], first.heads["score.weight"])


def test_a_resumed_run_needs_the_adapter_that_it_started_from(
    run: RunConfig, session: Session, adapter: AdapterArtifact, tmp_path: Path
) -> None:
    run = starting(run, adapter, tmp_path, optim={"steps": 4})
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(2), tmp_path / "cut").fit()
    some = next(iter(adapter.modules))
    modules = {**adapter.modules, some: replace(adapter.modules[some], scale=3.0)}
    replace(adapter, modules=modules).save(tmp_path / "start")
    with pytest.raises(
        TrainError, match=r"/start has changed \(content .* Put back what it was, .* or delete"
    ):
        Trainer(run, session, Reporter(), tmp_path / "cut").fit()
    adapter.save(tmp_path / "start")
    resumed = Trainer(run, session, Reporter(), tmp_path / "cut").fit()
    assert resumed.train_curve == whole.train_curve
    assert resumed.content_hash == whole.content_hash


def test_an_adapter_that_does_not_fit_is_refused(
    run: RunConfig, session: Session, adapter: AdapterArtifact, tmp_path: Path
) -> None:
    some, factors = next(iter(adapter.modules.items()))
    meta = adapter.meta
    other_base = replace(adapter, meta=meta.model_copy(update={"base_fingerprint": "0" * 16}))
    wide = torch.ones(40, factors.a.shape[1]), torch.ones(factors.b.shape[0], 40)
    cases: list[tuple[AdapterArtifact, type[Exception], str, Mapping[str, object]]] = [
        (other_base, BaseMismatchError, "made for the base", {}),
        (replace(adapter, modules={"model.nothing": factors}), BaseMismatchError, "no linear layer", {}),
        (adapter, ConfigError, "has rank 5, and method.rank is 8; set method.rank: 5", {"rank": 8}),
        (
            replace(adapter, modules={some: LoraFactors(*wide, 1.0)}),
            ConfigError,
            r"rank 40 at .*, which needs no more than \d+: bring it to rank",
            {"rank": 40},
        ),
        (
            replace(
                adapter,
                heads={"score.weight": torch.ones(2, 3)},
                meta=meta.model_copy(update={"task": "sequence_classification"}),
            ),
            BaseMismatchError,
            "no classification",
            {},
        ),
    ]
    for number, (given, error, match, method) in enumerate(cases):
        wrong = starting(run, given, tmp_path / str(number), method=method)
        with pytest.raises(error, match=match):
            Trainer(wrong, session, Reporter(), tmp_path / "run").fit()
    with pytest.raises(ArtifactError, match=r"has no adapter_config\.json"):
        Trainer(changed(wrong, start=str(tmp_path)), session, Reporter(), tmp_path / "run").fit()


def test_a_rank_that_equals_the_default_counts_as_not_set(
    run: RunConfig, session: Session, adapter: AdapterArtifact, tmp_path: Path
) -> None:
    run = starting(run, adapter, tmp_path, method={"rank": MethodConfig().rank}, optim=STILL)
    result = Trainer(run, session, Reporter(), tmp_path / "run").fit()
    assert math.isfinite(result.val_loss)
    assert AdapterArtifact.load(result.folder).rank == 5


@pytest.mark.parametrize(
    ("method", "error", "match"),
    [
        ({"targets": ["q_proj"]}, ConfigError, "method.targets does nothing: drop it"),
        ({"rank_pattern": {"q_proj": 2}}, ConfigError, "method.rank_pattern does nothing"),
        ({"alpha": 8.0}, ConfigError, "method.alpha does nothing"),
        ({"rslora": True}, ConfigError, "method.rslora does nothing"),
        ({"name": "cla"}, MethodError, "start is for lora and lora_plus, not for 'cla': its A is frozen"),
        ({"name": "rac"}, MethodError, "not for 'rac': .*Drop start, or set method.name to lora"),
    ],
)
def test_settings_that_the_adapter_determines_are_refused(
    method: dict[str, object], error: type[Exception], match: str
) -> None:
    rest = {"data": {"name": "needle_haystack", "train": 8, "val": 2, "test": 2}, "start": "adapter"}
    with pytest.raises(error, match=match):
        parse(RunConfig, {**rest, "method": method})


def test_the_adapters_folder_is_found_from_any_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = {"data": {"name": "needle_haystack", "train": 8, "val": 2, "test": 2}}
    assert parse(RunConfig, {**rest, "start": "some/adapter"}).start == str(tmp_path / "some" / "adapter")
