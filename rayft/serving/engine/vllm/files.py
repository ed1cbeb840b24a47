"""The file by which an engine passes adapters to its workers, which are other processes.

It holds the image of one adapter for each worker, lies in shared memory and is used for one adapter after the
other, so a load allocates, maps and frees nothing. Its name is deleted as soon as all workers have opened it:
whatever ends the processes, the file ends with them. If they are killed before, the next engine deletes it.

    byte 0         a mark for each image: the number of the adapter that the worker read last (int64)
    byte HEADER    length of the text that follows (int64), and the text: key of a worker → index of its mark,
                   where its image begins behind the text, and the image's size (JSON)
    then           the images
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ResourceError
from rayft.serving.engine.vllm.arena import aligned
from rayft.serving.engine.vllm.image import PIECE, Image, factors_of
from rayft.serving.engine.vllm.shard import Parts, key

__all__ = ["SWITCH_SECONDS", "Channel", "Inbox"]

SHARED = Path("/dev/shm")  # noqa: S108  (the name of POSIX shared memory on Linux)
PREFIX = "rayft-adapter-"
YOUNG_SECONDS = 60.0
"""Age of a file up to which its engine may not have locked it yet."""
SWITCH_SECONDS = 0.0005
"""Interval at which Python's threads give way to each other in the processes at both ends; ten times as often
as by default. While a thread writes or reads an adapter, the thread that generates or answers waits no longer
than this whenever it needs the interpreter."""
KEPT = 256 * 2**20
"""The most bytes that the file keeps from one adapter to the next."""
HEADER = 4096
NUMBER = struct.Struct("<q")


class Channel:
    """The engine's end of the file. It passes one adapter at a time, and its calls follow each other."""

    def __init__(self, workers: Iterable[Parts], dtype: torch.dtype) -> None:
        """Make no file yet.

        Args:
            workers: what each of them has. Those that need the same bytes share an image.
            dtype: the engine's dtype, to which A and B are cast.
        """
        self._workers = {key(parts, dtype): parts for parts in workers}
        assert len(self._workers) * NUMBER.size <= HEADER, "more workers than marks"
        self._dtype = dtype
        self._piece = torch.empty(PIECE, dtype=torch.uint8)
        self._handle: int | None = None
        self._path = Path()
        self._named = False
        self._size = 0

    def write(self, artifact: AdapterArtifact) -> Path:
        """Write an adapter in place of the former one; return the path that the workers open.

        Raises:
            ArtifactError: if the workers can't serve it.
            ResourceError: if there is no space for the file.
        """
        factors = factors_of(artifact)
        images = {name: Image(factors, parts, self._dtype) for name, parts in self._workers.items()}
        places, end = {}, 0
        for mark, (name, image) in enumerate(images.items()):
            places[name] = mark, end, image.nbytes
            end += aligned(image.nbytes)
        text = json.dumps(places).encode()
        first = _first(len(text))
        try:
            handle = self._opened(first + end)
            _write(handle, bytes(HEADER) + NUMBER.pack(len(text)) + text, 0)
            for name, image in images.items():
                self._copy(image, handle, first + places[name][1])
        except OSError as error:
            path = self._path
            self.close()
            raise ResourceError(
                f"an adapter of {end:,} bytes can't be passed to the engine's processes through {path} "
                f"({error}); free space there"
            ) from error
        self._size = max(self._size, first + end)
        return self._path

    def was_read(self, number: int) -> bool:
        """Return whether the workers have read an adapter; it costs some microseconds.

        Of workers that share an image, one may not have.
        """
        assert self._handle is not None, "nothing was written"
        count = len(self._workers)
        return os.pread(self._handle, count * NUMBER.size, 0) == NUMBER.pack(number) * count

    def settle(self, *, opened: bool) -> None:
        """End a load: free what the file has beyond `KEPT`.

        Args:
            opened: whether all workers have opened the file, which then needs no name any more.
        """
        if self._handle is None:
            return
        if opened and self._named:
            self._path.unlink(missing_ok=True)
            self._named = False
        if self._size > KEPT:
            os.ftruncate(self._handle, KEPT)
            self._size = KEPT

    def close(self) -> None:
        """Delete the file, and free its memory although workers have it open."""
        if self._handle is None:
            return
        handle, self._handle, self._size = self._handle, None, 0
        os.ftruncate(handle, 0)
        os.close(handle)
        if self._named:
            self._path.unlink(missing_ok=True)

    def _opened(self, size: int) -> int:
        """Return the file, or a new one if it can't grow to a size where it is."""
        if self._handle is not None and size <= self._size:
            return self._handle
        grown = size - self._size if self._path.parent == SHARED else size
        folder = _folder(grown)
        if self._handle is None or self._path.parent != folder:
            self.close()
            _delete_left(folder)
            # In case that no file can be made there.
            self._path = folder
            handle, place = tempfile.mkstemp(prefix=PREFIX, dir=folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._handle, self._path, self._named = handle, Path(place), True
        return self._handle

    def _copy(self, image: Image, handle: int, place: int) -> None:
        """Write an image piece by piece.

        The file is not mapped: to touch the pages of a map for the first time and to end it takes longer than
        to copy, and the latter keeps Python's lock.
        """
        begin = 0
        while begin < image.nbytes:
            count = image.read(self._piece, begin)
            _write(handle, self._piece.numpy()[:count], place + begin)
            begin += count


class Inbox:
    """A worker's end of the file."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        """Open nothing yet.

        Args:
            parts: what the worker has.
            dtype: the dtype of its A and B.
        """
        self._key = key(parts, dtype)
        self._path: Path | None = None
        self._handle, self._mark = -1, 0

    def image(self, path: Path) -> Written:
        """Return the image for this worker that was written last. The file stays open until another is."""
        if path != self._path:
            handle = os.open(path, os.O_RDWR)
            if self._path is not None:
                os.close(self._handle)
            self._path, self._handle = path, handle
        (length,) = NUMBER.unpack(os.pread(self._handle, NUMBER.size, HEADER))
        places = json.loads(os.pread(self._handle, length, HEADER + NUMBER.size))
        self._mark, begin, nbytes = places[self._key]
        return Written(self._handle, _first(length) + begin, nbytes)

    def mark(self, number: int) -> None:
        """Let the engine know that an adapter was read, or that it can't be."""
        if self._path is not None:
            os.pwrite(self._handle, NUMBER.pack(number), self._mark * NUMBER.size)


class Written:
    """The bytes of an image in a file (see `rayft.serving.engine.vllm.image.Bytes`)."""

    def __init__(self, handle: int, place: int, nbytes: int) -> None:
        self._handle, self._place, self.nbytes = handle, place, nbytes

    def read(self, memory: torch.Tensor, begin: int) -> int:
        """Read a piece without Python's lock."""
        count = min(len(memory), self.nbytes - begin)
        target: Any = memory.numpy()[:count]
        if os.preadv(self._handle, [target], self._place + begin) != count:
            raise OSError("the file of an adapter is too short")
        return count


def _first(length: int) -> int:
    """Return where the images begin behind a text."""
    return aligned(HEADER + NUMBER.size + length)


def _write(handle: int, numbers: Any, place: int) -> None:
    """Write all bytes of a buffer; a file system without space takes some of them first."""
    rest = memoryview(numbers)
    while rest:
        count = os.pwrite(handle, rest, place)
        rest, place = rest[count:], place + count


def _delete_left(folder: Path) -> None:
    """Delete the files of engines that were killed: nobody holds their locks."""
    for path in folder.glob(f"{PREFIX}*"):
        # Some may be another user's, or be deleted meanwhile.
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle).st_mtime > YOUNG_SECONDS:
                    path.unlink()
            finally:
                os.close(handle)


def _folder(size: int) -> Path:
    """Return the folder of shared memory, or that of temporary files if there is too little of it."""
    roomy = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 2 * size
    return SHARED if roomy else Path(tempfile.gettempdir())
