"""The base's forward and backward as CUDA graphs: two replays a micro-batch, not thousands of launches.

Where launches dominate (small models, few tokens) a step's time is that of the host: SmolLM2-135M
takes the same for 512 and for 16,384 tokens. The inner model (all but the output layer) is captured
once a trial, for the one shape that its micro-batches have; gradients still arrive at the parameters
one by one, so that DeepSpeed's hooks, clipping and steps stay as they are. Other shapes and evaluation
run as before.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rayft.data.pack import AnyBatch, Batch
from rayft.errors import ConfigError, TrainError

__all__ = ["capture_stream", "graphed"]


class _Inner(nn.Module):
    """The inner model with positional tensors in and a tensor out, as a graph needs it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self._forward = inner.forward

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Give the last hidden states (B, T, H)."""
        output = self._forward(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]


@contextmanager
def capture_stream() -> Iterator[None]:
    """Run on the stream that graphs are captured on.

    An engine keeps the nodes that accumulate gradients, each bound to the stream it was made on. Were
    that the default stream, a capture would have to wait for it, which CUDA refuses: so engine, training
    and capture share this one.
    """
    stream = torch.cuda.graph.default_capture_stream or torch.cuda.Stream()
    torch.cuda.graph.default_capture_stream = stream
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    # Warming up, before a capture, is on another stream by design; nothing is kept of it.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(True)
        outside.wait_stream(stream)


@contextmanager
def graphed(model: Any, example: AnyBatch) -> Iterator[None]:
    """Replay training passes of batches shaped like `example` as CUDA graphs, for as long as this lasts.

    Args:
        model: a causal language model on a GPU, adapters and engine in place, in training mode.
        example: a micro-batch on the device.

    Raises:
        ConfigError: if the model is no causal language model.
        TrainError: if something in the model can't be captured.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    if not isinstance(example, Batch):
        raise ConfigError("scale.graphs is for causal language models; set it to false")
    inner = model.base_model
    eager = inner.forward
    samples = (example.input_ids, example.attention_mask, example.position_ids)
    logging.getLogger(__name__).info("capturing %s", tuple(example.input_ids.shape))
    try:
        captured: list[Any] = [
            torch.cuda.make_graphed_callables(
                _Inner(inner).train(), tuple(sample.clone() for sample in samples), allow_unused_input=True
            )
        ]
    except RuntimeError as error:
        raise TrainError(
            f"the model can't be captured as a CUDA graph: {error}; set scale.graphs: false"
        ) from error

    def forward(**arguments: Any) -> Any:
        given = tuple(arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        fits = all(
            isinstance(value, torch.Tensor) and value.shape == sample.shape
            for value, sample in zip(given, samples, strict=True)
        )
        if not (fits and model.training and torch.is_grad_enabled()):
            return eager(**arguments)
        return BaseModelOutputWithPast(last_hidden_state=captured[0](*given))

    inner.forward = forward
    try:
        yield
    finally:
        # The class's own method shows again.
        del inner.forward
        # What was captured refers to itself; without this its memory would stay until the next collection.
        captured.clear()
        gc.collect()
