"""Promotion: point an alias to a version that is better than the base and no worse than the champion.

Only scores on the validation part count. The test part is for the numbers that are reported.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from rayft.config import Section
from rayft.errors import PromotionRefusedError, RegistryError
from rayft.registry.ref import BASE_SCORE_TAG, AdapterVersion, Registry

__all__ = ["Gate", "Promotion", "promote"]


class Gate(Section):
    """What the validation score of a candidate must reach."""

    tolerance: float = Field(default=0.0, ge=0)
    """How far the validation score may be below that of the present champion."""

    base_score: float | None = None
    """Best validation score of the base; by default the one that the candidate was registered with."""


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion, and the validation scores that decided it (None: unknown)."""

    name: str
    alias: str
    version: int
    previous: int | None
    """Version that the alias pointed to before; None if there was none."""
    score: float | None
    champion_score: float | None
    base_score: float | None
    forced: bool
    """Whether the gate would have refused the candidate."""


def promote(
    registry: Registry,
    name: str,
    version: int,
    alias: str = "champion",
    gate: Gate | None = None,
    *,
    force: bool = False,
) -> Promotion:
    """Point `alias` to a version, if it passes the gate or `force` is set.

    Args:
        registry: has the model.
        name: of the registered model.
        version: the candidate.
        alias: the alias to move.
        gate: what the candidate must reach.
        force: whether to move the alias even if the candidate does not pass.

    Raises:
        PromotionRefusedError: if the candidate does not pass, with both scores. The alias stays where it is.
        RegistryError: if there is no such model or version.
    """
    gate = gate or Gate()
    versions = {found.number: found for found in registry.versions(name)}
    if version not in versions:
        known = ", ".join(map(str, sorted(versions)))
        raise RegistryError(f"{name} has no version {version}; there are {known or 'none'}")
    candidate = versions[version]
    champion = next((found for found in versions.values() if alias in found.aliases), None)
    base = gate.base_score if gate.base_score is not None else candidate.score(BASE_SCORE_TAG)
    refusal = _refusal(candidate, champion, base, gate.tolerance, alias)
    if refusal and not force:
        raise PromotionRefusedError(refusal)
    registry.alias(name, alias, version)
    return Promotion(
        name=name,
        alias=alias,
        version=version,
        previous=champion.number if champion else None,
        score=candidate.score(),
        champion_score=champion.score() if champion else None,
        base_score=base,
        forced=bool(refusal),
    )


def _refusal(
    candidate: AdapterVersion,
    champion: AdapterVersion | None,
    base: float | None,
    tolerance: float,
    alias: str,
) -> str:
    """Return why a candidate does not pass the gate; empty if it passes."""
    who, score = f"{candidate.name}/{candidate.number}", candidate.score()
    anyway = "or promote it all the same with `rayft promote --force`"
    if score is None:
        return f"{who} has no validation score; score it before it is registered, {anyway}"
    if base is None:
        return f"{who} has {score:.4g}, but the base's validation score is unknown; score the base, {anyway}"
    # `not >` also refuses NaN.
    if not score > base:
        return (
            f"{who} has a validation score of {score:.4g}, not above the base's {base:.4g}; an adapter "
            "that is no better than prompting is not worth serving: train longer or with another rate, "
            f"{anyway}"
        )
    if champion is None or champion.content_hash == candidate.content_hash:
        return ""
    return _against_champion(who, score, candidate, champion, tolerance, f"the present {alias}", anyway)


def _against_champion(
    who: str,
    score: float,
    candidate: AdapterVersion,
    champion: AdapterVersion,
    tolerance: float,
    present: str,
    anyway: str,
) -> str:
    other, held = f"{champion.name}/{champion.number}", champion.score()
    if held is None:
        return f"{who} has {score:.4g}, but {present} {other} has no validation score; score it, {anyway}"
    data = [version.tags.get("data_digest", "") for version in (candidate, champion)]
    if all(data) and data[0] != data[1]:
        return (
            f"{who} ({score:.4g}) and {present} {other} ({held:.4g}) were scored on different data "
            f"({data[0]}, {data[1]}), so their scores can't be compared; score both on one, {anyway}"
        )
    if not score >= held - tolerance:
        return (
            f"{who} has a validation score of {score:.4g}, {present} {other} has {held:.4g}"
            f" (tolerance {tolerance:.4g}); train a better one, widen the gate's tolerance, {anyway}"
        )
    return ""
