"""Ray Train's trainer, whose controller runs in the process that starts it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController

__all__ = ["LaneTrainer"]


class LaneTrainer(TorchTrainer):
    """Starts and watches a lane's workers from this thread.

    `TorchTrainer` starts an actor for that, a process that imports torch once more before it starts the
    workers.
    """

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        # Its calls wait in this thread's event loop, which has nothing else to do.
        os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
        controller = TrainController(**settings)
        asyncio.run(controller.run())
        return controller.get_result()
