"""The page at `/` in a real browser: who opens it sees adapters, asks two of them, and reads both answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rayft.serving.http.auth import KeyConfig
from tests.integration.browser import Page, browser, chromium
from tests.integration.serving import Base, serving

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="there is no chromium here (Debian: apt install chromium)"),
]

ADMIN, USER = "the-key-of-the-admin", "the-key-of-a-user"
QUESTION = "Where is Paris?"
ROWS = "[...document.querySelectorAll('#adapters tbody tr')].map((row) => row.cells[0].textContent)"
OPTIONS = "[...document.querySelector('#left').options].map((option) => option.value)"
ANSWERED = """(() => {
  const boxes = [...document.querySelectorAll('.answer')];
  const done = !document.querySelector('#send').disabled
    && boxes.every((box) => !['', '…'].includes(box.querySelector('.small').textContent));
  const texts = (box) => ['h3', 'pre', '.small'].map((part) => box.querySelector(part).textContent);
  return done && boxes.map(texts);
})()"""


@pytest.fixture(scope="module")
def url(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = Base.read(tiny_folder, tmp_path_factory.mktemp("roots"))
    made = {"support": base.adapter("support", 8), "legal": base.squeezed("legal", 6)}
    keys = tuple(
        KeyConfig(name=role, role=role, sha256=hashlib.sha256(key.encode()).hexdigest(), adapters=adapters)
        for role, key, adapters in (("admin", ADMIN, None), ("user", USER, ("legal", "base")))
    )
    folders = {name: base.save(name, artifact) for name, artifact in made.items()}
    with serving(base, adapters=folders, keys=keys) as found:
        yield found


@pytest.fixture
def page(url: str, tmp_path: Path) -> Iterator[Page]:
    binary = chromium()
    assert binary is not None
    with browser(binary, tmp_path) as opened:
        opened.open(f"{url}/")
        yield opened
        assert not opened.errors


def use_key(page: Page, key: str) -> None:
    """Type a key as a person does, and leave the field."""
    page.wait("document.querySelector('#access').open")
    page.type("#key", key)
    page.leave()


def answer(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
    headers = {"Authorization": f"Bearer {ADMIN}"}
    made = httpx.post(
        f"{url}/v1/chat/completions", json={**body, "temperature": 0}, headers=headers, timeout=60
    )
    return str(made.json()["choices"][0]["message"]["content"])


def test_without_a_key_the_page_asks_for_one(page: Page) -> None:
    assert "needs a key" in page.wait("document.querySelector('#about.bad')?.textContent")
    assert page.run("document.querySelector('#adapters').hidden")
    use_key(page, "not the right key at all")
    assert "needs a key" in page.wait("document.querySelector('#about.bad')?.textContent")


def test_two_adapters_answer_side_by_side(page: Page, url: str) -> None:
    use_key(page, ADMIN)
    assert page.wait(f"{ROWS}.length === 2 && {ROWS}") == ["support", "legal"]
    assert page.run(OPTIONS) == ["base", "support", "legal", "legal@r3", "legal@r1"]
    page.run("document.querySelector('#left').value = 'support'")
    page.run("document.querySelector('#right').value = 'legal@r3'")
    page.type("#question", QUESTION)
    page.type("#tokens", "12")
    page.click("#send")
    left, right = page.wait(ANSWERED)
    assert [left[0], right[0]] == ["support", "legal@r3"]
    assert [left[1], right[1]] == [answer(url, "support"), answer(url, "legal@r3")]
    assert left[1] != right[1]
    assert left[2].startswith("12 tokens in ")
    boxes = page.run(
        "[...document.querySelectorAll('.answer')].map((box) => box.getBoundingClientRect())"
        ".map((place) => [place.x, place.y])"
    )
    assert boxes[0][1] == boxes[1][1]
    assert boxes[0][0] < boxes[1][0]
    # The table counts what was asked.
    page.wait("document.querySelector('#adapters tbody tr').cells[7].textContent !== '0'")


def test_a_users_key_shows_its_adapters_alone(page: Page) -> None:
    use_key(page, USER)
    assert page.wait(f"{ROWS}.length && {ROWS}") == ["legal"]
    assert page.run(OPTIONS) == ["base", "legal", "legal@r3", "legal@r1"]
    assert "support" not in page.run("document.body.innerText")


@pytest.mark.parametrize("width", [390, 820, 1400])
def test_nothing_is_wider_than_the_window(page: Page, url: str, width: int, tmp_path: Path) -> None:
    page.open(f"{url}/", width)
    use_key(page, ADMIN)
    page.wait(f"{ROWS}.length === 2")
    page.type("#tokens", "12")
    page.click("#send")
    page.wait(ANSWERED)
    page.screenshot(tmp_path / "page.png")
    assert page.run("document.documentElement.scrollWidth") <= width
