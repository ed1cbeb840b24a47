"""`Trainer`: trains one run, from fresh or given adapters or its last checkpoint, to an artifact on disk.

Training does not depend on Ray: the caller passes a `Session` and a `Reporter`.

A run's course is a generator. It yields what it can't do alone, an optimizer step or the question whether it
may continue, and receives the answer. `Trainer.fit` answers for a run that has the device to itself; packed
runs (`rayft.train.packed`) share their steps.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta, ModuleShapes, folder_bytes
from rayft.data.pack import AnyBatch, Row, collate_rows
from rayft.errors import ConfigError, InterruptedRunError, TrainError
from rayft.files import room_on, sync_tree
from rayft.identity import Identity
from rayft.methods.base import LayerShape, LoraFactors, MethodConfig
from rayft.models.attention import why_dense
from rayft.models.heads import reset_heads
from rayft.models.inject import check_fits, clear, export, inject
from rayft.models.methods import method
from rayft.models.targets import linear_shapes
from rayft.numerics import derive_seed, seed_everything
from rayft.peft.folder import Artifact
from rayft.squeeze.anneal import Phase, revive
from rayft.train import checkpoint
from rayft.train.best import BEST, Kept
from rayft.train.checkpoint_folder import is_portable
from rayft.train.course import (
    Asked,
    Clock,
    Course,
    CrowdedError,
    HalfDoneError,
    Part,
    Question,
    Step,
    TrainResult,
    Validation,
    drive,
    random_state,
)
from rayft.train.deepspeed import (
    DeepSpeedEngine,
    Later,
    StepResult,
    build_engine,
    destroy,
    gathered,
    kept,
    optimizer_step,
    release,
    set_lr,
)
from rayft.train.flat import RunEngine, flattens, has_masters
from rayft.train.graphs import capture_stream, graphed
from rayft.train.masters import Master, read_masters, write_masters
from rayft.train.memory import PeakMemory
from rayft.train.mode import train_mode
from rayft.train.packed import Pack, Slot
from rayft.train.phases import phases_of
from rayft.train.placement import (
    DeviceMemoryError,
    Placement,
    engine_out_of_memory,
    keep,
    out_of_memory,
    place,
    placed,
    recompute_activations,
    smaller,
    validation_out_of_memory,
)
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.stopwatch import Stopwatch
from rayft.train.validation import validation_loss

__all__ = [
    "Course",
    "Reporter",
    "TrainResult",
    "Trainer",
    "check_start",
    "evaluation_steps",
    "validation_loss",
]


@dataclass
class Progress:
    """The state of a run between two steps, which a checkpoint keeps."""

    step: int = 0
    val_curve: list[tuple[int, float]] = field(default_factory=list)
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    step_seconds: float = 0.0
    """Duration of the steps; if other runs took them as well, `train_seconds` has this run's share."""
    evaluate_seconds: float = 0.0
    tokens: int = 0
    best_step: int = 0
    """The step of the least validation loss so far; 0 before the first evaluation."""
    best_loss: float = math.inf
    start: str = ""
    """Content hash of the adapter that the run started from; empty if it started from fresh adapters."""
    saved_at: float = field(default_factory=time.monotonic)
    """When this process began or last saved a checkpoint; not kept in the checkpoint."""
    saved_step: int = 0
    """The step of the last checkpoint; not kept in the checkpoint."""
    saved_seconds: float = 0.0
    """Time that earlier processes spent on training and evaluating; not kept in the checkpoint."""

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Progress:
        """Read the progress from the state of a checkpoint."""
        # Earlier versions did not keep the best evaluation.
        values = {name: state[name] for name in cls().state() if name in state}
        for curve in ("val_curve", "train_curve"):
            values[curve] = [(int(step), float(value)) for step, value in values[curve]]
        values.setdefault("step_seconds", values["train_seconds"])
        spent = values["train_seconds"] + values["evaluate_seconds"]
        return cls(**values, saved_step=values["step"], saved_seconds=spent)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("saved_")}


@dataclass(frozen=True)
class _Saved:
    """What a run left on disk."""

    folder: Path
    parameters: int
    rank: int | None = None
    bytes: int = 0
    content_hash: str = ""


@dataclass(frozen=True)
class _Launched:
    """A step whose numbers have not been read."""

    step: int
    lr: float
    result: Later


class Reporter:
    """Receives a run's numbers, and may end the run. Only rank 0 calls it.

    This class ignores all numbers and never ends a run; a subclass overrides what it needs.
    """

    @property
    def interrupted(self) -> bool:
        """Whether the run has to save a checkpoint and end; read after each step."""
        return False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the numbers of a training step; must not block."""

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Receive the numbers of an evaluation, and return whether the run continues."""
        return True

    def note(self, text: str) -> None:
        """Receive a sentence that a person should read."""


class Trainer:
    """Train one run. All workers of the run make a trainer and call `fit` together.

    Args:
        run: settled (no `auto` left).
        session: the base and the data in memory; the trainer replaces the adapters in the base.
        reporter: receives the numbers of each step, and decides at each evaluation whether the run continues.
            A run that is resumed at an evaluation reports that evaluation again, because the process that
            received the decision may have ended before it could act on it.
        folder: where this node writes the files of the run's folder (`Home.place`). The run continues from
            the last checkpoint that the home has of this folder.
        evaluate_at: steps after which the search needs a validation loss. The last step is always evaluated.
        placement: how steps use the device, if an earlier group of workers has found out.
        pack: the runs with which this one takes its steps, by `course`; the session is then one of the
            pack's. By default it has the device to itself.
        clock: counts the device's time for the run; by default it begins now.

    Raises:
        ConfigError: if a link of a chain would have no steps.
    """

    def __init__(
        self,
        run: RunConfig,
        session: Session,
        reporter: Reporter,
        folder: Path,
        evaluate_at: Sequence[int] = (),
        *,
        placement: Placement | None = None,
        pack: Pack | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.pack, self.clock = pack, clock or Clock()
        self.run, self.session, self.reporter, self.folder = run, session, reporter, folder
        self.worker, self.model = session.worker, session.loaded.model
        self.phases = phases_of(run, session)
        self.progress = Progress()
        self.placement = Placement()
        """How steps use the device; decided in `fit`. Packed runs have their pack's."""
        self.engine: DeepSpeedEngine = None
        """The engine of the current phase; None outside of `fit`."""
        self._evaluate_at, self._known_placement = evaluation_steps(run, evaluate_at), placement
        self._trainable = 0
        self._ended = False
        """Whether the run ended before its last step by its own rule."""
        self._launched: _Launched | None = None
        """The last step, until its numbers are read."""
        self._best: Kept | None = None
        """On rank 0, what the best evaluation left, once training has gone on after it."""

    def fit(self) -> TrainResult:
        """Train the run, or what is left of it, and save its artifact in `folder`.

        Raises:
            ConfigError: if the adapter to start from does not fit.
            ArtifactError: if the adapter to start from can't be read or was made for another base, or if the
                folder of the result holds anything but an adapter written by rayft.
            DeviceMemoryError: on any worker, while others may wait for it, if a step does not fit into memory
                and only new workers can go on, with less at a time; or if the settings allow nothing less.
            TrainError: if a loss is not finite, or a checkpoint does not fit.
            InterruptedRunError: if the reporter was interrupted; a checkpoint of the last step was saved.
            DiskFullError: if there is no space for a checkpoint or the result; earlier files stay.
        """
        return drive(self.course(), self.answer)

    def course(self) -> Course:
        """Train the run as `fit` does, but let the caller take its steps and answer its questions.

        Raises:
            CrowdedError: if the runs of a pack that stay leave too little memory for this one.
        """
        try:
            return (yield from self._course())
        except torch.OutOfMemoryError as error:
            # Steps handle it themselves: it was for fresh adapters, the next rank or a copy of the best.
            if self.pack is not None and len(self.pack):
                raise CrowdedError(str(error), intact=False) from None
            raise engine_out_of_memory(self.run) from None

    def _course(self) -> Course:
        started = self.clock()
        self._fetch_checkpoints()
        start = read_start(self.run, self.session)
        self.progress.start = start.content_hash
        self._trainable = inject(self.model, self.run.method, self.run.seed, start.modules).trainable
        reset_heads(self.model, self.run.seed, start.heads)
        try:
            if self.pack is None:
                self.placement = place(self.run, self.session, self._known_placement)
            self._note_mask()
            stream = capture_stream() if self.placement.graphs else nullcontext()
            # What `place` has tried does not count. Packed runs have no memory of their own.
            watch = PeakMemory(self.worker.device) if self.pack is None else nullcontext()
            with watch as memory, stream:
                finished, saved = yield from self._train_phases()
        finally:
            if method(self.run.method.name).shares_base:
                clear(self.model)
        return self._result(saved, finished, memory.peak if memory else 0, self.clock() - started)

    def _note_mask(self) -> None:
        """Notify the user, once for all runs of a session, if attention computes all pairs of tokens."""
        if self.worker.rank > 0 or self.run.model.task != "causal_lm":
            return
        graphs = self.placement.graphs
        if self.pack is not None:
            # Nothing is captured in a pack while one of its runs has dropout.
            graphs = self.pack.placement.graphs and not self.run.method.dropout
        text = why_dense(self.model, torch.device(self.worker.device), graphs=graphs)
        if text and text not in self.session.said:
            self.session.said.add(text)
            self.reporter.note(text)

    # --- phases

    def _train_phases(self) -> Part[tuple[bool, _Saved]]:
        """Train one phase after the other, each with its own engine, and save the result.

        Returns:
            Whether the run reached its last step, and what was saved.
        """
        state = checkpoint.last_state(
            self.folder / "checkpoint", self._identity, self.worker, self.reporter.note
        )
        for number, phase in enumerate(self.phases.plan):
            if state is not None and phase.end < state["step"]:
                self.phases.skip(self.model, number + 1)
                continue
            saved = yield from self._train_phase(number, phase, state)
            state = None
            if saved is not None:
                return self._finished, saved
        raise AssertionError("the last phase ends with the run")

    def _train_phase(self, number: int, phase: Phase, state: Mapping[str, Any] | None) -> Part[_Saved | None]:
        """Train a phase, from its start or a checkpoint's state.

        If a step does not fit into the device's memory, the phase goes on with a smaller placement: weights
        and moments move to a new engine.

        Returns:
            What was saved, if the run ends with this phase; otherwise the next phase is prepared.
        """
        masters: Mapping[str, Master] | None = None
        while True:
            with self._new_engine(by_deepspeed=masters is None and not self._is_portable(state)):
                go_on: bool | None = True
                if masters is not None:
                    write_masters(self.engine, masters)
                elif state is not None:
                    go_on = yield from self._resume(state)
                else:
                    self.phases.enter(self.engine)
                if go_on:
                    with ExitStack() as graphs:
                        go_on = self._captured(graphs) and (yield from self._train(phase))
                if go_on is None:
                    for parameter in self.model.parameters():
                        parameter.grad = None
                    gc.collect()
                    masters = read_masters(self.engine)
                    continue
                if not go_on or self._finished:
                    return self._save()
                self.phases.leave(self.engine, self.model, number + 1)
                if self.run.anneal is not None:
                    # What was found at a higher rank can't be kept.
                    self.progress.best_step, self.progress.best_loss, self._best = 0, math.inf, None
                return None

    def _is_portable(self, state: Mapping[str, Any] | None) -> bool:
        """Return whether any engine can continue from a checkpoint, given its state."""
        return state is None or is_portable(self.folder / "checkpoint" / state["tag"])

    @property
    def _finished(self) -> bool:
        return self._ended or self.progress.step >= self.run.optim.steps

    @contextmanager
    def _new_engine(self, *, by_deepspeed: bool = False) -> Iterator[None]:
        """Build an engine over the model for the block, and destroy it after the block.

        A packed run takes a place in its pack instead.

        Args:
            by_deepspeed: whether the engine must read a checkpoint that DeepSpeed has written.
        """
        try:
            if self.pack is not None:
                self.engine = self.pack.join(self.run, self.model)
            elif flattens(self.run) and not by_deepspeed:
                self.engine = RunEngine(placed(self.run, self.placement), self.model)
            else:
                self.engine = build_engine(placed(self.run, self.placement), self.model)
        except torch.OutOfMemoryError as error:
            raise engine_out_of_memory(self.run) from error
        try:
            yield
        finally:
            engine, self.engine = self.engine, None
            if isinstance(engine, Slot | RunEngine):
                engine.leave()
            else:
                destroy(engine)

    def _captured(self, graphs: ExitStack) -> bool | None:
        """Capture the passes as CUDA graphs until `graphs` is closed, if the placement has them.

        A pack captures its own. Returns None if they did not fit into the device's memory; a smaller
        placement is set then.
        """
        if self.placement.graphs and self.pack is None:
            train_mode(self.model)
            try:
                first = self._share(self.progress.step)
                parts = self.engine.parts if isinstance(self.engine, RunEngine) else ()
                graphs.enter_context(graphed(self.model, self._micro_batches(first)[0], parts))
            except torch.OutOfMemoryError:
                self._lower()
                return None
        return True

    # --- steps

    def _train(self, phase: Phase) -> Part[bool | None]:
        """Take the steps of a phase; return whether the run may continue after it.

        Returns None if a step did not fit into the device's memory; a smaller placement is set then.
        """
        recompute_activations(self.model, wanted=self.placement.activation_checkpointing)
        while self.progress.step < phase.end:
            if not (yield from self._step(phase)):
                return None
            if self.progress.step in self._evaluate_at and not (yield from self._evaluate()):
                return False
            if self._interrupted():
                self._save_checkpoint()
                step = self.progress.step
                raise InterruptedRunError(f"interrupted after step {step}", step)
        self._read()
        return True

    def _step(self, phase: Phase) -> Part[bool]:
        """Take one optimizer step, and report the step before; return whether it fitted into memory."""
        progress, optim = self.progress, self.run.optim
        step, worker = progress.step, self.worker
        share = self._share(step)
        seed_everything(derive_seed(self.run.seed, step, worker.rank))
        lr = optim.lr_at(step, phase.first, phase.warmup)
        awaited = not worker.runs_ahead or step + 1 in self._evaluate_at or step + 1 == phase.end
        try:
            result: Later = yield Step(self.engine, share, lr, random_state(worker.device), awaited)
        except CrowdedError as crowded:
            if crowded.intact:
                self._save_checkpoint()
            raise
        except HalfDoneError:
            # Fewer rows at a time would leave it no more room.
            raise engine_out_of_memory(self.run) from None
        except torch.OutOfMemoryError:
            if self.pack is not None:
                # It is alone in its pack, which has tried all that takes less.
                raise out_of_memory(self.run, self.pack.placement) from None
            self._read()
            self._lower()
            return False
        if self.pack is not None:
            self.placement = self.pack.placement
        self._read()
        self._launched = _Launched(step + 1, lr, result)
        progress.step = step + 1
        if awaited:
            self._read()
        return True

    def _read(self) -> None:
        """Wait until the device has taken the last step, and report its numbers, unless that was done."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        progress, result = self.progress, launched.result()
        self._check_finite(result.loss, "loss", f"at step {launched.step}")
        self.session.tick()
        progress.tokens += result.tokens
        progress.step_seconds += result.seconds
        progress.train_seconds += result.seconds * result.share
        progress.train_curve.append((launched.step, result.loss))
        if self.worker.rank == 0:
            self.reporter.log(launched.step, _step_metrics(launched.lr, result))

    def _check_finite(self, loss: float, what: str, when: str) -> None:
        """Raise TrainError unless a loss is finite. All workers have the same loss, so all raise it."""
        if not math.isfinite(loss):
            diverged = TrainError(
                f"the {what} is {loss} {when} with lr {self.run.optim.lr:g}; use a lower learning rate, a "
                "longer warm-up, or float32"
            )
            diverged.everywhere = True
            raise diverged

    def answer(self, asked: Asked) -> Later | bool | float:
        """Answer what the course of a run asks for, if the run has the device to itself."""
        if isinstance(asked, Validation):
            return validation_loss(self.session)
        if isinstance(asked, Question):
            return self.worker.share(
                self.worker.rank == 0 and self.reporter.report(asked.step, asked.metrics)
            )
        if not self.model.training:
            train_mode(self.model)
        set_lr(asked.engine, asked.lr)
        stopwatch = Stopwatch(self.worker.device)
        batches = self._micro_batches(asked.share)
        result = optimizer_step(asked.engine, batches, self.worker)
        seconds = stopwatch.stop()
        padding = asked.padding(sum(batch.input_ids.numel() for batch in batches))
        return lambda: replace(result(), padding=padding, seconds=seconds())

    def _lower(self) -> None:
        """Set a smaller placement, because a step did not fit into the device's memory.

        Raises:
            DeviceMemoryError: if the settings allow none; or with the placement, if this is one of several
                workers, since the others may have had room and wait in an exchange, or if the weights and
                moments of ZeRO-3 would have to move to another engine.
        """
        rows = self.run.optim.rows_per_step // self.worker.world
        before, after = self.placement, smaller(self.run, self.placement)
        problem = (
            f"step {self.progress.step + 1} with {rows // before.accumulation} row(s) at a time did not fit "
            "into the device's memory"
        )
        how = "recomputes activations" if after.activation_checkpointing else "goes on"
        if self.worker.world > 1 or self.run.scale.zero == 3:
            raise DeviceMemoryError(
                f"{problem}; the run starts again from its last checkpoint, and {how} with "
                f"{rows // after.accumulation}",
                after,
            )
        self.placement = after
        keep(self.run, self.session, after)
        self.reporter.note(f"{problem}; the run {how} with {rows // after.accumulation}")

    def _share(self, step: int) -> list[list[Row]]:
        """Return this worker's rows of an optimizer step, for each of its micro-batches.

        A pack divides them itself.
        """
        stream, worker = self.session.row_stream(self.run), self.worker
        pieces = self.placement.accumulation if self.pack is None else 1
        return stream.share(step, worker.rank, worker.world, pieces)

    def _micro_batches(self, share: Sequence[Sequence[Row]]) -> list[AnyBatch]:
        """Return micro-batches on this worker's device."""
        graphs, stream = self.placement.graphs, self.session.row_stream(self.run)
        # CUDA graphs need the same shapes in every step.
        width = self.run.data.max_length if graphs else None
        segments = len(share[0]) * stream.most_segments if graphs else None
        batches = [collate_rows(rows, self.session.pad_id, width, segments) for rows in share]
        return [batch.to(self.worker.device) for batch in batches]

    def _interrupted(self) -> bool:
        """Return, on all workers alike, whether the run has to save a checkpoint and end."""
        if self.progress.step >= self.run.optim.steps:
            return False
        return self.worker.share(self.worker.rank == 0 and self.reporter.interrupted)

    # --- evaluations

    def _evaluate(self) -> Part[bool]:
        """Measure the validation loss, save a checkpoint if one is due, and report the loss.

        Returns:
            Whether the run may continue.
        """
        self._read()
        progress, started = self.progress, self.clock()
        try:
            value: float = yield Validation(self.engine)
        except torch.OutOfMemoryError:
            raise validation_out_of_memory(self.run) from None
        release(self.engine)
        self._check_finite(value, "validation loss", f"after step {progress.step}")
        progress.val_curve.append((progress.step, value))
        if value < progress.best_loss:
            progress.best_step, progress.best_loss = progress.step, value
            if self._keeps_best and progress.step < self.run.optim.steps:
                self._best = self._copy()
        progress.evaluate_seconds += self.clock() - started
        # Before the checkpoint, because a run that fails here continues from the checkpoint, after this step.
        if self.run.evaluate.trail and not method(self.run.method.name).saves_model:
            trail = self.folder / "trail" / f"step-{progress.step:06d}"
            self._save_adapter(trail)
            with self.worker.together():
                self.session.home.send(trail)
        # Before the report, so that nothing is lost if the process ends while the search decides.
        if progress.step < self.run.optim.steps and self._checkpoint_due():
            self._save_checkpoint()
        return (yield from self._report(progress.step, value))

    def _report(self, step: int, val_loss: float) -> Part[bool]:
        """Report an evaluation; return, on all workers alike, whether the run may continue."""
        wanted: bool = yield Question(step, {"val_loss": val_loss})
        if not wanted:
            return False
        self._ended = self._without_hope()
        return not self._ended

    def _without_hope(self) -> bool:
        """Return whether as many evaluations as `evaluate.patience` have brought no new least loss."""
        patience, last, progress = self.run.evaluate.patience, self.phases.plan[-1], self.progress
        since = [step for step, _ in progress.val_curve if step > max(last.first, progress.best_step)]
        return patience is not None and len(since) >= patience

    # --- the best evaluation

    @property
    def _keeps_best(self) -> bool:
        return self.run.evaluate.keep == "best"

    @property
    def _kept_step(self) -> int | None:
        """The step whose weights the run keeps; None if they are the last ones."""
        best = self.progress.best_step
        return best if self._keeps_best and best not in (0, self.progress.step) else None

    @property
    def _earlier_best(self) -> Kept | None:
        """On rank 0, what the run keeps, if that is not what it has now."""
        return self._best if self._kept_step is not None else None

    def _copy(self) -> Kept | None:
        """Copy what is trained to the CPU of rank 0 (all workers call it; the others get None)."""
        whole = method(self.run.method.name).saves_model
        parameters = dict(self.model.named_parameters()) if whole else kept(self.model)
        with gathered(self.engine, parameters.values()):
            if self.worker.rank > 0:
                return None
            if not whole:
                return Kept(artifact=self._export())
            return Kept(weights={name: value.detach().cpu().clone() for name, value in parameters.items()})

    # --- checkpoints

    @property
    def _identity(self) -> Identity:
        """What the run's result follows from."""
        start, name = self.progress.start, self.run.start or ""
        known = {"config": self.run.hash, "start": start, "start_name": name}
        return self.session.identity.model_copy(update=known)

    def _fetch_checkpoints(self) -> None:
        """Fetch from the home what an earlier lane has left there, on whichever node that lane was."""
        with self.worker.together():
            self.session.home.bring(self.folder / "checkpoint")

    def _checkpoint_due(self) -> bool:
        """Decide, for all workers alike, whether the last checkpoint is old enough for another one."""
        age = time.monotonic() - self.progress.saved_at
        return self.worker.share(age >= self.run.evaluate.checkpoint_seconds)

    def _save_checkpoint(self) -> None:
        """Save a checkpoint, unless there is one of this step."""
        self._read()
        progress = self.progress
        if progress.saved_step == progress.step:
            return
        place = self.folder / "checkpoint"
        best = self._earlier_best
        portable = has_masters(self.run)
        state = progress.state()
        checkpoint.save(place, self.engine, state, self._identity, self.session, best, portable=portable)
        progress.saved_at, progress.saved_step = time.monotonic(), progress.step

    def _resume(self, state: Mapping[str, Any]) -> Part[bool]:
        """Continue from a checkpoint; return whether the run may continue after its last evaluation."""
        checkpoint.restore(self.folder / "checkpoint", self.engine, state)
        self.progress = Progress.resumed(state)
        if self._kept_step is not None:
            with self.worker.together():
                if self.worker.rank == 0:
                    self._best = Kept.load(self.folder / "checkpoint" / state["tag"] / BEST)
        elif self._keeps_best and self.progress.best_step:
            self._best = self._copy()
        curve = self.progress.val_curve
        if not curve or curve[-1][0] != self.progress.step:
            return True
        return (yield from self._report(*curve[-1]))

    # --- the result

    def _save(self) -> _Saved:
        """Save what the run keeps: an adapter, or a whole model if the method trains that."""
        best = self._earlier_best
        if not method(self.run.method.name).saves_model:
            folder = self.folder / "adapter"
            artifact = self._save_adapter(folder, best)
            if artifact is None:
                return _Saved(folder, self._trainable)
            rank = artifact.rank if isinstance(artifact, AdapterArtifact) else None
            return _Saved(folder, artifact.parameters, rank, folder_bytes(folder), artifact.content_hash)
        saved = _Saved(self.folder / "model", self._trainable)
        with self.worker.together(), gathered(self.engine, self.model.parameters()):
            if self.worker.rank > 0:
                return saved
            if best is not None:
                # The lane loads its base again after such a run.
                for name, parameter in self.model.named_parameters():
                    parameter.data.copy_(best.weights[name])
            self._save_model(saved.folder)
            size = sum(file.stat().st_size for file in saved.folder.glob("*.safetensors"))
            return replace(saved, bytes=size)

    def _save_adapter(self, folder: Path, best: Kept | None = None) -> Artifact | None:
        """Write the adapters as they are now, and return them (None on other workers than rank 0).

        If `best` is given, its adapter is written instead.

        Rank 0 writes. All workers take part, since ZeRO-3 partitions frozen factors too.
        """
        with self.worker.together(), gathered(self.engine, kept(self.model).values()):
            if self.worker.rank > 0:
                return None
            artifact = (best and best.artifact) or self._export()
            artifact.save(folder)
            return artifact

    def _export(self) -> Artifact:
        """Return the adapters as they are now, copied to the CPU; their parameters must be gathered."""
        run, session = self.run, self.session
        meta = ArtifactMeta(
            method=run.method.name,
            task=run.model.task,
            base_model=run.model.name,
            base_revision=run.model.revision or "",
            base_fingerprint=session.loaded.fingerprint,
            data_digest=session.parts.digest,
            parent=self.progress.start,
        )
        return export(self.model, meta)

    def _save_model(self, folder: Path) -> None:
        """Write the whole model as a folder that transformers loads; leave nothing if there is no space."""
        with room_on(folder, sum(parameter.nbytes for parameter in self.model.parameters())):
            try:
                self.model.save_pretrained(folder)
                self.session.loaded.tokenizer.save_pretrained(folder)
                sync_tree(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def _result(self, saved: _Saved, finished: bool, peak_memory: int, seconds: float) -> TrainResult:
        progress = self.progress
        spent = progress.train_seconds + progress.evaluate_seconds - progress.saved_seconds
        return TrainResult(
            finished=finished,
            steps=progress.step,
            val_loss=self._kept_loss,
            val_curve=progress.val_curve,
            train_curve=progress.train_curve,
            trainable=self._trainable,
            parameters=saved.parameters,
            rank=saved.rank,
            bytes=saved.bytes,
            seconds={
                "train": progress.train_seconds,
                "evaluate": progress.evaluate_seconds,
                "overhead": seconds - spent,
                "total": seconds,
            },
            peak_memory=peak_memory,
            tokens_per_second=progress.tokens / max(progress.step_seconds, 1e-9),
            folder=str(saved.folder),
            content_hash=saved.content_hash,
            start=progress.start,
            kept_step=self._kept_step,
            placement=asdict(self.placement),
        )

    @property
    def _kept_loss(self) -> float:
        """The validation loss of the weights that the run keeps."""
        if self._kept_step is not None:
            return self.progress.best_loss
        return self.progress.val_curve[-1][1] if self.progress.val_curve else math.nan


def evaluation_steps(run: RunConfig, evaluate_at: Sequence[int]) -> set[int]:
    """Return the steps after which a run is evaluated.

    Args:
        run: the run.
        evaluate_at: steps besides those of `evaluate.every`.
    """
    every = run.evaluate.every
    regular = range(every, run.optim.steps, every) if every else ()
    return {step for step in (*evaluate_at, *regular) if step < run.optim.steps} | {run.optim.steps}


def _step_metrics(lr: float, result: StepResult) -> dict[str, float]:
    return {
        "train_loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_second": result.tokens / result.seconds,
        "step_seconds": result.seconds * result.share,
        "padding": result.padding,
    }


@dataclass(frozen=True)
class Start:
    """What a run starts from: fresh adapters (all fields empty), or an adapter folder (`RunConfig.start`)."""

    modules: Mapping[str, LoraFactors] | None = None
    """Module path → factors."""
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Parameter path → value of a classification head."""
    content_hash: str = ""
    """Content hash of the adapter on disk."""


def read_start(run: RunConfig, session: Session) -> Start:
    """Read the adapter that a run starts from, if it names one, and check that it fits.

    Columns that are zero in both factors would never learn; `revive` gives them a row of A.

    Raises:
        ArtifactError: if the adapter can't be read, or was made for another base.
        ConfigError: if its rank is not `method.rank`, or is more than a layer can hold.
    """
    if run.start is None:
        return Start()
    artifact, model = AdapterArtifact.load(session.home.local(run.start)), session.loaded.model
    check_fits(model, artifact, session.loaded.fingerprint)
    check_start(run, artifact, linear_shapes(model))
    modules = {name: revive(factors) for name, factors in artifact.modules.items()}
    return Start(modules, artifact.heads, artifact.content_hash)


def check_start(run: RunConfig, artifact: AdapterArtifact, shapes: ModuleShapes) -> None:
    """Check that the ranks of an adapter fit a run that starts from it.

    Args:
        run: the run.
        artifact: the adapter, which fits the base.
        shapes: linear layers of the base.

    Raises:
        ConfigError: if its rank is not `method.rank`, or is more than a layer can hold.
    """
    kind = method(run.method.name)
    for name, factors in artifact.modules.items():
        most = kind.max_rank(LayerShape(*shapes[name]))
        if factors.rank > most:
            raise ConfigError(
                f"start: {run.start} has rank {factors.rank} at {name}, which needs no more than {most}: "
                f"bring it to rank {most} by `rayft squeeze` first"
            )
    # A rank that equals the default counts as not set, except for annealing, which must know its first rank.
    rank_is_set = run.method.rank != MethodConfig().rank or run.anneal is not None
    if rank_is_set and artifact.rank != run.method.rank:
        raise ConfigError(
            f"start: {run.start} has rank {artifact.rank}, and method.rank is {run.method.rank}; set "
            f"method.rank: {artifact.rank}"
        )
