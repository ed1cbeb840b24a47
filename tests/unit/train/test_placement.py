"""What a run's settings leave open on a device, and a run that goes on when a step does not fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from rayft.config import content_hash
from rayft.errors import TrainError
from rayft.evaluate.loss import batch_loss
from rayft.models.inject import inject
from rayft.numerics import assert_close
from rayft.train import placement, trainer, validation
from rayft.train.flat import PartialAdamW
from rayft.train.placement import DeviceMemoryError, Placement, place, smaller
from rayft.train.run import RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.train.curves import WIDEST, assert_same_losses
from tests.unit.train.runs import changed, with_method
from tests.unit.train.workers import in_two_workers

OPEN = {"accumulation": None, "activation_checkpointing": None, "graphs": None}


@pytest.mark.parametrize(("name", "zero"), [("lora_plus", 0), ("lora_plus", 2), ("rc3la", 1), ("full", 2)])
def test_a_run_goes_on_with_smaller_batches(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, zero: int
) -> None:
    run = with_method(run, name, optim={"rows_per_step": 4}, scale={**OPEN, "zero": zero})
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()
    if name == "full":
        session = Session.open(run, session.worker)
    taken, steps = trainer.optimizer_step, [0]

    def optimizer_step(engine: Any, batches: Any, *more: Any) -> Any:
        if steps[0] == 3 and len(batches[0].input_ids) > 1:
            # Its gradients are left behind.
            engine.backward(batch_loss(engine.module, batches[0], engine)[0])
            raise torch.OutOfMemoryError("no room")
        steps[0] += 1
        return taken(engine, batches, *more)

    monkeypatch.setattr(trainer, "optimizer_step", optimizer_step)
    reporter = RecordingReporter()
    lowered = Trainer(run, session, reporter, tmp_path / "lowered").fit()
    assert [note.split(" did not fit")[0] for note in reporter.notes] == [
        "step 4 with 4 row(s) at a time",
        "step 4 with 2 row(s) at a time",
    ]
    assert lowered.placement == {"accumulation": 4, "activation_checkpointing": False, "graphs": False}
    assert [step for step, _ in reporter.logged] == [1, 2, 3, 4, 5, 6]
    assert_same_losses(whole, lowered)


def test_a_run_that_never_fits_says_what_to_change(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def optimizer_step(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer, "optimizer_step", optimizer_step)
    run = changed(run, scale=OPEN)
    reporter = RecordingReporter()
    with pytest.raises(TrainError, match=r"1 row\(s\) of 512 tokens do not fit .*: lower data.max_length"):
        Trainer(run, session, reporter, tmp_path).fit()
    assert "recomputes activations" in reporter.notes[-1]


@pytest.mark.parametrize(("zero", "step"), [(0, 1), (0, 3), (2, 3)])
def test_a_step_whose_update_does_not_fit_is_not_taken_again(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int, step: int
) -> None:
    """Some parameters would get it twice. The run goes on from its last checkpoint, when there is room."""
    run = with_method(run, "lora_plus", evaluate={"every": 1}, scale={**OPEN, "zero": zero})
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()
    real, updates = PartialAdamW._update, [0]

    def update(self: PartialAdamW, parameter: torch.Tensor, *more: Any) -> None:
        updates[0] += 1
        # The first of two groups has been updated.
        if updates[0] == 2 * step:
            raise torch.OutOfMemoryError("no room")
        real(self, parameter, *more)

    monkeypatch.setattr(PartialAdamW, "_update", update)
    with pytest.raises(DeviceMemoryError, match=r"optimizer states .* do not fit .*\(method.rank\)"):
        Trainer(run, session, Reporter(), tmp_path / "cut").fit()
    reporter = RecordingReporter()
    result = Trainer(run, session, reporter, tmp_path / "cut").fit()
    assert [number for number, _ in reporter.logged] == list(range(step, 7))
    assert result.train_curve == whole.train_curve
    assert result.content_hash == whole.content_hash


@pytest.mark.parametrize("fits", [1, 0])
def test_fewer_rows_are_validated_at_once_if_they_do_not_fit(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    run, real, sizes = changed(run, optim={"steps": 2}), validation.mean_loss, list[int]()
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()

    def mean_loss(model: Any, batches: Any) -> tuple[float, int]:
        every = [*batches]
        sizes.append(max(len(batch.input_ids) for batch in every))
        if sizes[-1] > fits:
            raise torch.OutOfMemoryError("no room")
        return real(model, every)

    monkeypatch.setattr(validation, "mean_loss", mean_loss)
    trainer = Trainer(run, session, Reporter(), tmp_path / "lowered")
    if fits:
        found, expected = (torch.tensor([loss]) for loss in (trainer.fit().val_loss, whole.val_loss))
        assert_close(found, expected, torch.float32, WIDEST)
    else:
        with pytest.raises(DeviceMemoryError, match=r"validation examples do not fit .* data\.max_length"):
            trainer.fit()
    assert sizes == [2, 1]


@pytest.mark.parametrize(
    ("settings", "now", "then"),
    [
        ({}, Placement(1), Placement(2)),
        ({}, Placement(2, graphs=True), Placement(3, graphs=True)),
        ({}, Placement(6), Placement(6, activation_checkpointing=True)),
        ({}, Placement(6, graphs=True), Placement(6, activation_checkpointing=True)),
        ({"zero": 1}, Placement(1, graphs=True), Placement(2)),
        ({"accumulation": 2}, Placement(2), Placement(2, activation_checkpointing=True)),
        ({"activation_checkpointing": True}, Placement(3, True), Placement(6, True)),
        ({"graphs": True}, Placement(1, graphs=True), Placement(2, graphs=True)),
    ],
)
def test_what_follows_a_placement_that_does_not_fit(
    run: RunConfig, settings: dict[str, Any], now: Placement, then: Placement
) -> None:
    scale = {**OPEN, "zero": 2, "device": "cuda", **settings}
    assert smaller(changed(run, optim={"rows_per_step": 6}, scale=scale), now) == then


@pytest.mark.parametrize(
    ("settings", "now", "said"),
    [
        ({"accumulation": 1, "activation_checkpointing": False}, Placement(1), "raise scale.accumulation"),
        ({"graphs": True, "zero": 1}, Placement(1, graphs=True), "set scale.graphs: false"),
        ({"gpu_share": 0.5}, Placement(6, True), "let fewer lanes share a GPU"),
        ({}, Placement(6, True), "at once: lower data.max_length"),
    ],
)
def test_what_to_change_where_the_settings_allow_nothing_smaller(
    run: RunConfig, settings: dict[str, Any], now: Placement, said: str
) -> None:
    scale = {**OPEN, "zero": 2, "device": "cuda", **settings}
    with pytest.raises(TrainError, match=said):
        smaller(changed(run, optim={"rows_per_step": 6}, scale=scale), now)


def train_in_a_group(rank: int, run: RunConfig, folder: Path, known: Placement | None) -> None:
    """Train as one of two workers, of which the second has no room for two rows in the fourth step."""
    taken, steps = trainer.optimizer_step, list[int]()

    def optimizer_step(engine: Any, batches: Any, *more: Any) -> Any:
        steps.append(engine.global_steps)
        if rank == 1 and engine.global_steps == 3 and len(batches[0].input_ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return taken(engine, batches, *more)

    trainer.optimizer_step = optimizer_step
    session = Session.open(run, Worker(rank, 2))
    try:
        result = Trainer(run, session, Reporter(), folder / "run", placement=known).fit()
    except DeviceMemoryError as error:
        (folder / "error").write_bytes(pickle.dumps(error))
        # As a lane does; the other worker waits for this one.
        raise
    if rank == 0:
        (folder / "result").write_bytes(pickle.dumps((result, steps)))


# tests/integration/test_lanes.py has such a group without ZeRO.
@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_a_group_ends_and_the_next_goes_on_with_smaller_batches(
    run: RunConfig, session: Session, tmp_path: Path, zero: int
) -> None:
    run = changed(run, optim={"rows_per_step": 4, "lr": 2e-3}, scale={**OPEN, "threads": 1})
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()
    both = changed(run, scale={"workers": 2, "zero": zero})
    (first := tmp_path / "first").mkdir()
    with pytest.raises(ProcessRaisedException):
        in_two_workers(train_in_a_group, first, both, tmp_path, None)
    error = pickle.loads((tmp_path / "error").read_bytes())  # noqa: S301
    assert error.placement == Placement(2)
    assert str(error) == (
        "step 4 with 2 row(s) at a time did not fit into the device's memory; the run starts again from its "
        "last checkpoint, and goes on with 1"
    )
    (second := tmp_path / "second").mkdir()
    in_two_workers(train_in_a_group, second, both, tmp_path, error.placement)
    lowered, steps = pickle.loads((tmp_path / "result").read_bytes())  # noqa: S301
    assert lowered.placement == {"accumulation": 2, "activation_checkpointing": False, "graphs": False}
    assert_same_losses(whole, lowered)
    assert steps == [2, 3, 4, 5], "from the checkpoint on"


def test_under_zero_3_one_worker_needs_a_new_group_too(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def optimizer_step(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer, "optimizer_step", optimizer_step)
    run = changed(run, optim={"rows_per_step": 4}, scale={**OPEN, "zero": 3})
    with pytest.raises(DeviceMemoryError, match="the run starts again") as raised:
        Trainer(run, session, Reporter(), tmp_path).fit()
    assert raised.value.placement == Placement(2)


def test_an_engine_that_does_not_fit_says_what_to_change(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    def initialize(**_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with pytest.raises(DeviceMemoryError, match=r"optimizer states .* do not fit .*scale\.offload"):
        Trainer(run, session, Reporter(), tmp_path).fit()


class Device:
    """Passes on a GPU with room for some rows, with and without recomputed activations."""

    def __init__(
        self, *, rows: int, recomputed: int = 64, slower: float = 1.3, row: float = 0.1, graphs: float = 1.0
    ) -> None:
        self.rows, self.recomputed, self.slower, self.row, self.graphs = rows, recomputed, slower, row, graphs
        self.tried: list[Placement] = []

    def measure(self, probe: Any, tried: Placement) -> float:
        self.tried.append(tried)
        rows = len(probe._batch(probe._share // tried.accumulation).input_ids)
        if rows > (self.recomputed if tried.activation_checkpointing else self.rows):
            raise torch.OutOfMemoryError("no room")
        # Each pass costs as much as two rows, however few it has.
        seconds = self.row * (rows + 2)
        return seconds * (
            self.slower if tried.activation_checkpointing else self.graphs if tried.graphs else 1
        )


@pytest.fixture
def gpu(run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that places a run of 8 rows a step on a device."""
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    properties = SimpleNamespace(name="a GPU", total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**36 - 2**33, 2**36))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**32)
    inject(session.loaded.model, run.method, run.seed)

    def placed(passes: Device, known: Placement | None = None, **settings: Any) -> Placement:
        monkeypatch.setattr(placement._Probe, "_measure", lambda probe, tried: passes.measure(probe, tried))
        method = {"rank": settings.pop("rank", 4)}
        scale = {**OPEN, "zero": 2, "device": "cuda", **settings}
        chosen = changed(run, method=method, optim={"rows_per_step": 8}, scale=scale)
        return place(chosen, session, known)

    return placed


@pytest.mark.parametrize(
    ("device", "settings", "found"),
    [
        (Device(rows=8), {}, Placement(1)),
        (Device(rows=8, graphs=0.5), {}, Placement(1, graphs=True)),
        (Device(rows=8, graphs=0.5), {"graphs": False}, Placement(1)),
        (Device(rows=8, graphs=1.5), {"graphs": True}, Placement(1, graphs=True)),
        # Two passes of four rows and two more take 1.2; one of eight with everything computed twice 1.3.
        (Device(rows=4), {}, Placement(2)),
        (Device(rows=4, graphs=0.5), {}, Placement(2, graphs=True)),
        (Device(rows=4, graphs=0.5), {"zero": 1}, Placement(2)),
        # Eight passes of a row take 2.4.
        (Device(rows=1), {}, Placement(1, activation_checkpointing=True)),
        (Device(rows=1, graphs=0.1), {"activation_checkpointing": False}, Placement(8, graphs=True)),
        (Device(rows=0, recomputed=2), {}, Placement(4, activation_checkpointing=True)),
        (Device(rows=0, recomputed=0), {}, Placement(8, activation_checkpointing=True)),
        (Device(rows=0, recomputed=4), {"accumulation": 1}, Placement(1, activation_checkpointing=True)),
    ],
)
def test_the_fastest_placement_that_fits_is_taken(
    gpu: Any, device: Device, settings: dict[str, Any], found: Placement
) -> None:
    assert gpu(device, **settings) == found


def test_a_placement_is_kept_for_runs_that_are_alike(gpu: Any, tmp_path: Path) -> None:
    device = Device(rows=4)
    assert gpu(device) == gpu(device) == Placement(2)
    assert [tried.accumulation for tried in device.tried if not tried.graphs][:2] == [1, 2]
    count = len(device.tried)
    assert gpu(device, rank=8) == Placement(2)
    assert len(device.tried) == 2 * count
    files = [*(tmp_path / "cache" / "probes").iterdir()]
    assert len(files) == 2
    for file in files:
        file.write_text("{")
    assert gpu(device) == Placement(2)
    assert len(device.tried) == 3 * count


def test_what_a_group_has_found_is_kept_for_runs_that_are_alike(gpu: Any) -> None:
    device = Device(rows=8)
    for settings in ({"zero": 2}, {"zero": 3}):
        found = gpu(device, known=Placement(4), **settings)
        assert found == gpu(device, **settings) == Placement(4)
    assert device.tried == []


def test_what_is_found_beside_other_programs_is_not_kept(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**34, 2**36))
    assert gpu(Device(rows=4)) == Placement(2)
    assert not (tmp_path / "cache" / "probes").exists()
    # Lanes that share a GPU are no other programs.
    assert gpu(Device(rows=4), gpu_share=0.25) == Placement(2)
    assert len([*(tmp_path / "cache" / "probes").iterdir()]) == 1


def test_that_nothing_fits_is_not_kept(gpu: Any) -> None:
    least = Placement(8, activation_checkpointing=True)
    assert gpu(Device(rows=0, recomputed=0)) == least
    assert gpu(Device(rows=8)) == Placement(1)


def test_nothing_is_tried_where_nothing_is_open(gpu: Any) -> None:
    device = Device(rows=8)
    everything = {"accumulation": 2, "activation_checkpointing": False, "graphs": True}
    assert gpu(device, **everything) == Placement(2, graphs=True)
    assert gpu(device, zero=3) == Placement()
    assert gpu(device, device="cpu") == Placement()
    assert device.tried == []


def test_settings_that_are_left_open_give_the_results_of_their_former_defaults() -> None:
    given = ScaleConfig(accumulation=1, activation_checkpointing=False, graphs=False)
    assert content_hash(ScaleConfig()) == content_hash(given)
    assert content_hash(ScaleConfig()) != content_hash(ScaleConfig(accumulation=2))
