from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from rayft.analysis.updates import Update, spectra
from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close, generator, tolerance

SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16)}


def drawn(name: str, kind: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=generator(kind, name))


@dataclass
class Files:
    """Stands for the files of two models, and notes what was read of them."""

    shapes: dict[str, tuple[int, int]] = field(default_factory=lambda: dict(SHAPES))
    read: list[str] = field(default_factory=list)

    def weight(self, path: str) -> torch.Tensor:
        self.read.append(f"weight {path}")
        return drawn(path, "weight")

    def update(self, path: str) -> torch.Tensor:
        self.read.append(f"update {path}")
        return 0.1 * drawn(path, "update")


@pytest.fixture
def files() -> Files:
    return Files()


def test_singular_values_are_those_of_a_dense_svd(files: Files) -> None:
    found = Update.of_pair(files, torch.device("cpu")).singular_values  # type: ignore[arg-type]
    assert [*found] == [*SHAPES]
    for path, values in found.items():
        dense = torch.linalg.svdvals(files.update(path).double())
        # The Gram matrix squares them: half of the digits of the largest are left of the smallest.
        assert float((values - dense).abs().max()) < tolerance(torch.float64, 30) ** 0.5 * float(dense[0])
        assert_close(values[:4], dense[:4], torch.float64, 30, depth=4)


def test_each_layer_is_read_when_it_is_needed(files: Files) -> None:
    update = Update.of_pair(files, torch.device("cpu"))  # type: ignore[arg-type]
    assert len(update.weights) == len(update.changes) == 3
    assert not files.read
    assert [update.singular_values for _ in range(2)]
    assert files.read == [f"update {path}" for path in SHAPES]
    files.read.clear()
    spectra(update, intruder_modules=1)
    # A weight for its norm; of the one layer that is decomposed both again.
    assert sorted(files.read) == sorted(
        [*(f"weight {path}" for path in SHAPES), "weight square", "update square"]
    )


def test_dense_updates_have_the_measures_of_their_factors() -> None:
    weights = {path: drawn(path, "weight") for path in SHAPES}
    factors = {path: LoraFactors(drawn(path, "a")[:3], drawn(path, "b")[:, :3], 0.5) for path in SHAPES}
    dense = {path: one.delta() for path, one in factors.items()}
    ours, ours_more = spectra(Update(weights, dense), 3)
    theirs, theirs_more = spectra(Update(weights, factors), 3)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # float32's rounding of ΔW is of full rank, which the entropy of the singular values sees most.
        assert_close(torch.tensor(value), torch.tensor(theirs[name]), torch.float32, 30, depth=4)
    assert ours_more["intruders"] == theirs_more["intruders"]
    assert ours_more["spectra"].keys() == theirs_more["spectra"].keys()


def test_an_unchanged_layer_has_a_spectrum_of_zeros() -> None:
    weights = {path: drawn(path, "weight") for path in SHAPES}
    changes = {**{path: drawn(path, "update") for path in SHAPES}, "tall": torch.zeros(SHAPES["tall"])}
    measures, more = spectra(Update(weights, changes), 3)
    assert more["spectra"]["tall"].frobenius_norm == more["spectra"]["tall"].effective_rank == 0
    assert measures["update_norm"] == pytest.approx(
        sum(float(change.double().square().sum()) for change in changes.values()) ** 0.5
    )


def test_the_spectrum_is_the_median_of_an_even_number_of_layers_too() -> None:
    values = {"one": [4.0, 1.0], "two": [2.0, 1.0], "three": [10.0, 6.0], "four": [5.0, 0.5]}
    weights = {path: torch.eye(2) for path in values}
    changes = {path: torch.diag(torch.tensor(one)) for path, one in values.items()}
    _, found = spectra(Update(weights, changes), intruder_modules=1)
    # The second values are 0.25, 0.5, 0.6 and 0.1 of the first.
    assert found["median_spectrum"] == pytest.approx((1.0, 0.375))
