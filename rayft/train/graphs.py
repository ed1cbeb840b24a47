"""Run the base's forward and backward passes as CUDA graphs.

A micro-batch then takes two replays instead of thousands of launches. Where kernel launches dominate (small
models, few tokens), the host determines the time of a step: SmolLM2-135M takes as long for 512 tokens as for
16,384. The inner model (all but the output layer) is captured once per trial, for the one shape of its
micro-batches. Gradients arrive at the parameters as without graphs, so engines work unchanged. Batches of
other shapes, and evaluation, run without graphs.
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
from rayft.models.attention import dense_mask, fits_graphs, mask_for

__all__ = ["capture_stream", "graphed"]


class _Inner(nn.Module):
    """The inner model with tensors as positional inputs and as output, which graph capture requires."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self._forward = inner.forward

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states (B, T, H)."""
        output = self._forward(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]


@contextmanager
def capture_stream() -> Iterator[None]:
    """Run the block on the stream on which graphs are captured.

    An engine keeps the autograd nodes that accumulate gradients, each bound to the stream on which it was
    created. If that were the default stream, a capture would have to wait for it, which CUDA refuses. So
    engine, training and capture share one stream.
    """
    stream = torch.cuda.graph.default_capture_stream or torch.cuda.Stream()
    torch.cuda.graph.default_capture_stream = stream
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    # The warm-up before a capture uses another stream by design, and nothing of it is kept.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(True)
        outside.wait_stream(stream)


@contextmanager
def graphed(model: Any, example: AnyBatch) -> Iterator[None]:
    """Replay training passes of batches shaped like `example` as CUDA graphs inside the block.

    Args:
        model: a causal language model on a GPU, in training mode, with adapters and engine.
        example: a micro-batch on the device.

    Raises:
        ConfigError: if the model is not a causal language model.
        TrainError: if a part of the model can't be captured.
        torch.OutOfMemoryError: if the graphs do not fit into the device's memory.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    if not isinstance(example, Batch):
        raise ConfigError("scale.graphs is for causal language models; set it to false")
    inner = model.base_model
    eager = inner.forward
    shape = example.input_ids.shape
    dense = not fits_graphs(model, example.input_ids.device)
    if dense and getattr(model.config.get_text_config(), "sliding_window", None):
        raise ConfigError(
            "this model's attention has windows, and in this dtype or on this GPU it can't be captured as a "
            "CUDA graph; set scale.graphs: false"
        )

    def mask_of(offsets: torch.Tensor) -> torch.Tensor:
        return dense_mask(offsets.flatten(), *shape) if dense else mask_for(model, offsets.flatten(), *shape)

    samples = (example.input_ids, mask_of(example.offsets), example.position_ids)
    logging.getLogger(__name__).info("capturing %s", tuple(example.input_ids.shape))
    try:
        captured: list[Any] = [
            torch.cuda.make_graphed_callables(
                _Inner(inner).train(), tuple(sample.clone() for sample in samples), allow_unused_input=True
            )
        ]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TrainError(
            f"the model can't be captured as a CUDA graph: {error}; set scale.graphs: false"
        ) from error

    def forward(**arguments: Any) -> Any:
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if (
            dense
            and mask is not None
            and mask.dtype == torch.int32
            and ids is not None
            and ids.shape == shape
        ):
            mask = mask_of(mask)
        given = (ids, mask, arguments.get("position_ids"))
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
        # Uncovers the method of the class.
        del inner.forward
        # The captured graph is a reference cycle; without this its memory would stay until the next
        # collection.
        captured.clear()
        gc.collect()
