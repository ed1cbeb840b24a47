"""Annealed runs: the rank falls between engines, and the optimizer's state is carried over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.config import parse
from rayft.errors import ConfigError, MethodError
from rayft.methods import METHODS
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig
from rayft.models.inject import inject
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close, generator
from rayft.squeeze.anneal import AnnealConfig
from rayft.train import phases, trainer
from rayft.train.deepspeed import build_engine, destroy
from rayft.train.masters import Master, read_masters
from rayft.train.phases import Annealing
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.train.curves import assert_same_losses
from tests.unit.train.runs import StopAt, changed
from tests.unit.train.workers import in_two_workers

GENTLE = {"lr": 2e-3}


def annealed(
    run: RunConfig, name: str = "lora", *, method: Mapping[str, Any] = {}, **sections: Any
) -> RunConfig:
    """Return a run of six steps at ranks 8, 4 and 2."""
    anneal = sections.pop("anneal", {})
    return changed(
        run,
        method=MethodConfig(name=name, rank=8, **method),
        anneal=AnnealConfig.model_validate({"rank": 2, **anneal}),
        **sections,
    )


def ranks_in(model: torch.nn.Module) -> dict[str, int]:
    return {
        name: layer.adapter.to_lora().rank
        for name, layer in model.named_modules()
        if isinstance(layer, AdapterLinear) and layer.adapter is not None
    }


class Watch:
    """Records the ranks at each step, and the state that is read from one engine and set in the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, session: Session) -> None:
        self.ranks: list[dict[str, int]] = []
        self.before: list[dict[str, Master]] = []
        self.after: list[dict[str, Master]] = []
        self.rounded: list[dict[str, torch.Tensor]] = []
        self._model = session.loaded.model
        self._step, self._read, self._write = (
            trainer.optimizer_step,
            phases.read_masters,
            phases.write_masters,
        )
        monkeypatch.setattr(trainer, "optimizer_step", self.step)
        monkeypatch.setattr(phases, "read_masters", self.read)
        monkeypatch.setattr(phases, "write_masters", self.write)

    def step(self, *args: Any) -> Any:
        self.ranks.append(ranks_in(self._model))
        return self._step(*args)

    def read(self, engine: Any) -> dict[str, Master]:
        self.before.append(self._read(engine))
        return dict(self.before[-1])

    def write(self, engine: Any, masters: Mapping[str, Master]) -> None:
        self._write(engine, masters)
        # Read back from the engine, instead of trusting the argument.
        self.after.append(read_masters(engine))
        self.rounded.append(
            {n: p.detach().clone() for n, p in self._model.named_parameters() if p.requires_grad}
        )


def test_each_phase_trains_at_its_rank_and_the_last_one_is_saved(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"q_proj": 16, "k_proj": 3, "o_proj": 1}
    run = annealed(run, method={"rank_pattern": own, "rslora": True, "dropout": 0.1})
    watch = Watch(monkeypatch, session)
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert result.finished
    for step, stage in enumerate((None, None, 4, 4, 2, 2)):
        for name, rank in watch.ranks[step].items():
            first = own.get(name.rsplit(".", 1)[-1], 8)
            assert rank == (first if stage is None else min(first, stage))
    artifact = AdapterArtifact.load(result.folder)
    assert artifact.meta.method == "lora"
    assert {name: factors.rank for name, factors in artifact.modules.items()} == watch.ranks[-1]
    # The scale remains that of the first rank: α/√R with α = 2·R.
    for name, factors in artifact.modules.items():
        assert factors.scale == pytest.approx(2 * own.get(name.rsplit(".", 1)[-1], 8) ** 0.5)
    shapes = linear_shapes(session.loaded.model)
    first_phase = sum(
        METHODS["lora"].trained(LayerShape(*shapes[name]), rank) for name, rank in watch.ranks[0].items()
    )
    assert result.trainable == first_phase
    assert result.parameters == artifact.parameters < first_phase
    losses = [loss for _, loss in result.train_curve]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("dtype", "zero", "name"),
    [
        ("float32", 0, "lora_plus"),
        ("float32", 2, "lora_plus"),
        ("bfloat16", 1, "lora"),
        ("bfloat16", 2, "lora_plus"),
    ],
)
def test_weights_and_moments_continue_in_the_next_engine(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, zero: int, name: str
) -> None:
    run = annealed(run, name, scale={"dtype": dtype, "zero": zero}, evaluate={"every": None})
    session = Session.open(run, Worker())
    watch = Watch(monkeypatch, session)
    Trainer(run, session, Reporter(), tmp_path).fit()
    for phase, (before, after) in enumerate(zip(watch.before, watch.after, strict=True)):
        assert before.keys() == after.keys()
        assert {master.steps for master in after.values()} == {2.0 * (phase + 1)}
        for module in watch.ranks[0]:
            one, other = f"{module}.adapter.lora_A", f"{module}.adapter.lora_B"
            assert_squeezed(before[one], before[other], after[one], after[other], (4, 2)[phase])
        for key, parameter in watch.rounded[phase].items():
            master = after[key].weight
            assert master.dtype == torch.float32
            assert torch.equal(parameter, master.to(parameter.dtype))
            # The optimizer continues with more digits than the model has.
            assert torch.equal(master, master.bfloat16().float()) == (
                dtype == "bfloat16" and not master.any()
            )


def assert_squeezed(a: Master, b: Master, new_a: Master, new_b: Master, rank: int) -> None:
    """Assert that an adapter became the best one of its rank, and its moments were mapped accordingly."""
    assert a.moments
    assert b.moments
    assert new_a.moments
    assert new_b.moments
    width = max(a.weight.shape[1], b.weight.shape[0])
    u, s, vt = torch.linalg.svd(b.weight.double() @ a.weight.double())
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert new_a.weight.shape[0] == new_b.weight.shape[1] == rank
    assert_close(
        (new_b.weight.double() @ new_a.weight.double()).float(), best.float(), torch.float32, width, 4
    )
    # A' = P_A A and B' = B P_B, from the factors as they are: B' has orthogonal columns of length √(S/s).
    p_a = (new_b.weight.double() / new_b.weight.double().norm(dim=0).square()).t() @ b.weight.double()
    p_b = a.weight.double() @ (new_a.weight.double().t() / new_a.weight.double().norm(dim=1).square())
    for found, expected in (
        (new_a.moments.mean, p_b.t() @ a.moments.mean.double()),
        (new_b.moments.mean, b.moments.mean.double() @ p_a.t()),
        (new_a.moments.square, p_b.square().t() @ a.moments.square.double()),
        (new_b.moments.square, b.moments.square.double() @ p_a.square().t()),
    ):
        assert bool(found.any())
        assert_close(found, expected.float(), torch.float32, width, depth=8)


def test_moments_can_be_reset_with_a_warm_up_at_each_phase(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = annealed(run, anneal={"moments": "reset", "warmup": 2}, optim={"lr": 4e-3, "schedule": "linear"})
    watch, reporter = Watch(monkeypatch, session), RecordingReporter()
    Trainer(run, session, reporter, tmp_path).fit()
    assert all(master.moments for master in watch.before[0].values())
    assert not any(master.moments for master in watch.after[0].values())
    # One decay over the whole run, with a ramp at each phase.
    decay = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    ramp = [1.0, 1.0, 0.5, 1.0, 0.5, 1.0]
    rates = [metrics["lr"] for _, metrics in reporter.logged]
    assert rates == pytest.approx([4e-3 * d * r for d, r in zip(decay, ramp, strict=True)])


def test_annealing_gives_the_same_losses_under_each_zero_stage(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    run = annealed(run, "lora_plus", optim=GENTLE, evaluate={"every": None})
    plain = Trainer(run, session, Reporter(), tmp_path / "0").fit()
    for zero in (1, 2):
        scale = {
            "zero": zero,
            "activation_checkpointing": zero == 1,
            "accumulation": zero,
            "offload": zero == 2,
        }
        other = Trainer(
            changed(run, scale=scale), Session.open(run, Worker()), Reporter(), tmp_path / str(zero)
        ).fit()
        assert_same_losses(plain, other)
        assert (other.trainable, other.parameters) == (plain.trainable, plain.parameters)


def test_a_stopped_run_saves_the_rank_of_its_phase(run: RunConfig, session: Session, tmp_path: Path) -> None:
    for step, rank in ((2, 8), (3, 4)):
        result = Trainer(annealed(run), session, StopAt(step), tmp_path / str(step), (step,)).fit()
        assert not result.finished
        assert AdapterArtifact.load(result.folder).rank == result.rank == rank


def test_heads_keep_their_weights_and_moments_between_phases(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "colours.jsonl"
    words = ("red", "green", "blue")
    file.write_text(
        "\n".join(f'{{"text": "{word} {i}", "label": "{word}"}}' for word in words for i in range(8))
    )
    data = type(run.data)(
        source="jsonl", name=str(file), val=3, test=3, max_length=64, format="classification"
    )
    run = changed(
        annealed(run, scale={"dtype": "bfloat16", "zero": 2}),
        data=data,
        model={"task": "sequence_classification", "num_labels": 3},
    )
    session = Session.open(run, Worker())
    watch = Watch(monkeypatch, session)
    Trainer(run, session, Reporter(), tmp_path / "run").fit()
    for before, after in zip(watch.before, watch.after, strict=True):
        one, other = before["score.weight"], after["score.weight"]
        assert one.moments is not None
        assert other.moments is not None
        assert torch.equal(one.weight, other.weight)
        assert not torch.equal(one.weight, one.weight.bfloat16().float())
        assert torch.equal(one.moments.mean, other.moments.mean)
        assert torch.equal(one.moments.square, other.moments.square)


REST = {"data": {"name": "needle_haystack", "train": 8, "val": 2, "test": 2}, "anneal": {"rank": 4}}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cla", "its A is frozen"),
        ("asym", "its A is frozen"),
        ("cola", "a chain's links"),
        ("rc3la", "a chain's links"),
        ("paca", "columns of the base's own weights"),
        ("full", "it trains the whole model"),
        ("peft:VeraConfig", "its layers are PEFT's own"),
    ],
)
def test_methods_whose_factors_are_not_free_can_not_be_annealed(name: str, why: str) -> None:
    with pytest.raises(
        MethodError, match=f"anneal is for lora and lora_plus, not for '.*': .*{why}.*squeeze"
    ):
        parse(RunConfig, {**REST, "method": {"name": name}})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": {"zero": 3}}, "Set scale.zero to 0, 1 or 2"),
        ({"method": {"rank": 4}}, r"not below method.rank \(4\)"),
        ({"optim": {"steps": 2, "warmup": 0}}, "gets 0, fewer than one"),
        ({"optim": {"steps": 9, "warmup": 4}}, "gets 3, fewer than its warm-up of 4"),
        ({"anneal": {"rank": 4, "stage": 2}}, "unknown key 'anneal.stage'; did you mean 'stages'"),
    ],
)
def test_settings_that_do_not_fit_annealing_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(RunConfig, {**REST, **change})


def annealed_layers(run: RunConfig) -> list[dict[str, Master]]:
    """Anneal two layers in the current process group; return the optimizer's state at each change of rank."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(15, 11, bias=False) for name in ("one", "other")})
    for name, parameter in model.named_parameters():
        parameter.data.normal_(generator=generator(name)).requires_grad_(False)
    inject(model, run.method, 0)
    x, wanted = (torch.randn(7, width, generator=generator(width)) for width in (15, 11))
    assert run.anneal is not None
    plan = run.anneal.plan(8, 6, 0)
    parts, seen = Annealing(plan, run.anneal, Worker.current("cpu")), []
    for number, phase in enumerate(plan):
        engine = build_engine(run, model)
        parts.enter(engine)
        if number:
            seen.append(read_masters(engine))
        for _ in range(phase.first, phase.end):
            engine.backward(sum((layer(x) - wanted).square().mean() for layer in engine.module.values()))
            engine.step()
        if number + 1 < len(plan):
            seen.append(read_masters(engine))
            parts.leave(engine, model, number + 1)
        destroy(engine)
    return seen


def save_layers(rank: int, run: RunConfig, folder: Path) -> None:
    layers = [{name: vars(master) for name, master in seen.items()} for seen in annealed_layers(run)]
    torch.save(layers, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_workers_have_the_optimizer_state_of_one(run: RunConfig, tmp_path: Path) -> None:
    # LoRA+ under ZeRO-2 has two groups of parameters, each cut in two in the middle of a factor.
    run = annealed(run, "lora_plus", optim=GENTLE, scale={"zero": 2, "threads": 1})
    both = changed(run, scale={"workers": 2})
    in_two_workers(save_layers, tmp_path, both, tmp_path)
    workers = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for alone, *seen in zip(annealed_layers(run), *workers, strict=True):
        for name, master in alone.items():
            first, second = (Master(**each[name]) for each in seen)
            assert first.steps == second.steps == master.steps
            assert_close(first.weight, master.weight, torch.float32, 15, depth=16)
            for one, two in zip(values(first), values(second), strict=True):
                assert torch.equal(one, two)
            for one, expected in zip(values(first), values(master), strict=True):
                assert expected.any()
                assert_close(one, expected, torch.float32, 15, depth=64)


def values(master: Master) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert master.moments is not None
    return master.weight, master.moments.mean, master.moments.square
