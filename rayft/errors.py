"""Every error that a user can cause, in one tree; each message says what to do instead.

RayftError
 x ConfigError          a file, key, value or `--set` that is wrong
 x DataError            data that can't be read, is too small, too long or of the wrong shape
 x ModelError           a base model that can't be found or loaded
    + TargetError       target modules that match nothing, or a rank that a layer can't hold
 x MethodError          a method that can't do what is asked of it
 x TrainError           a run that can't start or has failed
    + InterruptedRunError   a run that was told to end, and has saved a checkpoint
 x TrackingError        an MLflow server that is away or refuses
 x ArtifactError        an adapter folder that is missing, truncated, or holds NaN or Inf
    + BaseMismatchError an adapter made for another base model
 x SqueezeError         a rank, energy or budget that can't be met
 x RegistryError        a model, version or alias that isn't in the registry
    + PromotionRefusedError  a candidate that does not pass the gate
 x ReportError          a sweep that can't be reported
 x ResourceError        no disk, memory or port; a package or device that is missing
    + DiskFullError     a disk without space for what has to be written
 x UnfinishedError      a command whose results are there, and that left something after them undone
 x RequestError         an HTTP request that can't be served (has an HTTP status)
    + UnknownModelError 404
    + TooManyRequestsError 429
    + RequestTimeoutError 504
    + BadRequestError   400
    + TooLargeError     413

`assert` is for invariants of the code; these are for mistakes and circumstances.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BadRequestError",
    "BaseMismatchError",
    "ConfigError",
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
    """Base of all errors that rayft raises for its users.

    The message is valid Unicode whatever it quotes: lone surrogates are written as escapes. Ray ends the
    process of an actor that raises an error which can't be encoded, and no terminal or log can write it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class ConfigError(RayftError):
    """A configuration file, key, value or override that is wrong."""


class DataError(RayftError):
    """Data that can't be read, is too small, too long or of the wrong shape."""


class ModelError(RayftError):
    """A base model that can't be found or loaded."""


class TargetError(ModelError):
    """Target modules that match nothing, or a rank that a layer can't hold."""


class MethodError(RayftError):
    """A fine-tuning method that can't do what is asked of it."""


class TrainError(RayftError):
    """A run that can't start or has failed."""


class InterruptedRunError(TrainError):
    """A run that was told to end between two steps, and has saved a checkpoint to continue from.

    Attributes:
        step: the last step that was trained, which the checkpoint is of.
    """

    def __init__(self, message: str = "", step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class TrackingError(RayftError):
    """A tracking server that is away or refuses."""


class ArtifactError(RayftError):
    """An adapter folder that is missing, truncated, or holds NaN or Inf."""


class BaseMismatchError(ArtifactError):
    """An adapter that was made for another base model."""


class SqueezeError(RayftError):
    """A rank, energy or budget that can't be met."""


class RegistryError(RayftError):
    """A model, version or alias that isn't in the registry."""


class PromotionRefusedError(RegistryError):
    """A candidate that does not pass the promotion gate."""


class ReportError(RayftError):
    """A sweep that can't be reported."""


class ResourceError(RayftError):
    """No disk, memory or port, or a package or device that is missing."""


class DiskFullError(ResourceError):
    """A disk without space for what has to be written; nothing that was saved is lost."""


class UnfinishedError(RayftError):
    """A command's results are there, and something after them (tracking, registering) is left to be done."""


class RequestError(RayftError):
    """An HTTP request that can't be served.

    Attributes:
        status: the HTTP status code of the answer.
        code: OpenAI's machine-readable error code.
        param: the request field at fault, if there is one.
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
    """The `model` of a request is not served here."""

    status = 404
    code = "model_not_found"


class TooManyRequestsError(RequestError):
    """As many requests wait as may."""

    status = 429
    code = "rate_limit_exceeded"


class RequestTimeoutError(RequestError):
    """A request that took longer than requests may."""

    status = 504
    code = "timeout"


class BadRequestError(RequestError):
    """A request that is malformed or asks for what can't be done."""

    status = 400
    code = "invalid_request_error"


class TooLargeError(RequestError):
    """A request whose body is larger than bodies may be."""

    status = 413
    code = "request_too_large"
