"""The identity of a result: the configuration, the data and the base model that it was computed from.

The result of a trial, a checkpoint, an analysis and the folder of a sweep are saved with the `Identity` of
what they were computed from. Before one of them is reused, `Identity.differences` compares that with the
present configuration, data and base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from rayft.config import Record

__all__ = ["UNKNOWN", "Identity"]


class Identity(Record):
    """What a result was computed from. An empty field is unknown and is not compared.

    rayft 0.1.0 saved no identity. For its results, one is put together from what it did save, `data` and
    `fingerprint`.
    """

    rayft: str = ""
    """The version of rayft that computed the result; empty for 0.1.0, which did not save it."""
    config: str = ""
    """Content hash of the run."""
    data: str = ""
    """Digest of all examples, in order."""
    base: str = ""
    """Hash of the base's files: weights, tokenizer, chat template and settings."""
    start: str = ""
    """Content hash of the adapter that the run started from."""
    fingerprint: str = ""
    """Fingerprint of a sample of the base's weights; 0.1.0 saved nothing else about a base."""
    sweep: str = ""
    """Random id of the sweep, part of the keys of its tracked runs; not compared. Empty for 0.1.0."""
    data_name: str = ""
    base_name: str = ""
    start_name: str = ""
    """The names of data, base and start in the configuration. For messages; not compared."""
    parts: Mapping[str, str] = {}
    """Part of the data → its digest. For messages; not compared."""
    files: Mapping[str, str] = {}
    """File of the base → its hash. For messages; not compared."""

    @property
    def inputs(self) -> str:
        """A hash of data and base (8 hex digits), for keys."""
        return hashlib.sha256(f"{self.data}\0{self.base}".encode()).hexdigest()[:8]

    @property
    def brief(self) -> Identity:
        """The identity as it is saved with each result, without the fields that only messages use."""
        left_out = ("sweep", "data_name", "base_name", "start_name")
        return self.model_copy(update={"parts": {}, "files": {}, **dict.fromkeys(left_out, "")})

    def of_data(self) -> Identity:
        """Return the identity of the data alone, for results on another base (a tuned model)."""
        return Identity(data=self.data, data_name=self.data_name, parts=self.parts)

    def differences(self, now: Identity) -> list[str]:
        """Return a sentence for each thing that differs in `now`. Unknown fields are not compared."""
        found = []
        if _differ(self.config, now.config):
            found.append(f"the configuration has changed (hash {self.config}, now {now.config})")
        if _differ(self.data, now.data):
            found.append(self._data(now))
        if _differ(self.base, now.base):
            found.append(self._base(now))
        elif _differ(self.fingerprint, now.fingerprint):
            found.append(
                f"the base has changed: the weights of {now.base_name or 'the base'} had the fingerprint "
                f"{self.fingerprint}, now {now.fingerprint}"
            )
        if _differ(self.start, now.start):
            name = now.start_name or "the adapter to start from"
            found.append(f"{name} has changed (content {self.start}, now {now.start})")
        return found

    def _data(self, now: Identity) -> str:
        changed = [name for name in now.parts if _differ(self.parts.get(name, ""), now.parts[name])]
        which = f"{now.data_name} ({', '.join(changed)})" if changed else now.data_name
        text = f"the data has changed: {which} had the digest {self.data}, now {now.data}"
        if self.rayft == now.rayft:
            return text
        # Another version of rayft may read the same file differently, which changes the digest.
        versions = f"that was {self.rayft}, this is {now.rayft}" if self.rayft else "that was rayft 0.1.0"
        return f"{text} (or rayft reads it differently now: {versions})"

    def _base(self, now: Identity) -> str:
        names = sorted(self.files.keys() | now.files.keys())
        changed = [name for name in names if self.files.get(name) != now.files.get(name)]
        which = f" in {', '.join(changed)}" if self.files and now.files else ""
        name = now.base_name or "it"
        return f"the base has changed: {name} is not what it was{which} (hash {self.base}, now {now.base})"


def _differ(one: str, other: str) -> bool:
    return bool(one and other) and one != other


UNKNOWN = Identity()
"""The identity of an unknown result: comparing with it finds no differences."""
