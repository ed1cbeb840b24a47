"""What all tests share: a tiny model, seeds, and one local Ray cluster a session."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch and Ray are imported: both read their environment then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Ray's workers would wait for a core behind every test that another process computes.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pytest
import torch

from rayft.numerics import seed_everything
from tests.disks import Disk, mounted

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


CLUSTERS = {
    "servers": ("tests/integration/test_serving", "tests/integration/one_server/"),
    "sweeps": ("tests/e2e/", "tests/integration/"),
}
"""Tests that share a Ray cluster, and so a process: what they need it for → how their names begin."""


def _scope(name: str) -> str:
    """Return which tests have to be in one process with a test: those that share its cluster, or its file."""
    own = (scope for scope, starts in CLUSTERS.items() if name.startswith(starts))
    return next(own, name.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that need a cluster: they take longest."""
    order = [*reversed(CLUSTERS)]
    items.sort(key=lambda item: order.index(scope) if (scope := _scope(item.nodeid)) in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, give tests to processes by `_scope`."""
    from xdist.scheduler import LoadScopeScheduling

    class Scopes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False
    return Scopes(config, log)


def pytest_collection_finish() -> None:
    """Exempt all that was imported from the searches for cycles that each training run ends with."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start each test from the same random state, whichever tests ran before it."""
    seed_everything(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and chat template, saved once."""
    from rayft.models.tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def tiny_model(tiny_folder: Path) -> Any:
    """The tiny Llama in float32, frozen, in evaluation mode; a fresh copy for each test."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder: Path) -> Any:
    """The tiny model's tokenizer of bytes."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray cluster for the whole session; its logical CPUs exceed the real ones on purpose.

    Trial actors and worker groups each need a CPU of their own, and mostly wait for one another.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        # Not the one that another process of the tests has started.
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of one for tests that train in this process, with a Ray Train worker's environment."""
    import torch.distributed as dist

    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        del os.environ[name]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 64 MiB, which the test makes as small as it wants."""
    with mounted(tmp_path / "disk", 64 * 2**20) as made:
        yield made
