"""Who may ask: keys as hashes, compared in constant time, never written anywhere."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from rayft.config import Section
from rayft.errors import ConfigError, RequestError
from rayft.paths import PathText

__all__ = ["Caller", "ForbiddenError", "KeyConfig", "UnauthorizedError", "identify", "resolved"]


class UnauthorizedError(RequestError):
    """No key, or one that is not known here."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """A key that may not do this."""

    status = 403
    code = "insufficient_permissions"


class KeyConfig(Section):
    """A key: where it is found, and what it opens. The key itself is never in a configuration."""

    name: str
    """Whose it is; this, and never the key, is what may be shown."""
    role: Literal["user", "admin"] = "user"
    """A user asks; an admin also loads, unloads and sees all adapters."""
    adapters: tuple[str, ...] | None = None
    """Names that a user may ask for; all where not given."""
    env: str | None = None
    """The environment variable that holds the key."""
    file: PathText | None = None
    """The file that holds it."""
    sha256: str | None = None
    """Its SHA-256 (64 hex digits): `printf %s KEY | sha256sum`."""

    @field_validator("sha256")
    @classmethod
    def _is_hash(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("sha256 is 64 hex digits in small letters: `printf %s KEY | sha256sum`")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> KeyConfig:
        if sum(place is not None for place in (self.env, self.file, self.sha256)) != 1:
            raise ValueError(f"key '{self.name}' needs one of env, file and sha256: where it is found")
        if self.role == "admin" and self.adapters is not None:
            raise ValueError(f"key '{self.name}' is an admin's, which opens all adapters: drop adapters")
        return self


@dataclass(frozen=True)
class Caller:
    """Who a request is from."""

    name: str
    admin: bool
    adapters: tuple[str, ...] | None
    """Names that may be asked for; None for all."""

    def may_ask(self, name: str) -> bool:
        """Say whether a name may be asked for."""
        return self.adapters is None or name in self.adapters


ANYONE = Caller("anyone", True, None)
"""Where there are no keys, on this machine alone."""


def resolved(keys: Sequence[KeyConfig]) -> tuple[KeyConfig, ...]:
    """Replace what keys are found in by their hashes, so that no process has to be told a key.

    Raises:
        ConfigError: if one is not there, is empty or short, or two are the same.
    """
    found = tuple(key.model_copy(update={"sha256": _hash(key), "env": None, "file": None}) for key in keys)
    if len({key.sha256 for key in found}) < len(found):
        raise ConfigError("two keys are the same; give each caller one of their own")
    return found


def _hash(key: KeyConfig) -> str:
    if key.sha256 is not None:
        return key.sha256
    try:
        text = os.environ[key.env] if key.env is not None else _in_file(Path(str(key.file)).expanduser())
        # Bytes that are no text, in a file or a variable, are no key: no header could carry them.
        text.encode()
    except KeyError as error:
        raise ConfigError(f"key '{key.name}': the environment has no {key.env}; set it") from error
    except OSError as error:
        raise ConfigError(f"key '{key.name}' can't be read from its file ({error})") from error
    except UnicodeError as error:
        raise ConfigError(f"key '{key.name}' is not text; take `openssl rand -hex 24`") from error
    if len(text.strip()) < 16:
        raise ConfigError(f"key '{key.name}' has fewer than 16 characters; take `openssl rand -hex 24`")
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _in_file(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def identify(keys: Sequence[KeyConfig], authorization: str | None) -> Caller:
    """Tell who a request is from by its `Authorization` header.

    Raises:
        UnauthorizedError: if there are keys, and the header has none of them.
    """
    if not keys:
        return ANYONE
    scheme, _, given = (authorization or "").partition(" ")
    digest = hashlib.sha256(given.strip().encode(errors="replace")).hexdigest()
    # All are compared, each in constant time: how long it takes tells nothing.
    matches = [key for key in keys if hmac.compare_digest(digest, key.sha256 or "")]
    if scheme.lower() != "bearer" or not matches:
        raise UnauthorizedError("this server needs a key; send it as `Authorization: Bearer …`")
    return Caller(matches[0].name, matches[0].role == "admin", matches[0].adapters)
