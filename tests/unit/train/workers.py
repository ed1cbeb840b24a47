"""Run a function in two worker processes that form a process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HEAVY = [
    "torch._dynamo",
    "transformers.pytorch_utils",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "tests.unit.train.workers",
]
"""Modules that take seconds to import: a server process imports them once, and the workers are forked from
it."""


def in_two_workers(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `function(rank, *args)` in two processes, each with one thread.

    Args:
        function: a function of an importable module.
        folder: an empty folder for the group's store.
        args: picklable arguments.
    """
    mp.get_context("forkserver").set_forkserver_preload(HEAVY)
    mp.start_processes(_join, (function, str(folder / "store"), args), nprocs=2, start_method="forkserver")


def _join(rank: int, function: Callable[..., None], store: str, args: tuple[Any, ...]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    function(rank, *args)
    dist.destroy_process_group()
