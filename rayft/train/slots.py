"""How many runs should share their steps on a device, found by trying it.

Packing pays where a step of one run does not fill a GPU. Steps of 1, 4 and 16 runs are tried, and the fewest
are taken that are about as fast, a run, as any of them. What was found is kept in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from rayft import __version__
from rayft.errors import TrainError
from rayft.files import write_file
from rayft.models.files import cache_folder
from rayft.models.inject import inject
from rayft.train.course import Step, random_state
from rayft.train.packed import Pack, Slot
from rayft.train.placement import limited
from rayft.train.run import RunConfig
from rayft.train.session import Session

__all__ = ["Sizing", "sizing"]

COUNTS = (1, 4, 16)
"""Numbers of slots that are tried."""
GAIN = 0.95
"""More slots are taken if a run's share of a step then takes less than this share of its time with fewer."""
STEPS = 4
"""Steps of a trial measurement; the first ones compile and capture."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizing:
    """How runs share their steps."""

    slots: int = 1
    """The most runs that do; 1 if they are not slower one after the other."""
    graphs: bool = False
    """Whether their passes are captured as CUDA graphs."""


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
    file = _file(run, session)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Sizing(**json.loads(file.read_text(encoding="utf-8")))
    with limited(session.worker.device, run.scale.gpu_share):
        found = choose(partial(_seconds, run, session), graphs=graphs)
    logger.info("%s", found)
    # Without a writable cache, each lane tries anew.
    with contextlib.suppress(OSError):
        write_file(file, json.dumps(asdict(found)))
    return found


def choose(seconds: Callable[[Sizing], float | None], *, graphs: bool) -> Sizing:
    """Return the sizing that is about the fastest, a run, and needs the fewest slots.

    Args:
        seconds: returns the time of a step; None if it does not fit into the device's memory.
        graphs: whether CUDA graphs may be used.
    """
    best, least = Sizing(), seconds(Sizing(1, graphs))
    if least is None:
        return best
    for count in COUNTS[1:]:
        took = seconds(Sizing(count, graphs))
        if took is None or took / count > GAIN * least:
            break
        best, least = Sizing(count, graphs), took / count
    if best.slots > 1 and graphs:
        plain = seconds(Sizing(best.slots, graphs=False))
        if plain is not None and plain / best.slots < least:
            return Sizing(best.slots, graphs=False)
    return best


def _seconds(run: RunConfig, session: Session, sizing: Sizing) -> float | None:
    """Take some steps of as many runs as there are slots; return the time of the faster of the last two."""
    device = session.worker.device
    share = session.row_stream(run).share(0, 0, 1, run.scale.accumulation or 1)
    try:
        pack = Pack(session, graphs=sizing.graphs)
        with pack.stream():
            steps = {}
            for seed in range(sizing.slots):
                model = pack.session().loaded.model
                inject(model, run.method, seed)
                slot = pack.join(run, model)
                steps[slot] = Step(slot, share, 0.0, random_state(device))
            times = [_timed(pack, steps) for _ in range(STEPS)]
            fits = pack.whole
            pack.close()
    except (torch.OutOfMemoryError, TrainError) as error:
        logger.info("%s: %s", sizing, error)
        return None
    finally:
        torch.cuda.empty_cache()
    return min(times[-2:]) if fits else None


def _timed(pack: Pack, steps: Mapping[Slot, Step]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    pack.step(steps)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _file(run: RunConfig, session: Session) -> Path:
    """Return where the sizing is kept, named by all that it follows from."""
    device = torch.cuda.get_device_properties(session.worker.device)
    found = {
        "base": session.loaded.fingerprint,
        "method": run.method.model_dump(mode="json"),
        "rows": run.optim.rows_per_step,
        "length": run.data.max_length,
        "scale": run.scale.model_dump(mode="json"),
        "device": [device.name, device.total_memory],
        "versions": [__version__, torch.__version__],
        "what": "slots",
    }
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "probes" / f"{key}.json"
