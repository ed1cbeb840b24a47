from __future__ import annotations

from pathlib import Path

import pytest

from rayft.models.tiny import byte_tokenizer
from tests.gpu.naming import new_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    new_model().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place
