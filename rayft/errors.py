"""The errors that rayft raises for its users, in one tree. Each message says what to do instead.

RayftError
 x ConfigError          a file, key, value or `--set` is wrong
 x DataError            data can't be read, is too small, too long or of the wrong shape
 x ModelError           a base model can't be found or loaded
    + TargetError       target modules match nothing, or a rank is too large for a layer
 x MethodError          a method does not support what a configuration requests
 x TrainError           a run can't start or has failed
    + InterruptedRunError   a run was interrupted, and has saved a checkpoint
 x TrackingError        an MLflow server is away or refuses
 x ArtifactError        an adapter folder is missing, truncated, or holds NaN or Inf
    + BaseMismatchError an adapter was made for another base model
 x SqueezeError         a rank, energy or budget can't be met
 x RegistryError        a model, version or alias isn't in the registry
    + PromotionRefusedError  a candidate does not pass the gate
 x ReportError          a sweep can't be reported
 x ResourceError        disk space, memory, a port, a package or a device is missing
    + DiskFullError     a disk has no space for what has to be written
 x UnfinishedError      the results of a command are complete, but a step after them failed
 x RequestError         an HTTP request can't be served (has an HTTP status)
    + UnknownModelError 404
    + TooManyRequestsError 429
    + RequestTimeoutError 504
    + BadRequestError   400
        + ContextLengthError    a prompt and its answer do not fit into the model's context
    + TooLargeError     413

These errors are for mistakes of users and for circumstances; `assert` is for invariants of the code.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BadRequestError",
    "BaseMismatchError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "DiskFullError",
    "InterruptedRunError",
    "MethodError",
    "ModelError",
    "PromotionRefusedError",
    "RayftError",
    "RegistryError",
    "ReportError",
    "RequestError",
    "RequestTimeoutError",
    "ResourceError",
    "SqueezeError",
    "TargetError",
    "TooLargeError",
    "TooManyRequestsError",
    "TrackingError",
    "TrainError",
    "UnfinishedError",
    "UnknownModelError",
]


class RayftError(Exception):
    """Base class of all errors that rayft raises for its users.

    The message is always valid Unicode: lone surrogates in what it quotes are written as escapes. Ray ends
    the process of an actor that raises an error which can't be encoded, and no terminal or log can write it.

    Attributes:
        everywhere: whether all workers of a run raise the error at the same point, so that none waits for
            another.
    """

    everywhere = False

    def __init__(self, message: str = "") -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class ConfigError(RayftError):
    """A configuration file, key, value or override is wrong."""


class DataError(RayftError):
    """Data can't be read, is too small, too long or of the wrong shape."""


class ModelError(RayftError):
    """A base model can't be found or loaded."""


class TargetError(ModelError):
    """Target modules match nothing, or a rank is too large for a layer."""


class MethodError(RayftError):
    """A fine-tuning method does not support what a configuration requests."""


class TrainError(RayftError):
    """A run can't start or has failed."""


class InterruptedRunError(TrainError):
    """A run was interrupted between two steps, and has saved a checkpoint to continue from.

    Attributes:
        step: the last step that was trained, after which the checkpoint was saved.
    """

    def __init__(self, message: str = "", step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class TrackingError(RayftError):
    """A tracking server is away or refuses."""


class ArtifactError(RayftError):
    """An adapter folder is missing, truncated, or holds NaN or Inf."""


class BaseMismatchError(ArtifactError):
    """An adapter was made for another base model."""


class SqueezeError(RayftError):
    """A rank, energy or budget can't be met."""


class RegistryError(RayftError):
    """A model, version or alias isn't in the registry."""


class PromotionRefusedError(RegistryError):
    """A candidate does not pass the promotion gate."""


class ReportError(RayftError):
    """A sweep can't be reported."""


class ResourceError(RayftError):
    """Disk space, memory, a port, a package or a device is missing."""


class DiskFullError(ResourceError):
    """A disk has no space for what has to be written. Nothing that was saved before is lost."""


class UnfinishedError(RayftError):
    """The results of a command are complete, but a step after them (tracking, registering) failed."""


class RequestError(RayftError):
    """An HTTP request can't be served.

    Attributes:
        status: the HTTP status code of the answer.
        code: OpenAI's machine-readable error code.
        param: the field of the request that is wrong, or None.
    """

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        """Keep `param` when the error crosses a process boundary."""
        return (_rebuild, (type(self), str(self), self.param))


def _rebuild(cls: type[RequestError], message: str, param: str | None) -> RequestError:
    return cls(message, param=param)


class UnknownModelError(RequestError):
    """The server does not serve the `model` of a request."""

    status = 404
    code = "model_not_found"


class TooManyRequestsError(RequestError):
    """The queue of waiting requests is full."""

    status = 429
    code = "rate_limit_exceeded"


class RequestTimeoutError(RequestError):
    """A request took longer than the server's time limit."""

    status = 504
    code = "timeout"


class BadRequestError(RequestError):
    """A request is malformed, or asks for something that is not supported."""

    status = 400
    code = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """A prompt and its answer together are longer than the model's context.

    Programs that shorten a conversation when it has become too long recognise this code.
    """

    code = "context_length_exceeded"


class TooLargeError(RequestError):
    """The body of a request is larger than the server's limit."""

    status = 413
    code = "request_too_large"
