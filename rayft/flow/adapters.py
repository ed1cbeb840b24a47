"""`rayft adapters`: list and change the adapters of a running server, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx
from rich.table import Table

from rayft.errors import ResourceError
from rayft.flow.http import checked, connect
from rayft.flow.options import refuse_unused
from rayft.report.text import human_bytes

__all__ = ["Action", "adapters_table", "call"]

Action = Literal["list", "load", "unload", "promote", "rollback"]
OPTION = "--server"
"""How a user sets the server's URL."""
SECONDS_TO_ANSWER = 10.0
"""How long a server may take to list its adapters. The list shows whether it is a server of rayft."""
SECONDS_TO_CHANGE = 600.0
"""How long a server may take to change its adapters, since it may have to download one."""


def call(
    server: str,
    action: Action,
    name: str | None = None,
    source: str | None = None,
    *,
    weight: float | None = None,
    pinned: bool = False,
) -> list[dict[str, Any]]:
    """Perform an action on a server, and return its adapters after that, as the server describes them.

    Args:
        server: its URL.
        action: what to do.
        name: the adapter's served name; needed by all actions but `list`.
        source: where `load` finds the adapter: a folder, `models:/…` or a URL.
        weight: share of the name's traffic that a loaded adapter gets, 1 by default; below it is a canary.
        pinned: whether a loaded adapter stays on the device.

    Raises:
        ConfigError: for an option that the action does not take.
        ResourceError: if the server can't be reached or refuses, with its reason.
    """
    if action == "list":
        refuse_unused({"the name": name}, "all adapters are listed")
    if action != "load":
        options = {"the source": source, "--weight": weight, "--pinned": pinned}
        refuse_unused(options, f"it is for load, and this is {action}")
    if action != "list" and name is None:
        raise ResourceError(f"the name is missing: rayft adapters {action} NAME")
    if action == "load" and source is None:
        raise ResourceError("the source is missing: rayft adapters load NAME SOURCE")
    # A server has another working directory, and takes only absolute paths.
    place = str(Path(source).absolute()) if source is not None and Path(source).is_dir() else source
    with connect(server, OPTION, SECONDS_TO_CHANGE) as client:
        found = _list(client)
        if action == "list":
            return found
        path = f"/v1/adapters/{quote(name or '', safe='')}"
        if action == "load":
            body = {
                "name": name,
                "source": place,
                "weight": 1.0 if weight is None else weight,
                "pinned": pinned,
            }
            checked(client, "POST", "/v1/adapters", option=OPTION, json=body)
        elif action == "unload":
            checked(client, "DELETE", path, option=OPTION)
        else:
            checked(client, "POST", f"{path}/{action}", option=OPTION)
        return _list(client)


def _list(client: httpx.Client) -> list[dict[str, Any]]:
    answer = checked(client, "GET", "/v1/adapters", option=OPTION, timeout=SECONDS_TO_ANSWER)
    try:
        return list(answer.json()["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            f"{client.base_url} is not a server of rayft; give the right URL with --server"
        ) from error


def adapters_table(found: list[dict[str, Any]]) -> Table:
    """Return a table with a line for each version. A narrow terminal shortens names, never numbers."""
    table = Table("adapter", "method", box=None, pad_edge=False)
    for header in ("rank", "size", "traffic", "requests", "tokens", "errors"):
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
