"""Run the base's forward and backward passes as CUDA graphs.

A micro-batch then takes two replays instead of thousands of launches. Where kernel launches dominate (small
models, few tokens), the host determines the time of a step: SmolLM2-135M takes as long for 512 tokens as for
16,384. The inner model (all but the output layer) is captured once per trial, for the one shape of its
micro-batches. Batches of other shapes, and evaluation, run without graphs.

One kernel copies the gradients of flat parameters (`rayft.train.flat`) to where the engine needs them:
autograd and Python would spend more time on hundreds of parameters than all else of a step. Those of others
arrive at the parameters as without graphs.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rayft.data.pack import AnyBatch, Batch
from rayft.errors import ConfigError, TrainError
from rayft.kernels.foreach_copy import ForeachCopy
from rayft.models.attention import dense_mask, fits_graphs, mask_for
from rayft.train.flat import Part

__all__ = ["capture_stream", "graphed"]

WARM_UPS = 3
"""Passes before a capture, which compile, tune and allocate what a graph can't."""


class _Passes:
    """The passes of an inner model, captured as two graphs.

    Args:
        inner: the model.
        forward: its forward pass.
        samples: tokens, mask and positions of a micro-batch.
        parts: flat parameters; the gradients of those that are wholly in the model are copied to them.
    """

    def __init__(
        self,
        inner: Any,
        forward: Callable[..., Any],
        samples: tuple[torch.Tensor, ...],
        parts: Iterable[Part],
    ) -> None:
        self._inner_forward = forward
        self._inputs = tuple(sample.clone() for sample in samples)
        self._trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
        known = {*self._trained}
        self._parts = [
            part for part in parts if part.parameters and known.issuperset(part.parameters.values())
        ]
        self._views = {parameter: view for part in self._parts for parameter, view in part.gradients.items()}
        self.passed = [parameter for parameter in self._trained if parameter not in self._views]
        """Parameters whose gradients autograd takes to them."""
        self._gradients: list[torch.Tensor | None] = []
        self._moved: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        """Parts of flat gradients, and what belongs there."""
        # Without it autograd would see nothing that needs a gradient.
        self.anchor = torch.zeros((), device=samples[0].device, requires_grad=True)
        for _ in range(WARM_UPS):
            self._forward()
            self._outer = torch.zeros_like(self._hidden)
            self._backward()
        torch.cuda.synchronize()
        del self._hidden
        self._gradients, self._moved = [], ([], [])
        pool = torch.cuda.graph_pool_handle()
        self._replay_forward = _capture(self._forward, pool)
        self._replay_backward = _capture(self._backward, pool)
        # What the graph has computed is in the same memory after each replay.
        self._copy = ForeachCopy(*self._moved)

    def _forward(self) -> None:
        ids, mask, positions = self._inputs
        output = self._inner_forward(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        self._hidden: torch.Tensor = output.last_hidden_state

    def _backward(self) -> None:
        found = torch.autograd.grad(self._hidden, self._trained, self._outer, allow_unused=True)
        gradients = dict(zip(self._trained, found, strict=True))
        self._gradients = [gradients[parameter] for parameter in self.passed]
        self._moved = ([], [])
        for parameter, view in self._views.items():
            gradient = gradients[parameter]
            if gradient is None:
                view.zero_()
            else:
                self._moved[0].append(view)
                self._moved[1].append(gradient.contiguous())

    def forward(self, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the last hidden states (B, T, H) of a micro-batch; the next one overwrites them."""
        for own, value in zip(self._inputs, given, strict=True):
            own.copy_(value)
        self._replay_forward()
        return self._hidden.detach()

    def backward(self, outer: torch.Tensor) -> Iterator[torch.Tensor | None]:
        """Write the gradients of flat parameters, and return those of the others."""
        self._outer.copy_(outer)
        self._replay_backward()
        self._copy()
        for part in self._parts:
            part.arrived = True
        return (None if gradient is None else gradient.detach() for gradient in self._gradients)


def _capture(body: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Capture what a function launches as a graph; return the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        body()
    return graph.replay


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: _Passes, given: tuple[torch.Tensor, ...], *_: torch.Tensor) -> torch.Tensor:
        ctx.passes = passes
        return passes.forward(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, None, *ctx.passes.backward(outer))


@contextmanager
def capture_stream() -> Iterator[None]:
    """Run the block on the stream on which graphs are captured, the same one in the whole process.

    An engine keeps the autograd nodes that accumulate gradients, each bound to the stream on which it was
    created. If that were the default stream, a capture would have to wait for it, which CUDA refuses. So
    engine, training and capture share one stream.

    The passes before a capture run on this stream too. cuBLAS keeps a workspace for each stream on which a
    thread has multiplied matrices (32 MiB on Hopper), until the process ends; with a new stream for each
    capture, they would add up. A workspace that exists before a capture is also not allocated among the
    tensors of its graph.
    """
    stream = torch.cuda.graph.default_capture_stream or torch.cuda.Stream()
    torch.cuda.graph.default_capture_stream = stream
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)


@contextmanager
def graphed(model: Any, example: AnyBatch, parts: Iterable[Part] = ()) -> Iterator[None]:
    """Replay training passes of batches shaped like `example` as CUDA graphs inside the block.

    Call it inside a block of `capture_stream`.

    Args:
        model: a causal language model on a GPU, in training mode, with adapters and engine.
        example: a micro-batch on the device.
        parts: the engine's flat parameters.

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
        captured = [_Passes(inner, eager, samples, parts)]
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
        passes = captured[0]
        hidden = _Replay.apply(passes, given, passes.anchor, *passes.passed)  # type: ignore[no-untyped-call]
        return BaseModelOutputWithPast(last_hidden_state=hidden)

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
