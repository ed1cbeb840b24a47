"""Ranks from one budget of bytes, against every other choice of ranks; sizes against real files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta, folder_bytes
from rayft.errors import SqueezeError
from rayft.methods.base import LoraFactors
from rayft.numerics import generator
from rayft.squeeze.budget import parse_bytes, ranks_for_budget, weight_bytes
from rayft.squeeze.rank import squeeze


def lost(spectra: dict[str, tuple[float, ...]], ranks: dict[str, int]) -> float:
    return sum(value * value for name, values in spectra.items() for value in values[ranks[name] :])


def every_choice(
    spectra: dict[str, tuple[float, ...]], costs: dict[str, int], budget: int
) -> list[dict[str, int]]:
    ranges = [range(1, len(values) + 1) for values in spectra.values()]
    choices = [dict(zip(spectra, ranks, strict=True)) for ranks in itertools.product(*ranges)]
    return [choice for choice in choices if sum(costs[name] * k for name, k in choice.items()) <= budget]


def random_spectra(seed: int) -> dict[str, tuple[float, ...]]:
    draw = generator("spectra", seed)
    return {
        name: tuple(sorted(torch.rand(4, generator=draw, dtype=torch.float64).tolist(), reverse=True))
        for name in "abc"
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [30, 50, 70, 110, 1000])
def test_of_equal_costs_no_choice_loses_less(seed: int, budget: int) -> None:
    spectra, costs = random_spectra(seed), dict.fromkeys("abc", 10)
    found = ranks_for_budget(spectra, costs, budget)
    best = min(lost(spectra, choice) for choice in every_choice(spectra, costs, budget))
    assert lost(spectra, found) == best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [24, 31, 47, 60])
def test_of_different_costs_it_is_never_farther_off_than_one_value(seed: int, budget: int) -> None:
    spectra, costs = random_spectra(seed), {"a": 4, "b": 7, "c": 13}
    found = ranks_for_budget(spectra, costs, budget)
    assert sum(costs[name] * rank for name, rank in found.items()) <= budget
    best = min(lost(spectra, choice) for choice in every_choice(spectra, costs, budget))
    widest = max(value * value for values in spectra.values() for value in values)
    assert best <= lost(spectra, found) <= best + widest
    # What is left could hold no further rank of any module.
    left = budget - sum(costs[name] * rank for name, rank in found.items())
    assert all(costs[name] > left for name, rank in found.items() if rank < len(spectra[name]))


def test_large_singular_values_get_the_ranks() -> None:
    spectra = {"loud": (5.0, 4.0, 3.0, 2.0), "quiet": (0.5, 0.4, 0.3, 0.2)}
    assert ranks_for_budget(spectra, {"loud": 10, "quiet": 10}, 50) == {"loud": 4, "quiet": 1}
    # At ten times the price a loud rank is worth less than a quiet one of a tenth of its energy or more.
    assert ranks_for_budget({"loud": (5.0, 1.0), "quiet": (1.0, 0.9)}, {"loud": 100, "quiet": 10}, 220) == {
        "loud": 2,
        "quiet": 2,
    }
    assert ranks_for_budget({"loud": (5.0, 1.0), "quiet": (1.0, 0.9)}, {"loud": 100, "quiet": 10}, 125) == {
        "loud": 1,
        "quiet": 2,
    }


def test_nothing_is_spent_on_values_of_zero() -> None:
    spectra = {"a": (1.0, 1e-9, 0.0), "b": (0.0, 0.0, 0.0)}
    assert ranks_for_budget(spectra, {"a": 10, "b": 10}, 1000) == {"a": 1, "b": 1}


@pytest.fixture
def artifact() -> AdapterArtifact:
    draw = generator("budget")

    def factors(outputs: int, inputs: int, dtype: torch.dtype, scale: float = 2.0) -> LoraFactors:
        a, b = torch.randn(8, inputs, generator=draw), torch.randn(outputs, 8, generator=draw)
        return LoraFactors(a.to(dtype), b.to(dtype), scale)

    modules = {
        "layers.0.q": factors(24, 16, torch.float32, 20.0),
        "layers.0.v": factors(13, 16, torch.bfloat16),
        "layers.1.up": factors(96, 24, torch.float32),
    }
    return AdapterArtifact(modules, {"score.weight": torch.randn(3, 24)}, ArtifactMeta(task="causal_lm"))


@pytest.mark.parametrize("rank", [8, 3, 1])
def test_the_size_is_known_before_the_file_is_written(
    artifact: AdapterArtifact, tmp_path: Path, rank: int
) -> None:
    small = squeeze(artifact, rank=rank)
    assert weight_bytes(small) == folder_bytes(small.save(tmp_path / "a"))


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9, 1.0])
def test_a_squeeze_to_a_budget_fits_and_uses_it(
    artifact: AdapterArtifact, tmp_path: Path, share: float
) -> None:
    budget = int(share * weight_bytes(artifact))
    small = squeeze(artifact, budget=budget)
    size = folder_bytes(small.save(tmp_path / "a"))
    dearest = max(
        f.a.element_size() * f.a.shape[1] + f.b.element_size() * f.b.shape[0] for f in small.modules.values()
    )
    # The header is shorter for ranks of fewer digits: up to a byte for each number in it.
    assert budget - dearest - 64 < size <= budget
    assert torch.equal(small.heads["score.weight"], artifact.heads["score.weight"])


def test_ranks_differ_by_module_and_lose_less_than_one_rank_for_all(artifact: AdapterArtifact) -> None:
    uniform = squeeze(artifact, rank=2)
    by_module = squeeze(artifact, budget=weight_bytes(uniform))
    spectra = by_module.meta.singular_values

    def loss(small: AdapterArtifact) -> float:
        return lost(dict(spectra), {name: factors.rank for name, factors in small.modules.items()})

    assert weight_bytes(by_module) <= weight_bytes(uniform)
    assert loss(by_module) < loss(uniform)


def test_a_budget_that_is_too_small_says_by_how_much(artifact: AdapterArtifact) -> None:
    least = weight_bytes(squeeze(artifact, rank=1))
    squeeze(artifact, budget=least + 8)
    with pytest.raises(SqueezeError, match=r"rank 1 in all 3 modules takes [\d,]+: raise it by [\d,]+ bytes"):
        squeeze(artifact, budget=least - 64)
    with pytest.raises(SqueezeError, match="heads and the file's header alone take"):
        squeeze(artifact, budget=100)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5MB", 1_500_000), ("800 kB", 800_000), ("2MiB", 2 * 2**20), ("1234", 1234), (".5gb", 500_000_000)],
)
def test_sizes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "big", "1.5XB", "-3MB", "0", "1,5MB", "nan"])
def test_a_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SqueezeError, match=r"is no size; write it as 1\.5MB"):
        parse_bytes(text)
