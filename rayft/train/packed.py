"""Packed runs: runs that share base and data take their steps together, as one batch.

Each run keeps its own course (`Trainer.course`), model (a skeleton of the base with the run's adapters),
random state, learning rate, clipping and moments. What they share is a step's forward and backward pass,
and one DeepSpeed engine (`rayft.train.flat`). A run that joins takes the place of one that has left, if its
parameters are as large. Otherwise a new engine is built, and masters and moments move to it.

If a step does not fit into the device's memory, fewer slots share a pass, then fewer rows of a slot, then
activations are recomputed, as for a run alone. If that is not enough, the newest runs have to leave.

On a GPU the passes of a set of slots can be captured as CUDA graphs. All batches then have the same shape,
so a run that waits for an answer has rows in them too, whose loss counts nothing.

    Pack.session()  → Trainer(run, session, …, pack).course() → asks for steps
    Pack.step({slot: Step, …}) → the result of each
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from rayft.data.pack import Batch, Row, collate_rows, padded
from rayft.errors import ConfigError, TrainError
from rayft.evaluate.loss import target_losses
from rayft.models.inject import clear
from rayft.models.packed import Layout, pack, skeleton, spans_of, unpackable
from rayft.numerics import moved
from rayft.train.course import Asked, Clock, CrowdedError, HalfDoneError, Part, Question, Step, Validation
from rayft.train.deepspeed import Later, StepResult, later
from rayft.train.flat import FlatEngine, clipped_here
from rayft.train.graphs import capture_stream, graphed
from rayft.train.masters import Holder, Master
from rayft.train.mode import train_mode
from rayft.train.placement import DeviceMemoryError, Placement, recompute_activations, smaller
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.stopwatch import Stopwatch
from rayft.train.validation import MOST_TOKENS, longest, rows_at_once, validation_rows

__all__ = ["Courses", "Pack", "Slot"]

EndT = TypeVar("EndT")
GPU_TIMES = 4
"""How many times as many tokens a GPU validates at once, of several runs, as of one."""
EASED = 0.9
"""What did not fit is tried again when rows or trained values have fallen to this share."""
logger = logging.getLogger(__name__)


class Slot(Holder):
    """A run's place in a pack, which stands in for the engine of a run that trains alone."""

    def __init__(self, owner: Pack, number: int, run: RunConfig, model: nn.Module) -> None:
        self.number, self.run, self.module = number, run, model
        self._pack = owner
        self.given: Mapping[str, Master] = {}
        """Masters that the next engine starts with."""
        self.share: Sequence[Sequence[Row]] = ()
        """Rows of its last step."""

    def masters(self) -> dict[str, Master]:
        """Return a copy of the state of all parameters that train."""
        return self._pack.masters(self)

    def set_masters(self, masters: Mapping[str, Master]) -> None:
        """Set the state of parameters before their first step."""
        self.given = dict(masters)

    def leave(self) -> None:
        """Free the place."""
        self._pack.leave(self)

    def zero_optimization_stage(self) -> int:
        """Return 0: a slot's parameters are never partitioned."""
        return 0


@dataclass(frozen=True)
class _Micro:
    """A micro-batch with the rows of several slots."""

    batch: Batch
    spans: dict[Slot, slice]
    """Slot → its tokens."""
    widths: dict[Slot, int]
    """Slot → tokens of a row in a batch of its own."""
    targets: dict[Slot, int]
    """Slot → its number of targets."""


class Pack:
    """Runs that take their steps together.

    Args:
        session: the base and the data, which all runs share. The pack replaces the adapters in the base.
        note: called with a sentence that a person should read.
        graphs: whether passes are captured as CUDA graphs; all is then done within `stream`.

    Raises:
        ConfigError: if no runs can share a batch on this base.
    """

    def __init__(
        self,
        session: Session,
        note: Callable[[str], object] = lambda _: None,
        *,
        graphs: bool = False,
    ) -> None:
        self._session, self._model, self._note = session, session.loaded.model, note
        self._wants_graphs = self._graphs = graphs
        if reason := unpackable(self._model):
            raise ConfigError(f"trials can't be packed: {reason}; set sweep.slots: 1")
        clear(self._model)
        # A trial that had the lane to itself may have turned it on.
        recompute_activations(self._model, wanted=False)
        self._skeleton = skeleton(self._model)
        self._layout = Layout()
        self._slots: list[Slot] = []
        self._engine: FlatEngine | None = None
        self._built: list[Slot | None] = []
        """Who has each place in the engine; None where a run has left."""
        self._pieces = 0
        """Number of micro-batches of a step of the engine."""
        self._attached: list[Slot] = []
        """The slots whose adapters are in the model."""
        self._numbers = 0
        self._together: int | None = None
        """Number of slots whose rows share a pass; None for all."""
        self._smaller = Placement()
        """What a slot's rows are divided into, once they have not fitted."""
        self._validated: tuple[int, int] | None = None
        """Number of slots whose examples share a batch, and of rows of each, once more have not fitted."""
        self._short: tuple[int, int] | None = None
        """Size of the slots that did not fit."""
        self._said: set[str] = set()
        """Notes on what did not fit."""
        self.placement = Placement(graphs=graphs)
        """How the last step used the device; before the first one, how that will be tried."""
        self.shares: dict[Slot, float] = {}
        """The slots' shares of the tokens of the last step."""
        self.updating = False
        """Whether the last step has begun to change parameters; if it has failed, they can't be used."""
        self._captured: ExitStack | None = None
        """Holds the graphs of the slots that the engine has."""
        self._unread: Callable[[], object] | None = None
        """Reads the numbers of the last step, until they are read."""

    def stream(self) -> AbstractContextManager[None]:
        """Return a context for all that the pack does: the stream on which graphs are captured."""
        return capture_stream() if self._graphs else nullcontext()

    def __len__(self) -> int:
        """Return the number of runs that have a place."""
        return len(self._slots)

    def session(self) -> Session:
        """Return a session for one run, with a model of its own that shares the base's weights."""
        loaded = replace(self._session.loaded, model=skeleton(self._skeleton))
        return replace(self._session, loaded=loaded)

    def join(self, run: RunConfig, model: nn.Module) -> Slot:
        """Return a place for a run whose adapters are in its model."""
        slot = Slot(self, self._numbers, run, model)
        self._numbers += 1
        self._slots.append(slot)
        return slot

    def leave(self, slot: Slot) -> None:
        """Take a run out; its parameters keep their values."""
        self._slots.remove(slot)
        if self._engine is not None and slot in self._built:
            member = self._built.index(slot)
            self._engine.release(member)
            self._built[member] = None

    def masters(self, slot: Slot) -> dict[str, Master]:
        """Return a copy of the state of a slot's parameters."""
        if self._engine is not None and slot in self._built:
            return self._engine.masters(self._built.index(slot))
        plain = {n: Master(p.detach().float().clone(), None) for n, p in _trainable(slot).items()}
        return {**plain, **slot.given}

    def step(self, steps: Mapping[Slot, Step]) -> dict[Slot, Later]:
        """Take a step of each of some runs together; other runs in the pack stay as they are.

        Returns when the device has taken the step before; or this one, if a run needs its numbers.

        Raises:
            torch.OutOfMemoryError: if they do not fit into the device's memory together, however little is
                taken at once; unless `updating`, nothing has changed then.
        """
        self.updating = False
        self._attach()
        self._prepare()
        lowered = False
        while True:
            self.placement = Placement(self._accumulation, self._recomputes, self._by_graphs)
            try:
                found = self._step(steps)
            except torch.OutOfMemoryError as error:
                if self.updating:
                    raise
                failure = str(error)
            else:
                if lowered:
                    self._say(len(steps))
                return found
            lowered = True
            try:
                self._lower([*steps])
            except DeviceMemoryError:
                # Another engine will know nothing of the gradients that were left behind.
                self._take_down()
                raise torch.OutOfMemoryError(failure) from None
            self._build()

    def validate(self, slots: Sequence[Slot]) -> dict[Slot, float]:
        """Return the validation loss of each of some runs; their examples share batches.

        Raises:
            torch.OutOfMemoryError: if not even one row of one run fits into the device's memory.
        """
        # This needs no engine, and after it some of the runs may end.
        self._attach()
        session, order = self._session, [slot for slot in self._slots if slot in slots]
        most = MOST_TOKENS * (GPU_TIMES if session.worker.device != "cpu" else 1)
        at_once = rows_at_once(session)
        together = min(len(order), max(1, most // (at_once * longest(session))))
        if self._validated is not None:
            together, at_once = min(together, self._validated[0]), self._validated[1]
        while True:
            try:
                return self._losses(order, together, at_once)
            except torch.OutOfMemoryError:
                if together == at_once == 1:
                    raise
            if together > 1:
                together = -(-together // 2)
            else:
                at_once = -(-at_once // 2)
            self._validated, self._short = (together, at_once), self._size

    @torch.no_grad()
    def _losses(self, order: Sequence[Slot], together: int, at_once: int) -> dict[Slot, float]:
        """Return the validation loss of each slot, where some rows of some of them share batches."""
        session = self._session
        rows = validation_rows(session, range(len(session.val)))
        # Another width would cost each layer another table.
        width = padded([*rows.tokens.tolist()] * len(order))
        self._model.eval()
        totals, targets = dict.fromkeys(order, 0.0), 0
        for start in range(0, len(rows), at_once):
            chunk = rows[start : start + at_once]
            for first in range(0, len(order), together):
                group = order[first : first + together]
                losses = self._validate(group, chunk, width)
                for slot, loss in zip(group, losses.sum(1).tolist(), strict=True):
                    totals[slot] += loss
            targets += losses.shape[1]
            session.tick()
        return {slot: total / max(targets, 1) for slot, total in totals.items()}

    def _validate(self, group: Sequence[Slot], rows: Sequence[Row], width: int) -> torch.Tensor:
        """Return the loss of each target of some rows, for each of some slots: (slots, targets)."""
        session = self._session
        batch = collate_rows([*rows] * len(group), session.pad_id, width).to(session.worker.device)
        assert isinstance(batch, Batch)
        self._layout.enter([slot.number for slot in group for _ in rows], width)
        return target_losses(self._model, batch).view(len(group), -1)

    def close(self) -> None:
        """Destroy the engine, and take the adapters out of the base."""
        self._take_down()
        clear(self._model)

    def _lower(self, slots: Sequence[Slot]) -> None:
        """Take less at once, because a step of some slots did not fit; first without graphs.

        Raises:
            DeviceMemoryError: if the settings allow nothing less.
        """
        self._short = self._size
        count = min(self._together or len(slots), len(slots))
        if self._by_graphs:
            self._graphs = False
        elif count > 1:
            self._together = -(-count // 2)
        else:
            now = self.placement
            after = smaller(_widest(slots), now)
            if after.accumulation == now.accumulation and _has_dropout(slots):
                # Recomputed activations would have other values dropped.
                raise DeviceMemoryError
            self._smaller = after

    def _say(self, count: int) -> None:
        """Describe once, in a note, what a shortage of memory has led to."""
        now, ways = self.placement, list[str]()
        if self._together is not None and self._together < count:
            ways.append(f"the rows of {self._together} share a pass")
        if now.accumulation > (self._slots[0].run.scale.accumulation or 1):
            ways.append(f"each trial's rows are divided into {now.accumulation} micro-batches")
        if now.activation_checkpointing:
            ways.append("activations are recomputed")
        rows = f"the rows of {count} trials" if count > 1 else "the rows of a trial"
        text = f"{rows} did not fit into the device's memory together; now {', '.join(ways)}"
        if ways and text not in self._said:
            self._said.add(text)
            self._note(text)

    # --- the engine

    def _attach(self) -> None:
        """Put the slots' adapters into the model, if that has not been done.

        What did not fit is tried again if the slots are smaller now.
        """
        if self._attached == self._slots:
            return
        if self._short is not None:
            shares = [now / then for now, then in zip(self._size, self._short, strict=True)]
            if max(shares) <= 1 and min(shares) <= EASED:
                self._graphs, self._together, self._smaller = self._wants_graphs, None, Placement()
                self._validated = self._short = None
        self._drop_graphs()
        pack(self._model, {slot.number: slot.module for slot in self._slots}, self._layout)
        recompute_activations(self._model, wanted=self._recomputes)
        self._attached = [*self._slots]

    def _prepare(self) -> None:
        """Let the engine have all slots. New ones take the places of others, or else it is built anew."""
        placed = self._pieces == self._accumulation and all(map(self._has_place, self._slots))
        # Empty places cost time at each step.
        if not placed or self._built.count(None) > len(self._slots):
            self._build()

    def _has_place(self, slot: Slot) -> bool:
        """Return whether the engine has a slot, which may take the place of one that has left."""
        if self._engine is None or slot in self._built:
            return self._engine is not None
        for member, owner in enumerate(self._built):
            if owner is None and self._engine.replace(member, slot.run, slot.module, slot.given):
                self._built[member], slot.given = slot, {}
                return True
        return False

    def _drop_graphs(self) -> None:
        if self._captured is not None:
            self._captured.close()
            self._captured = None

    @property
    def _size(self) -> tuple[int, int]:
        """Rows of a step of all slots, and number of values that train."""
        values = sum(p.numel() for slot in self._slots for p in _trainable(slot).values())
        return sum(slot.run.optim.rows_per_step for slot in self._slots), values

    def _build(self) -> None:
        """Build an engine over the parameters of all slots, and set in it what they have learnt."""
        self._take_down()
        recompute_activations(self._model, wanted=self._recomputes)
        self._engine = FlatEngine(self._config, [(slot.run, slot.module) for slot in self._slots])
        self._engine.set_masters([slot.given for slot in self._slots])
        self._built, self._pieces = [*self._slots], self._accumulation
        for slot in self._slots:
            slot.given = {}

    def _take_down(self) -> None:
        """Destroy the engine; each slot keeps what it has learnt, for the next one."""
        if self._engine is None:
            return
        self._engine.drop_gradients()
        self._drop_graphs()
        for member, slot in enumerate(self._built):
            if slot is not None:
                slot.given = self._engine.masters(member)
        engine, self._engine, self._built = self._engine, None, []
        engine.close()

    @property
    def _config(self) -> RunConfig:
        """The settings of the engine.

        One worker has all masters, so the stage only decides whether there are any beside the parameters.
        """
        run = _widest(self._slots)
        stage = 0 if run.scale.dtype == "float32" else 2
        scale = run.scale.model_copy(update={"zero": stage, "accumulation": self._accumulation})
        return clipped_here(run.model_copy(update={"scale": scale}))

    @property
    def _accumulation(self) -> int:
        """Number of micro-batches of a step."""
        if not self._slots:
            return self._smaller.accumulation
        run = _widest(self._slots)
        return min(max(run.scale.accumulation or 1, self._smaller.accumulation), run.optim.rows_per_step)

    @property
    def _recomputes(self) -> bool:
        """Whether activations are recomputed."""
        return self._smaller.activation_checkpointing and not _has_dropout(self._slots)

    # --- steps

    def _step(self, steps: Mapping[Slot, Step]) -> dict[Slot, Later]:
        engine, stopwatch = self._engine, Stopwatch(self._session.worker.device)
        assert engine is not None
        self._set_groups(engine, steps)
        if not self._model.training:
            train_mode(self._model)
        self._layout.random = {slot.number: one.random for slot, one in steps.items()}
        for slot, one in steps.items():
            slot.share = one.share
        groups = [self._micro_batches(slots) for slots in self._passes(steps)]
        self._capture(engine, groups[0][0])
        targets, tokens = Counter[Slot](), Counter[Slot]()
        for micro in (micro for micros in groups for micro in micros if micro is not None):
            targets.update(micro.targets)
            tokens.update({slot: span.stop - span.start for slot, span in micro.spans.items()})
        losses: list[dict[Slot, torch.Tensor]] = []
        for number, micros in enumerate(zip(*groups, strict=True), 1):
            # The engine divides by the number of micro-batches.
            weights = {slot: len(groups[0]) / targets[slot] if slot in steps else 0.0 for slot in targets}
            losses.append(self._passed(engine, [micro for micro in micros if micro is not None], weights))
            engine.deliver()
            last = number == len(groups[0])
            if last:
                norms = engine.clip({self._built.index(slot): slot.run.optim.clip for slot in steps})
                read = later([*norms, *(loss for each in losses for loss in each.values())])
            self.updating = last
            engine.deepspeed.step()
        self.updating = False
        seconds = stopwatch.stop()
        every = sum(tokens[slot] for slot in steps)
        shares = self.shares = {slot: tokens[slot] / every for slot in steps}
        owners = [slot for each in losses for slot in each]

        @cache
        def numbers() -> dict[Slot, StepResult]:
            found = read()
            norm_of, sums = dict(zip(steps, found, strict=False)), dict.fromkeys(targets, 0.0)
            for slot, loss in zip(owners, found[len(steps) :], strict=True):
                sums[slot] += loss
            self._session.tick()
            return {
                slot: StepResult(
                    sums[slot] / targets[slot],
                    norm_of[slot],
                    tokens[slot],
                    one.padding(tokens[slot]),
                    seconds(),
                    shares[slot],
                )
                for slot, one in steps.items()
            }

        self._read()
        self._unread = numbers
        if any(one.awaited for one in steps.values()):
            self._read()
        return {slot: partial(_own, numbers, slot) for slot in steps}

    def _set_groups(self, engine: FlatEngine, steps: Mapping[Slot, Step]) -> None:
        """Let the engine step the slots that take part, each with its learning rate, and no others."""
        for slot, groups_of in zip(self._built, engine.groups, strict=True):
            one = steps.get(slot) if slot is not None else None
            for group in groups_of:
                group["active"] = one is not None
                if one is not None:
                    group["lr"] = one.lr * group["lr_factor"]

    @property
    def _by_graphs(self) -> bool:
        """Whether passes are captured, which they are not while a slot has dropout."""
        return self._graphs and not _has_dropout(self._slots)

    def _read(self) -> None:
        """Wait until the device has taken the last step, unless that was done."""
        unread, self._unread = self._unread, None
        if unread is not None:
            unread()

    def _passes(self, steps: Mapping[Slot, Step]) -> list[list[Slot]]:
        """Divide the slots of a step into those whose rows share a pass, in their order."""
        order = [slot for slot in self._slots if slot in steps or (self._by_graphs and slot.share)]
        count = self._together or len(order)
        return [order[first : first + count] for first in range(0, len(order), count)]

    def _capture(self, engine: FlatEngine, micro: _Micro | None) -> None:
        """Capture the passes of the engine's slots as CUDA graphs, if that is wanted and not done."""
        if micro is None or not self._by_graphs or self._captured or len(micro.spans) < len(self._slots):
            return
        self._enter(micro)
        self._captured = ExitStack()
        try:
            self._captured.enter_context(graphed(self._model, micro.batch, chain(*engine.parts)))
        except (ConfigError, TrainError) as error:
            logger.info("%s", error)
            self._wants_graphs = self._graphs = False
            self._captured = None

    def _enter(self, micro: _Micro) -> None:
        """Let the layers know whose rows are in the next pass."""
        self._layout.spans = {slot.number: span for slot, span in micro.spans.items()}
        self._layout.width = micro.batch.input_ids.shape[1]
        self._layout.widths = {slot.number: width for slot, width in micro.widths.items()}

    def _micro_batches(self, order: Sequence[Slot]) -> list[_Micro | None]:
        """Return the micro-batches of some slots; None where none of them has rows."""
        pieces = zip(*(_pieces(slot.share, self._accumulation) for slot in order), strict=True)
        return [self._micro_batch(order, rows) if any(rows) else None for rows in pieces]

    def _micro_batch(self, order: Sequence[Slot], rows: Sequence[Sequence[Row]]) -> _Micro:
        every, width, segments = [row for own in rows for row in own], None, None
        if self._by_graphs:
            run = order[0].run
            width = run.data.max_length
            segments = len(every) * max(self._session.row_stream(slot.run).most_segments for slot in order)
        batch = collate_rows(every, self._session.pad_id, width, segments)
        assert isinstance(batch, Batch)
        owners = [slot for slot, own in zip(order, rows, strict=True) for _ in own]
        spans, targets = spans_of(owners, batch.input_ids.shape[1]), {}
        for slot, span in spans.items():
            inside = (batch.completion_index >= span.start) & (batch.completion_index < span.stop)
            targets[slot] = int(inside.sum())
        widths = {slot: padded([*map(len, own)]) for slot, own in zip(order, rows, strict=True) if own}
        return _Micro(batch.to(self._session.worker.device), spans, widths, targets)

    def _passed(
        self, engine: FlatEngine, micros: Sequence[_Micro], weights: Mapping[Slot, float]
    ) -> dict[Slot, torch.Tensor]:
        """Run the passes of one micro-batch of all slots, as `_pass`; slots without rows get no gradient."""
        losses: dict[Slot, torch.Tensor] = {}
        for micro in micros:
            losses.update(self._pass(engine, micro, weights))
        for slot, parts in zip(self._built, engine.parts, strict=True):
            if slot is None or slot not in losses:
                for part in parts:
                    part.grad.zero_()
        return losses

    def _pass(
        self, engine: FlatEngine, micro: _Micro, weights: Mapping[Slot, float]
    ) -> dict[Slot, torch.Tensor]:
        """Run forward and backward over a micro-batch, and keep the gradients.

        Args:
            engine: the engine.
            micro: rows of some slots.
            weights: slot → what its summed loss is multiplied by.

        Returns:
            Each slot's summed loss, a scalar on the device.
        """
        self._enter(micro)
        # The targets are in the order of the rows, and so are the slots.
        losses = target_losses(self._model, micro.batch).split([*micro.targets.values()])
        sums = torch.stack([loss.sum() for loss in losses])
        weight = torch.tensor([weights[slot] for slot in micro.spans], dtype=sums.dtype)
        sums.backward(moved(weight, sums.device))
        for slot, parts in zip(self._built, engine.parts, strict=True):
            if slot is not None and slot in micro.spans:
                for part in parts:
                    part.take_gradients()
        return dict(zip(micro.spans, sums.detach(), strict=True))


def _own(numbers: Callable[[], Mapping[Slot, StepResult]], slot: Slot) -> StepResult:
    return numbers()[slot]


def _trainable(slot: Slot) -> dict[str, nn.Parameter]:
    return {n: p for n, p in slot.module.named_parameters() if p.requires_grad}


def _widest(slots: Sequence[Slot]) -> RunConfig:
    """Return the run with the most rows in a step."""
    return max((slot.run for slot in slots), key=lambda run: run.optim.rows_per_step)


def _has_dropout(slots: Sequence[Slot]) -> bool:
    return any(slot.run.method.dropout for slot in slots)


def _pieces(share: Sequence[Sequence[Row]], count: int) -> list[list[Row]]:
    """Divide the rows of a step into a number of pieces of about the same size."""
    rows = [row for micro in share for row in micro]
    ends = [number * len(rows) // count for number in range(count + 1)]
    return [rows[first:end] for first, end in pairwise(ends)]


class Courses(Generic[EndT]):
    """The courses of packed runs, by key. Their steps are taken together, and their questions passed on.

    The clock of a run counts the time of its own code, and its share of the steps and validations.
    """

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._courses: dict[str, Part[EndT]] = {}
        self._clocks: dict[str, Clock] = {}
        self._asked: dict[str, Asked] = {}
        self._ended: dict[str, EndT | Exception] = {}

    def begin(self, key: str, course: Part[EndT], clock: Clock) -> None:
        """Begin a course, up to its first step or question.

        Args:
            key: names the run.
            course: the run's.
            clock: the run's, which counts.
        """
        self._courses[key], self._clocks[key] = course, clock
        self._go_on(key, course.send, None)

    def __len__(self) -> int:
        """Return the number of runs that have not ended."""
        return len(self._courses)

    @property
    def questions(self) -> dict[str, Question]:
        """What runs wait for: key → question."""
        return {key: asked for key, asked in self._asked.items() if isinstance(asked, Question)}

    def answer(self, key: str, go_on: bool) -> None:
        """Answer a run's question."""
        course = self._courses[key]
        self._go_on(key, course.send, go_on)

    def fail(self, key: str, error: Exception) -> None:
        """Raise an error in a run, in place of an answer."""
        self._go_on(key, self._courses[key].throw, error)

    def advance(self) -> bool:
        """Go on with all runs that have no question: validate those that ask for it, or else take a step.

        If that does not fit into the device's memory, a `CrowdedError` ends the newest half of them. If
        parameters have begun to change, it ends all. A run that has no others beside it fails.

        Returns:
            Whether there was one.
        """
        try:
            return self._validated() or self._stepped()
        except torch.OutOfMemoryError as error:
            failure = str(error)
        # Frees what an engine that could not be built has left.
        gc.collect()
        intact = not self._pack.updating
        due = [key for key in self._courses if not isinstance(self._asked[key], Question)]
        if len(self._courses) == 1:
            kind = torch.OutOfMemoryError if intact else HalfDoneError
            self._go_on(due[0], self._courses[due[0]].throw, kind(failure))
            return True
        for key in due[len(due) // 2 :] if intact else due:
            self._go_on(key, self._courses[key].throw, CrowdedError(failure, intact=intact))
        return True

    def _validated(self) -> bool:
        due = {key: asked.engine for key, asked in self._asked.items() if isinstance(asked, Validation)}
        if due:
            started = time.perf_counter()
            losses = self._pack.validate([*due.values()])
            self._share(dict.fromkeys(due, 1 / len(due)), started)
            for key, slot in due.items():
                self._go_on(key, self._courses[key].send, losses[slot])
            return True
        return False

    def _stepped(self) -> bool:
        steps = {key: asked for key, asked in self._asked.items() if isinstance(asked, Step)}
        if not steps:
            return False
        started = time.perf_counter()
        results = self._pack.step({one.engine: one for one in steps.values()})
        self._share({key: self._pack.shares[one.engine] for key, one in steps.items()}, started)
        for key, one in steps.items():
            course, result = self._courses[key], results[one.engine]
            self._go_on(key, course.send, result)
        return True

    def ended(self) -> dict[str, EndT | Exception]:
        """Return how runs have ended since the last call: key → result, or what the run raised."""
        ended, self._ended = self._ended, {}
        return ended

    def close(self) -> None:
        """End all courses where they are."""
        for course in self._courses.values():
            course.close()
        self._courses.clear()
        self._clocks.clear()
        self._asked.clear()

    def _share(self, shares: Mapping[str, float], started: float) -> None:
        """Divide the time since something began among the runs that it was done for."""
        seconds = time.perf_counter() - started
        for key, share in shares.items():
            self._clocks[key].add(share * seconds)

    def _go_on(self, key: str, go: Callable[[Any], Asked], value: object) -> None:
        self._asked.pop(key, None)
        self._clocks[key].go_on()
        try:
            self._asked[key] = go(value)
            self._clocks[key].stop()
        except StopIteration as end:
            self._end(key, end.value)
        except Exception as error:  # noqa: BLE001  (one run's error must not end the others)
            self._end(key, error)

    def _end(self, key: str, result: EndT | Exception) -> None:
        self._ended[key] = result
        del self._courses[key], self._clocks[key]
