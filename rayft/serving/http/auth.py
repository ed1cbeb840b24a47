"""Authentication by API keys: `Guard` is the dependency with which a route says who may call it.

Keys are kept as SHA-256 hashes, compared in constant time, and never written anywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from pydantic import field_validator, model_validator

from rayft.config import Section
from rayft.errors import ConfigError, RequestError
from rayft.paths import PathText

__all__ = [
    "Administrator",
    "Caller",
    "ForbiddenError",
    "Guard",
    "KeyConfig",
    "KnownCaller",
    "UnauthorizedError",
    "identify",
    "resolved",
]


class UnauthorizedError(RequestError):
    """The request has no key, or an unknown one."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The request's key does not permit this operation."""

    status = 403
    code = "insufficient_permissions"


class KeyConfig(Section):
    """Where an API key is found and what it permits. A configuration never contains the key itself."""

    name: str
    """Name of the key's owner; only this name, never the key, is shown."""
    role: Literal["user", "admin"] = "user"
    """A `user` may request answers; an `admin` may also load and unload adapters, and sees all of them."""
    adapters: tuple[str, ...] | None = None
    """Names that a user may put into the `model` field; all names by default."""
    env: str | None = None
    """Name of the environment variable that holds the key."""
    file: PathText | None = None
    """Path of the file that holds the key."""
    sha256: str | None = None
    """SHA-256 of the key, as 64 hex digits: `printf %s KEY | sha256sum`."""

    @field_validator("sha256")
    @classmethod
    def _is_hash(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(
                "sha256 must be 64 hex digits in lower case; compute it by `printf %s KEY | sha256sum`"
            )
        return value

    @model_validator(mode="after")
    def _one_place(self) -> KeyConfig:
        if sum(place is not None for place in (self.env, self.file, self.sha256)) != 1:
            raise ValueError(f"key '{self.name}' needs exactly one of env, file and sha256")
        if self.role == "admin" and self.adapters is not None:
            raise ValueError(
                f"key '{self.name}' has the role admin, which permits all adapters; remove its `adapters`"
            )
        return self


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    name: str
    admin: bool
    adapters: tuple[str, ...] | None
    """Names that the caller may put into the `model` field; None for all."""

    def may_ask(self, name: str) -> bool:
        """Return whether the caller may put a name into the `model` field."""
        return self.adapters is None or name in self.adapters


ANYONE = Caller("anyone", True, None)
"""The caller where no keys are configured, which only an address of this machine alone allows."""


class Guard(SecurityBase):
    """A FastAPI dependency that authenticates a request and returns its caller.

    The application that it is used in has its keys in `app.state.keys`. `body.GuardedRoute` calls the guards
    of a route before the body of the request is read.
    """

    def __init__(self, *, admin: bool = False) -> None:
        """Describe the guard.

        Args:
            admin: whether the key must be an admin's.
        """
        self.model = HTTPBearer()
        self.scheme_name = "key"
        self._admin = admin

    async def __call__(self, request: Request) -> Caller:
        """Return the caller of a request.

        Raises:
            UnauthorizedError: if the request has no known key.
            ForbiddenError: if the key must be an admin's and is not, or if no key is needed and a browser
                sends the request for a page of another site.
        """
        keys = request.app.state.keys
        if not keys and request.headers.get("sec-fetch-site") == "cross-site":
            raise ForbiddenError("this server has no keys, so pages of other sites can't use it; set keys")
        caller = identify(keys, request.headers.get("authorization"))
        if self._admin and not caller.admin:
            raise ForbiddenError("this operation needs an admin's key")
        return caller


KnownCaller = Annotated[Caller, Security(Guard())]
"""Type of a route's parameter that receives the caller; the route answers 401 without a known key."""

Administrator = Annotated[Caller, Security(Guard(admin=True))]
"""As `KnownCaller`; the route also answers 403 unless the key is an admin's."""


def resolved(keys: Sequence[KeyConfig]) -> tuple[KeyConfig, ...]:
    """Replace the place of each key by the key's hash, so that no other process needs to receive a key.

    Raises:
        ConfigError: if a key is missing, empty or short, or if two keys are equal.
    """
    found = tuple(key.model_copy(update={"sha256": _hash(key), "env": None, "file": None}) for key in keys)
    if len({key.sha256 for key in found}) < len(found):
        raise ConfigError("two keys are equal; give each caller a key of its own")
    return found


def _hash(key: KeyConfig) -> str:
    if key.sha256 is not None:
        return key.sha256
    try:
        text = os.environ[key.env] if key.env is not None else _in_file(Path(str(key.file)).expanduser())
        # Clients encode other characters in different ways, or can't send them in a header.
        text.encode("ascii")
    except KeyError as error:
        raise ConfigError(
            f"key '{key.name}': the environment variable {key.env} is not set; set it"
        ) from error
    except OSError as error:
        raise ConfigError(f"key '{key.name}' can't be read from its file ({error})") from error
    except UnicodeError as error:
        raise ConfigError(
            f"key '{key.name}' has characters other than ASCII; create one by `openssl rand -hex 24`"
        ) from error
    if len(text.strip()) < 16:
        raise ConfigError(
            f"key '{key.name}' has fewer than 16 characters; create one by `openssl rand -hex 24`"
        )
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _in_file(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def identify(keys: Sequence[KeyConfig], authorization: str | None) -> Caller:
    """Return the caller that an `Authorization` header belongs to.

    Raises:
        UnauthorizedError: if keys are configured and the header has none of them.
    """
    if not keys:
        return ANYONE
    scheme, _, given = (authorization or "").partition(" ")
    digest = hashlib.sha256(given.strip().encode(errors="replace")).hexdigest()
    # Compare with all keys, each in constant time, so that the duration reveals nothing.
    matches = [key for key in keys if hmac.compare_digest(digest, key.sha256 or "")]
    if scheme.lower() != "bearer" or not matches:
        raise UnauthorizedError("this server needs a key; send it as `Authorization: Bearer …`")
    return Caller(matches[0].name, matches[0].role == "admin", matches[0].adapters)
