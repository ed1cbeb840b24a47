"""What all tests share: seeds, a tiny model, MLflow databases, and one local Ray cluster."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch, Ray and MLflow are imported: they read their environment then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# With Ray's own niceness its workers would wait for a core behind every test of another process.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray's own processes look for new logs and measure the machine less often: they take CPU from the tests.
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "5")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# No test writes to the server of the person who runs it.
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest
import torch

from rayft.numerics import seed_everything
from rayft.tracking import TrackerSpec, TrackingConfig, tracker_spec
from tests.disks import Disk, mounted
from tests.mlflow_server import MlflowServer

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


CLUSTERS = {
    "servers": ("tests/integration/test_serving", "tests/integration/one_server/"),
    "sweeps": ("tests/e2e/", "tests/integration/"),
}
"""Tests that share a Ray cluster, and hence a process: what it runs → how their names begin. Those that start
clusters of their own are among them: two of them at the same time take longer than one after the other."""


def _scope(name: str) -> str:
    """Return the group that runs in one process with a test: the tests of its cluster, or of its file."""
    own = (scope for scope, starts in CLUSTERS.items() if name.startswith(starts))
    return next(own, name.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that need a cluster: they take longest."""
    order = [*reversed(CLUSTERS)]
    items.sort(key=lambda item: order.index(scope) if (scope := _scope(item.nodeid)) in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, distribute the tests by `_scope`."""
    from xdist.scheduler import LoadScopeScheduling

    class Scopes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False
    return Scopes(config, log)


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """Exclude what is imported, and what earlier modules left, from the collection that ends each run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start each test from the same random state, whatever tests ran before it."""
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
    """One local Ray cluster for the whole session.

    It has more logical CPUs than the machine has cores: trial actors and worker groups each need a CPU of
    their own, and mostly wait for one another.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        # Do not connect to the cluster of another process of the tests.
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
    """A gloo group of one process and the environment of a Ray Train worker, for tests that train."""
    import torch.distributed as dist

    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        del os.environ[name]


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `current.db`, and `older.db` of the revision before. Making the tables takes seconds."""
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, _upgrade_db, create_sqlalchemy_engine
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy.exc import SADeprecationWarning

    # MLflow 3.17 imports its models with a loader option that SQLAlchemy 2.1 deprecates.
    warnings.simplefilter("ignore", SADeprecationWarning)
    folder = tmp_path_factory.mktemp("databases")
    uri = f"sqlite:///{folder / 'older.db'}"
    alembic, engine = _get_alembic_config(uri), create_sqlalchemy_engine(uri)
    Base.metadata.create_all(engine)
    scripts = ScriptDirectory.from_config(alembic)
    with engine.begin() as connection:
        alembic.attributes["connection"] = connection
        command.upgrade(alembic, str(scripts.get_revision(scripts.get_current_head()).down_revision))
    engine.dispose()
    shutil.copy(folder / "older.db", folder / "current.db")
    engine = create_sqlalchemy_engine(f"sqlite:///{folder / 'current.db'}")
    _upgrade_db(engine)
    engine.dispose()
    return folder


@pytest.fixture
def spec(tmp_path: Path, databases: Path) -> TrackerSpec:
    """A prepared sqlite database in the test's folder."""
    from rayft.tracking.connection import prepare

    (tmp_path / "out").mkdir()
    shutil.copy(databases / "current.db", tmp_path / "out" / "mlflow.db")
    return prepare(tracker_spec(TrackingConfig(), tmp_path / "out"))


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory, databases: Path) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(databases / "current.db", folder / "server.db")
    server = MlflowServer(folder)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(_server: MlflowServer) -> MlflowServer:
    """A running MLflow server, one for all tests of the session: each uses an experiment of its own."""
    _server.start()
    return _server


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 64 MiB, which a test can shrink."""
    with mounted(tmp_path / "disk", 64 * 2**20) as made:
        yield made
