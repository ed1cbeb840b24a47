"""Ray Train's trainer, whose controller runs in the process that starts it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup

__all__ = ["LaneTrainer"]


class _WorkerGroup(WorkerGroup):
    """A worker group that releases its resources if its process group can't be set up.

    Ray releases them only when the process of the controller ends, which goes on here.
    """

    def _start(self) -> None:
        try:
            super()._start()  # type: ignore[no-untyped-call]
        except Exception:
            with suppress(Exception):
                self.shutdown()  # type: ignore[no-untyped-call]
            raise


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class LaneTrainer(TorchTrainer):
    """A trainer that starts and watches the workers from its own thread.

    `TorchTrainer` starts an actor for that, a process that imports torch once more before it starts the
    workers.
    """

    def _initialize_and_run_controller(self, *, callbacks: Sequence[Any], **settings: Any) -> Any:
        # Ray warns of calls that block an event loop. This thread's loop runs nothing but the controller.
        os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
        # A controller would set up the logging of its process, which holds the lock of `logging` while it
        # waits for the handlers' locks. The handler of another lane that opens its file holds its own lock
        # while it waits for that of `logging`, so both would wait forever.
        os.environ["RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"] = "0"
        # This callback starts a process for Ray Data, which lanes do not use.
        needed = [one for one in callbacks if not isinstance(one, DatasetsCallback)]
        controller = _Controller(callbacks=needed, **settings)
        asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        return controller.get_result()
