"""The analysis of one adapter, as a job for a lane, which has base and data in memory already.

A part that can't be done is noted with its reason, and the other parts are done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from rayft.analysis import bounds, landscape, sharpness
from rayft.analysis.directions import Direction, random_directions, trajectory_directions
from rayft.analysis.gap import example_losses, gap, sample
from rayft.analysis.norms import matrix, spectral_norms, squared_norms
from rayft.analysis.record import AdapterAnalysis, Kind, Landscape
from rayft.analysis.section import AnalyzeConfig, Part
from rayft.analysis.updates import Update, spectra
from rayft.artifacts import AdapterArtifact
from rayft.data.pack import AnyBatch, collate_rows, rows_of
from rayft.errors import DataError, DiskFullError, MethodError, RayftError, ResourceError
from rayft.evaluate.loss import targets_of
from rayft.identity import UNKNOWN, Identity
from rayft.methods.base import LayerShape, LoraFactors
from rayft.models.difference import open_pair
from rayft.models.inject import attach, clear, wrap
from rayft.models.load import ModelConfig
from rayft.models.methods import method
from rayft.models.targets import linear_shapes, select
from rayft.peft.folder import Artifact, load_adapter
from rayft.train.run import RunConfig
from rayft.train.session import Session

if TYPE_CHECKING:
    from rayft.sweep.lane import Lane

__all__ = ["TRAIL", "AnalyzeRequest", "analyze"]

TRAIL = "trail"
"""Folder of a trial with its adapter at each evaluation, for the plane of its trajectory."""
MEASURED = 16
"""How many examples the input norms in the bounds are measured on."""
POINTS = 64
"""Points of a landscape in one forward pass; halved whenever memory runs out."""


@dataclass(frozen=True)
class AnalyzeRequest:
    """A request to analyse an adapter, or a whole tuned model, which is then the run's base."""

    kind: ClassVar[str] = "analyse"
    resumable: ClassVar[bool] = False
    folders: ClassVar[tuple[Path, ...]] = ()

    name: str
    run: RunConfig
    config: AnalyzeConfig
    adapter: str | None = None
    group: str = ""
    base: ModelConfig | None = None
    """The model from which training started, if a whole tuned model is analysed."""
    expected: Identity = UNKNOWN
    """Identity of data and base, as the driver has read them."""

    def __call__(self, lane: Lane) -> AdapterAnalysis | None:
        """Analyse on the first worker; the others return None."""
        return self.analyse(lane.session(self.run, self.expected, whole=True))

    def analyse(self, session: Session) -> AdapterAnalysis | None:
        """Analyse with the base and the data of a session, on its first worker."""
        if session.worker.rank > 0:
            return None
        artifact = None if self.adapter is None else load_adapter(session.home.local(self.adapter))
        trail = session.home.local(Path(self.adapter).parent / TRAIL) if self.adapter else None
        base = self.base
        if base is not None:
            base = base.model_copy(update={"name": str(session.home.local(base.name))})
        found = analyze(
            session, self.run, artifact, self.config, name=self.name, group=self.group, trail=trail, base=base
        )
        # As it will be read from its file: landscapes have lists there, not tuples.
        return AdapterAnalysis.model_validate_json(found.model_dump_json())


def analyze(
    session: Session,
    run: RunConfig,
    artifact: Artifact | None,
    config: AnalyzeConfig,
    *,
    name: str,
    group: str = "",
    trail: Path | None = None,
    base: ModelConfig | None = None,
) -> AdapterAnalysis:
    """Run all parts of an analysis.

    Args:
        session: the base and the data; no adapter is left in the base.
        run: what was trained.
        artifact: the adapter; None if the session's base is the tuned model itself.
        config: the parts and their sizes.
        name: the adapter's name.
        group: the adapter's settings without the seed.
        trail: folder with the adapter at several steps, for the trajectory.
        base: what a tuned model started from.
    """
    analysis = _Analysis(session, run, artifact, config, trail, base)
    done: dict[str, Any] = {}
    measures: dict[str, float] = {}
    notes: dict[str, str] = {}
    seconds: dict[str, float] = {}
    landscapes: dict[str, dict[str, Any]] = {}
    for part in config.parts:
        started = time.perf_counter()
        try:
            if artifact is not None:
                attach(session.loaded.model, artifact)
            session.loaded.model.eval()
            found = _within_memory(analysis.steps[part])
        except DiskFullError:
            raise
        except RayftError as error:
            notes[part] = str(error)
        else:
            measures |= found.measures
            landscapes |= found.more.pop("landscapes", {})
            done |= found.more
        finally:
            clear(session.loaded.model)
        seconds[part] = time.perf_counter() - started
    return AdapterAnalysis(
        name=name, group=group, measures=measures, landscapes=landscapes, notes=notes, seconds=seconds, **done
    )


def _within_memory(step: Callable[[], _Found]) -> _Found:
    try:
        return step()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "the device ran out of memory: set analyze.examples lower, or sweep.lanes where they share it"
        ) from error
    finally:
        # Other lanes on the same GPU need what this part held.
        torch.cuda.empty_cache()


@dataclass
class _Found:
    """The results of a part."""

    measures: dict[str, float]
    more: dict[str, Any] = field(default_factory=dict)
    """Fields of `AdapterAnalysis`."""


@dataclass
class _Analysis:
    """The analysis of one adapter in a session."""

    session: Session
    run: RunConfig
    artifact: Artifact | None
    config: AnalyzeConfig
    trail: Path | None
    base: ModelConfig | None

    @property
    def model(self) -> Any:
        return self.session.loaded.model

    @property
    def steps(self) -> dict[Part, Callable[[], _Found]]:
        """Return the method that runs each part."""
        return {
            "gap": self.gap, "bounds": self.bounds, "spectra": self.spectra, "sharpness": self.sharpness,
            "hessian": self.hessian, "line": self.line, "landscape": self.landscape,
            "trajectory": self.trajectory,
        }  # fmt: skip

    @cached_property
    def modules(self) -> Mapping[str, LoraFactors]:
        """The adapter's factors, on the model's device.

        Raises:
            MethodError: if it has no factors.
        """
        if not isinstance(self.artifact, AdapterArtifact):
            what = "is a whole model" if self.artifact is None else "has PEFT's own layers"
            raise MethodError(
                f"'{self.run.method.name}' {what}, without low-rank factors: extract a LoRA first "
                "(`rayft squeeze`), and analyse that"
            )
        return {path: factors.to(self.model.device) for path, factors in self.artifact.modules.items()}

    @cached_property
    def update(self) -> Update:
        """The adapter's update, decomposed once for all parts."""
        return Update.of_adapter(self.model, self.modules)

    @cached_property
    def centre(self) -> Mapping[str, LoraFactors]:
        """The centre of a landscape: the adapter's factors; zeros for a whole model."""
        if self.artifact is not None or self.config.directions == "update":
            return self.modules
        wrap(self.model)
        shapes, zeros = linear_shapes(self.model), partial(torch.zeros, device=self.model.device)
        return {
            path: LoraFactors(zeros(1, shapes[path][1]), zeros(shapes[path][0], 1), 1.0)
            for path in select(shapes, self.run.method.targets)
        }

    def gap(self) -> _Found:
        """Measure the gap between the losses on training and on held-out examples."""
        session, count = self.session, self.config.samples
        test = session.prepared.encoded("test", session.loaded.context)
        if not len(test):
            raise DataError(
                "no test example is short enough for data.max_length; raise it to measure the gap"
            )
        count = min(count, len(session.train), len(test))
        seen, fresh = (
            example_losses(
                self.model,
                sample(texts, count, self.config.seed, part),
                session.pad_id,
                session.worker.device,
            )
            for part, texts in (("train", session.train), ("test", test))
        )
        found = gap(seen, fresh, self.config.clip, self.config.seed)
        measures = {"gap": found.value, "gap_low": found.low, "gap_high": found.high}
        measures |= {"sample_train_loss": found.train, "sample_test_loss": found.held_out}
        return _Found(measures, {"gap": found})

    def bounds(self) -> _Found:
        """Compute the bounds."""
        sigma, samples = bounds.sigma_of_clipped(0.0, self.config.clip), len(self.session.train)
        numbers, bits = _stored(self.artifact, self.model)
        found = {"bound_information": bounds.information_bound(numbers, bits, samples, sigma)}
        measures: dict[str, float] = {"parameters": numbers}
        if isinstance(self.artifact, AdapterArtifact):
            modules = self.modules
            base = spectral_norms(self.model)
            inputs = squared_norms(self.model, self._batches(MEASURED), base)
            # The chain of layers begins with the model's first one, whichever are adapted.
            radius = float(next(iter(inputs.values())).max().sqrt())
            update = {path: float(values.max()) for path, values in self.update.singular_values.items()}
            terms = bounds.lipschitz_terms([*base.values()], [update.get(path, 0.0) for path in base], radius)
            measures["bound_lipschitz_log10"] = terms.log10_update
            worst = {
                path: bounds.norm_bound(
                    bounds.norm_budget(f), f.b.shape[0], inputs[path], loss_range=self.config.clip
                )
                for path, f in modules.items()
            }
            found["bound_norm"] = max(worst.values(), key=lambda bound: bound.log10)
        measures |= {f"{name}_log10": bound.log10 for name, bound in found.items()}
        vacuous = [name for name, bound in found.items() if bound.vacuous]
        if measures.get("bound_lipschitz_log10", -math.inf) >= math.log10(self.config.clip):
            vacuous.append("bound_lipschitz")
        return _Found(measures, {"vacuous": tuple(vacuous)})

    def spectra(self) -> _Found:
        """Summarise the update's spectra, and count intruder dimensions."""
        with self._update() as update:
            return _Found(*spectra(update, self.config.intruder_modules))

    @contextmanager
    def _update(self) -> Iterator[Update]:
        if self.artifact is not None or self.base is None:
            yield self.update
            return
        model, targets = self.run.model, self.run.method.targets
        tuned = str(self.session.home.local(model.name))
        with open_pair(self.base, tuned, targets, model.revision) as pair:
            yield Update.of_pair(pair, self.model.device)

    def sharpness(self) -> _Found:
        """Measure the rise of the loss in SAM's step and in the adaptive one."""
        batches, modules, config = self._batches(), self.modules, self.config
        plain = sharpness.adapter_sharpness(self.model, batches, modules, config.rho)
        adaptive = sharpness.adapter_sharpness(
            self.model, batches, modules, config.adaptive_rho, adaptive=True
        )
        return _Found({"sam_sharpness": plain.difference, "asam_sharpness": adaptive.difference})

    def hessian(self) -> _Found:
        """Find the Hessian's largest eigenvalues and its trace."""
        found = sharpness.adapter_curvature(
            self.model, self._batches(), self.modules, self.config.eigenvalues, seed=self.config.seed
        )
        values = {
            f"hessian_eigenvalue_{number}": value for number, value in enumerate(found.eigenvalues, start=1)
        }
        return _Found({**values, "hessian_trace": found.trace})

    def line(self) -> _Found:
        """Evaluate a line in a random direction and, for an adapter, the line from the base through it."""
        points = landscape.grid_1d(self.config.grid, self.config.reach)
        random = self._measure("random", self._random(1), points)
        curves = {"line": random.to_json()}
        if self.artifact is not None:
            points = landscape.grid_1d(self.config.grid, 1.0)
            curves["update"] = self._measure("update", [self.modules], points).to_json()
        return _Found({"line_rise": random.rise}, {"landscapes": curves})

    def landscape(self) -> _Found:
        """Evaluate a plane of two random directions."""
        points = landscape.grid_2d(self.config.grid, self.config.reach)
        found = self._measure("random", self._random(2), points)
        return _Found({"landscape_rise": found.rise}, {"landscapes": {"random": found.to_json()}})

    def _random(self, count: int) -> list[Direction]:
        modules, norm = self.centre, self.config.directions
        weights = {path: matrix(self.model, path) for path in modules} if norm == "weight" else None
        return [*random_directions(modules, count, self.config.seed, norm, weights)]

    def trajectory(self) -> _Found:
        """Evaluate the plane that most of the adapter's path in training lies in."""
        modules = self.modules
        folders = sorted(self.trail.iterdir()) if self.trail is not None and self.trail.is_dir() else []
        if len(folders) < 2:
            raise MethodError(
                "this adapter has no trail of earlier steps: train with evaluate.trail: true to have one"
            )
        path = [
            {name: factors.to(self.model.device) for name, factors in one.modules.items()}
            for one in self._before([AdapterArtifact.load(folder) for folder in folders])
        ]
        plane = trajectory_directions([*path, modules])
        points = landscape.grid_around(plane.coordinates, self.config.grid)
        more = {
            "path": tuple(tuple(map(float, point)) for point in plane.coordinates.tolist()),
            "explained": plane.explained,
        }
        found = self._measure("trajectory", plane.directions, points, **more)
        return _Found({}, {"landscapes": {"trajectory": found.to_json()}})

    def _before(self, trail: Sequence[AdapterArtifact]) -> Sequence[AdapterArtifact]:
        """Return the steps that led to the adapter: where an earlier step was kept, the later ones did not.

        Raises:
            DataError: if fewer than two did.
        """
        assert self.artifact is not None
        hashes = [step.content_hash for step in trail]
        if self.artifact.content_hash not in hashes:
            return trail
        earlier = trail[: hashes.index(self.artifact.content_hash)]
        if len(earlier) < 2:
            raise DataError(
                f"the weights that were kept are those of evaluation {len(earlier) + 1}, and a plane needs "
                "two evaluations before them: evaluate more often"
            )
        return earlier

    def _measure(
        self,
        kind: Kind,
        directions: Sequence[Direction],
        points: torch.Tensor,
        **more: Any,
    ) -> Landscape:
        batches = self._batches()
        losses = landscape.losses(self.model, batches, self.centre, directions, points, POINTS)
        return Landscape(
            kind=kind,
            norm=self.config.directions if kind == "random" else None,
            coordinates=tuple(tuple(point) for point in points.tolist()),
            losses=tuple(losses.tolist()),
            seed=self.config.seed if kind == "random" else None,
            targets=sum(len(targets_of(batch)) for batch in batches),
            **more,
        )

    def _batches(self, count: int | None = None) -> list[AnyBatch]:
        """Return batches of training examples on the device.

        With a count, each example is a batch of its own, so that nothing is padded. Without one, the batches
        are the packed examples for the sharpness and the landscapes.
        """
        chosen = sample(self.session.train, count or self.config.examples, self.config.seed, "train")
        data = self.run.data
        rows = rows_of(chosen, data.max_length, packing=data.packing and count is None)
        return [collate_rows([row], self.session.pad_id).to(self.session.worker.device) for row in rows]


def _stored(artifact: Artifact | None, model: nn.Module) -> tuple[int, int]:
    """Return how many numbers the training stored, and the bits of each."""
    if isinstance(artifact, AdapterArtifact):
        path, factors = next(iter(artifact.modules.items()))
        dtype = factors.b.dtype
        if not artifact.squeezed and method(artifact.meta.method).widens:
            # What trained has the base's dtype.
            dtype = matrix(model, path).dtype
        return _learnt(artifact), torch.finfo(dtype).bits
    every = model.parameters() if artifact is None else artifact.tensors.values()
    # Some of PEFT's classes save indices too, which training did not choose.
    tensors = [tensor for tensor in every if tensor.is_floating_point()]
    return sum(tensor.numel() for tensor in tensors), torch.finfo(tensors[0].dtype).bits


def _learnt(artifact: AdapterArtifact) -> int:
    """Count the numbers of an adapter that training chose: a frozen A holds nothing of the data."""
    if artifact.squeezed:
        # Both factors now depend on what was trained.
        return artifact.parameters
    kind = method(artifact.meta.method)
    heads = sum(head.numel() for head in artifact.heads.values())
    shapes = {path: LayerShape(f.b.shape[0], f.a.shape[1]) for path, f in artifact.modules.items()}
    return heads + sum(kind.learnt(shapes[path], f.rank) for path, f in artifact.modules.items())
