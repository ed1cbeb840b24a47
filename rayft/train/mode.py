"""The mode in which a model trains."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["train_mode"]


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode, but normalise by the running statistics that it was loaded with.

    Batch normalisation would normalise by the rows of a micro-batch on one worker, so that what is learnt
    would depend on how a step is divided. It would also change the statistics: those of a base that other
    trials share, and that neither an adapter nor a checkpoint holds.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
