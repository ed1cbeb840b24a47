"""Send requests to one name, and count which version of the adapter answered: `python ask.py [URL]`."""

from __future__ import annotations

import sys
from collections import Counter

import httpx

REQUESTS = 40
"""How many requests to send."""


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Print how many requests each version answered."""
    body = {
        "model": "dates",
        "messages": [{"role": "user", "content": "Write this date as YYYY-MM-DD: May 7, 1999"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    found: Counter[tuple[str, str]] = Counter()
    with httpx.Client(base_url=url, timeout=120) as client:
        for _ in range(REQUESTS):
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            text = answer["choices"][0]["message"]["content"].strip()
            found[answer["system_fingerprint"], text] += 1
    for (version, text), count in found.most_common():
        print(f"{count} of {REQUESTS} requests: version {version[:12]} answered {text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
