"""Talk to a running server over HTTP: its address, the caller's key, requests, and what a refusal says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from rayft.artifacts import check_prefix
from rayft.config import nearest
from rayft.errors import ModelError, ResourceError, SqueezeError
from rayft.serving.control.state import parse_model

__all__ = [
    "ServedVersion",
    "api_url",
    "base_card",
    "checked",
    "connect",
    "key_headers",
    "reason",
    "served_card",
    "served_cards",
    "served_version",
]

KEY = "RAYFT_KEY"
"""Environment variable that holds the caller's key."""
SECONDS_TO_ANSWER = 10.0
"""How long a server may take to list its models."""


def key_headers() -> dict[str, str]:
    """Return the HTTP header with the caller's key; empty if RAYFT_KEY is not set.

    Raises:
        ResourceError: if the key is empty, or can't be part of a header.
    """
    key = os.environ.get(KEY)
    if key is None:
        return {}
    if not key.strip():
        raise ResourceError(f"the key in {KEY} is empty; set it again, or unset it")
    if key != key.strip():
        raise ResourceError(f"the key in {KEY} begins or ends with whitespace; set it again without that")
    if not key.isascii() or not key.isprintable():
        raise ResourceError(f"the key in {KEY} has characters that an HTTP header can't hold; set it again")
    return {"Authorization": f"Bearer {key}"}


def connect(url: str, option: str, timeout: float) -> httpx.Client:
    """Return a client for a server, which sends the caller's key. Nothing is sent yet.

    Args:
        url: the server's.
        option: how a user sets the URL, for the message.
        timeout: seconds that the server may take to answer.

    Raises:
        ResourceError: if the text is not a URL, or the key is empty or can't be part of a header.
    """
    try:
        url.encode()
        return httpx.Client(base_url=url.rstrip("/"), headers=key_headers(), timeout=timeout)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ResourceError(f"{option} {url} is not a URL ({error}); write http://host:port") from error


def checked(client: httpx.Client, verb: str, path: str, *, option: str, **options: Any) -> httpx.Response:
    """Send a request, and return the answer.

    Args:
        client: sends it.
        verb: `GET`, `POST` or `DELETE`.
        path: path on the server.
        option: how a user sets the server's URL, for the message.
        options: as those of `httpx.Client.request`.

    Raises:
        ResourceError: if the server can't be reached or refuses, with its reason.
    """
    try:
        answer = client.request(verb, path, **options)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ResourceError(
            f"{client.base_url} can't be reached ({type(error).__name__}: {error}); give the right URL "
            f"with {option}"
        ) from error
    if answer.is_success:
        return answer
    hint = f"; put a key of this server into {KEY}" if answer.status_code == 401 else ""
    raise ResourceError(f"the server refuses ({answer.status_code}): {reason(answer)}{hint}")


def reason(answer: Any) -> str:
    """Return the reason that a server gives for a refusal, from a response of httpx or requests."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer.text)[:200]


def api_url(url: str) -> str:
    """Return the URL of a server's API: as the user wrote it, with `/v1` if it has no path."""
    url = url.rstrip("/")
    try:
        path = urlsplit(url).path
    except ValueError:
        # `connect` says what is wrong with it.
        return url
    return url if path else f"{url}/v1"


def served_cards(url: str) -> dict[str, Mapping[str, Any]]:
    """Ask a server with an OpenAI-compatible API what it serves: name → description.

    Args:
        url: from `api_url`.

    Raises:
        ResourceError: if the server can't be reached, refuses this caller, or has another API.
    """
    with connect(url, "--url", SECONDS_TO_ANSWER) as client:
        answer = checked(client, "GET", "/models", option="--url")
    try:
        return {str(card["id"]): card for card in answer.json()["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            f"{url}/models answers no list of models, so it is no OpenAI-compatible server; give the right "
            "URL, such as http://127.0.0.1:8000/v1, with --url"
        ) from error


def served_card(url: str, cards: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return the description of a name that a server serves; a version, alias or rank may follow the name.

    Args:
        url: the server's, for the message.
        cards: what it serves.
        name: the name, such as `mine`, `mine@r8` or `mine@champion`.

    Raises:
        ModelError: if it does not serve the name.
    """
    # Other servers may have names with an @.
    own = name if name in cards else name.partition("@")[0]
    if own not in cards:
        raise ModelError(f"{url} does not serve '{name}'{nearest(own, cards)}")
    return cards[own]


def base_card(cards: Mapping[str, Mapping[str, Any]], card: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the description of the base that a model of a server has; of a base its own.

    vLLM names the base of an adapter as its `parent`, and describes the context only there.
    """
    return cards.get(str(card.get("parent")), card)


@dataclass(frozen=True)
class ServedVersion:
    """What a server answers with under a name. A server that is not rayft's says nothing of it."""

    content: str = ""
    """Content hash of the adapter, with `@r4` after it for a lower rank; empty for a base, or if unknown."""
    parent: str = ""
    """Content hash of the adapter that it was squeezed from; empty if none, or if unknown."""
    base: str = ""
    """Fingerprint of the base's weights; empty if unknown."""


def served_version(url: str, cards: Mapping[str, Mapping[str, Any]], name: str) -> ServedVersion:
    """Return what a server answers with under a name.

    Args:
        url: from `api_url`.
        cards: what it serves.
        name: the name, such as `mine`, `mine@3`, `mine@champion` or `mine@r8`.

    Raises:
        ModelError: if the server does not serve the name, version, alias or rank, or if it answers with two
            versions under the name.
        ResourceError: if it can't be reached, or refuses this caller.
    """
    card, asked = served_card(url, cards, name), parse_model(name)
    if "version" in card:
        card = _version(url, asked.name, asked.which, name)
    content = str(card.get("content_hash") or "")
    if asked.rank is not None and "rank" in card:
        try:
            check_prefix(asked.rank, int(card["rank"]), squeezed=bool(card.get("squeezed")))
        except SqueezeError as error:
            raise ModelError(f"{url} can't serve '{name}': {error}") from error
        if asked.rank > card["rank"]:
            raise ModelError(f"{url} can't serve '{name}': it has rank {card['rank']}")
        content += f"@r{asked.rank}" if asked.rank < card["rank"] else ""
    return ServedVersion(content, str(card.get("parent") or ""), str(card.get("base_fingerprint") or ""))


def _version(url: str, own: str, which: str | None, name: str) -> Mapping[str, Any]:
    """Return the description of a version of an adapter that a server of rayft serves."""
    with connect(url, "--url", SECONDS_TO_ANSWER) as client:
        answer = checked(client, "GET", f"/adapters/{own}", option="--url")
    versions: list[Mapping[str, Any]] = answer.json()["versions"]
    if which is None:
        if len(versions) > 1:
            both = " or ".join(f"{own}@{one['version']}" for one in versions)
            raise ModelError(f"{url} has two versions under '{name}', one is a canary: name {both}")
        return versions[0]
    known = {key: one for one in versions for key in (str(one["version"]), *one.get("aliases", ()))}
    if which not in known:
        raise ModelError(
            f"{url} does not serve '{name}'; versions and aliases of {own} are {', '.join(known)}"
        )
    return known[which]
