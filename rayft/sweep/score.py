"""A job that scores an adapter, or the base, on parts of the data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import nn

from rayft.artifacts import AdapterArtifact
from rayft.data.source import Example
from rayft.data.template import Style, prompt_ids
from rayft.evaluate.tasks import Packed, answer, expected_answers, score, score_answers
from rayft.identity import UNKNOWN, Identity
from rayft.models.fuse import plainly
from rayft.models.inject import attach, clear
from rayft.models.packed import Layout, attached, pack
from rayft.peft.folder import load_adapter
from rayft.train.run import RunConfig
from rayft.train.session import Session

if TYPE_CHECKING:
    from rayft.sweep.lane import Lane

__all__ = [
    "MOST_TOGETHER",
    "TOGETHER",
    "ScoreRequest",
    "failures_text",
    "questions",
    "room",
    "run_score",
    "sample",
    "score_together",
]

TOGETHER, MOST_TOGETHER = 512, 4096
"""The fewest and the most questions, of several adapters, that a GPU takes up at once."""
BATCHES = 4
"""Batches of questions that a CPU takes up at once. The scores are kept when all of them are answered."""
ROOM = 0.3
"""Share of a GPU's free memory for the keys and values of their tokens."""


@dataclass(frozen=True)
class ScoreRequest:
    """Score an adapter, or the base alone, on parts of the data."""

    kind: ClassVar[str] = "score"
    resumable: ClassVar[bool] = False
    folders: ClassVar[tuple[Path, ...]] = ()

    run: RunConfig
    """Base, data and evaluation settings."""
    parts: tuple[Literal["val", "test"], ...]
    adapter: str | None = None
    """Folder of the adapter; by default the base alone is scored."""
    style: Style = "as_is"
    expected: Identity = UNKNOWN
    """Identity of data and base, as the driver has read them."""
    examples: int | None = None
    """Most examples of a part that are scored (`sample`); by default all."""

    @property
    def pack(self) -> str:
        """What requests have in common whose questions one batch can have; empty if this one's can't."""
        run = self.run
        if run.model.task != "causal_lm" or run.scale.workers > 1 or run.scale.zero == 3:
            return ""
        shared = run.model_dump(mode="json", include={"model", "data", "scale", "evaluate"})
        return json.dumps(["score", shared, self.expected.base], sort_keys=True)

    def __call__(self, lane: Lane) -> dict[str, list[float]]:
        """Return part → the score of each example, in the order of the data (all workers call it)."""
        session = lane.session(self.run, self.expected, whole=True)
        return run_score(self, session, lane.note, lane.progress)


def sample(total: int, most: int | None) -> list[int]:
    """Return the indices of at most `most` of `total` examples, at equal distances."""
    count = total if most is None else min(most, total)
    return [index * total // count for index in range(count)]


def run_score(
    request: ScoreRequest,
    session: Session,
    note: Callable[[str], object] = lambda _: None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, list[float]]:
    """Return part → the score of each example, in the order of the data (all workers call it).

    Args:
        request: what is scored.
        session: its base and data.
        note: called by the first worker with a sentence about answers for which the scorer raised an error.
        progress: called with the number of examples that are scored, and that of all.
    """
    model, worker = session.loaded.model, session.worker
    found: dict[str, list[float]] = {}
    with _answering(model):
        if request.adapter is not None:
            attach(model, load_adapter(session.home.local(request.adapter)))
        model.eval()
        chosen = {part: _chosen(getattr(session.parts, part), request.examples) for part in request.parts}
        watch = _Watch(sum(map(len, chosen.values())), worker.world, progress)
        for part, examples in chosen.items():
            values, problem = _score(examples[worker.rank :: worker.world], request, session, watch.add)
            found[part], problems = _gather(values, problem, len(examples), session)
            if problems and worker.rank == 0:
                note(f"{_name(request)}, {part}: {problems}")
    return found


@contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """Clear a model before and after the block, in which it computes without fused modules.

    Those are for training: a call of one costs the host more than one of plain operations.
    """
    with plainly(model):
        clear(model)
        try:
            yield
        finally:
            clear(model)


def questions(request: ScoreRequest, session: Session) -> int:
    """Return the number of questions that are answered for a request."""
    return sum(len(sample(len(getattr(session.parts, part)), request.examples)) for part in request.parts)


def room(session: Session, batch_size: int) -> int:
    """Return how many questions, of several adapters, are taken up at once: on a GPU, those that fit.

    Args:
        session: base and data.
        batch_size: questions of a batch (`evaluate.batch_size`).
    """
    device = torch.device(session.worker.device)
    if device.type != "cuda":
        return BATCHES * batch_size
    config = session.loaded.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * session.loaded.model.dtype.itemsize
    longest = max((len(getattr(one, "input_ids", ())) for one in session.val), default=1)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(TOGETHER, min(MOST_TOGETHER, int(ROOM * free / (token * longest))))


def score_together(
    requests: Mapping[str, ScoreRequest],
    adapters: Mapping[str, AdapterArtifact | None],
    session: Session,
    note: Callable[[str], object],
    advance: Callable[[int], None],
) -> dict[str, dict[str, list[float]]]:
    """Score several adapters and the base: one batch has questions for all of them.

    Args:
        requests: key → request; base, data and evaluation settings are the same.
        adapters: key → adapter; None for the base.
        session: base and data.
        note: called with a sentence about answers for which the scorer raised an error.
        advance: called with the number of questions that were answered.

    Returns:
        Key → part → the score of each example.
    """
    loaded, parts, started = session.loaded, session.parts, time.perf_counter()
    evaluate, layout = next(iter(requests.values())).run.evaluate, Layout()
    numbers = {key: slot for slot, key in enumerate(requests)}
    shots = parts.train[: evaluate.shots]

    # All adapters are asked the same questions.
    @cache
    def chosen(part: str, most: int | None) -> list[Example]:
        return _chosen(getattr(parts, part), most)

    @cache
    def prompts_of(part: str, most: int | None, style: Style) -> list[tuple[int, ...]]:
        return [prompt_ids(example, loaded.tokenizer, style, shots) for example in chosen(part, most)]

    @cache
    def expected(part: str, most: int | None) -> list[str]:
        return expected_answers(chosen(part, most), loaded.tokenizer)

    asked = [(key, part) for key, one in requests.items() for part in one.parts if len(getattr(parts, part))]
    prompts, owners = list[tuple[int, ...]](), list[int]()
    for key, part in asked:
        own = prompts_of(part, requests[key].examples, requests[key].style)
        prompts += own
        owners += [numbers[key]] * len(own)
    batch = evaluate.batch_size
    if session.worker.device != "cpu":
        batch = max(batch, room(session, batch))
    with _answering(loaded.model):
        slots = {numbers[key]: attached(loaded.model, found) for key, found in adapters.items() if found}
        pack(loaded.model, slots, layout)
        loaded.model.eval()
        packed = Packed(layout, owners)
        answers = iter(_answers(session, prompts, evaluate.max_new_tokens, batch, packed, advance))
    found: dict[str, dict[str, list[float]]] = {key: {} for key in requests}
    for key, part in asked:
        which = part, requests[key].examples
        examples = chosen(*which)
        said = [*islice(answers, len(examples))]
        scores = score_answers(examples, said, expected(*which), parts.scorer, started)
        found[key][part] = [*scores.values]
        if text := failures_text(scores.failures, len(examples), scores.problem):
            note(f"{_name(requests[key])}, {part}: {text}")
    return found


def _answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch: int,
    packed: Packed,
    advance: Callable[[int], None],
) -> list[str]:
    """Answer prompts in batches that fit into the device's memory."""
    loaded, done = session.loaded, 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        advance(number)

    while True:
        try:
            return answer(loaded.model, loaded.tokenizer, prompts, max_new_tokens, batch, count, packed)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        advance(-done)
        done, batch = 0, -(-batch // 2)
        torch.cuda.empty_cache()


class _Watch:
    """Counts the examples that this worker has scored, and passes on those of all workers."""

    def __init__(self, total: int, world: int, progress: Callable[[int, int], object]) -> None:
        self._total, self._world, self._progress = total, world, progress
        self._done = 0

    def add(self, count: int) -> None:
        """Count some more."""
        self._done += count
        self._progress(min(self._done * self._world, self._total), self._total)


def _chosen(examples: Sequence[Example], most: int | None) -> list[Example]:
    return [examples[index] for index in sample(len(examples), most)]


def _score(
    examples: Sequence[Example], request: ScoreRequest, session: Session, add: Callable[[int], None]
) -> tuple[list[float], tuple[int, str]]:
    """Return the scores; and for how many answers the scorer raised an error, and the first of the errors."""
    if not examples:
        return [], (0, "")
    evaluate = request.run.evaluate
    scores = score(
        session.loaded.model,
        session.loaded.tokenizer,
        examples,
        session.parts.scorer,
        style=request.style,
        shots=session.parts.train[: evaluate.shots],
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        advance=add,
    )
    return list(scores.values), (scores.failures, scores.problem)


def _gather(
    values: list[float], problem: tuple[int, str], total: int, session: Session
) -> tuple[list[float], str]:
    """Exchange the workers' scores; return them in the order of the data, and a text about errors."""
    world = session.worker.world
    shares: list[Any] = [(values, problem)]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, (values, problem))
    failures = sum(count for _, (count, _) in shares)
    first = next((why for _, (count, why) in shares if count), "")
    ordered = [shares[index % world][0][index // world] for index in range(total)]
    return ordered, failures_text(failures, total, first)


def _name(request: ScoreRequest) -> str:
    if request.adapter is None:
        return "base" if request.style == "as_is" else f"base, {request.style}"
    # Of a trial: its key, and `adapter`.
    return "/".join(Path(request.adapter).parts[-2:])


def failures_text(failures: int, total: int, first: str) -> str:
    """Return a sentence about answers for which the scorer raised an error; empty if there are none."""
    if not failures:
        return ""
    return f"the scorer raised an error for {failures} of {total} answers, which score 0; the first: {first}"
