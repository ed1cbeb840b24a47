"""What `rayft squeeze` checks before it computes anything: the base, and the folders that it writes to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayft.artifacts import check_replaceable, contains
from rayft.errors import ArtifactError, ModelError, SqueezeError
from rayft.models.base import base_of, pinned
from rayft.models.fingerprint import source_fingerprint
from rayft.models.load import is_here, load_skeleton, resolve, whole_skeleton
from rayft.models.targets import linear_shapes
from rayft.peft.folder import Artifact
from rayft.train.run import RunConfig

__all__ = ["check_base", "check_places"]


def check_places(source: Path, out: Path, marks: Mapping[str, str], parent: str, overwrite: bool) -> None:
    """Check that the results overwrite nothing that another command or a user has made.

    Args:
        source: folder of what is squeezed.
        out: folder of the results.
        marks: name of each folder that may be written in `out` → the mark of its adapter
            (`ArtifactMeta.made`).
        parent: content hash of the adapter that the results are squeezed from. Adapters of rayft 0.1.0 have
            it instead of a mark.
        overwrite: whether adapters that another command of rayft made are replaced.

    Raises:
        SqueezeError: if a folder is, contains or lies in the source, or if another command made it.
        ArtifactError: if a folder holds anything that rayft did not make.
        ResourceError: if the folder can't be made.
    """
    for label, mark in marks.items():
        place = out / label
        if contains(source, place) or (place.exists() and contains(place, source)):
            raise SqueezeError(
                f"{place} would be written over or into the source {source}, which stays as it is; choose "
                "another folder with --out"
            )
        try:
            found = check_replaceable(place)
        except ArtifactError as error:
            raise ArtifactError(f"--out {out}: {error}") from error
        if found is None or overwrite:
            continue
        # Adapters of rayft 0.1.0 record only what they were squeezed from.
        same = found["made"] == mark if found.get("made") else bool(parent) and found.get("parent") == parent
        if not same:
            raise SqueezeError(
                f"{place} holds an adapter that this command did not make from this source; choose another "
                "folder with --out, or replace it with --overwrite"
            )


def check_base(artifact: Artifact, base: str | None, run: RunConfig | None) -> str:
    """Check that an adapter fits its base, without loading the base's weights.

    Args:
        artifact: the adapter.
        base: name of the base, if the user gave one.
        run: a run that names the base, used where `base` is not given. Without either, the base that the
            adapter names is used if it is on this machine.

    Returns:
        Why the names of the adapter's modules could not be checked; empty if they were checked.

    Raises:
        BaseMismatchError: naming what differs.
        ModelError: if a base that was given can't be found.
    """
    model = base_of(artifact, base) if base else pinned(run.model, artifact) if run else None
    if model is not None:
        skeleton = load_skeleton(model)
        known = source_fingerprint(skeleton, resolve(model), model.revision)
        artifact.check_base(known or "", linear_shapes(skeleton))
        return ""
    model = base_of(artifact)
    if model is None:
        return "the adapter names no base, so its module names were not checked; give one with --base"
    try:
        skeleton = whole_skeleton(model) if is_here(model.name, model.revision) else None
    except ModelError:
        skeleton = None
    if skeleton is None:
        return (
            f"its base {model.name} is not here, so its module names were not checked; give one with --base"
        )
    artifact.check_base("", linear_shapes(skeleton))
    return ""
