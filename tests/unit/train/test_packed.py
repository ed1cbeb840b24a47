"""Runs that take their steps together give what each gives alone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayft.artifacts import AdapterArtifact
from rayft.errors import ConfigError, TrainError
from rayft.methods.base import MethodConfig
from rayft.numerics import assert_close, tolerance
from rayft.squeeze.anneal import AnnealConfig
from rayft.train import packed as module
from rayft.train import trainer as trainer_module
from rayft.train.checkpoint_folder import MASTERS_FILE, checkpoints, last_curve
from rayft.train.course import CrowdedError
from rayft.train.deepspeed import StepResult
from rayft.train.flat import FlatEngine, Part, PartialAdamW
from rayft.train.packed import Courses, Pack
from rayft.train.run import Placement, RunConfig, why_alone
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.train.curves import WIDEST, assert_same_losses
from tests.unit.train.runs import DieAt, changed, play, two_rows, with_method


def begin(courses: Courses[TrainResult], pack: Pack, key: str, run: RunConfig, folder: Path) -> None:
    trainer = Trainer(run, pack.session(), Reporter(), folder / key, pack=pack)
    courses.begin(key, trainer.course(), trainer.clock)


def packed(
    runs: Mapping[str, RunConfig],
    session: Session,
    folder: Path,
    note: Callable[[str], object] = lambda _: None,
    *,
    graphs: bool = False,
) -> dict[str, TrainResult | Exception]:
    """Train runs together; all may continue at each evaluation. Those that had to leave go on later."""
    pack = Pack(session, note, graphs=graphs)
    courses, ended = Courses[TrainResult](pack), dict[str, TrainResult | Exception]()
    waiting = [*runs]
    while waiting or len(courses):
        if not len(courses):
            for key in waiting:
                begin(courses, pack, key, runs[key], folder)
            waiting = []
        for key in courses.questions:
            courses.answer(key, True)
        courses.advance()
        for key, result in courses.ended().items():
            if isinstance(result, CrowdedError):
                waiting.append(key)
            else:
                ended[key] = result
    pack.close()
    return ended


def variants(run: RunConfig) -> dict[str, RunConfig]:
    """Runs that differ in all that may differ in a pack."""
    return {
        "lora": with_method(run, "lora"),
        "plus": with_method(run, "lora_plus", seed=3, optim={"lr": 3e-3, "schedule": "linear"}),
        "cla": with_method(run, "cla", optim={"lr": 2e-2, "clip": 0.05, "weight_decay": 0.1}),
        "pattern": changed(
            run, method={"rank": 4, "alpha": 8, "rank_pattern": {"down_proj": 2, "q_proj": 12}}, seed=7
        ),
        "chain": with_method(run, "c3la", seed=1),
        "asym": changed(with_method(run, "asym"), optim={"betas": (0.8, 0.99), "steps": 4}),
        "dropout": changed(
            run, method={"rank": 8, "alpha": 4, "dropout": 0.2, "targets": ("q_proj", "down_proj")}, seed=5
        ),
        "cola": with_method(run, "cola", optim={"rows_per_step": 4}),
        "falling": changed(run, method={"rank": 8}, anneal=AnnealConfig(rank=2)),
    }


def assert_same(alone: TrainResult, together: TrainResult | Exception) -> None:
    """Assert that two float32 runs differ only by the rounding of their steps."""
    assert isinstance(together, TrainResult), together
    assert_same_losses(alone, together)
    assert [step for step, _ in alone.val_curve] == [step for step, _ in together.val_curve]
    expected, actual = (torch.tensor([loss for _, loss in each.val_curve]) for each in (alone, together))
    assert_close(actual, expected, torch.float32, WIDEST, depth=alone.steps)
    one, other = (AdapterArtifact.load(Path(result.folder)) for result in (alone, together))
    assert one.modules.keys() == other.modules.keys()
    for name, factors in one.modules.items():
        found = other.modules[name]
        assert found.scale == factors.scale
        assert_close(found.delta(), factors.delta(), torch.float32, WIDEST, depth=256)


def assert_all_same(
    expected: Mapping[str, TrainResult | Exception], found: Mapping[str, TrainResult | Exception]
) -> None:
    """Assert that each of some runs has ended well, and in the same way."""
    assert expected.keys() == found.keys()
    for name, result in expected.items():
        assert isinstance(result, TrainResult), result
        assert_same(result, found[name])


def test_a_packed_run_is_the_run_alone(run: RunConfig, session: Session, tmp_path: Path) -> None:
    runs = variants(run)
    together = packed(runs, session, tmp_path / "together")
    for name, one in runs.items():
        alone = Trainer(one, Session.open(one, session.worker), Reporter(), tmp_path / name).fit()
        assert_same(alone, together[name])


def test_no_slot_waits_for_the_answer_to_another(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {
        "late": with_method(run, "lora_plus", optim={"weight_decay": 0.1}),
        "chain": with_method(run, "rc3la", seed=1),
        "dropout": changed(run, method={"rank": 8, "dropout": 0.2}, seed=2),
    }
    real, sizes = Pack.step, list[int]()

    def step(pack: Pack, steps: Any) -> Any:
        sizes.append(len(steps))
        return real(pack, steps)

    monkeypatch.setattr(Pack, "step", step)
    pack = Pack(session)
    courses = Courses[TrainResult](pack)
    for key, one in runs.items():
        begin(courses, pack, key, one, tmp_path / "together")
    play(courses, pack, "late")
    assert sizes == [3, 3, 2, 2, 3, 3, 1, 1]
    together = courses.ended()
    for key, one in runs.items():
        alone = Trainer(one, Session.open(one, session.worker), Reporter(), tmp_path / key).fit()
        assert_same(alone, together[key])


def test_the_rows_of_a_slot_decide_its_gradients_alone(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    """A slot whose weights become NaN leaves another slot as it is."""
    runs = {"one": with_method(run, "lora"), "other": with_method(run, "cla", seed=2)}
    clean = packed(runs, session, tmp_path / "clean")
    broken = packed(
        {**runs, "other": changed(runs["other"], optim={"lr": 1e30})}, session, tmp_path / "broken"
    )
    one, again = clean["one"], broken["one"]
    assert isinstance(one, TrainResult)
    assert isinstance(again, TrainResult)
    assert one.train_curve[:1] == again.train_curve[:1]
    assert_same(one, again)
    assert isinstance(broken["other"], TrainError)


@pytest.mark.parametrize("name", ["lora_plus", "rc3la"])
def test_masters_in_float32_stay_with_their_slot(run: RunConfig, tmp_path: Path, name: str) -> None:
    """Slots come and go while another trains on, whose masters and moments move from engine to engine."""
    run = changed(run, scale={"dtype": "bfloat16", "zero": 2})
    session = Session.open(run, Worker())
    runs = {
        "short": with_method(run, "lora", optim={"steps": 2}),
        "long": with_method(run, name, optim={"steps": 6}),
    }
    pack = Pack(session)
    courses, ended = Courses[TrainResult](pack), dict[str, TrainResult | Exception]()
    waiting = {**runs, "late": with_method(run, "asym", optim={"steps": 3}, seed=4)}
    for key in runs:
        begin(courses, pack, key, waiting.pop(key), tmp_path)
    while len(courses):
        for key in courses.questions:
            courses.answer(key, True)
        courses.advance()
        ended |= courses.ended()
        if "short" in ended and waiting:
            begin(courses, pack, "late", waiting.pop("late"), tmp_path)
    pack.close()
    alone = Trainer(runs["long"], Session.open(run, Worker()), Reporter(), tmp_path / "alone").fit()
    together = ended["long"]
    assert isinstance(together, TrainResult)
    for (_, one), (_, other) in zip(alone.train_curve, together.train_curve, strict=True):
        # Without the moments, or with new ones, the losses differ by more than one rounding.
        assert abs(one - other) <= torch.finfo(torch.bfloat16).eps * one
    assert isinstance(ended["late"], TrainResult)


def left(folder: Path, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a run's last step, and the masters and moments that it has saved."""
    (last, *_) = checkpoints(folder / "checkpoint")
    assert last.step == step
    return last.state["train_curve"][-1][1], load_file(last.place / MASTERS_FILE)


@pytest.mark.parametrize("name", ["lora", "cla", "c3la"])
def test_each_step_in_bfloat16_is_that_of_the_run_alone(run: RunConfig, tmp_path: Path, name: str) -> None:
    """Each one starts from the state of the run alone, since differences of roundings grow over a course."""
    run = changed(run, scale={"dtype": "bfloat16", "zero": 2}, evaluate={"every": 1})
    session, one = Session.open(run, Worker()), with_method(run, name, seed=3)
    neighbours = {
        "plus": with_method(run, "lora_plus", seed=1),
        "rows": with_method(run, "cla", seed=2, optim={"rows_per_step": 4}),
    }
    alone = tmp_path / "alone"
    for step in range(1, 5):
        together = tmp_path / f"{step}"
        if step > 1:
            shutil.copytree(alone, together / "one")
        with pytest.raises(KeyboardInterrupt):
            Trainer(one, Session.open(one, session.worker), DieAt(step), alone).fit()
        pack = Pack(session)
        courses = Courses[TrainResult](pack)
        for key, each in {"one": one, **neighbours}.items():
            begin(courses, pack, key, each, together)
        while "one" not in courses.questions or courses.questions["one"].step < step:
            for key in courses.questions:
                courses.answer(key, True)
            courses.advance()
        (loss, expected), (packed_loss, found) = (left(place, step) for place in (alone, together / "one"))
        courses.close()
        pack.close()
        # Two layers, forward and backward.
        assert abs(packed_loss - loss) <= tolerance(torch.bfloat16, WIDEST, 4) * loss
        assert found.keys() == expected.keys()
        for part, values in expected.items():
            assert_close(found[part], values, torch.bfloat16, WIDEST, 4)


def test_slots_that_do_not_fit_together_share_no_pass(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("abc")}
    expected = packed(runs, session, tmp_path / "whole")
    real, notes = module.target_losses, list[str]()

    def target_losses(model: Any, batch: Any) -> torch.Tensor:
        if len(batch.input_ids) > 4:
            raise torch.OutOfMemoryError("no room")
        return real(model, batch)

    monkeypatch.setattr(module, "target_losses", target_losses)
    lowered = packed(runs, session, tmp_path / "lowered", notes.append)
    assert_all_same(expected, lowered)
    (note,) = notes
    assert "the rows of 3 trials did not fit" in note


def test_one_run_that_does_not_fit_says_what_to_change(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "target_losses", _no_room)
    ended = packed({"one": run, "other": changed(run, seed=1)}, session, tmp_path)
    for error in ended.values():
        assert isinstance(error, TrainError)
        assert "1 row(s) of 512 tokens do not fit" in str(error)
        assert "lower data.max_length" in str(error)


@pytest.mark.parametrize(
    ("fits", "placement", "text"),
    [
        (1, Placement(4), "the rows of 1 share a pass, each trial's rows are divided into 4 micro-batches"),
        (0, Placement(4, True), "4 micro-batches, activations are recomputed"),
    ],
)
def test_rows_of_a_slot_that_do_not_fit_are_divided(
    run: RunConfig,
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fits: int,
    placement: Placement,
    text: str,
) -> None:
    """As for a run alone; and the sweep says so once."""
    runs = {
        "one": with_method(run, "lora", optim={"rows_per_step": 4}),
        "other": with_method(run, "cla", seed=1),
    }
    expected = packed(runs, session, tmp_path / "whole")
    real, notes = module.target_losses, list[str]()

    def target_losses(model: Any, batch: Any) -> torch.Tensor:
        recomputed = any(getattr(one, "gradient_checkpointing", False) for one in model.modules())
        if torch.is_grad_enabled() and len(batch.input_ids) > max(fits, recomputed):
            raise torch.OutOfMemoryError("no room")
        return real(model, batch)

    monkeypatch.setattr(module, "target_losses", target_losses)
    lowered = packed(runs, session, tmp_path / "lowered", notes.append)
    assert_all_same(expected, lowered)
    for result in lowered.values():
        assert isinstance(result, TrainResult)
        assert Placement(**result.placement) == placement
    assert [text in note for note in notes] == [True]


def test_no_rows_are_padded_for_graphs_that_dropout_prevents(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    runs = {"plain": run, "dropout": changed(run, method={"rank": 8, "dropout": 0.2})}
    eager, wanted = (packed(runs, session, tmp_path / str(graphs), graphs=graphs) for graphs in (False, True))
    for name, result in wanted.items():
        assert isinstance(result, TrainResult), result
        assert not result.placement["graphs"]
        # The same numbers only in rows of the same width.
        assert result.train_curve == eager[name].train_curve  # type: ignore[union-attr]


def test_a_run_with_dropout_in_a_pack_tells_of_no_mask_for_graphs(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    pack, reporter = Pack(session, graphs=True), RecordingReporter()
    courses = Courses[TrainResult](pack)
    for dropout in (0.2, 0.0):
        one = changed(run, method={"rank": 8, "dropout": dropout})
        trainer = Trainer(one, pack.session(), reporter, tmp_path / f"{dropout}", pack=pack)
        courses.begin(f"{dropout}", trainer.course(), trainer.clock)
        assert len(reporter.notes) == (not dropout), "in float32 a run by graphs takes a mask"
    courses.close()
    pack.close()


def test_what_a_slot_drops_is_not_drawn_anew(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "target_losses", _no_room)
    dropout = changed(run, method={"rank": 8, "dropout": 0.2})
    ended = packed({"one": dropout}, session, tmp_path)["one"]
    assert isinstance(ended, TrainError)
    assert "set scale.activation_checkpointing: true" in str(ended)


def _no_room(*_: Any) -> Any:
    raise torch.OutOfMemoryError("no room")


def test_slots_that_there_is_no_room_for_go_on_later(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters and moments of three do not fit; the newest go on when the first has ended."""
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("abc")}
    expected = packed(runs, session, tmp_path / "whole")
    sizes, real = list[int](), FlatEngine.__init__

    def build(engine: FlatEngine, config: RunConfig, members: Any) -> None:
        sizes.append(len(members))
        if len(members) > 2:
            _no_room()
        real(engine, config, members)

    monkeypatch.setattr(FlatEngine, "__init__", build)
    assert_all_same(expected, packed(runs, session, tmp_path / "again"))
    assert {*sizes} >= {1, 2, 3}


def test_a_run_that_has_to_leave_saves_its_last_step(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("ab")}
    pack = Pack(session)
    courses = Courses[TrainResult](pack)
    for key, one in runs.items():
        begin(courses, pack, key, one, tmp_path)
    courses.advance()
    monkeypatch.setattr(Pack, "_step", _no_room)
    courses.advance()
    ((key, error),) = courses.ended().items()
    assert key == "b"
    assert isinstance(error, CrowdedError)
    assert last_curve(tmp_path / "b" / "checkpoint") == []
    assert [one.place.name for one in checkpoints(tmp_path / "b" / "checkpoint")] == ["step-000001"]
    assert not (tmp_path / "a" / "checkpoint").exists()
    courses.close()
    pack.close()


def test_weights_that_an_update_has_left_half_done_are_not_saved(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack(session)
    courses = Courses[TrainResult](pack)
    for seed, key in enumerate("abc"):
        begin(courses, pack, key, changed(run, seed=seed), tmp_path)
    courses.advance()
    monkeypatch.setattr(PartialAdamW, "step", _no_room)
    courses.advance()
    ended = courses.ended()
    pack.close()
    assert [isinstance(error, CrowdedError) and not error.intact for error in ended.values()] == [True] * 3
    assert not any((tmp_path / key / "checkpoint").exists() for key in ended)


def test_an_update_of_one_run_that_does_not_fit_says_what_to_change(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PartialAdamW, "step", _no_room)
    (error,) = packed({"one": run}, session, tmp_path).values()
    assert isinstance(error, TrainError)
    assert "optimizer states of what is trained do not fit" in str(error)


@pytest.mark.parametrize("failing", ["inject", "export"])
def test_what_does_not_fit_beside_others_outside_of_steps_goes_on_later(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The second run has no room for its adapters, or for the copy of the best ones."""
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("ab")}
    expected = packed(runs, session, tmp_path / "whole")
    real, calls = getattr(trainer_module, failing), [0]

    def fails(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("no room")
        return real(*args)

    monkeypatch.setattr(trainer_module, failing, fails)
    assert_all_same(expected, packed(runs, session, tmp_path / "lowered"))
    assert calls[0] > 2
    monkeypatch.setattr(trainer_module, failing, _no_room)
    (error,) = packed({"a": run}, session, tmp_path / "alone").values()
    assert isinstance(error, TrainError)
    assert "train fewer values" in str(error)


def test_a_base_that_drops_values_is_not_packed(session: Session) -> None:
    for name in ("attention_dropout", "residual_dropout"):
        setattr(session.loaded.model.config, name, 0.1)
        with pytest.raises(ConfigError, match=rf"random numbers \({name}: 0.1\) .* set sweep.slots: 1"):
            Pack(session)
        setattr(session.loaded.model.config, name, 0.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale": {"zero": 3}}, "scale.zero is 3"),
        ({"scale": {"workers": 2}}, "scale.workers is 2"),
        ({"model": {"quantize": "nf4"}}, "the base is quantised"),
        ({"deepspeed": {"wall_clock_breakdown": True}}, "settings of its own"),
        ({"method": MethodConfig(name="paca", rank=4)}, "'paca' changes the base"),
        ({"method": MethodConfig(name="peft:DoRA", rank=4)}, "'peft:DoRA' changes the base, or has layers"),
    ],
)
def test_runs_that_can_not_share_steps_say_why(run: RunConfig, changes: Any, reason: str) -> None:
    assert why_alone(run) == ""
    assert reason in why_alone(changed(run, **changes))


# Two rows of each slot: of all three, of two, of one; and one row of one.
@pytest.mark.parametrize(("fits", "tried"), [(4, {6, 4, 2}), (1, {6, 4, 2, 1})])
def test_examples_of_slots_that_do_not_fit_together_are_validated_apart(
    run: RunConfig,
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fits: int,
    tried: set[int],
) -> None:
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("abc")}
    expected = packed(runs, session, tmp_path / "whole")
    real, rows = module.target_losses, list[int]()

    def target_losses(model: Any, batch: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            rows.append(len(batch.input_ids))
            if len(batch.input_ids) > fits:
                raise torch.OutOfMemoryError("no room")
        return real(model, batch)

    monkeypatch.setattr(module, "target_losses", target_losses)
    lowered = packed(runs, session, tmp_path / "lowered")
    assert_all_same(expected, lowered)
    assert {*rows} == tried


def test_in_bfloat16_a_slot_that_diverges_leaves_the_others_as_they_are(
    run: RunConfig, tmp_path: Path
) -> None:
    run = changed(run, scale={"dtype": "bfloat16", "zero": 2})
    session = Session.open(run, Worker())
    runs = {"one": with_method(run, "lora"), "other": with_method(run, "cla", seed=2)}
    clean = packed(runs, session, tmp_path / "clean")["one"]
    runs["other"] = changed(runs["other"], optim={"lr": 1e30})
    broken = packed(runs, session, tmp_path / "broken")
    beside = broken["one"]
    assert isinstance(clean, TrainResult)
    assert isinstance(beside, TrainResult)
    assert isinstance(broken["other"], TrainError)
    assert [loss for _, loss in beside.train_curve] == pytest.approx(
        [loss for _, loss in clean.train_curve], rel=torch.finfo(torch.bfloat16).eps
    )


def test_gradients_of_a_pass_that_did_not_fit_are_forgotten(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("ab")}
    expected = packed(runs, session, tmp_path / "whole")
    real, failed = Part.take_gradients, list[bool]()

    def take_gradients(part: Part) -> None:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        real(part)

    monkeypatch.setattr(Part, "take_gradients", take_gradients)
    again = packed(runs, session, tmp_path / "again")
    assert failed
    assert_all_same(expected, again)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_of_a_pass_are_forgotten_when_another_run_has_to_leave(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    # Nothing is left to lower, so the newest run leaves; a clipped gradient would hide its size.
    run = changed(
        run,
        scale={"accumulation": accumulation, "activation_checkpointing": False},
        optim={"clip": 1e9, "lr": 1e-3},
    )
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("ab")}
    expected = Trainer(runs["a"], session, Reporter(), tmp_path / "alone").fit()
    real, there, taken = Part.take_gradients, Pack.session, list[Part]()
    slots = list[Any]()

    def own(pack: Pack) -> Session:
        slots.append(pack._slots)
        return there(pack)

    def take_gradients(part: Part) -> None:
        taken.append(part)
        # In the last micro-batch of the third step of both.
        if len(slots[-1]) == 2 and len(taken) > 4 * accumulation + 2 * (accumulation - 1):
            raise torch.OutOfMemoryError("no room")
        real(part)

    monkeypatch.setattr(Pack, "session", own)
    monkeypatch.setattr(Part, "take_gradients", take_gradients)
    left = packed(runs, session, tmp_path / "packed")["a"]
    assert isinstance(left, TrainResult)
    assert_same(expected, left)


def test_seconds_and_tokens_are_those_of_each_run(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times of packed runs add up to that of the device."""
    runs = {"one": run, "other": changed(run, seed=1, optim={"rows_per_step": 4})}
    real, steps = Pack.step, list[list[StepResult]]()

    def step(pack: Pack, asked: Any) -> Any:
        found = real(pack, asked)
        steps.append([result() for result in found.values()])
        return found

    monkeypatch.setattr(Pack, "step", step)
    started = time.perf_counter()
    ended = packed(runs, session, tmp_path)
    wall = time.perf_counter() - started
    results = [result for result in ended.values() if isinstance(result, TrainResult)]
    assert len(results) == 2
    for both in steps:
        assert sum(one.share for one in both) == pytest.approx(1)
        assert both[0].seconds == both[1].seconds
        assert both[1].share == pytest.approx(both[1].tokens / (both[0].tokens + both[1].tokens))
    durations = [both[0].seconds or 0.0 for both in steps]
    assert sum(result.seconds["train"] for result in results) == pytest.approx(sum(durations))
    for number, result in enumerate(results):
        tokens = sum(both[number].tokens for both in steps)
        assert result.tokens_per_second == pytest.approx(tokens / sum(durations))
        assert result.seconds["overhead"] >= 0
        assert result.peak_memory == 0, "the memory is that of both"
    # What each spends comes from one clock at a time.
    assert sum(result.seconds["total"] for result in results) <= wall


def test_padding_is_that_of_each_run(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, session = two_rows(changed(run, optim={"steps": 2}), session)
    real, found = Pack.step, list[list[float]]()

    def step(pack: Pack, asked: Any) -> Any:
        results = real(pack, asked)
        found.append([result().padding for result in results.values()])
        return results

    monkeypatch.setattr(Pack, "step", step)
    packed({"both": run, "each": changed(run, optim={"rows_per_step": 1})}, session, tmp_path)
    both, each = zip(*found, strict=True)
    assert both == (7 / 32, 7 / 32)
    # All rows are as wide as the longest one of both runs.
    assert sorted(each) == [0, 7 / 16]


def test_what_did_not_fit_is_tried_again_with_fewer_slots(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("abcd")}
    runs["a"] = with_method(run, "lora", optim={"steps": 2})
    expected = packed(runs, session, tmp_path / "whole")
    real, training, validating = module.target_losses, list[int](), list[int]()

    def target_losses(model: Any, batch: Any) -> torch.Tensor:
        rows = len(batch.input_ids)
        (training if torch.is_grad_enabled() else validating).append(rows)
        if rows > 6:
            raise torch.OutOfMemoryError("no room")
        return real(model, batch)

    monkeypatch.setattr(module, "target_losses", target_losses)
    assert_all_same(expected, packed(runs, session, tmp_path / "lowered"))
    # Two rows of each slot: of all four, of two by turns, and of the three that are left.
    assert training == [8, *[4, 4] * 2, *[6] * 4]
    assert validating == [8, 4, 4, 6, 6]


def test_graphs_are_captured_again_with_fewer_slots(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: with_method(run, "lora", seed=seed) for seed, name in enumerate("abc")}
    runs["a"] = with_method(run, "lora", optim={"steps": 2})
    captured: list[int] = []

    @contextmanager
    def graphed(_: Any, batch: Any, parts: Any) -> Iterator[None]:
        captured.append(len(batch.input_ids))
        if len(batch.input_ids) > 4:
            raise torch.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(module, "graphed", graphed)
    pack = Pack(session, graphs=True)
    courses = Courses[TrainResult](pack)
    for key, one in runs.items():
        begin(courses, pack, key, one, tmp_path)
    play(courses, pack)
    assert captured == [6, 4]
    graphs = {key: result.placement["graphs"] for key, result in courses.ended().items()}  # type: ignore[union-attr]
    assert graphs == {"a": False, "b": True, "c": True}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of members of each engine that is built."""
    sizes, real = list[int](), FlatEngine.__init__

    def build(engine: FlatEngine, config: RunConfig, members: Any) -> None:
        sizes.append(len(members))
        real(engine, config, members)

    monkeypatch.setattr(FlatEngine, "__init__", build)
    return sizes


def test_links_of_a_chain_need_no_new_engine(
    run: RunConfig, session: Session, tmp_path: Path, built: list[int]
) -> None:
    runs = {name: with_method(run, name, seed=seed) for seed, name in enumerate(("c3la", "rac", "lora"))}
    runs["two"] = with_method(run, "rc3la", links=2)
    expected = {
        name: Trainer(one, Session.open(one, session.worker), Reporter(), tmp_path / name).fit()
        for name, one in runs.items()
    }
    built.clear()
    assert_all_same(expected, packed(runs, session, tmp_path / "together"))
    assert built == [4]


@pytest.mark.parametrize(("short", "sizes"), [(2, [4]), (3, [4, 1])])
def test_an_engine_that_is_mostly_empty_is_built_anew(
    run: RunConfig, session: Session, tmp_path: Path, built: list[int], short: int, sizes: list[int]
) -> None:
    """Without new runs, the places of those that have ended would be kept to the end."""
    runs = {f"short{seed}": changed(run, seed=seed, optim={"steps": 2}) for seed in range(short)}
    runs |= {f"long{seed}": changed(run, seed=9 + seed) for seed in range(4 - short)}
    alone = Trainer(runs["long0"], session, Reporter(), tmp_path / "alone").fit()
    built.clear()
    assert_same(alone, packed(runs, session, tmp_path / "together")["long0"])
    assert built == sizes


def test_ranks_that_fall_at_the_same_step_need_one_new_engine(
    run: RunConfig, session: Session, tmp_path: Path, built: list[int]
) -> None:
    """Even if one of the runs is evaluated there, and the other is not."""
    falling = changed(run, anneal=AnnealConfig(rank=2), evaluate={"every": None})
    runs = {"one": falling, "other": changed(falling, seed=1)}
    pack = Pack(session)
    courses = Courses[TrainResult](pack)
    (boundary, *_) = [phase.end for phase in Trainer(falling, session, Reporter(), tmp_path).phases.plan]
    for key, one in runs.items():
        at = [boundary] if key == "one" else []
        trainer = Trainer(one, pack.session(), Reporter(), tmp_path / key, at, pack=pack)
        courses.begin(key, trainer.course(), trainer.clock)
    play(courses, pack)
    ranks = {phase.rank for phase in Trainer(falling, session, Reporter(), tmp_path).phases.plan}
    assert built == [2] * len(ranks)


@pytest.mark.parametrize("scale", [{}, {"dtype": "bfloat16", "zero": 2}])
def test_a_run_that_goes_on_takes_the_place_of_one_that_has_ended(
    run: RunConfig, tmp_path: Path, built: list[int], scale: dict[str, Any]
) -> None:
    """Its masters, moments and number of steps are its own."""
    run = changed(run, scale=scale)
    session = Session.open(run, Worker())
    runs = {
        "short": with_method(run, "lora_plus", optim={"steps": 2, "betas": (0.5, 0.6), "weight_decay": 0.0}),
        "long": with_method(run, "lora", seed=1),
        "late": with_method(run, "lora_plus", seed=2, optim={"weight_decay": 0.1, "lr": 3e-3}),
    }
    alone = Trainer(runs["late"], session, Reporter(), tmp_path / "alone").fit()
    with pytest.raises(KeyboardInterrupt):
        Trainer(runs["late"], session, DieAt(2), tmp_path / "late").fit()
    built.clear()
    pack = Pack(session)
    courses, ended = Courses[TrainResult](pack), dict[str, TrainResult | Exception]()
    for key in ("short", "long"):
        begin(courses, pack, key, runs[key], tmp_path)
    while len(courses):
        for key in courses.questions:
            courses.answer(key, True)
        courses.advance()
        ended |= courses.ended()
        if "short" in ended and "late" in runs:
            begin(courses, pack, "late", runs.pop("late"), tmp_path)
    pack.close()
    late = ended["late"]
    assert isinstance(late, TrainResult), late
    assert built == [2]
    if scale:
        for (_, one), (_, other) in zip(alone.train_curve, late.train_curve, strict=True):
            assert abs(one - other) <= torch.finfo(torch.bfloat16).eps * one
    else:
        assert_same(alone, late)
