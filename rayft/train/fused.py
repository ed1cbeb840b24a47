"""Fuse the base of a session on a GPU, and check that its loss and gradient stay what they were.

`rayft.models.fuse` says what is fused. Compiled operations round otherwise than single ones do, and compilers
have errors. So each session computes some tokens of its data both ways before it trusts them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rayft.data.pack import AnyEncoded, Batch
from rayft.errors import ConfigError
from rayft.evaluate.loss import batch_loss
from rayft.models.fuse import fuse, unfuse
from rayft.numerics import relative_error, tolerance
from rayft.train.run import RunConfig
from rayft.train.worker import Worker

__all__ = ["fuse_base", "fuse_checked"]

logger = logging.getLogger(__name__)

TOKENS = 512
"""Tokens that are computed both ways."""
PRODUCTS = 8
"""Products after one another in a layer, each of which rounds."""
WRONG = 0.5
"""A gradient that differs by this share of its length is wrong, however many layers round."""


def fuse_base(run: RunConfig, model: Any, train: Sequence[AnyEncoded], worker: Worker) -> None:
    """Fuse a run's base if its settings want it, on a GPU and not under ZeRO-3 (all workers call it).

    Args:
        run: settled.
        model: its base without adapters.
        train: examples to try it with.
        worker: this process.

    Raises:
        ConfigError: if `scale.fused` is true and the base can't be fused.
    """
    scale = run.scale
    if scale.fused is False or scale.device != "cuda" or scale.zero == 3 or run.model.task != "causal_lm":
        return
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    tokens = _tokens(train)[: min(TOKENS, context) + 1]
    reason = fuse_checked(model, tokens.to(worker.device), scale.torch_dtype)
    torch.cuda.empty_cache()
    with worker.together():
        if worker.largest(int(bool(reason))) == 0:
            return
        unfuse(model)
        reason = reason or "another worker can't fuse it"
        if scale.fused:
            raise ConfigError(f"scale.fused is true, but {reason}; drop it")
    logger.warning("the base runs without fused operations: %s", reason)


def fuse_checked(model: Any, tokens: torch.Tensor, dtype: torch.dtype) -> str:
    """Fuse a frozen causal language model, unless its loss or gradient would change by more than rounding.

    Args:
        model: without adapters.
        tokens: (T + 1,) int64: each but the first is a target.
        dtype: in which the model computes.

    Returns:
        Why it is not fused, as a clause; empty if it is.
    """
    config = model.config.get_text_config()
    plain_loss, plain_gradient = _passes(model, tokens)
    known = fuse(model)
    if not known:
        return f"rayft knows no part of {type(model).__name__} that could be fused"
    reason = ""
    try:
        loss, gradient = _passes(model, tokens)
    except Exception as error:  # noqa: BLE001  (compilers need programs and folders)
        first = next(iter(str(error).splitlines()), "")
        reason = f"fused operations failed: {type(error).__name__}: {first}"
    else:
        width = config.hidden_size
        apart, allowed = abs(loss - plain_loss), tolerance(dtype, width) * max(1.0, abs(plain_loss))
        if not apart <= allowed:
            reason = f"fused operations change the loss of {len(tokens) - 1} tokens by {apart:.2g} nats"
        depth = PRODUCTS * config.num_hidden_layers
        off = relative_error(gradient, plain_gradient)
        if not reason and not off <= min(WRONG, tolerance(dtype, width, depth)):
            reason = f"fused operations change the gradient by {off:.0%}"
    if reason:
        unfuse(model)
    else:
        logger.info("fused: %s", ", ".join(f"{count} {what}" for what, count in known.items()))
    return reason


def _passes(model: Any, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean loss of tokens, and its gradient in their embeddings (1, T, D)."""
    count, device = len(tokens) - 1, tokens.device
    place = torch.arange(count, device=device)
    batch = Batch(
        input_ids=tokens[None, :-1],
        position_ids=place[None],
        offsets=torch.tensor([0, count], dtype=torch.int32, device=device),
        completion_index=place,
        targets=tokens[1:],
    )
    embedded: list[torch.Tensor] = []

    def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
        embedded.append(output.requires_grad_())

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        loss = batch_loss(model, batch)[0] / count
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(loss, embedded)
    return float(loss.detach()), gradient


def _tokens(train: Sequence[AnyEncoded]) -> torch.Tensor:
    """Return `TOKENS` + 1 tokens of the data, repeated if it has fewer."""
    found: list[int] = []
    for number in range(len(train)):
        found += getattr(train[number], "input_ids", [])
        if len(found) > TOKENS:
            break
    repeated = found * math.ceil((TOKENS + 1) / len(found))
    return torch.tensor(repeated[: TOKENS + 1], dtype=torch.int64)
