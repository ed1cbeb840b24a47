"""Choose the next token of each row by the row's own temperature, top-p and seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayft.numerics import derive_seed
from rayft.serving.engine import TokenLogprob

__all__ = ["Draw", "choose", "finite_rows", "logprobs", "uniform"]


@dataclass(frozen=True)
class Draw:
    """How one row's next token is chosen."""

    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    """Share of the probability to draw from."""
    uniform: float
    """A number in [0, 1): the draw itself."""


def uniform(seed: int, step: int) -> float:
    """Give the draw of a request's step: a function of nothing else, so batches can't change it."""
    return random.Random(derive_seed(seed, step)).random()


def choose(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Choose a token for each row by inverting the cumulative distribution: (N × V) → (N,), int64.

    The likeliest token always stays, and so does the one in which `top_p` is reached.
    """
    chosen = logits_NV.argmax(dim=-1)
    rows = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if not rows:
        return chosen

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_NV.device).unsqueeze(1)

    # In float32 a very small number is 0, which would divide 0 by 0, or leave no token to draw from.
    tiny = torch.finfo(torch.float32).tiny
    temperature = column([draws[row].temperature for row in rows]).clamp(min=tiny)
    top_p = column([draws[row].top_p for row in rows]).clamp(min=tiny)
    point = column([draws[row].uniform for row in rows])
    picked = torch.tensor(rows, device=logits_NV.device)
    # Shifted by the maximum first, so that a tiny temperature gives -inf, not inf - inf.
    logits = logits_NV.index_select(0, picked).float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    p_NV, order_NV = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before_NV = p_NV.cumsum(dim=-1) - p_NV
    p_NV = p_NV.masked_fill(before_NV >= top_p, 0.0)
    total = p_NV.cumsum(dim=-1)
    place = torch.searchsorted(total, point * total[:, -1:], right=True)
    # A row of NaN has no token above 0; the first one is as wrong as any.
    last = ((p_NV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    chosen[picked] = order_NV.gather(1, place.minimum(last)).squeeze(1)
    return chosen


def finite_rows(logits_NV: torch.Tensor) -> list[bool]:
    """Say of each row whether its largest logit is a number: NaN and Inf both show there."""
    return logits_NV.amax(dim=-1).isfinite().tolist()


def logprobs(
    logits_NV: torch.Tensor, chosen: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Give the log-probability of each row's token, and of as many of the likeliest as its count says.

    They are the model's own: before temperature and top-p, as OpenAI's are. Rows of no count give None.
    """
    found: list[TokenLogprob | None] = [None] * len(chosen)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return found
    picked = logits_NV[torch.tensor(rows, device=logits_NV.device)].float().log_softmax(dim=-1)
    most = min(max(counts[row] or 0 for row in rows), picked.shape[1])
    top = picked.topk(most, dim=-1)
    tokens, values = top.indices.tolist(), top.values.tolist()
    for place, row in enumerate(rows):
        count = counts[row] or 0
        best = tuple(zip(tokens[place][:count], values[place][:count], strict=True))
        found[row] = TokenLogprob(chosen[row], float(picked[place, chosen[row]]), best)
    return found
