"""Scores that are kept as they come, so that nothing is scored twice.

scores/<name>.json     a score of each example, part by part, and what they follow from

A kept score is used again only if all that it follows from is the same: the adapter's content, the base, the
data, how the base is loaded, and how answers are generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rayft.config import Record
from rayft.models.identity import base_files
from rayft.peft.folder import load_adapter
from rayft.sweep.score import ScoreRequest
from rayft.train.run import RunConfig

__all__ = ["ScoreStore", "follows_from"]

SETTINGS: Any = {
    "model": True,
    "data": True,
    "scale": True,
    "evaluate": {"max_new_tokens", "batch_size", "shots"},
}
"""Fields of a run that decide scores."""


class _Kept(Record):
    """What a file of the folder holds."""

    follows: Mapping[str, str]
    """Name of what the scores follow from → its hash or text."""
    parts: Mapping[str, tuple[float, ...]]
    """Part of the data → score of each example."""


class ScoreStore:
    """A sweep's folder of scores."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Use a folder, which is made when the first score is kept.

        Args:
            folder: the folder.
            say: called with a sentence for each file that can't be read.
        """
        self._folder, self._say = folder, say

    def find(
        self, name: str, follows: Mapping[str, str], parts: Sequence[str]
    ) -> dict[str, tuple[float, ...]] | None:
        """Return the scores that were kept under a name; None if they have to be made.

        Args:
            name: of what was scored.
            follows: what the scores have to follow from.
            parts: the parts of the data that are needed.
        """
        place = self._place(name)
        try:
            kept = _Kept.model_validate_json(place.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            self._say(f"{name} is scored again: {place} is damaged ({str(error).splitlines()[0]})")
            return None
        if kept.follows != follows or not {*parts} <= kept.parts.keys():
            return None
        return {part: kept.parts[part] for part in parts}

    def keep(self, name: str, follows: Mapping[str, str], parts: Mapping[str, Sequence[float]]) -> None:
        """Keep scores under a name; those kept before are replaced."""
        found = {part: tuple(values) for part, values in parts.items()}
        _Kept(follows=dict(follows), parts=found).write(self._place(name))

    def _place(self, name: str) -> Path:
        return self._folder / (re.sub(r"[^\w.@+,:=-]", "-", name) + ".json")


def follows_from(request: ScoreRequest) -> dict[str, str]:
    """Return what the scores of a request follow from.

    Raises:
        ArtifactError: if the adapter can't be read.
        ModelError: if the tuned model can't be read.
    """
    run = RunConfig.model_validate_json(request.run)
    if request.adapter is not None:
        content = load_adapter(request.adapter).content_hash
    else:
        # A tuned model is a base of its own, whose files are its content.
        content = "" if request.expected.base else base_files(run.model).identity
    return {
        "adapter": content,
        "base": request.expected.base,
        "data": request.expected.data,
        "style": request.style,
        "settings": json.dumps(run.model_dump(mode="json", include=SETTINGS), sort_keys=True),
    }
