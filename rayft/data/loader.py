"""The rows that each worker trains on at each step, which depend only on the seed and the step.

So a run that continues from a checkpoint trains on the same rows as if it had not been interrupted, and a run
on more workers takes the same optimizer steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

from rayft.data.pack import AnyEncoded, Row, Rows, rows_of
from rayft.data.texts import lengths_of
from rayft.errors import DataError
from rayft.numerics import derive_seed

__all__ = ["RowStream"]

RECENT = 64
"""An epoch's rows are kept until so many steps were taken without them, of all runs together. So packed runs
that are epochs apart don't pack their rows anew at each step."""


class RowStream:
    """An endless stream of rows. The epochs follow each other, and each is shuffled and packed anew.

    Args:
        encoded: the examples of the train part.
        length: tokens of a row.
        rows_per_step: rows of an optimizer step, summed over all workers and micro-batches.
        seed: decides the order of each epoch.
        packing: whether examples share rows. Labelled examples and images never do.

    Raises:
        DataError: if there are no examples, or one is longer than a row.
    """

    def __init__(
        self,
        encoded: Sequence[AnyEncoded],
        length: int,
        rows_per_step: int,
        seed: int,
        *,
        packing: bool = True,
    ) -> None:
        if not encoded:
            raise DataError("there are no examples to train on; check data.train")
        self.encoded, self.length, self.seed = encoded, length, seed
        self.rows_per_step = rows_per_step
        self.packing = packing
        self._starts = [0]
        self._epochs: dict[int, Rows] = {}
        self._used: dict[int, int] = {}
        """Epoch → the last step that had rows of it, among all that were asked for."""
        self._asked = 0

    @cached_property
    def most_segments(self) -> int:
        """The most segments that a packed row can have: as many examples as the shortest, and the padding."""
        return self.length // max(1, int(lengths_of(self.encoded).min())) + 1

    def rows(self, step: int, rank: int = 0, world: int = 1) -> list[Row]:
        """Return the rows of optimizer step `step`, counted from 0, or every `world`-th of them."""
        self._asked += 1
        first = step * self.rows_per_step
        found: list[Row] = []
        taken, epoch = 0, self._epoch_of(first)
        while taken < self.rows_per_step:
            rows = self.epoch(epoch)
            skip = max(0, first - self._starts[epoch])
            end = min(len(rows), skip + self.rows_per_step - taken)
            found += rows[skip + (rank - taken) % world : end : world]
            taken, epoch = taken + end - skip, epoch + 1
        return found

    def first_step(self, epoch: int) -> int:
        """Return the first optimizer step that has no row of an epoch before this one, counted from 0."""
        while len(self._starts) <= epoch:
            self.epoch(len(self._starts) - 1)
        return -(-self._starts[epoch] // self.rows_per_step)

    def share(self, step: int, rank: int, world: int, accumulation: int) -> list[list[Row]]:
        """Return the part of one worker in a step: `accumulation` micro-batches with the same number of rows.

        Args:
            step: optimizer step, counted from 0.
            rank: the worker.
            world: number of workers.
            accumulation: number of micro-batches that a worker accumulates in a step.

        Raises:
            DataError: if `rows_per_step` can't be divided by `world` · `accumulation`.
        """
        micro, rest = divmod(self.rows_per_step, world * accumulation)
        if rest or not micro:
            raise DataError(
                f"{self.rows_per_step} rows a step can't be shared by {world} workers x {accumulation} "
                f"accumulation steps: take a multiple of {world * accumulation}"
            )
        mine = self.rows(step, rank, world)
        return [mine[start : start + micro] for start in range(0, len(mine), micro)]

    def _epoch_of(self, row: int) -> int:
        """Return the epoch that has a row of the stream. Epochs differ in their number of rows."""
        while self._starts[-1] <= row:
            self.epoch(len(self._starts) - 1)
        return next(epoch for epoch, end in enumerate(self._starts[1:]) if row < end)

    def epoch(self, epoch: int) -> Rows:
        """Return the rows of an epoch, counted from 0."""
        if epoch not in self._epochs:
            order = list(range(len(self.encoded)))
            random.Random(derive_seed(self.seed, epoch)).shuffle(order)
            rows = rows_of(self.encoded, self.length, packing=self.packing, order=order)
            if epoch == len(self._starts) - 1:
                self._starts.append(self._starts[-1] + len(rows))
            self._epochs = {
                number: kept
                for number, kept in self._epochs.items()
                if self._used[number] > self._asked - RECENT
            }
            self._epochs[epoch] = rows
        self._used[epoch] = self._asked
        return self._epochs[epoch]
