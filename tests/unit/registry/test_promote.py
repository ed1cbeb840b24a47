from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rayft.errors import PromotionRefusedError, RegistryError
from rayft.registry import AdapterRef, AdapterVersion, Gate, promote


class Shelf:
    """A registry of versions made by hand."""

    def __init__(self, *tags: Mapping[str, str], champion: int | None = None) -> None:
        self.found = [
            AdapterVersion(
                "sums", number, f"hash{number}", "", "", ("champion",) if number == champion else (), tag
            )
            for number, tag in enumerate(tags, start=1)
        ]

    def register(self, name: str, run_id: str, folder: str | Path, tags: Mapping[str, str]) -> int:
        raise NotImplementedError

    def resolve(self, ref: AdapterRef | str) -> AdapterRef:
        raise NotImplementedError

    def fetch(self, ref: AdapterRef | str, folder: str | Path, most: int | None = None) -> Path:
        raise NotImplementedError

    def alias(self, name: str, alias: str, version: int) -> None:
        self.found = [replace(v, aliases=(alias,) if v.number == version else ()) for v in self.found]

    def versions(self, name: str) -> Sequence[AdapterVersion]:
        return self.found

    @property
    def champion(self) -> int | None:
        return next((version.number for version in self.found if version.aliases), None)


def scored(score: float, base: float | None = 0.2, **more: str) -> dict[str, str]:
    return {"val_score": str(score), **({} if base is None else {"base_val_score": str(base)}), **more}


def test_the_first_champion_only_has_to_beat_the_base() -> None:
    shelf = Shelf(scored(0.5))
    done = promote(shelf, "sums", 1)
    assert shelf.champion == 1
    assert (done.previous, done.score, done.base_score, done.forced) == (None, 0.5, 0.2, False)


@pytest.mark.parametrize("score", [0.2, 0.1, float("nan")])
def test_no_better_than_the_base_is_refused_with_both_numbers(score: float) -> None:
    shelf = Shelf(scored(score))
    with pytest.raises(PromotionRefusedError, match=rf"{score:.4g}.*base's 0\.2.*rayft promote --force"):
        promote(shelf, "sums", 1)
    assert shelf.champion is None


def test_a_better_one_replaces_the_champion() -> None:
    shelf = Shelf(scored(0.5), scored(0.6), champion=1)
    done = promote(shelf, "sums", 2)
    assert (shelf.champion, done.previous, done.champion_score) == (2, 1, 0.5)


def test_a_worse_one_is_refused_with_both_numbers() -> None:
    shelf = Shelf(scored(0.5), scored(0.45), champion=1)
    with pytest.raises(PromotionRefusedError, match=r"0\.45.*champion sums/1 has 0\.5"):
        promote(shelf, "sums", 2)
    assert shelf.champion == 1


@pytest.mark.parametrize(("tolerance", "passes"), [(0.04, False), (0.06, True)])
def test_tolerance_is_how_far_below(tolerance: float, passes: bool) -> None:
    shelf = Shelf(scored(0.5), scored(0.45), champion=1)
    if passes:
        promote(shelf, "sums", 2, gate=Gate(tolerance=tolerance))
    else:
        with pytest.raises(PromotionRefusedError, match=r"tolerance 0\.04"):
            promote(shelf, "sums", 2, gate=Gate(tolerance=tolerance))
    assert shelf.champion == (2 if passes else 1)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [({}, "no validation score"), (scored(0.9, None), "base's validation score is unknown")],
)
def test_an_unknown_score_is_refused(candidate: Mapping[str, str], message: str) -> None:
    shelf = Shelf(scored(0.5), candidate, champion=1)
    with pytest.raises(PromotionRefusedError, match=message):
        promote(shelf, "sums", 2)


def test_the_gate_can_bring_the_base_score() -> None:
    shelf = Shelf(scored(0.9, None))
    with pytest.raises(PromotionRefusedError, match=r"base's 0\.95"):
        promote(shelf, "sums", 1, gate=Gate(base_score=0.95))
    promote(shelf, "sums", 1, gate=Gate(base_score=0.5))
    assert shelf.champion == 1


def test_scores_on_other_data_are_not_compared() -> None:
    shelf = Shelf(scored(0.5, data_digest="aaa"), scored(0.9, data_digest="bbb"), champion=1)
    with pytest.raises(PromotionRefusedError, match="different data"):
        promote(shelf, "sums", 2)


def test_force_goes_past_the_gate_and_says_so() -> None:
    shelf = Shelf(scored(0.5), scored(0.1), champion=1)
    assert promote(shelf, "sums", 2, force=True).forced
    assert shelf.champion == 2


def test_the_champion_may_be_promoted_again() -> None:
    shelf = Shelf(scored(0.5), champion=1)
    assert promote(shelf, "sums", 1).previous == 1


def test_force_makes_no_version_up() -> None:
    with pytest.raises(RegistryError, match="no version 4; there are 1, 2"):
        promote(Shelf(scored(0.5), scored(0.5)), "sums", 4, force=True)
