"""Each operation of `/openapi.json`, asked with generated requests, good and bad, on a running server."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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
from tests.integration.serving import ADMIN, HEADERS, Base, description, replica_stats, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]


MODELS = ("base", "still", "squeezed@r2", "turning@1", "nobody")
NAMES = ("still", "turning", "nobody")
LONGEST = 128
"""Letters of a name."""
SOURCES = ("still", "squeezed", "a", "missing")
"""Folders below the server's root."""


def document() -> dict[str, Any]:
    """The server's description of itself, with what this one serves: chance would never hit it."""
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
"""Operation → how many requests were answered well, and not."""


@dataclass(frozen=True)
class Server:
    url: str
    root: Path
    replica: int

    def make_canary(self, name: str) -> None:
        """Serve two versions under a name, if it has not got them."""
        for source, weight in (("still", 1), ("a", 0.5)):
            body = {"name": name, "source": str(self.root / source), "weight": weight}
            httpx.post(f"{self.url}/v1/adapters", json=body, headers=HEADERS).raise_for_status()


@pytest.fixture(scope="module")
def server(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = Base.read(tiny_folder, tmp_path_factory.mktemp("roots"))
    made = {"still": base.adapter("still"), "squeezed": base.squeezed("squeezed"), "a": base.adapter("a", 2)}
    folders = {name: base.save(name, artifact) for name, artifact in made.items()}
    served = {name: folders[name] for name in ("still", "squeezed")}
    with serving(base, adapters=served, keys=(ADMIN,), max_new_tokens=8) as url:
        yield Server(url, base.root, replica_stats()[0]["pid"])


def aim(case: schemathesis.Case, server: Server) -> None:
    """Put what is there in place of generated names and sources; what is wrong stays wrong."""
    on_adapter = "/v1/adapters/" in case.path
    names = case.path_parameters if on_adapter else case.body
    name = names.get("name") if isinstance(names, dict) else None
    if isinstance(name, str) and re.fullmatch(NAME, name) and len(name) <= LONGEST:
        names["name"] = NAMES[zlib.crc32(name.encode()) % len(NAMES)]
        if on_adapter and names["name"] == "turning":
            server.make_canary("turning")
    if isinstance(case.body, dict) and case.body.get("source") in SOURCES:
        case.body["source"] = str(server.root / case.body["source"])


def test_the_server_describes_itself(server: Server) -> None:
    assert httpx.get(f"{server.url}/openapi.json").json() == description()


def promise(path: str, verb: str) -> Any:
    """Make the test of one operation. Made by one function for all, they would all have one name."""

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
            # The document doesn't say how fields depend on one another, nor what is served just now.
            excluded_checks=[positive_data_acceptance],
        )
        good.setdefault(case.operation.label, Counter())[answer.status_code < 300] += 1

    return keeps_what_it_promises


for _path, _verbs in description()["paths"].items():
    for _verb in _verbs:
        globals()[f"test_{_verb}_{re.sub(r'[^a-z0-9]+', '_', _path).strip('_')}"] = promise(_path, _verb)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """List the places of all values in a body."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """Copy a value with another one at a place in it."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


# What schemathesis leaves out by itself: it generates no text that can't be encoded.
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
def test_a_request_that_is_spoilt_at_any_place_is_answered_or_refused(
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
def test_any_name_in_a_path_is_found_or_not(server: Server, name: str, verb: str) -> None:
    encoded = quote(name.encode("utf-8", "surrogatepass"), safe="")
    for path in (f"/v1/models/{encoded}", f"/v1/adapters/{encoded}", f"/v1/adapters/{encoded}/promote"):
        answer = httpx.request(verb, f"{server.url}{path}", headers=HEADERS)
        assert 300 <= answer.status_code < 500
        if answer.status_code >= 400:
            TypeAdapter(ErrorAnswer).validate_python(answer.json(), strict=True)


def test_no_request_ended_a_replica(server: Server) -> None:
    assert [one["pid"] for one in replica_stats()] == [server.replica]


def test_each_operation_was_answered_well_by_some_of_them() -> None:
    if len(good) < sum(map(len, description()["paths"].values())):
        pytest.skip("not all operations were asked")
    assert {label for label, found in good.items() if not found[True]} == set()
