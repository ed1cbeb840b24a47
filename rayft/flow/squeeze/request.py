"""What `rayft squeeze` was asked for: read from the command line, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rayft.errors import ResourceError, SqueezeError
from rayft.flow.squeeze.make import Target
from rayft.flow.target import Place
from rayft.paths import check_folder
from rayft.squeeze.section import ContinueConfig

__all__ = ["SqueezeRequest", "check_request", "squeeze_request", "wanted_targets"]


@dataclass(frozen=True)
class SqueezeRequest:
    """A request to squeeze a folder."""

    place: Place
    """Where the adapter or tuned model lies, and at which rank squeezing starts."""
    out: Path
    """Folder for the results."""
    targets: tuple[Target, ...] = ()
    """How far to squeeze; empty to search for the smallest rank that keeps the score."""
    keep_score: float | None = None
    """Share of the source's validation score that the smallest result must keep."""
    cont: ContinueConfig | None = None
    """How the results are trained further; None if they are not."""
    config: Path | None = None
    """File of the configuration that names base and data; that of the source's sweep if not given."""
    base: str | None = None
    """Name of the base, which the adapter is checked against or a tuned model compared with."""
    device: str | None = None
    """Where to compute; the CPU if not given."""
    overwrite: bool = False
    """Whether adapters that another command of rayft made are replaced."""

    @property
    def source(self) -> Path:
        """Folder of the adapter or tuned model."""
        return self.place.folder


def squeeze_request(
    place: Place,
    out: Path,
    *,
    ranks: Sequence[int] = (),
    energies: Sequence[float] = (),
    budgets: Sequence[str] = (),
    keep_score: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    config: Path | None = None,
    base: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> SqueezeRequest:
    """Return the request that the options of a command line stand for.

    Args:
        place: where the adapter or tuned model lies.
        out: folder for the results.
        ranks: ranks to squeeze to.
        energies: shares of energy to retain, in (0, 1].
        budgets: sizes such as `1.5MB`.
        keep_score: share of the validation score that the smallest result must keep, in (0, 1].
        steps: optimizer steps of further training.
        lr: learning rate of further training.
        config: file of a configuration that names base and data.
        base: name of the base.
        device: `cpu`, `cuda` or `cuda:1`.
        overwrite: whether adapters that another command of rayft made are replaced.

    Raises:
        SqueezeError: if `steps` or `lr` makes no sense.
    """
    if steps is not None and steps < 1:
        raise SqueezeError(f"--steps {steps} trains nothing; give 1 or more, or leave it out")
    if lr is not None and (steps is None or lr <= 0):
        raise SqueezeError("--lr is the learning rate of --steps, and above 0")
    targets = [Target(rank=rank) for rank in ranks]
    targets += [Target(energy=energy) for energy in energies]
    targets += [Target(budget=budget) for budget in budgets]
    return SqueezeRequest(
        place=place,
        out=out,
        targets=tuple(dict.fromkeys(targets)),
        keep_score=keep_score,
        cont=None if steps is None else ContinueConfig(steps=steps, lr=lr),
        config=config,
        base=base,
        device=device,
        overwrite=overwrite,
    )


def check_request(request: SqueezeRequest) -> None:
    """Check the options of a request that can be checked without its source.

    Raises:
        SqueezeError: naming the option, and what to write instead.
        ResourceError: if the output folder can't be written, or the GPU does not exist.
    """
    if not request.targets and request.keep_score is None:
        raise SqueezeError(
            "no target is given: add --rank 8 (may be repeated), --energy 0.95, --budget 1.5MB or "
            "--keep-score 0.98"
        )
    if request.keep_score is not None and not 0 < request.keep_score <= 1:
        raise SqueezeError(f"--keep-score {request.keep_score:g} is not in (0, 1]; 0.98 keeps 98 % of it")
    labels = [target.label for target in request.targets]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise SqueezeError(
            f"two targets would both be written to {request.out / twice}; leave one of them out"
        )
    check_folder(request.out, "--out")
    _check_device(request.device)


def _check_device(name: str | None) -> None:
    try:
        device = torch.device("cpu" if name is None else name)
    except RuntimeError as error:
        raise SqueezeError(f"--device {name} is not a device; write cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise SqueezeError(f"--device {name} can't be used; write cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ResourceError(
            f"--device {name}: this machine has {count} GPUs; write --device cpu, or leave it out"
        )


def wanted_targets(request: SqueezeRequest, rank: int) -> list[Target]:
    """Return the targets of a request; without any, every power of two below the source's rank.

    Args:
        request: the request.
        rank: of the source.

    Raises:
        SqueezeError: if there is no lower rank.
    """
    if request.targets:
        return list(request.targets)
    halves = [2**power for power in range(rank.bit_length() - 1, -1, -1) if 2**power < rank]
    if not halves:
        raise SqueezeError(f"{request.place.name} has rank {rank}: there is no lower rank to try")
    return [Target(rank=half) for half in halves]
