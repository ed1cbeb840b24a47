from __future__ import annotations

import pytest

from rayft.errors import BadRequestError
from rayft.serving.proxy import DECODED, check_headers


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("spelt", [str.lower, str.upper, lambda name: name.replace("-", "_")])
def test_headers_that_the_proxy_decodes_must_be_utf_8(name: str, spelt: object) -> None:
    assert callable(spelt)
    with pytest.raises(BadRequestError, match=name):
        check_headers([(b"host", b"\xff"), (spelt(name).encode(), b"a\xff")])


@pytest.mark.parametrize("seconds", [b"", b"soon", b"nan", b"inf", b"1e300", b"1000001"])
def test_a_time_limit_is_a_number_below_the_largest(seconds: bytes) -> None:
    with pytest.raises(BadRequestError, match="x-request-timeout-seconds"):
        check_headers([(b"x-request-timeout-seconds", seconds)])


def test_other_headers_may_have_any_bytes() -> None:
    check_headers(
        [(b"user-agent", b"\xff"), (b"x-request-id", "ü".encode()), (b"x-request-timeout-seconds", b"2.5")]
    )
