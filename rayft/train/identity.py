"""Compute the identity of a run's inputs: its data and the files of its base."""

from __future__ import annotations

from rayft import __version__
from rayft.data.source import Parts
from rayft.identity import Identity
from rayft.models.identity import BaseFiles, base_files
from rayft.train.run import RunConfig

__all__ = ["identify"]


def identify(run: RunConfig, parts: Parts, *, with_base: bool = True) -> Identity:
    """Return the identity of a run's data and base, without the run's configuration and its starting adapter.

    Args:
        run: names the data and the base.
        parts: the data, as it was read.
        with_base: whether to hash the base's files.

    Raises:
        ModelError: if the base can't be found.
    """
    base = base_files(run.model) if with_base else BaseFiles()
    files = [path for _, path in run.data.files or () if path is not None]
    return Identity(
        rayft=__version__,
        data=parts.digest,
        base=base.identity,
        data_name=", ".join([run.data.name, *files] if run.data.name else files),
        base_name=run.model.name,
        parts=dict(parts.digests),
        files=base.files,
    )
