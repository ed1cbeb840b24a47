from __future__ import annotations

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from starlette.responses import JSONResponse

from rayft.errors import (
    BadRequestError,
    ContextLengthError,
    ResourceError,
    TooManyRequestsError,
    UnknownModelError,
)
from rayft.serving.http.errors import describe_error


@pytest.mark.parametrize(
    ("error", "status", "code", "word"),
    [
        (BadRequestError("no", param="n"), 400, "invalid_request_error", "no"),
        (ContextLengthError("long", param="prompt"), 400, "context_length_exceeded", "long"),
        (UnknownModelError("who", param="model"), 404, "model_not_found", "who"),
        (TooManyRequestsError("later"), 429, "rate_limit_exceeded", "later"),
        (ResourceError("full"), 503, "unavailable", "full"),
        (ActorDiedError(), 503, "unavailable", "try again"),
        (ActorUnavailableError("away", None), 503, "unavailable", "try again"),
        (ValueError("a secret"), 500, "internal_error", "ValueError inside the server"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_an_error_has_a_status_in_whichever_process_it_was_raised(
    error: Exception, status: int, code: str, word: str, remote: bool
) -> None:
    raised = RayTaskError("generate", "traceback", error) if remote else error
    found, body = describe_error(raised)
    assert (found, body["error"]["code"]) == (status, code)
    assert word in body["error"]["message"]
    assert "secret" not in str(body)


@pytest.mark.parametrize(
    "error", [BadRequestError("no \ud83d"), ResourceError("\udcff/a"), UnknownModelError("a\0")]
)
def test_an_error_with_any_text_can_be_sent_and_pickled(error: Exception) -> None:
    status, body = describe_error(RayTaskError("generate", "traceback", error))
    assert JSONResponse(body, status_code=status).body.decode()
    assert cloudpickle.loads(cloudpickle.dumps(error)).args == error.args
    assert str(error).encode()


def test_a_long_message_is_truncated() -> None:
    _, body = describe_error(UnknownModelError("x" * 10**6))
    assert len(body["error"]["message"]) < 5000
