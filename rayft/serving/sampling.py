"""Choose the next token of each row by the row's own options and seed.

What a row asks for is applied in vLLM's order: the repetition penalty to its logits, then the temperature,
then `min_p`, `top_k` and `top_p`; the last is a share of what the others have left. A row's choice depends on
nothing but its logits and its options, so that a batch changes no answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayft.numerics import derive_seed
from rayft.serving.engine import GenerationRequest, TokenLogprob

__all__ = ["Draw", "Seen", "choose", "finite_rows", "logprobs", "uniform"]


class Seen:
    """The tokens of one row, its prompt's and those that it was given since, for the repetition penalty."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Begin with the prompt."""
        self._first = tokens
        self._mask: torch.Tensor | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> Seen | None:
        """Begin with a request's prompt, if it has a penalty."""
        return None if request.repetition_penalty == 1.0 else cls(request.prompt)

    def add(self, token: int) -> None:
        """Add a token that was chosen."""
        assert self._mask is not None
        self._mask[token] = True

    def mask(self, size: int) -> torch.Tensor:
        """Return which tokens of a vocabulary are there: (V,), bool, on the CPU."""
        if self._mask is None:
            self._mask = torch.zeros(size, dtype=torch.bool)
            self._mask[torch.tensor(self._first, dtype=torch.int64)] = True
        return self._mask


@dataclass(frozen=True)
class Draw:
    """How one row's next token is chosen."""

    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    """Share of the probability to draw from."""
    uniform: float
    """A number in [0, 1): the draw itself."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Draw from tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of the tokens in `seen`, and multiplies the others."""
    seen: Seen | None = None
    """The row's tokens, where there is a penalty."""

    @classmethod
    def of(cls, request: GenerationRequest, step: int, seen: Seen | None) -> Draw:
        """Return how a request chooses its token at a step."""
        return cls(
            request.temperature,
            request.top_p,
            uniform(request.seed, step) if request.temperature > 0 else 0.0,
            request.top_k,
            request.min_p,
            request.repetition_penalty,
            seen,
        )


def uniform(seed: int, step: int) -> float:
    """Give the draw of a request's step: a function of nothing else, so batches can't change it."""
    return random.Random(derive_seed(seed, step)).random()


def choose(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Choose a token for each row by inverting the cumulative distribution: (N × V) → (N,), int64.

    The likeliest token always stays, and so does the one in which `top_p` is reached. Equally likely tokens
    stay or go together under `top_k` and `min_p`.
    """
    chosen = logits_NV.argmax(dim=-1)
    rows = [row for row, draw in enumerate(draws) if draw.temperature > 0 or draw.seen is not None]
    if not rows:
        return chosen
    asked = [draws[row] for row in rows]
    picked = torch.tensor(rows, device=logits_NV.device)
    logits = logits_NV.index_select(0, picked).float()
    if any(draw.seen is not None for draw in asked):
        logits = _penalized(logits, asked)
        # Of rows without a penalty this is what they have: the same logits in float32.
        chosen[picked] = logits.argmax(dim=-1)
    drawn = [place for place, draw in enumerate(asked) if draw.temperature > 0]
    if not drawn:
        return chosen
    if len(drawn) < len(rows):
        kept = torch.tensor(drawn, device=logits.device)
        picked, logits = picked[kept], logits[kept]
    chosen[picked] = _sampled(logits, [asked[place] for place in drawn])
    return chosen


def _penalized(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Make the tokens that rows have seen less likely; rows without a penalty stay as they are."""
    size = logits_NV.shape[1]
    none = torch.zeros(size, dtype=torch.bool)
    seen_NV = torch.stack([none if draw.seen is None else draw.seen.mask(size) for draw in draws])
    penalty = _column([draw.repetition_penalty for draw in draws], logits_NV.device)
    less_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
    return torch.where(seen_NV.to(logits_NV.device), less_NV, logits_NV)


def _sampled(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Draw a token for each row."""
    device = logits_NV.device
    # In float32 a very small number is 0, which would divide 0 by 0, or leave no token to draw from.
    tiny = torch.finfo(torch.float32).tiny
    temperature = _column([draw.temperature for draw in draws], device).clamp(min=tiny)
    top_p = _column([draw.top_p for draw in draws], device).clamp(min=tiny)
    point = _column([draw.uniform for draw in draws], device)
    # Shifted by the maximum first, so that a tiny temperature gives -inf, not inf - inf.
    logits = (logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / temperature
    p_NV, order_NV = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if any(draw.top_k > 0 or draw.min_p > 0 for draw in draws):
        p_NV = _filtered(p_NV, draws)
    before_NV = p_NV.cumsum(dim=-1) - p_NV
    p_NV = p_NV.masked_fill(before_NV >= top_p, 0.0)
    total = p_NV.cumsum(dim=-1)
    place = torch.searchsorted(total, point * total[:, -1:], right=True)
    # A row of NaN has no token above 0; the first one is as wrong as any.
    last = ((p_NV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return order_NV.gather(1, place.minimum(last)).squeeze(1)


def _filtered(p_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Apply `min_p` and `top_k` to sorted probabilities, and scale what is left to a sum of 1.

    Rows that ask for neither stay bit for bit as they are: they are compared with 0 and divided by 1.
    """
    size, device = p_NV.shape[1], p_NV.device
    counts = [min(draw.top_k, size) if draw.top_k > 0 else size for draw in draws]
    last = torch.tensor(counts, device=device).unsqueeze(1) - 1
    least = torch.maximum(
        _column([draw.min_p for draw in draws], device) * p_NV[:, :1],
        # Of a row without a `top_k` this is its smallest probability, which excludes nothing.
        p_NV.gather(1, last),
    )
    p_NV = p_NV.masked_fill(p_NV < least, 0.0)
    filters = _column([float(draw.top_k > 0 or draw.min_p > 0) for draw in draws], device).bool()
    return p_NV / torch.where(filters, p_NV.cumsum(dim=-1)[:, -1:], 1.0)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


def finite_rows(logits_NV: torch.Tensor) -> list[bool]:
    """Say of each row whether its largest logit is a number: NaN and Inf both show there."""
    return logits_NV.amax(dim=-1).isfinite().tolist()


def logprobs(
    logits_NV: torch.Tensor, chosen: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Give the log-probability of each row's token, and of as many of the likeliest as its count says.

    They are the model's own, as OpenAI's are: before the penalty, the temperature and what follows. Rows of
    no count give None.
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
