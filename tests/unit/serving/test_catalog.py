from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import ArtifactError, BaseMismatchError, UnknownModelError
from rayft.methods.base import LoraFactors
from rayft.serving.catalog import BaseModel, Catalog, check_adapter
from tests.unit.serving.adapters import random_adapter

SHAPES = {"layer.q_proj": (6, 4), "layer.v_proj": (3, 4)}
BASE = BaseModel(name="org/tiny", fingerprint="f" * 16, shapes=SHAPES)


class RecordingEngine:
    """Notes what is loaded."""

    def __init__(self) -> None:
        self.loaded: dict[str, Mapping[str, LoraFactors]] = {}

    def load(self, name: str, factors: Mapping[str, LoraFactors]) -> None:
        assert name not in self.loaded
        self.loaded[name] = factors

    def unload(self, name: str) -> None:
        del self.loaded[name]


class Served:
    """A catalog with its engine."""

    def __init__(self) -> None:
        self.engine = RecordingEngine()
        self.catalog = Catalog(BASE, self.engine, torch.float32, "cpu")  # type: ignore[arg-type]

    def sync(self, adapters: dict[str, str]) -> None:
        asyncio.run(self.catalog.sync(adapters))

    def names(self) -> list[str]:
        return [card.id for card in self.catalog.cards()]


@pytest.fixture
def served() -> Served:
    return Served()


def save(folder: Path, name: str = "a", *, squeezed: bool = False, **extra: Any) -> str:
    artifact = random_adapter(name, SHAPES, BASE.fingerprint, **extra)
    values = {path: (1.0,) * f.rank for path, f in artifact.modules.items()} if squeezed else {}
    meta = artifact.meta.model_copy(update={"singular_values": values})
    return str(AdapterArtifact(artifact.modules, meta=meta).save(folder / name))


def test_names_resolve_to_base_and_adapters(served: Served, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path, "a"), "b": save(tmp_path, "b", rank=2)})
    keys = []
    for model in ("base", "org/tiny", "a", "b"):
        with served.catalog.lease(model) as key:
            keys.append(key)
    assert keys[:2] == [None, None]
    assert set(keys[2:]) == set(served.engine.loaded)
    assert served.names() == ["base", "a", "b"]
    card = served.catalog.cards()[2]
    assert (card.rank, card.base, card.method, card.squeezed) == (2, "org/tiny", "lora", False)
    assert card.bytes == (tmp_path / "b" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("model", ["c", "", "a@", "a@r", "a@v2", "c@r2", "A"])
def test_unknown_names_list_what_is_served(served: Served, tmp_path: Path, model: str) -> None:
    served.sync({"a": save(tmp_path)})
    with pytest.raises(UnknownModelError, match="served are base, a") as caught, served.catalog.lease(model):
        pass
    assert caught.value.param == "model"


def test_a_squeezed_adapter_is_served_at_lower_ranks_from_the_same_memory(
    served: Served, tmp_path: Path
) -> None:
    served.sync({"a": save(tmp_path, rank=4, squeezed=True)})
    with served.catalog.lease("a") as full, served.catalog.lease("a@r2") as low:
        pass
    assert full is not None
    assert low is not None
    for path in SHAPES:
        whole, part = served.engine.loaded[full][path], served.engine.loaded[low][path]
        assert torch.equal(part.b, whole.b[:, :2])
        assert torch.equal(part.a, whole.a[:2])
        assert part.scale == whole.scale
        assert part.b.data_ptr() == whole.b.data_ptr()
        assert part.a.data_ptr() == whole.a.data_ptr()
    with served.catalog.lease("a@r2") as again, served.catalog.lease("a@r99") as most:
        assert (again, most) == (low, full)
    assert len(served.engine.loaded) == 2


@pytest.mark.parametrize(
    ("squeezed", "model", "word"), [(False, "a@r2", "squeeze"), (True, "a@r0", "positive")]
)
def test_ranks_that_mean_nothing_are_not_served(
    served: Served, tmp_path: Path, squeezed: bool, model: str, word: str
) -> None:
    served.sync({"a": save(tmp_path, squeezed=squeezed)})
    with pytest.raises(UnknownModelError, match=word), served.catalog.lease(model):
        pass


def test_sync_loads_what_is_new_and_frees_what_is_gone(served: Served, tmp_path: Path) -> None:
    a, b = save(tmp_path, "a"), save(tmp_path, "b", squeezed=True)
    served.sync({"a": a})
    kept = dict(served.engine.loaded)
    served.sync({"a": a, "b": b})
    assert kept.items() <= served.engine.loaded.items()
    with served.catalog.lease("b@r1"):
        pass
    served.sync({"a": a})
    assert served.engine.loaded == kept
    assert served.names() == ["base", "a"]


def test_what_a_running_request_uses_is_freed_when_it_ends(served: Served, tmp_path: Path) -> None:
    folder = save(tmp_path)
    served.sync({"a": folder})
    with served.catalog.lease("a") as old:
        shutil.rmtree(folder)
        random_adapter("other", SHAPES, BASE.fingerprint).save(folder)
        served.sync({"a": folder})
        assert old in served.engine.loaded
        with served.catalog.lease("a") as new:
            assert new != old
    assert set(served.engine.loaded) == {new}


def test_a_bad_adapter_changes_nothing(served: Served, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path)})
    before = dict(served.engine.loaded)
    with pytest.raises(ArtifactError, match="adapter 'b' is not served"):
        served.sync({"b": str(tmp_path / "nowhere")})
    assert served.engine.loaded == before
    assert served.names() == ["base", "a"]


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    other = random_adapter("a", SHAPES, "0" * 16).save(tmp_path / "print")
    shape = random_adapter("a", {"layer.q_proj": (6, 5)}).save(tmp_path / "shape")
    module = random_adapter("a", {"layer.k_proj": (6, 4)}).save(tmp_path / "module")
    for folder, word in ((other, "was made for the base"), (shape, "6x5"), (module, "k_proj")):
        with pytest.raises(BaseMismatchError, match=word):
            check_adapter("a", str(folder), BASE)


def test_an_adapter_with_nan_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path)
    weights = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(ArtifactError, match=r"adapter 'a' is not served.*NaN"):
        check_adapter("a", folder, BASE)


def test_a_truncated_adapter_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    weights = Path(folder) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="truncated"):
        check_adapter("a", folder, BASE)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    artifact = random_adapter("a", SHAPES, BASE.fingerprint)
    meta = ArtifactMeta(task="sequence_classification")
    heads = {"score.weight": torch.ones(2, 4)}
    folder = AdapterArtifact(artifact.modules, heads=heads, meta=meta).save(tmp_path / "head")
    with pytest.raises(ArtifactError, match="classification head"):
        check_adapter("a", str(folder), BASE)
