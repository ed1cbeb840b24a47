"""`rayft adapters`: see and change what a running server serves, over HTTP."""

from __future__ import annotations

import os
from typing import Any, Literal
from urllib.parse import quote

import httpx
from rich.table import Table

from rayft.errors import ResourceError
from rayft.report.text import human_bytes

__all__ = ["Action", "adapters_table", "call"]

Action = Literal["list", "load", "unload", "promote", "rollback"]
KEY = "RAYFT_KEY"
"""Environment variable with the caller's key."""
SECONDS_TO_ANSWER = 10.0
"""How long a server may take to say what it serves, which tells whether there is one."""
SECONDS_TO_CHANGE = 600.0
"""How long it may take to change that: an adapter may have to be downloaded."""


def call(
    server: str,
    action: Action,
    name: str | None = None,
    source: str | None = None,
    *,
    weight: float = 1.0,
    pinned: bool = False,
) -> list[dict[str, Any]]:
    """Do one thing, and give what is served then.

    Raises:
        ResourceError: if the server can't be reached or refuses, with its reason.
    """
    if action != "list" and name is None:
        raise ResourceError(f"say which: rayft adapters {action} NAME")
    if action == "load" and source is None:
        raise ResourceError("say where it is: rayft adapters load NAME SOURCE")
    try:
        server.encode()
        client = httpx.Client(base_url=server.rstrip("/"), headers=_headers(), timeout=SECONDS_TO_CHANGE)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ResourceError(f"--server {server} is no URL ({error}); write http://host:port") from error
    with client:
        found = _list(client)
        if action == "list":
            return found
        path = f"/v1/adapters/{quote(name or '', safe='')}"
        if action == "load":
            body = {"name": name, "source": source, "weight": weight, "pinned": pinned}
            _checked(client, "POST", "/v1/adapters", json=body)
        elif action == "unload":
            _checked(client, "DELETE", path)
        else:
            _checked(client, "POST", f"{path}/{action}")
        return _list(client)


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    if key is None:
        return {}
    if not key.isascii() or not key.isprintable():
        raise ResourceError(f"the key in {KEY} has characters that no header can carry; set it again")
    return {"Authorization": f"Bearer {key}"}


def _list(client: httpx.Client) -> list[dict[str, Any]]:
    answer = _checked(client, "GET", "/v1/adapters", timeout=SECONDS_TO_ANSWER)
    try:
        return list(answer.json()["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ResourceError(f"{client.base_url} is no server of rayft; give its --server") from error


def _checked(client: httpx.Client, verb: str, path: str, **options: Any) -> httpx.Response:
    try:
        answer = client.request(verb, path, **options)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ResourceError(
            f"{client.base_url} can't be reached ({type(error).__name__}: {error}); give its --server"
        ) from error
    if answer.is_success:
        return answer
    try:
        reason = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = answer.text[:200]
    hint = f"; put a key of this server into {KEY}" if answer.status_code == 401 else ""
    raise ResourceError(f"the server refuses ({answer.status_code}): {reason}{hint}")


def adapters_table(found: list[dict[str, Any]]) -> Table:
    """Show what is served, a version a line; numbers are never cut, names may be."""
    table = Table("adapter", "method", box=None, pad_edge=False)
    for header in ("rank", "size", "traffic", "asked", "tokens", "errors"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    for one in found:
        did = one["traffic"]
        aliases = f" ({', '.join(one['aliases'])})" if one.get("aliases") else ""
        table.add_row(
            f"{one['id']}@{one['version']}{aliases}",
            one.get("method", ""),
            str(one.get("rank", "")),
            human_bytes(one["bytes"]) if "bytes" in one else "",
            f"{100 * one['weight']:.0f} %",
            *(f"{did[what]:.0f}" for what in ("requests", "tokens", "errors")),
            ", ".join(sorted(set(one["tiers"]))) + (", pinned" if one.get("pinned") else ""),
        )
    return table
