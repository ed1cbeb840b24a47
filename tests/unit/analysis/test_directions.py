"""Directions in ΔW space: norms, what they don't depend on, and principal ones against a dense PCA."""

from __future__ import annotations

import pytest
import torch

from rayft.analysis.directions import Direction, random_directions, trajectory_directions
from rayft.errors import DataError, MethodError
from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close, generator, tolerance

SHAPES = {"first": (13, 7), "second": (5, 11)}
WIDE = {"first": (150, 140), "second": (120, 130)}
"""Where six points of rank 9 in factors are smaller than multiplied out."""


def adapter(
    *seed: object, rank: int = 3, scale: float = 0.5, dtype=torch.float64, shapes=SHAPES
) -> dict[str, LoraFactors]:
    found = {}
    for name, (outputs, inputs) in shapes.items():
        draw = generator(*seed, name)
        a = torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
        b = torch.randn(outputs, rank, generator=draw, dtype=torch.float64)
        found[name] = LoraFactors(a.to(dtype), b.to(dtype), scale)
    return found


def rescaled(modules: dict[str, LoraFactors], by: float) -> dict[str, LoraFactors]:
    return {name: LoraFactors(f.a / by, f.b * by, f.scale) for name, f in modules.items()}


def test_rows_are_as_long_as_the_updates() -> None:
    modules = adapter("rows")
    modules["first"].b[2] = 0
    directions = random_directions(modules, 2, seed=4)
    for direction in directions:
        for name, factors in modules.items():
            assert_close(direction[name].norm(dim=1), factors.delta().norm(dim=1), torch.float64, 13)
    assert torch.equal(directions[0]["first"][2], torch.zeros(7, dtype=torch.float64))
    assert not torch.allclose(directions[0]["second"], directions[1]["second"])


def test_rows_are_as_long_as_the_weights() -> None:
    modules = adapter("rows")
    weights = {
        name: torch.randn(shape, generator=generator("w", name), dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    (direction,) = random_directions(modules, 1, 4, "weight", weights)
    for name, factors in modules.items():
        expected = (weights[name] + factors.delta()).norm(dim=1)
        assert_close(direction[name].norm(dim=1), expected, torch.float64, 13)
    with pytest.raises(MethodError, match="second, whose weight isn't given"):
        random_directions(modules, 1, 4, "weight", {"first": weights["first"]})


def test_a_module_draws_the_same_whatever_else_there_is() -> None:
    modules = adapter("alone")
    both = random_directions(modules, 2, 4)
    (alone,) = random_directions({"second": modules["second"]}, 1, 4)
    assert torch.equal(alone["second"], both[0]["second"])
    (other,) = random_directions(modules, 1, 5)
    assert not torch.allclose(other["second"], alone["second"])


@pytest.mark.parametrize("by", [4.0, -3.0])
def test_rescaled_factors_have_the_same_directions(by: float) -> None:
    modules = adapter("scale")
    for one, other in zip(
        random_directions(modules, 2, 1), random_directions(rescaled(modules, by), 2, 1), strict=True
    ):
        for name in SHAPES:
            assert_close(one[name], other[name], torch.float64, 13, depth=2)


def flat(modules: Direction) -> torch.Tensor:
    dense = [one.delta() if isinstance(one := modules[name], LoraFactors) else one for name in SHAPES]
    return torch.cat([one.flatten() for one in dense])


def trained_path(points: int, shapes=SHAPES) -> list[dict[str, LoraFactors]]:
    """A path that bends, of adapters of different ranks and scales."""
    ends = [adapter("path", number, scale=1.0, shapes=shapes) for number in range(3)]
    path = []
    for step in range(points):
        t = step / (points - 1)
        shares = (t, t * (1 - t), 0.2 * t**3 * (1 - t))
        modules = {}
        for name in SHAPES:
            a = torch.cat([end[name].a for end in ends])
            b = torch.cat([share * end[name].b for share, end in zip(shares, ends, strict=True)], 1)
            scale = 1.0 + step
            modules[name] = LoraFactors(a, b / scale, scale)
        path.append(modules)
    return path


@pytest.mark.parametrize("shapes", [SHAPES, WIDE])
def test_principal_directions_are_those_of_a_dense_pca(shapes) -> None:
    path = trained_path(6, shapes)
    dense = torch.stack([flat(point) for point in path])
    offset = dense - dense[-1]
    u, s, vt = torch.linalg.svd(offset, full_matrices=False)
    sign = torch.where(u[0, :2] < 0, -1.0, 1.0)
    found = trajectory_directions(path)
    # Eigenvectors of products turn by the rounding of the largest over the gap of the eigenvalues.
    gap = float(s[0] ** 2 / (s[1] ** 2 - s[2] ** 2))
    depth = 2 * int(gap) + 2
    for number, direction in enumerate(found.directions):
        assert_close(flat(direction), sign[number] * vt[number], torch.float64, offset.shape[1], depth)
        assert_close(flat(direction).norm(), torch.ones(()), torch.float64, offset.shape[1], depth)
    expected = (offset @ vt[:2].t()) * sign
    assert_close(found.coordinates, expected, torch.float64, offset.shape[1], depth)
    shares = (s**2 / (s**2).sum())[:2]
    assert_close(torch.tensor(found.explained, dtype=torch.float64), shares, torch.float64, 6, depth)
    allowed = tolerance(torch.float64, offset.shape[1], depth) * float(s[0])
    assert float(found.coordinates[-1].norm()) <= allowed


def test_principal_directions_have_no_more_ranks_than_they_need() -> None:
    # Six points of three adapters of rank 3: nine dimensions, where 6·9 ranks were stacked.
    for direction in trajectory_directions(trained_path(6, WIDE)).directions:
        assert [direction[name].rank for name in WIDE] == [9, 9]
    # In factors they would be more numbers than multiplied out.
    for direction in trajectory_directions(trained_path(6)).directions:
        assert [tuple(direction[name].shape) for name in SHAPES] == [*SHAPES.values()]
    # A module that never moves has the direction 0.
    still = [{**point, "second": adapter("still", shapes=WIDE)["second"]} for point in trained_path(4, WIDE)]
    first, _ = trajectory_directions(still).directions
    assert first["second"].rank == 1
    assert float(first["second"].delta().norm()) <= tolerance(torch.float64, 130)


def test_principal_directions_do_not_depend_on_the_factors() -> None:
    path = trained_path(5)
    one, other = trajectory_directions(path), trajectory_directions([rescaled(p, 4.0) for p in path])
    assert_close(other.coordinates, one.coordinates, torch.float64, 100, depth=4)


def test_a_path_without_a_plane_is_refused() -> None:
    path = trained_path(4)
    with pytest.raises(DataError, match="at least three"):
        trajectory_directions(path[:2])
    with pytest.raises(DataError, match="the same modules"):
        trajectory_directions([{"first": path[0]["first"]}, *path[1:]])
    end = adapter("line")
    line = [{name: LoraFactors(f.a, f.b, share) for name, f in end.items()} for share in (0.0, 0.3, 0.7, 1.0)]
    with pytest.raises(DataError, match="straight line"):
        trajectory_directions(line)
    with pytest.raises(DataError, match="straight line"):
        trajectory_directions([end, end, end])
