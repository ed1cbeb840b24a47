"""Dense updates become an adapter that is squeezed already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import SqueezeError
from rayft.numerics import assert_close, generator
from rayft.squeeze.dense import DenseSqueeze
from rayft.squeeze.rank import retained_energy, squeeze

SHAPES = {"wide": (40, 60), "tall": (70, 30), "small": (6, 50), "still": (20, 20)}


def updates() -> dict[str, torch.Tensor]:
    found = {name: torch.randn(*shape, generator=generator(name)) for name, shape in SHAPES.items()}
    return {**found, "still": torch.zeros(SHAPES["still"])}


def made(**settings: float) -> DenseSqueeze:
    dense = DenseSqueeze(SHAPES, **settings)  # type: ignore[arg-type]
    for name, delta in updates().items():
        dense.add(name, delta)
    return dense


def test_ranks_spectra_and_tails_are_those_of_the_dense_svd() -> None:
    dense = made(rank=8)
    artifact = dense.artifact(ArtifactMeta(method="full"), {})
    assert {name: factors.rank for name, factors in artifact.modules.items()} == {
        "wide": 8,
        "tall": 8,
        "small": 6,
    }
    assert dense.unchanged == ["still"]
    assert artifact.squeezed
    for name, delta in list(updates().items())[:3]:
        factors, spectrum = artifact.modules[name], artifact.meta.singular_values[name]
        assert factors.scale == 1.0
        assert len(spectrum) == factors.rank
        assert_close(factors.b.norm(), factors.a.norm(), torch.float32, 70)
        assert_close(torch.linalg.svdvals(factors.delta().double())[: factors.rank], torch.tensor(spectrum),
                     torch.float32, 70, depth=4)  # fmt: skip
        total = sum(value * value for value in spectrum) + artifact.meta.tail_energy[name]
        assert_close(
            torch.tensor(total, dtype=torch.float64),
            delta.double().square().sum(),
            torch.float64,
            delta.numel(),
        )
    assert artifact.meta.tail_energy["small"] == 0.0
    assert retained_energy(artifact)["small"] == 1.0
    assert retained_energy(artifact)["wide"] < 1.0


def test_an_adapter_is_cut_further_without_another_svd() -> None:
    artifact = made(rank=8).artifact(ArtifactMeta(), {})
    again = squeeze(artifact, rank=3)
    assert again.content_hash == artifact.at_rank(3).content_hash
    assert again.rank == 3


def test_an_energy_gives_each_module_its_rank() -> None:
    artifact = made(energy=0.6).artifact(ArtifactMeta(), {})
    assert len({factors.rank for factors in artifact.modules.values()}) > 1
    assert min(retained_energy(artifact).values()) >= 0.6


def test_a_module_is_the_same_whatever_comes_with_it() -> None:
    alone = DenseSqueeze({"tall": SHAPES["tall"]}, rank=8)
    alone.add("tall", updates()["tall"])
    one = alone.artifact(ArtifactMeta(), {}).modules["tall"]
    other = made(rank=8).artifact(ArtifactMeta(), {}).modules["tall"]
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)


def test_an_adapter_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    head = {"score.weight": torch.ones(2, 3)}
    artifact = made(rank=8).artifact(ArtifactMeta(method="full", task="sequence_classification"), head)
    loaded = AdapterArtifact.load(artifact.save(tmp_path / "adapter"))
    assert loaded.content_hash == artifact.content_hash
    assert loaded.meta.tail_energy == artifact.meta.tail_energy
    assert loaded.at_rank(2).rank == 2


def test_updates_of_zero_alone_are_refused() -> None:
    dense = DenseSqueeze({"still": (20, 20)}, rank=4)
    dense.add("still", torch.zeros(20, 20))
    with pytest.raises(
        SqueezeError, match=r"none of 1 linear layers differs from the base.*right checkpoint"
    ):
        dense.artifact(ArtifactMeta(), {})


def test_a_module_that_is_not_finite_is_named() -> None:
    dense = DenseSqueeze(SHAPES, rank=4)
    with pytest.raises(SqueezeError, match="wide: the update holds NaN or Inf"):
        dense.add("wide", torch.full(SHAPES["wide"], torch.nan))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "give a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, "give a rank or an energy"),
        ({"rank": 0}, "rank 0 is not between 1 and 40"),
        ({"rank": 41}, "rank 41 is not between 1 and 40"),
        ({"energy": 0.0}, r"not in \(0, 1\]"),
        ({"energy": 1.1}, r"not in \(0, 1\]"),
    ],
)
def test_impossible_requests_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(SqueezeError, match=match):
        made(**settings)
