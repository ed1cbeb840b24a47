"""Rehearse the first steps of runs on a small stand-in for their base, so that their kernels are compiled.

A lane on a machine whose caches are empty spends most of its first half minute on compiling. What it
compiles depends on the shapes of the base's layers, on dtypes, on methods and ranks, on the rows of a step,
and not on weights or data. So another process can compile it before, into the caches that the lane reads
(those of PyTorch's Inductor and of Triton), while the lane is still being started.

The classes that train the runs are the lane's own, and what they do comes in the lane's order. That matters:
Inductor lets Triton keep its kernels in another folder once it has compiled something itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from rayft.config import content_hash
from rayft.data.template import Encoded
from rayft.evaluate.loss import target_losses
from rayft.kernels.launch_triton import compiling_ahead
from rayft.models.attention import check_packing
from rayft.models.inject import wrap
from rayft.models.load import load_shallow
from rayft.models.methods import method
from rayft.models.packed import unpackable
from rayft.train.course import TrainResult
from rayft.train.flat import FlatEngine
from rayft.train.fused import fuse_base
from rayft.train.packed import Courses, Pack
from rayft.train.run import RunConfig, why_alone
from rayft.train.session import Session
from rayft.train.slots import COUNTS, Sizing, sizing, tried
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker

__all__ = ["rehearse"]

ROWS = 4
"""Steps whose rows are made; a run that goes on meets them again."""
EXAMPLES = 4
"""Examples of the validation: those of one batch."""
logger = logging.getLogger(__name__)


def rehearse(runs: Sequence[RunConfig], slots: int | None, device: str, folder: Path) -> None:
    """Compute the first step and validation of runs, as a lane does, with random weights and tokens.

    Args:
        runs: the trials in their order, settled. They have base, data and scale in common.
        slots: the most of them that share a step; None to find it out as a lane does.
        device: the lane's, such as `cuda:0`.
        folder: for files that nobody needs afterwards.

    Raises:
        RayftError, torch.OutOfMemoryError: if the base can't be loaded, or something does not fit.
    """
    runs = [run.model_copy(update={"start": None}) for run in runs]
    _join_group(device)
    session = _session(runs[0], device)
    text = session.loaded.model.config.get_text_config()
    logger.info("%s, %d layers", runs[0].model.name, text.num_hidden_layers)
    fuse_base(runs[0], session.loaded.model, session.train, session.worker)
    packs = [run for run in runs if not why_alone(run)]
    size = _size(packs, session, slots)
    logger.info("%s", size)
    together = size.slots > 1
    # The base has more layers, so a lane may find another number, and it has fewer runs at the end.
    others = [count for count in COUNTS if together and slots is None and 1 < count != size.slots]
    for count in dict.fromkeys(
        min(count, len(packs)) for count in ([size.slots, *others] if together else ())
    ):
        _train_together(packs[:count], session, folder / f"together{count}", graphs=size.graphs)
    for number, run in enumerate(_alone(runs, packs if together else ())):
        _train_alone(run, session, folder / f"alone{number}")


def _join_group(device: str) -> None:
    """Initialise a process group of this process alone, which DeepSpeed needs."""
    if not dist.is_initialized():
        if _is_gpu(device):
            torch.cuda.set_device(device)
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
        backend = "nccl" if _is_gpu(device) else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _session(run: RunConfig, device: str) -> Session:
    """Return a session with a shallow base and random tokens; each example fills a row."""
    loaded = load_shallow(run.model, run.scale.torch_dtype, device)
    wrap(loaded.model)
    if run.data.packing:
        check_packing(loaded.model, run.data.max_length)
    length, count = min(run.data.max_length, loaded.context), ROWS * run.optim.rows_per_step
    embeddings: Any = loaded.model.get_input_embeddings()
    words = len(embeddings.weight)
    lines = torch.randint(0, words, (count, length), device="cpu").tolist()
    examples = [Encoded(tuple(line), tuple(line)) for line in lines]
    parts: Any = SimpleNamespace(parts=SimpleNamespace(digest="", labels=()))
    worker = Worker.current(device)
    return Session(loaded, parts, examples, examples[:EXAMPLES], worker, packing=run.data.packing)


def _size(packs: Sequence[RunConfig], session: Session, slots: int | None) -> Sizing:
    """Return how runs share steps: what a lane would find, though it keeps that in the cache."""
    if not packs or unpackable(session.loaded.model):
        return Sizing()
    if slots is None and _is_gpu(session.worker.device):
        slots = tried(packs[0], session)
    return sizing(packs[0], session, slots)


def _train_together(runs: Sequence[RunConfig], session: Session, folder: Path, *, graphs: bool) -> None:
    """Take a step of all runs together, and validate them."""
    pack = _Pack(session, lambda text: logger.info("%s", text), graphs=graphs)
    courses = Courses[TrainResult](pack)
    with pack.stream():
        try:
            for number, run in enumerate(runs):
                own = pack.session()
                trainer = Trainer(run, own, Reporter(), folder / str(number), [1], pack=pack)
                courses.begin(str(number), trainer.course(), trainer.clock)
            for what in ("step", "validation"):
                courses.advance()
                logger.info("%s of %d runs", what, len(courses))
        finally:
            _log_ends(courses.ended())
            courses.close()
            pack.close()


def _log_ends(ended: Mapping[str, object]) -> None:
    for key, result in ended.items():
        logger.info("run %s: %r", key, result)


def _alone(runs: Sequence[RunConfig], packed: Sequence[RunConfig]) -> Iterator[RunConfig]:
    """Yield a run of each method and rank that does not share steps, with all that a lane would try set."""
    known = set()
    for run in runs:
        key = content_hash(run.method)
        if run in packed or key in known or not method(run.method.name).shares_base:
            continue
        known.add(key)
        scale = run.scale
        placement = {
            "accumulation": scale.accumulation or 1,
            "activation_checkpointing": bool(scale.activation_checkpointing),
            "graphs": scale.device == "cuda" and scale.graphs is not False and run.data.packing,
        }
        if placement["activation_checkpointing"] or scale.zero == 3:
            placement["graphs"] = False
        yield run.model_copy(update={"scale": scale.model_copy(update=placement)})


def _train_alone(run: RunConfig, session: Session, folder: Path) -> None:
    """Take a step of a run, and validate it."""
    logger.info("%s alone", run.method.name)
    trainer = Trainer(run, session, Reporter(), folder, [1])
    course = trainer.course()
    try:
        step = next(course)
        validation = course.send(trainer.answer(step))
        course.send(trainer.answer(validation))
    finally:
        course.close()


class _Pack(Pack):
    """A pack that compiles the kernels of a pass at the same time before it computes one."""

    _compiled = False

    def _capture(self, engine: FlatEngine, micro: Any) -> None:
        if micro is not None and not self._compiled and _is_gpu(self._session.worker.device):
            self._compiled = True
            try:
                self._compile(engine, micro)
            except Exception:
                logger.info("kernels are compiled one after the other", exc_info=True)
        super()._capture(engine, micro)

    def _compile(self, engine: FlatEngine, micro: Any) -> None:
        """Run a pass whose kernels are compiled and not launched: what it computes means nothing."""
        self._enter(micro)
        # Triton's mode belongs to the thread, and the backward pass would have one of its own.
        with compiling_ahead(), torch.autograd.set_multithreading_enabled(False):
            target_losses(self._model, micro.batch).sum().backward()
        engine.drop_gradients()
        logger.info("compiled the kernels of packed layers")
