"""How the steps of a run use their device: micro-batches, activation checkpointing, CUDA graphs.

None of these changes what is learnt, but by rounding and by which values dropout drops. What the settings
leave open is found by trying it on a GPU: the longest row that the run can meet, as often as a micro-batch
may have it, forward and backward. What was found is kept in the cache, by everything that it depends on. A
step that does not fit after all makes the run go on with less at a time, in the same process or in new ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rayft import __version__
from rayft.data.pack import AnyBatch, Row, collate_rows
from rayft.data.texts import first_learnt
from rayft.errors import ConfigError, TrainError
from rayft.evaluate.loss import batch_loss, targets_of
from rayft.files import write_file
from rayft.models.files import cache_folder
from rayft.models.fuse import is_fused
from rayft.train.graphs import capture_stream, graphed
from rayft.train.mode import train_mode
from rayft.train.run import Placement, RunConfig
from rayft.train.session import Session

__all__ = [
    "DeviceMemoryError",
    "Placement",
    "engine_out_of_memory",
    "keep",
    "limited",
    "out_of_memory",
    "place",
    "placed",
    "probe_file",
    "recompute_activations",
    "smaller",
    "validation_out_of_memory",
]

logger = logging.getLogger(__name__)

SHARDED = "shard the base over more workers (scale.zero: 3)"
SHORTER = ("lower data.max_length", SHARDED)
"""What always helps a run whose rows do not fit into the device's memory."""
SAMPLED = 256
"""Rows of the first epoch among which the one with the most targets is looked for."""
SPARE = 0.05
"""Share of a device's memory that a probe leaves free: the sizes of later tensors differ, and leave gaps."""
CROWDED = 0.15
"""Share of a GPU's memory that other programs may take while a placement is kept for later runs."""
GAIN = 0.97
"""Graphs are used if a pass takes less than this share of its time without them."""


class DeviceMemoryError(TrainError):
    """A run does not fit into the memory of a device. In a group, the other workers may have had room.

    Attributes:
        placement: what a new group of workers can continue the run with; None if the settings allow nothing
            smaller.
    """

    def __init__(self, message: str = "", placement: Placement | None = None) -> None:
        super().__init__(message)
        self.placement = placement


def placed(run: RunConfig, placement: Placement) -> RunConfig:
    """Return a run whose settings are those of a placement."""
    return run.model_copy(update={"scale": run.scale.model_copy(update=dataclasses.asdict(placement))})


def place(run: RunConfig, session: Session, known: Placement | None = None) -> Placement:
    """Decide what a run's settings leave open (all workers call it).

    On a CPU, and under ZeRO-3, whose passes need an engine, nothing is tried: a step is one micro-batch, or
    what is kept of a run whose step did not fit.

    Args:
        run: settled.
        session: the base with the run's adapters, and the data.
        known: the placement, if an earlier group of workers has found it; it is kept for the next runs.
    """
    scale = run.scale
    if known is not None:
        keep(run, session, known)
        return known
    given = (scale.accumulation, scale.activation_checkpointing, scale.graphs)
    whole = Placement(scale.accumulation or 1, bool(scale.activation_checkpointing), bool(scale.graphs))
    if scale.device != "cuda" or None not in given:
        return whole
    probe = _Probe(run, session)
    kept: Placement | None = session.worker.agreed(_kept(probe.file))
    if kept is None and scale.zero == 3:
        return whole
    if kept is None and (kept := probe.find()) is not None:
        probe.keep(kept)
    return kept or probe.least


def keep(run: RunConfig, session: Session, placement: Placement) -> None:
    """Keep a placement for the next run that is alike, in place of what was tried."""
    if run.scale.device == "cuda":
        _Probe(run, session).keep(placement)


def smaller(run: RunConfig, placement: Placement) -> Placement:
    """Return a placement that takes less memory, for a run whose step did not fit.

    Raises:
        DeviceMemoryError: if the settings allow none.
    """
    scale = run.scale
    rows = run.optim.rows_per_step // scale.workers
    more = [count for count in _divisors(rows) if count > placement.accumulation]
    if scale.accumulation is None and more and not (scale.graphs and (scale.zero or 0) < 2):
        graphs = placement.graphs and (scale.zero or 0) >= 2
        return replace(placement, accumulation=more[0], graphs=graphs)
    if scale.activation_checkpointing is None and not placement.activation_checkpointing and not scale.graphs:
        return replace(placement, activation_checkpointing=True, graphs=False)
    raise out_of_memory(run, placement)


def out_of_memory(run: RunConfig, placement: Placement) -> DeviceMemoryError:
    """Return the error for a run whose step did not fit into the device's memory; it says what to change."""
    scale, ways = run.scale, []
    rows = run.optim.rows_per_step // scale.workers
    if placement.graphs and scale.graphs:
        ways.append("set scale.graphs: false")
    if not placement.activation_checkpointing:
        ways.append("set scale.activation_checkpointing: true")
    if placement.accumulation < rows:
        ways.append("raise scale.accumulation")
    ways += [*_fewer_lanes(run), *SHORTER]
    return DeviceMemoryError(
        f"{rows // placement.accumulation} row(s) of {run.data.max_length} tokens do not fit into the "
        f"device's memory at once: {', or '.join(ways)}"
    )


def engine_out_of_memory(run: RunConfig) -> DeviceMemoryError:
    """Return the error for a run whose engine does not fit into the device's memory; it says what to do."""
    ways = _fewer_lanes(run)
    if not run.scale.offload:
        ways.append("keep the optimizer's states in host memory (scale.offload: true, with zero: 1, 2 or 3)")
    ways += ["train fewer values (method.rank)", SHARDED]
    return DeviceMemoryError(
        "beside the base, the gradients and optimizer states of what is trained do not fit into the device's "
        f"memory: {', or '.join(ways)}"
    )


def validation_out_of_memory(run: RunConfig) -> DeviceMemoryError:
    """Return the error for a run whose validation does not fit into the memory; it says what to do."""
    return DeviceMemoryError(
        "the validation examples do not fit into the device's memory beside what is trained: "
        f"{', or '.join([*_fewer_lanes(run), *SHORTER])}"
    )


def _fewer_lanes(run: RunConfig) -> list[str]:
    """Return what a run can do whose GPU is shared by lanes; nothing for others."""
    return ["let fewer lanes share a GPU (scale.gpu_share)"] if run.scale.gpu_share < 1 else []


def recompute_activations(model: Any, *, wanted: bool) -> None:
    """Turn activation checkpointing on or off; the trial before may have had the other setting."""
    # Before transformers 5.23 both methods have their older names only.
    if wanted:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
        disable()


def probe_file(run: RunConfig, session: Session, **others: object) -> Path:
    """Return where the cache keeps what was tried on a GPU, named by all that it follows from.

    Args:
        run: one of the runs that it was tried for.
        session: base and data.
        others: what it follows from beside base, rows, scale, GPU and releases.
    """
    device = torch.cuda.get_device_properties(session.worker.device)
    found = {
        "base": session.loaded.fingerprint,
        "rows": run.optim.rows_per_step,
        "scale": run.scale.model_dump(mode="json"),
        "fused": is_fused(session.loaded.model),
        "device": [device.name, device.total_memory],
        "versions": [__version__, torch.__version__],
        **others,
    }
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "probes" / f"{key}.json"


def _kept(file: Path) -> Placement | None:
    try:
        return Placement(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]


class _Probe:
    """Tries placements of a run on its device."""

    def __init__(self, run: RunConfig, session: Session) -> None:
        self._run, self._session = run, session
        self._model, self._worker = session.loaded.model, session.worker
        self._share = run.optim.rows_per_step // run.scale.workers
        self._trainable = [p for p in self._model.parameters() if p.requires_grad]

    @cached_property
    def file(self) -> Path:
        """Where the placement is kept, named by all that it follows from."""
        run, batch = self._run, self._batch(1)
        return probe_file(
            run,
            self._session,
            method=run.method.model_dump(mode="json"),
            trainable=sum(p.numel() for p in self._trainable),
            anneal=run.anneal is not None,
            shape=[*batch.input_ids.shape],
            targets=len(targets_of(batch)),
            deepspeed=run.deepspeed,
        )

    def keep(self, placement: Placement) -> None:
        """Keep a placement. Without a writable cache, or beside other programs, each run tries anew."""
        if self._worker.rank == 0 and not self._is_crowded():
            with contextlib.suppress(OSError):
                write_file(self.file, json.dumps(dataclasses.asdict(placement)))

    def _is_crowded(self) -> bool:
        """Return whether other programs take so much memory that more may fit at other times."""
        if self._run.scale.gpu_share < 1:
            # The other lanes are expected.
            return False
        free, total = torch.cuda.mem_get_info(self._worker.device)
        return total - free - torch.cuda.memory_reserved(self._worker.device) > CROWDED * total

    @property
    def least(self) -> Placement:
        """The placement that takes the least memory."""
        return Placement(self._accumulations[-1], self._recompute[-1], bool(self._run.scale.graphs))

    def find(self) -> Placement | None:
        """Return the fastest placement that fits; None if none does."""
        scale, found = self._run.scale, dict[Placement, float]()
        for recompute in self._recompute:
            for accumulation in self._accumulations:
                candidate = Placement(accumulation, recompute)
                seconds = self._seconds(candidate)
                if seconds is not None:
                    found[candidate] = seconds * accumulation
                    break
            if any(placement.accumulation == 1 for placement in found):
                # The whole step fits. Recomputing would only cost time.
                break
        if not found:
            return None
        best = min(found, key=found.__getitem__)
        graphs = scale.graphs if scale.graphs is not None else self._faster(best, found[best])
        logger.info("%s: %s", self._run.method.name, replace(best, graphs=graphs))
        return replace(best, graphs=graphs)

    @property
    def _recompute(self) -> tuple[bool, ...]:
        """Whether activations may be recomputed."""
        given = False if self._run.scale.graphs else self._run.scale.activation_checkpointing
        return (False, True) if given is None else (given,)

    @property
    def _accumulations(self) -> list[int]:
        """The numbers of micro-batches that a step may have, the fewest first."""
        scale = self._run.scale
        if scale.graphs and (scale.zero or 0) < 2:
            # Each replay returns the same gradient buffers, which only ZeRO-2 copies away.
            return [scale.accumulation or 1]
        return [scale.accumulation] if scale.accumulation else _divisors(self._share)

    def _faster(self, placement: Placement, seconds: float) -> bool:
        """Return whether graphs make the passes of a step faster, by capturing one and replaying it."""
        run, scale = self._run, self._run.scale
        if (
            run.model.task != "causal_lm"
            or placement.activation_checkpointing
            or not run.data.packing
            or (placement.accumulation > 1 and (scale.zero or 0) < 2)
        ):
            return False
        replayed = self._seconds(replace(placement, graphs=True))
        return replayed is not None and replayed * placement.accumulation < GAIN * seconds

    def _seconds(self, placement: Placement) -> float | None:
        """Return the time of a micro-batch's forward and backward pass; None if some worker has no room."""
        seconds = None
        try:
            seconds = self._measure(placement)
        except torch.OutOfMemoryError:
            logger.info("%s does not fit", placement)
        except (ConfigError, TrainError) as error:
            # This model can't be captured.
            logger.info("%s: %s", placement, error)
        finally:
            recompute_activations(self._model, wanted=False)
            for parameter in self._trainable:
                parameter.grad = None
            gc.collect()
            torch.cuda.empty_cache()
        if self._worker.largest(int(seconds is None)):
            return None
        return float(self._worker.agreed(seconds))

    def _measure(self, placement: Placement) -> float:
        """Take three passes, and return the seconds of the faster of the last two: the first compiles.

        Raises:
            torch.OutOfMemoryError: if they do not fit beside what the optimizer will need.
            ConfigError, TrainError: if the model can't be captured.
        """
        device = self._worker.device
        with limited(device, self._run.scale.gpu_share):
            optimizer = torch.empty(self._optimizer_bytes(), dtype=torch.uint8, device=device)
            batch = self._batch(self._share // placement.accumulation).to(device)
            recompute_activations(self._model, wanted=placement.activation_checkpointing)
            train_mode(self._model)
            with contextlib.ExitStack() as graphs:
                if placement.graphs:
                    graphs.enter_context(capture_stream())
                    graphs.enter_context(graphed(self._model, batch))
                times = [self._pass(batch) for _ in range(3)]
            del optimizer
        return min(times[1:])

    def _pass(self, batch: AnyBatch) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss, targets = batch_loss(self._model, batch)
        (loss / max(targets, 1)).backward()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def _optimizer_bytes(self) -> int:
        """Return the most that an engine will take beside model and gradients."""
        scale, count = self._run.scale, sum(parameter.numel() for parameter in self._trainable)
        if not scale.zero:
            return 8 * count  # Adam's moments
        # Gradients in float32; masters and moments, partitioned.
        return 4 * count + (0 if scale.offload else 12 * count // scale.workers)

    def _batch(self, rows: int) -> AnyBatch:
        """Return a micro-batch of the row that takes the most memory, on the CPU."""
        data, stream = self._run.data, self._session.row_stream(self._run)
        packed = data.packing and self._run.model.task == "causal_lm"
        return collate_rows(
            [self._widest] * rows,
            self._session.pad_id,
            data.max_length if packed else None,
            rows * stream.most_segments if packed else None,
        )

    @cached_property
    def _widest(self) -> Row:
        """The longest row; of packed rows, all of which are long, the one with the most targets of some."""
        rows = self._session.row_stream(self._run).epoch(0)
        if self._run.model.task != "causal_lm" or not self._run.data.packing:
            return rows[int(rows.tokens.argmax())]
        return max(rows[:SAMPLED], key=_targets)


def _targets(row: Row) -> int:
    return sum(len(text) - first_learnt(text) for text in getattr(row, "examples", ()))


@contextlib.contextmanager
def limited(device: str, share: float) -> Iterator[None]:
    """Limit this process to its share of a GPU's memory in the block, less what must stay free."""
    torch.cuda.set_per_process_memory_fraction((1 - SPARE) * share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
