"""Chooses the next token of each sequence by its own options and seed.

Options apply in vLLM's order: the repetition penalty to the logits, then the temperature, then `min_p`,
`top_k` and `top_p`, which is a share of what the others leave. The choice for a sequence depends on its
logits and options only, so it is the same in every batch.

Shapes: N sequences, V tokens of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayft.numerics import derive_seed
from rayft.serving.engine.api import GenerationRequest, TokenLogprob

__all__ = ["Draw", "Seen", "choose", "finite_rows", "logprobs", "uniform"]


class Seen:
    """The set of a sequence's tokens, for the repetition penalty."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Start with the prompt."""
        self._prompt = tokens
        self._mask: torch.Tensor | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> Seen | None:
        """Start with the prompt of a request, if it has a penalty."""
        return None if request.repetition_penalty == 1.0 else cls(request.prompt)

    def add(self, token: int) -> None:
        """Add a generated token."""
        assert self._mask is not None
        self._mask[token] = True

    def mask(self, size: int) -> torch.Tensor:
        """Return which tokens of the vocabulary are in the set: (V,), bool."""
        if self._mask is None:
            self._mask = torch.zeros(size, dtype=torch.bool)
            self._mask[torch.tensor(self._prompt, dtype=torch.int64)] = True
        return self._mask


@dataclass(frozen=True)
class Draw:
    """How the next token of one sequence is chosen."""

    temperature: float
    """Temperature; 0 takes the most likely token."""
    top_p: float
    """Sample from the most likely tokens that together have this probability."""
    uniform: float
    """The random number in [0, 1) that decides."""
    top_k: int = 0
    """Sample from this number of most likely tokens; 0 for all."""
    min_p: float = 0.0
    """Sample from the tokens whose probability is at least this fraction of the most likely token's."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of the tokens in `seen`, and multiplies their negative ones."""
    seen: Seen | None = None
    """The sequence's tokens, if there is a penalty."""

    @classmethod
    def of(cls, request: GenerationRequest, step: int, seen: Seen | None) -> Draw:
        """Return how a request, which has a seed, chooses its token at a step."""
        assert request.seed is not None
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
    """Return the random number of a request's step, which depends on nothing else."""
    return random.Random(derive_seed(seed, step)).random()


def choose(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Choose a token for each sequence by inverting the cumulative distribution: (N × V) → (N,), int64.

    The most likely token can always be chosen, and so can the one at which `top_p` is reached. Equally likely
    tokens are kept or excluded together by `top_k` and `min_p`.
    """
    chosen = logits_NV.argmax(dim=-1)
    asked = [index for index, draw in enumerate(draws) if draw.temperature > 0 or draw.seen is not None]
    if not asked:
        return chosen
    picked, some = torch.tensor(asked), [draws[index] for index in asked]
    logits = logits_NV.index_select(0, picked).float()
    if any(draw.seen is not None for draw in some):
        logits = _penalized(logits, some)
        # For sequences without a penalty this changes nothing: their logits are the same, in float32.
        chosen[picked] = logits.argmax(dim=-1)
    drawn = [index for index, draw in enumerate(some) if draw.temperature > 0]
    if not drawn:
        return chosen
    if len(drawn) < len(some):
        kept = torch.tensor(drawn)
        picked, logits = picked[kept], logits[kept]
    chosen[picked] = _sampled(logits, [some[index] for index in drawn])
    return chosen


def _penalized(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Make the tokens that sequences have seen less likely; those without a penalty stay as they are."""
    size = logits_NV.shape[1]
    none = torch.zeros(size, dtype=torch.bool)
    seen_NV = torch.stack([none if draw.seen is None else draw.seen.mask(size) for draw in draws])
    penalty = _column([draw.repetition_penalty for draw in draws])
    less_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
    return torch.where(seen_NV, less_NV, logits_NV)


def _sampled(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Draw a token for each sequence."""
    # In float32 a very small number is 0, which would divide 0 by 0, or leave no token to draw from.
    tiny = torch.finfo(torch.float32).tiny
    temperature = _column([draw.temperature for draw in draws]).clamp(min=tiny)
    top_p = _column([draw.top_p for draw in draws]).clamp(min=tiny)
    point = _column([draw.uniform for draw in draws])
    # Shifted by the maximum first, so that a tiny temperature gives -inf, not inf - inf.
    logits = (logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / temperature
    p_NV, order_NV = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if any(draw.top_k > 0 or draw.min_p > 0 for draw in draws):
        p_NV = _filtered(p_NV, draws)
    before_NV = p_NV.cumsum(dim=-1) - p_NV
    p_NV = p_NV.masked_fill(before_NV >= top_p, 0.0)
    total = p_NV.cumsum(dim=-1)
    index = torch.searchsorted(total, point * total[:, -1:], right=True)
    # If all logits are NaN, no token has a probability above 0, and the first one is taken.
    last = ((p_NV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return order_NV.gather(1, index.minimum(last)).squeeze(1)


def _filtered(p_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Apply `min_p` and `top_k` to sorted probabilities, and scale those that are left to a sum of 1.

    Sequences with neither option stay bitwise the same: they are compared with 0 and divided by 1.
    """
    size = p_NV.shape[1]
    counts = [min(draw.top_k, size) if draw.top_k > 0 else size for draw in draws]
    least = torch.maximum(
        _column([draw.min_p for draw in draws]) * p_NV[:, :1],
        # Without a `top_k` this is the smallest probability, which excludes nothing.
        p_NV.gather(1, torch.tensor(counts).unsqueeze(1) - 1),
    )
    p_NV = p_NV.masked_fill(p_NV < least, 0.0)
    filters = _column([float(draw.top_k > 0 or draw.min_p > 0) for draw in draws]).bool()
    return p_NV / torch.where(filters, p_NV.cumsum(dim=-1)[:, -1:], 1.0)


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def finite_rows(logits_NV: torch.Tensor) -> list[bool]:
    """Return for each sequence whether its largest logit is finite, which it is not after a NaN or Inf."""
    return logits_NV.amax(dim=-1).isfinite().tolist()


def logprobs(
    logits_NV: torch.Tensor, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Return the log-probability of a token for each row of logits, before any option applies.

    Args:
        logits_NV: the logits.
        tokens: the token of each row.
        counts: for each row, how many of the most likely tokens to report too; None for no entry at all.
    """
    found: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return found
    picked = logits_NV[torch.tensor(rows)].float().log_softmax(dim=-1)
    most = min(max(counts[row] or 0 for row in rows), picked.shape[1])
    top = picked.topk(most, dim=-1)
    ids, values = top.indices.tolist(), top.values.tolist()
    for index, row in enumerate(rows):
        count = counts[row] or 0
        best = tuple(zip(ids[index][:count], values[index][:count], strict=True))
        found[row] = TokenLogprob(tokens[row], float(picked[index, tokens[row]]), best)
    return found
