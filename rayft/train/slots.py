"""How many runs should share their steps on a device, found by trying it.

Packing pays where a step of one run does not fill a GPU. The passes of the base over the rows of 1, 4 and 16
runs are timed, and the fewest are taken that are about as fast, a run, as any. What was found is kept in the
cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from rayft.data.pack import Batch, collate_rows
from rayft.files import write_file
from rayft.models.attention import fits_graphs, mask_for
from rayft.models.inject import clear
from rayft.train.graphs import capture_stream
from rayft.train.mode import train_mode
from rayft.train.placement import limited, probe_file, recompute_activations
from rayft.train.run import RunConfig
from rayft.train.session import Session

__all__ = ["COUNTS", "Sizing", "sizing", "tried"]

COUNTS = (1, 4, 16)
"""Numbers of slots that are tried."""
GAIN = 0.95
"""More slots are taken if a run's share of a step then takes less than this share of its time with fewer."""
REPEATS = 3
"""Times that passes are timed; the least counts."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizing:
    """How runs share their steps."""

    slots: int = 1
    """The most runs that do; 1 if they are not slower one after the other."""
    graphs: bool = False
    """Whether the passes of several are captured as CUDA graphs."""


def sizing(run: RunConfig, session: Session, slots: int | None) -> Sizing:
    """Decide how runs like one share their steps.

    Args:
        run: one of the runs.
        session: base and data.
        slots: how many runs share them; None to find it out on a GPU. On a CPU, where one run's step keeps
            all cores busy, they then take turns.
    """
    cuda = session.worker.device.startswith("cuda")
    graphs = cuda and run.scale.graphs is not False and run.data.packing
    if slots is not None:
        return Sizing(slots, graphs)
    if not cuda:
        return Sizing()
    file = probe_file(run, session, length=run.data.max_length, what="slots")
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Sizing(**json.loads(file.read_text(encoding="utf-8")))
    with limited(session.worker.device, run.scale.gpu_share):
        found = Sizing(tried(run, session), graphs)
    logger.info("%s", found)
    # Without a writable cache, each lane tries anew.
    with contextlib.suppress(OSError):
        write_file(file, json.dumps(asdict(found)))
    return found


def tried(run: RunConfig, session: Session) -> int:
    """Return how many slots are fastest on a GPU, by timing the base's passes.

    Args:
        run: one of the runs.
        session: base and data.
    """
    return choose(partial(_seconds, run, session))


def choose(seconds: Callable[[int], float | None]) -> int:
    """Return the number of slots that is about the fastest, a run; of several, the smallest.

    Args:
        seconds: returns the time of the passes of a number of runs; None if they do not fit into the device's
            memory.
    """
    best, least = 1, seconds(1)
    if least is None:
        return best
    for count in COUNTS[1:]:
        took = seconds(count)
        if took is None or took / count > GAIN * least:
            break
        best, least = count, took / count
    return best


def _seconds(run: RunConfig, session: Session, slots: int) -> float | None:
    """Return the time of the base's passes over the rows of as many runs as there are slots.

    Adapters add about the same to the rows of each run, and their kernels would have to be compiled first.
    """
    rows = session.row_stream(run).share(0, 0, 1, run.scale.accumulation or 1)[0]
    try:
        batch = collate_rows([*rows] * slots, session.pad_id, run.data.max_length)
        assert isinstance(batch, Batch)
        return _Passes(session.loaded.model, batch.to(session.worker.device)).time()
    except torch.OutOfMemoryError:
        logger.info("the rows of %d runs do not fit", slots)
        return None
    except Exception:
        logger.info("the base's passes can't be timed alone", exc_info=True)
        return None
    finally:
        torch.cuda.empty_cache()


class _Passes:
    """Forward and backward passes of a frozen base, to its inputs; by a CUDA graph if it can be captured."""

    def __init__(self, model: Any, batch: Batch) -> None:
        clear(model)
        recompute_activations(model, wanted=False)
        train_mode(model)
        self._inner, self._batch = model.base_model, batch
        self._embedded = model.get_input_embeddings()(batch.input_ids).detach()
        self._mask = mask_for(model, batch.offsets, *batch.input_ids.shape)
        self._run: Callable[[], object] = self._pass
        if fits_graphs(model, batch.input_ids.device):
            self._run = self._captured().replay

    def time(self) -> float:
        """Return the seconds of both passes, the least of several times."""
        times = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self._run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with capture_stream():
            # What is compiled is compiled here.
            for _ in range(2):
                self._pass()
            with torch.cuda.graph(graph):
                self._pass()
        return graph

    def _pass(self) -> None:
        inputs = self._embedded.detach().requires_grad_()
        hidden = self._inner(
            inputs_embeds=inputs,
            attention_mask=self._mask,
            position_ids=self._batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        torch.autograd.grad(hidden, inputs, torch.ones_like(hidden))
