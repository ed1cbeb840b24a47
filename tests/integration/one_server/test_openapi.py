"""Generated requests, valid and invalid, for each operation of `/openapi.json`, to a running server."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from schemathesis.checks import positive_data_acceptance
from schemathesis.config import SchemathesisConfig

from rayft.serving.http.responses import ErrorAnswer
from rayft.serving.messages import NAME
from tests.integration.one_server.server import Server
from tests.integration.serving import HEADERS, description, replica_stats

pytestmark = [pytest.mark.ray, pytest.mark.slow]


MODELS = ("base", "still", "squeezed@r2", "turning@1", "nobody")
NAMES = ("still", "turning", "nobody")
LONGEST = 128
"""Most characters of a name."""
MOST_TOKENS = 8
"""Length of answers, which would otherwise take most of the time."""
SOURCES = ("still", "squeezed", "a", "missing")
"""Folders below the server's root."""


def document() -> dict[str, Any]:
    """Return the server's description, restricted to names that it serves: chance would never hit one."""
    found = description()
    bodies = found["components"]["schemas"]
    for body in ("ChatRequest", "CompletionRequest"):
        bodies[body]["properties"]["model"] = {"enum": MODELS}
    bodies["CompletionRequest"]["properties"]["prompt"]["oneOf"][0]["minLength"] = 1
    bodies["LoadRequest"]["properties"]["source"] = {"enum": SOURCES}
    for operation in found["paths"]["/v1/models/{name}"].values():
        operation["parameters"][0]["schema"] = {"enum": MODELS}
    return json.loads(json.dumps(found))


unsaved = SchemathesisConfig.from_dict({"cache": {"enabled": False}})
schema = schemathesis.openapi.from_dict(document(), config=unsaved)


good: dict[str, Counter[bool]] = {}
"""Operation → number of requests that succeeded (True) and that were refused (False)."""


@pytest.fixture(scope="module")
def server(restored: Server) -> Server:
    restored.base.save("a", restored.base.adapter("a", 2))
    return restored


def make_canary(server: Server, name: str) -> None:
    """Serve two versions under a name, unless it has them already."""
    for source, weight in (("still", 1), ("a", 0.5)):
        body = {"name": name, "source": str(server.base.root / source), "weight": weight}
        server.call("POST", "/v1/adapters", json=body).raise_for_status()


def aim(case: schemathesis.Case, server: Server) -> None:
    """Replace valid generated names and sources by existing ones, and keep answers short."""
    on_adapter = "/v1/adapters/" in case.path
    names = case.path_parameters if on_adapter else case.body
    name = names.get("name") if isinstance(names, dict) else None
    if isinstance(name, str) and re.fullmatch(NAME, name) and len(name) <= LONGEST:
        names["name"] = NAMES[zlib.crc32(name.encode()) % len(NAMES)]
        if on_adapter and names["name"] == "turning":
            make_canary(server, "turning")
    if isinstance(case.body, dict) and {"messages", "prompt"} & case.body.keys():
        for limit in ("max_tokens", "max_completion_tokens"):
            if type(case.body.get(limit)) is int and case.body[limit] > MOST_TOKENS:
                case.body[limit] = MOST_TOKENS
        if case.body.get("max_tokens") is None:
            case.body["max_tokens"] = MOST_TOKENS
    if isinstance(case.body, dict) and case.body.get("source") in SOURCES:
        case.body["source"] = str(server.base.root / case.body["source"])


def test_the_server_publishes_its_description(server: Server) -> None:
    assert httpx.get(f"{server.url}/openapi.json").json() == description()


def promise(path: str, verb: str) -> Any:
    """Return the test of one operation, so that the test of each operation has a name of its own."""

    @schema.include(path=path, method=verb.upper()).parametrize()
    @settings(
        max_examples=8,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def keeps_what_it_promises(case: schemathesis.Case, server: Server) -> None:
        aim(case, server)
        answer = case.call_and_validate(
            base_url=server.url,
            headers=HEADERS,
            # The document can't say how fields depend on one another, nor what is being served.
            excluded_checks=[positive_data_acceptance],
        )
        good.setdefault(case.operation.label, Counter())[answer.status_code < 300] += 1

    return keeps_what_it_promises


for _path, _verbs in description()["paths"].items():
    for _verb in _verbs:
        globals()[f"test_{_verb}_{re.sub(r'[^a-z0-9]+', '_', _path).strip('_')}"] = promise(_path, _verb)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all values in a body."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """Return a copy of a value in which another value is at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


# Schemathesis does not generate text that can't be encoded.
halves = st.text(st.characters(categories=["Cs"]), min_size=1, max_size=3)
odd = st.one_of(
    halves,
    st.builds("a{}\0".format, halves),
    st.text(st.characters(categories=["Cc", "Cf", "Co", "Cn"]), max_size=5),
    st.integers() | st.integers(10**20, 10**22),
    st.floats(),
    st.booleans() | st.none(),
    st.dictionaries(halves | st.text(), st.none(), max_size=2),
    st.integers(1, 3000).map(lambda depth: json.loads("[" * min(depth, 500) + "]" * min(depth, 500))),
    st.integers(1, 2000).map(lambda size: "x" * 100 * size),
    st.integers(1, 2000).map(lambda size: [0] * size),
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/adapters"])
@settings(
    max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_a_request_with_a_wrong_value_at_any_path_is_answered_or_refused(
    server: Server, path: str, data: st.DataObject
) -> None:
    case = data.draw(schema[path]["POST"].as_strategy())
    aim(case, server)
    body: Any = case.body if isinstance(case.body, dict) else {}
    place = data.draw(st.sampled_from([*places(body)]))
    spoilt = put(body, place, data.draw(odd))
    if isinstance(spoilt, dict) and data.draw(st.booleans()):
        spoilt[data.draw(halves | st.text())] = data.draw(odd)
    headers = {**HEADERS, "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}{path}", content=json.dumps(spoilt), headers=headers, timeout=60)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        TypeAdapter(ErrorAnswer).validate_python(answer.json(), strict=True)


@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(
    name=st.text(st.characters(codec=None), min_size=1, max_size=20), verb=st.sampled_from(["GET", "DELETE"])
)
def test_a_path_with_any_name_is_found_or_not(server: Server, name: str, verb: str) -> None:
    encoded = quote(name.encode("utf-8", "surrogatepass"), safe="")
    for path in (f"/v1/models/{encoded}", f"/v1/adapters/{encoded}", f"/v1/adapters/{encoded}/promote"):
        answer = httpx.request(verb, f"{server.url}{path}", headers=HEADERS)
        assert 300 <= answer.status_code < 500
        if answer.status_code >= 400:
            TypeAdapter(ErrorAnswer).validate_python(answer.json(), strict=True)


def test_the_replica_is_still_the_same(server: Server) -> None:
    assert [one["pid"] for one in replica_stats()] == [server.replica]


def test_each_operation_succeeded_at_least_once() -> None:
    if len(good) < sum(map(len, description()["paths"].values())):
        pytest.skip("not all operations were asked")
    assert {label for label, found in good.items() if not found[True]} == set()
