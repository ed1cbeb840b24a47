"""What tests on a GPU share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rayft.models.tiny import byte_tokenizer
from tests.gpu.naming import new_model


# DeepSpeed keeps the first group that it meets.
@pytest.fixture(scope="session")
def nccl_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Initialise the process group of one worker on the first GPU."""
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that says which adapter answers, with its tokenizer."""
    place = tmp_path_factory.mktemp("base")
    new_model().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place
