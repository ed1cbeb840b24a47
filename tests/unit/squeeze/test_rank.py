"""Squeezing artifacts by rank and energy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import ArtifactError, SqueezeError
from rayft.methods.base import AdapterLinear, ChainConfig, LoraFactors, MethodConfig
from rayft.models.methods import method, settled
from rayft.numerics import assert_close, generator
from rayft.squeeze.rank import rank_for_energy, retained_energy, squeeze
from rayft.squeeze.section import SqueezeConfig


@pytest.fixture
def artifact() -> AdapterArtifact:
    draw = generator("artifact")

    def factors(outputs: int, inputs: int, rank: int, scale: float) -> LoraFactors:
        a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
        return LoraFactors(a, b, scale)

    modules = {"q": factors(24, 16, 8, 2.0), "v": factors(12, 16, 4, 16 / 4**0.5)}
    return AdapterArtifact(modules, meta=ArtifactMeta(method="lora"))


def test_without_a_rank_the_update_stays_the_same(artifact: AdapterArtifact) -> None:
    full = squeeze(artifact)
    for name, factors in artifact.modules.items():
        assert_close(full.modules[name].delta(), factors.delta(), torch.float32, 24)
        assert full.modules[name].scale == factors.scale
    assert full.meta.parent == artifact.content_hash


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_a_rank_is_a_view_of_the_full_squeeze(artifact: AdapterArtifact, rank: int) -> None:
    direct, view = squeeze(artifact, rank=rank), squeeze(artifact).at_rank(rank)
    assert direct.content_hash == view.content_hash
    assert direct.modules["v"].rank == min(rank, 4)
    u, s, vt = torch.linalg.svd(artifact.modules["q"].delta().double())
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert_close(direct.modules["q"].delta(), best, torch.float32, 24)


def test_energy_gives_each_module_its_own_rank(artifact: AdapterArtifact) -> None:
    squeezed = squeeze(artifact, energy=0.7)
    for name, kept in retained_energy(squeezed).items():
        rank, values = squeezed.modules[name].rank, squeezed.meta.singular_values[name]
        assert kept >= 0.7
        without = sum(v * v for v in values[: rank - 1]) / sum(v * v for v in values)
        assert without < 0.7
    assert squeeze(artifact, energy=1.0).modules["q"].rank == 8


def test_a_zero_update_has_rank_one() -> None:
    assert rank_for_energy((0.0, 0.0), 0.9) == 1


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"rank": 0}, "not between 1 and"),
        ({"rank": 9}, "not between 1 and the adapter's own rank, 8"),
        ({"energy": 1.5}, r"not in \(0, 1\]"),
        ({"rank": 2, "energy": 0.5}, "one of them"),
        ({"rank": 2, "budget": 500}, "one of them"),
        ({"energy": float("nan")}, r"not in \(0, 1\]"),
        ({"budget": 0}, "holds nothing"),
    ],
)
def test_impossible_requests_are_refused(
    artifact: AdapterArtifact, request_: dict[str, float], match: str
) -> None:
    with pytest.raises(SqueezeError, match=match):
        squeeze(artifact, **request_)  # type: ignore[arg-type]


def test_retained_energy_needs_a_spectrum(artifact: AdapterArtifact) -> None:
    with pytest.raises(SqueezeError, match="squeeze it first"):
        retained_energy(artifact)


def test_ranks_of_a_config_are_sorted_and_positive() -> None:
    assert SqueezeConfig(ranks=(2, 8, 8, 4)).ranks == (8, 4, 2)
    with pytest.raises(ValueError, match="0 is no rank"):
        SqueezeConfig(ranks=(0,))


def test_an_energy_that_a_lower_rank_has_lost_is_refused(artifact: AdapterArtifact) -> None:
    small = squeeze(artifact, rank=2)
    kept = retained_energy(small)["q"]
    assert squeeze(small, energy=kept * 0.9).rank <= 2
    with pytest.raises(SqueezeError, match=r"q is at rank 2 already and retains 0\.\d+ of its energy"):
        squeeze(small, energy=0.999)


def test_energy_of_values_that_were_not_computed_counts(artifact: AdapterArtifact) -> None:
    full = squeeze(artifact)
    total = sum(value * value for value in full.meta.singular_values["q"])
    meta = full.meta.model_copy(update={"tail_energy": {"q": total}})
    half = replace(full, meta=meta)
    assert retained_energy(half)["q"] == pytest.approx(0.5)
    with pytest.raises(SqueezeError, match=r"q is at rank 8 already and retains 0\.5000"):
        squeeze(half, energy=0.9)


def test_an_update_that_is_switched_off_is_refused(artifact: AdapterArtifact) -> None:
    off = replace(artifact.modules["q"], scale=0.0)
    with pytest.raises(SqueezeError, match="q has scale 0"):
        squeeze(replace(artifact, modules={**artifact.modules, "q": off}), rank=2)


def test_progress_counts_every_module(artifact: AdapterArtifact) -> None:
    done: list[int] = []
    squeeze(artifact, rank=2, progress=done.append)
    assert sum(done) == len(artifact.modules)


@pytest.mark.parametrize("name", ["cola", "c3la", "rac", "rc3la"])
def test_a_chain_stacks_and_squeezes_to_one_link(name: str) -> None:
    layer = AdapterLinear(torch.nn.Linear(20, 14, bias=False).double())
    config = settled(MethodConfig(name=name, rank=3, chain=ChainConfig(links=3)))
    adapter = method(name).build(layer, config, generator(name))
    for link in range(3):
        if link:
            adapter.advance(generator(name, link))
        with torch.no_grad():
            for i, parameter in enumerate(p for p in adapter.parameters() if p.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(name, link, i)))
    stacked = AdapterArtifact({"q": adapter.to_lora()}, meta=ArtifactMeta(method=name))
    assert stacked.rank == 9
    small = squeeze(stacked, rank=3)
    u, s, vt = torch.linalg.svd(stacked.modules["q"].delta())
    assert small.rank == 3
    assert small.modules["q"].scale == stacked.modules["q"].scale
    assert_close(small.modules["q"].delta(), (u[:, :3] * s[:3]) @ vt[:3], torch.float64, 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_were_trained_on_after_a_squeeze_are_not_cut(tmp_path: Path, dtype: torch.dtype) -> None:
    draw = generator("saved over")
    modules = {}
    # Updates as large as at the end of a training, and as small as at its beginning; 0; and switched round.
    for name, size, scale in (
        ("late", 1.0, 2.0),
        ("early", 1e-4, 2.0),
        ("none", 0.0, 2.0),
        ("less", 1.0, -0.5),
    ):
        a, b = torch.randn(8, 48, generator=draw), size * torch.randn(32, 8, generator=draw)
        modules[name] = LoraFactors(a.to(dtype), b.to(dtype), scale)
    full = squeeze(AdapterArtifact(modules))
    for artifact in (full, squeeze(full, rank=3), squeeze(full, energy=0.7)):
        assert AdapterArtifact.load(artifact.save(tmp_path / "squeezed")).squeezed
    weights = load_file(full.save(tmp_path / "squeezed") / "adapter_model.safetensors")
    rounded = {key: value.bfloat16().to(value.dtype) for key, value in weights.items()}
    save_file(rounded, tmp_path / "squeezed" / "adapter_model.safetensors")
    assert AdapterArtifact.load(tmp_path / "squeezed").squeezed
    trained = {
        key: (1.05 * value if key.endswith("less.lora_B.weight") else value) for key, value in weights.items()
    }
    save_file(trained, tmp_path / "squeezed" / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"less: the singular values in rayft.json .* delete rayft.json"):
        AdapterArtifact.load(tmp_path / "squeezed")
    (tmp_path / "squeezed" / "rayft.json").unlink()
    assert not AdapterArtifact.load(tmp_path / "squeezed").squeezed
