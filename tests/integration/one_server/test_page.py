"""The page at `/` in a real browser: it shows the adapters, and the answers of two of them side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.browser import Page, browser, chromium
from tests.integration.one_server.server import USER_KEY, Server
from tests.integration.serving import HEADERS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="there is no chromium here (Debian: apt install chromium)"),
]

ADMIN_KEY = HEADERS["Authorization"].removeprefix("Bearer ")
ADAPTERS = ["small", "middle", "large", "picks", "squeezed", "still"]
QUESTION = "Where is Paris?"
ROWS = "[...document.querySelectorAll('#adapters tbody tr')].map((row) => row.cells[0].textContent)"
REQUESTS = "document.querySelector('#adapters tbody tr').cells[7].textContent"
OPTIONS = "[...document.querySelector('#left').options].map((option) => option.value)"
ANSWERED = """(() => {
  const boxes = [...document.querySelectorAll('.answer')];
  const done = !document.querySelector('#send').disabled
    && boxes.every((box) => !['', '…'].includes(box.querySelector('.small').textContent));
  const texts = (box) => ['h3', 'pre', '.small'].map((part) => box.querySelector(part).textContent);
  return done && boxes.map(texts);
})()"""


@pytest.fixture(scope="module")
def url(restored: Server) -> str:
    return restored.url


@pytest.fixture
def page(url: str, tmp_path: Path) -> Iterator[Page]:
    binary = chromium()
    assert binary is not None
    with browser(binary, tmp_path) as opened:
        opened.open(f"{url}/")
        yield opened
        assert not opened.errors


def use_key(page: Page, key: str) -> None:
    """Type a key and leave the field, as a person does."""
    page.wait("document.querySelector('#access').open")
    page.type("#key", key)
    page.leave()


def answer(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
    made = httpx.post(
        f"{url}/v1/chat/completions", json={**body, "temperature": 0}, headers=HEADERS, timeout=60
    )
    return str(made.json()["choices"][0]["message"]["content"])


def test_without_a_key_the_page_asks_for_one(page: Page) -> None:
    assert "needs a key" in page.wait("document.querySelector('#about.bad')?.textContent")
    assert page.run("document.querySelector('#adapters').hidden")
    use_key(page, "not the right key at all")
    assert "needs a key" in page.wait("document.querySelector('#about.bad')?.textContent")


def test_two_adapters_answer_side_by_side(page: Page, url: str) -> None:
    use_key(page, ADMIN_KEY)
    assert page.wait(f"{ROWS}.length && {ROWS}") == ADAPTERS
    assert page.run(OPTIONS) == ["base", *ADAPTERS, "squeezed@r3", "squeezed@r1"]
    page.run("document.querySelector('#left').value = 'small'")
    page.run("document.querySelector('#right').value = 'squeezed@r3'")
    page.type("#question", QUESTION)
    page.type("#tokens", "12")
    before = page.run(REQUESTS)
    page.click("#send")
    left, right = page.wait(ANSWERED)
    assert [left[0], right[0]] == ["small", "squeezed@r3"]
    assert [left[1], right[1]] == [answer(url, "small"), answer(url, "squeezed@r3")]
    assert left[1] != right[1]
    assert left[2].startswith("12 tokens in ")
    boxes = page.run(
        "[...document.querySelectorAll('.answer')].map((box) => box.getBoundingClientRect())"
        ".map((place) => [place.x, place.y])"
    )
    assert boxes[0][1] == boxes[1][1]
    assert boxes[0][0] < boxes[1][0]
    page.wait(f"{REQUESTS} !== {json.dumps(before)}")


def test_with_a_users_key_the_page_shows_only_the_users_adapters(page: Page) -> None:
    use_key(page, USER_KEY)
    assert page.wait(f"{ROWS}.length && {ROWS}") == ["squeezed"]
    assert page.run(OPTIONS) == ["base", "squeezed", "squeezed@r3", "squeezed@r1"]
    assert "small" not in page.run("document.body.innerText")


@pytest.mark.parametrize("width", [390, 820, 1400])
def test_nothing_is_wider_than_the_window(page: Page, url: str, width: int, tmp_path: Path) -> None:
    page.open(f"{url}/", width)
    use_key(page, ADMIN_KEY)
    page.wait(f"{ROWS}.length === {len(ADAPTERS)}")
    page.type("#tokens", "12")
    page.click("#send")
    page.wait(ANSWERED)
    page.screenshot(tmp_path / "page.png")
    assert page.run("document.documentElement.scrollWidth") <= width
