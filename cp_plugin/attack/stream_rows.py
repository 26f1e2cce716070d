"""Rows of delta for the images of a stream: found or made as the images come.

Nothing is known of a stream before it is read. A row of one's own is found by the hash of the
image's pixels and made where there is none; that of a class by the label in the sample. So neither
a length nor an order is asked for, and a shuffled stream, or one that several workers share, has
the same rows. Rows in memory do not grow with the stream: those of single images lie in a file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.rows import Rows
from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.data.labels import UNLABELLED

LEAST = 1024
"""Rows of single images that are made room for at once; later half of those that are there."""
MOST_CLASSES = 1 << 16
"""A label from here on is taken for the number of something else."""


class NewRows(Rows):
    """Rows that are made when the first image comes that needs them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        generator: torch.Generator | None,
        begun_from: Poison | None,
    ) -> None:
        """Say how rows start.

        Args:
            shape: (C, H, W) of a row.
            generator: draws the noise that they start from; None: they start from zero.
            begun_from: a poison whose rows are taken over where it has one for an image.
        """
        super().__init__(torch.empty(0, dtype=torch.int64))
        self.shape = shape
        self._generator, self._begun_from = generator, begun_from
        self._given = 0
        """Rows that images have been told so far."""
        self._made = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return what is needed to go on, beside delta."""
        drawn = {} if self._generator is None else {"start": self._generator.get_state()}
        return {**super().tensors(), **drawn}

    def resume(self, tensors: dict[str, Tensor], count: int) -> None:
        """Go on from what `tensors` gave.

        Args:
            tensors: the state.
            count: rows that delta has.
        """
        self._given = self._made = count
        if self._generator is not None:
            self._generator.set_state(tensors["start"])
        if "keys" in tensors:
            self.restore(tensors["keys"])

    def restore(self, keys: Tensor) -> None:
        """Take the keys of an earlier run's snapshot."""
        super().restore(keys)
        self._given = self._made = int((keys != 0).sum())

    def provide(self, perturbation: Perturbation) -> None:
        """Make the rows that images have been told since the last call."""
        first, end = self._made, self._given
        if first == end:
            return
        self._make_room(perturbation)
        if self._generator is not None:
            perturbation.draw(first, end, self._generator)
        if self._begun_from is not None:
            theirs, rows = self._rows_of(self._begun_from, first, end), torch.arange(first, end)
            taken = theirs >= 0
            perturbation.write(rows[taken], self._begun_from.perturbation.gather(theirs[taken]))
        self._made = end

    def _make_room(self, perturbation: Perturbation) -> None:
        """Let there be rows enough."""
        if self._given > len(perturbation):
            perturbation.grow(self._given)

    def _rows_of(self, poison: Poison, first: int, end: int) -> Tensor:
        """Return a poison's rows for the images or classes of rows that are made, int64."""
        raise NotImplementedError


class KeyedRows(NewRows):
    """One row an image, found by the hash of its pixels; identical images share one."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        generator: torch.Generator | None,
        begun_from: Poison | None,
    ) -> None:
        """Begin without rows; the arguments are those of `NewRows`."""
        super().__init__(shape, generator, begun_from)
        self._keys = torch.zeros(0, dtype=torch.int64)
        self.keys = self._keys

    def of_batch(self, batch: Batch) -> Tensor:
        """Return the rows of the batch's images, int64 (B), new ones for images not seen yet."""
        rows = self._row_of_key.find(batch.keys)
        for place in (rows < 0).nonzero().flatten().tolist():
            key = int(batch.keys[place])
            rows[place] = self._row_of_key.claim(key, self._given)
            if rows[place] == self._given:
                self._take(key)
        return rows

    def restore(self, keys: Tensor) -> None:
        """Take the keys of an earlier run's snapshot."""
        super().restore(keys)
        self._keys = keys

    def _take(self, key: int) -> None:
        if self._given == len(self._keys):
            more = self._keys.new_zeros(max(LEAST, len(self._keys) // 2))
            self._keys = self.keys = torch.cat([self._keys, more])
        self._keys[self._given] = key
        self._given += 1

    def _make_room(self, perturbation: Perturbation) -> None:
        """Let there be a row for each key that there is room for: tables grow seldom."""
        if len(self._keys) > len(perturbation):
            perturbation.grow(len(self._keys))

    def _rows_of(self, poison: Poison, first: int, end: int) -> Tensor:
        return poison.rows(keys=self._keys[first:end].tolist())


class ClassRows(NewRows):
    """One row a class, by the label in the sample; an unlabelled image has none."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        generator: torch.Generator | None,
        begun_from: Poison | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        """Begin with the rows of all classes that the stream names.

        Args:
            shape: as of `NewRows`.
            generator: as of `NewRows`.
            begun_from: as of `NewRows`.
            classes: their names; None: they are numbered, and there are as many as labels say.
        """
        super().__init__(shape, generator, begun_from)
        self._names = classes
        self._given = len(classes or ())

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that have a row."""
        return self._names or tuple(map(str, range(self._given)))

    def of_batch(self, batch: Batch) -> Tensor:
        """Return the rows of the batch's images, int64 (B), -1 where unlabelled.

        Raises:
            UserError: a label is larger than the classes are many.
        """
        assert batch.labels is not None
        rows = batch.labels.clamp(min=UNLABELLED)
        last = int(rows.max())
        if last >= (MOST_CLASSES if self._names is None else len(self._names)):
            known = "no names of classes" if self._names is None else f"{len(self._names)} classes"
            raise UserError(
                f"an image of the stream has the label {last}, and the stream has {known}; give "
                "labels from 0 on, and the names of all classes as the stream's attribute "
                "`classes`."
            )
        self._given = max(self._given, last + 1)
        return rows

    def _rows_of(self, poison: Poison, first: int, end: int) -> Tensor:
        return poison.rows(classes=self.classes[first:end])
