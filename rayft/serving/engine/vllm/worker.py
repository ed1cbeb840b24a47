"""What vLLM's workers use in place of vLLM's own LoRA manager.

`WorkerManager` has the methods that vLLM's model runners call; they are the same from vLLM 0.26 to 0.32. It
inherits nothing, wraps no layers, and keeps no factors padded to a largest rank. `WorkerExtension` lets the
engine load adapters while the worker generates.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from rayft.artifacts import AdapterArtifact
from rayft.errors import RayftError, ResourceError
from rayft.files import write_file
from rayft.kernels.grouped_lora import SLICES, AdapterTable, Group
from rayft.kernels.segment_lora import BASE_SLOT
from rayft.serving.engine.api import NoRoomError
from rayft.serving.engine.vllm.adapters import AdaptedLinear, Batch, Product, Site
from rayft.serving.engine.vllm.arena import Arena
from rayft.serving.engine.vllm.files import SWITCH_SECONDS, Inbox
from rayft.serving.engine.vllm.image import PIECE, Bytes, Image, entries_in, factors_of, locate
from rayft.serving.engine.vllm.plugin import ANSWERS, CONFIG
from rayft.serving.engine.vllm.shard import Part, Parts, described

__all__ = ["WorkerExtension", "WorkerManager"]

SLOTS = 4096

Problem = list[str]
"""Class and message of an error; empty if there was none. Workers answer with it, because an exception in one
would end the engine."""


class AdaptedMethod(LinearMethodBase):
    """Computes a layer's product and its adapters'; the method that it replaces does everything else."""

    def __init__(self, inner: Any, site: Site, batch: Batch) -> None:
        self._inner, self._linear = inner, AdaptedLinear(site, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_weights(self, *arguments: Any, **options: Any) -> None:
        """Do what the replaced method does."""
        self._inner.create_weights(*arguments, **options)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Do what the replaced method does."""
        self._inner.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute (N × I) → (N × O)."""
        return self._linear(x, bias)


@dataclass(frozen=True)
class _Placed:
    """An adapter on the device."""

    place: int
    nbytes: int
    done: torch.cuda.Event | None
    """Recorded behind the copy to the device; None on a CPU."""


class WorkerManager:
    """The adapters of one worker, by the numbers that vLLM's requests carry."""

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)
        self._device = torch.device(device)
        self._free = list(range(SLOTS - 1, BASE_SLOT, -1))
        self._slots: dict[int, int] = {}
        self._slot_of = np.full(1024, BASE_SLOT, dtype=np.int32)
        self._placed: dict[int, _Placed] = {}
        self._loading: dict[int, Future[_Placed]] = {}
        self._failed: dict[int, Problem] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="rayft-load")
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        # One half is filled while the other is copied to the device.
        self._staging = torch.empty(
            2, PIECE, dtype=torch.uint8, device="cpu", pin_memory=self._stream is not None
        )

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: Any) -> torch.nn.Module:
        """Take the memory of adapters, and add them to the model's linear layers.

        vLLM calls this before it measures how much memory is left for the KV cache.

        Raises:
            ResourceError: if there is not enough memory.
        """
        options = vllm_config.additional_config[CONFIG]
        found = fused_layers(model)
        groups = [Group(inputs, {part.name: part.size for part in parts}) for _, inputs, parts in found]
        try:
            self._table = AdapterTable(
                SLOTS, groups, dtype=vllm_config.model_config.dtype, device=self._device
            )
            self._arena = Arena(int(options["adapter_bytes"]), self._device)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"the GPU has no memory for {options['adapter_bytes']:,} bytes of adapters beside the base; "
                "lower device_bytes"
            ) from error
        scheduler = vllm_config.scheduler_config
        self._batch = Batch(
            self._table,
            tokens=scheduler.max_num_batched_tokens,
            requests=scheduler.max_num_seqs,
            captured=vllm_config.compilation_config.cudagraph_capture_sizes or (),
        )
        self._parts: Parts = tuple(part for _, _, parts in found for part in parts)
        self._inbox = Inbox(self._parts, self._table.dtype)
        for index, (layer, _, parts) in enumerate(found):
            site = Site(index, parts, _product(layer.quant_method, layer), _weight(layer))
            layer.quant_method = AdaptedMethod(layer.quant_method, site, self._batch)
            # Later releases otherwise quantise the input of a quantised layer before it is called.
            layer.requires_unquantized_input = True
        self._batch.warm_up()
        _answer(self._parts)
        return model

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Prepare a step.

        Args:
            requests: the requests' adapters. One that was given as a folder is loaded here if it has to be.
            mapping: `index_mapping` has the number of each token's adapter, 0 for the base. A number that is
                not loaded counts as the base: its request was aborted, and nobody reads the token.
        """
        for request in requests:
            if request.lora_int_id not in self._slots and Path(request.lora_path).is_dir():
                self.add_adapter(request)
        if not requests:
            self._batch.assign(None)
            return
        numbers = np.asarray(mapping.index_mapping, dtype=np.int64)
        largest = int(numbers.max(initial=0))
        self._reserve(largest)
        self._batch.assign(self._slot_of[numbers] if largest else None)

    def add_adapter(self, request: Any) -> bool:
        """Load an adapter from `lora_path` and wait for it; return whether it was not loaded before.

        Raises:
            RayftError: if it can't be loaded.
        """
        number = request.lora_int_id
        if number in self._slots:
            return False
        self._begin(number, request.lora_path)
        self._loading[number].exception()
        if problem := self.loaded(number):
            raise ResourceError(problem[-1])
        return True

    def begin(self, number: int, path: str) -> None:
        """Begin to load an adapter in a thread from a file of `files.Channel`, which is marked at the end."""
        self._begin(number, path).add_done_callback(lambda _: self._inbox.mark(number))

    def loaded(self, number: int) -> Problem | None:
        """Make an adapter usable if it has been read; return None while it is being read."""
        reading = self._loading.get(number)
        if reading is None:
            # Another worker was not ready when this one was asked before.
            return self._failed.get(number, [])
        if not reading.done():
            return None
        del self._loading[number]
        problem = self._use(number, reading)
        if problem:
            self._failed[number] = problem
        return problem

    def view(self, number: int, of: int, rank: int) -> Problem:
        """Make a loaded adapter usable at a lower rank under another number."""
        self._reserve(number)
        whole = self._slots[of]
        try:
            slot = self._take(number)
        except RayftError as error:
            return [type(error).__name__, str(error)]
        self._table.lower(slot, whole, rank)
        return []

    def remove_adapter(self, number: int) -> bool:
        """Free an adapter or a view of one; return whether it was loaded.

        Steps that were launched before still read the factors: what is written there next waits for them.
        """
        self._failed.pop(number, None)
        if reading := self._loading.pop(number, None):
            reading.add_done_callback(self._drop)
        slot = self._slots.pop(number, None)
        if slot is None:
            return False
        self._slot_of[number] = BASE_SLOT
        self._table.clear(slot)
        self._free.append(slot)
        if placed := self._placed.pop(number, None):
            self._arena.give(placed.place, placed.nbytes)
        return True

    def remove_all_adapters(self) -> None:
        """Free all adapters."""
        for number in list(self._slots):
            self.remove_adapter(number)

    def list_adapters(self) -> set[int]:
        """Return the numbers of the loaded adapters."""
        return set(self._slots)

    def pin_adapter(self, number: int) -> bool:
        """Return whether an adapter is loaded: it then stays until it is removed."""
        return number in self._slots

    def supports_tower_connector_lora(self) -> bool:
        """Return False: only the language model has adapters."""
        return False

    # While vLLM warms up and captures graphs it uses adapters without factors, whose rows end after one load.

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Do nothing; vLLM's manager keeps dummies in a cache meanwhile."""
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Add an adapter without factors."""
        if request.lora_int_id not in self._slots:
            self._reserve(request.lora_int_id)
            self._table.clear(self._take(request.lora_int_id))
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Return the rank that vLLM proposes; it makes no difference here."""
        return default_rank

    @property
    def free_bytes(self) -> int:
        """Number of bytes on the device that adapters don't use."""
        return self._arena.free

    def _use(self, number: int, reading: Future[_Placed]) -> Problem:
        """Put an adapter that was read into a slot."""
        try:
            placed = reading.result()
            if placed.done is not None:
                torch.cuda.current_stream(self._device).wait_event(placed.done)
            try:
                slot = self._take(number)
            except BaseException:
                self._arena.give(placed.place, placed.nbytes)
                raise
        except RayftError as error:
            return [type(error).__name__, str(error)]
        except Exception as error:  # noqa: BLE001  (the engine must hear of any)
            return ["ResourceError", f"{type(error).__name__}: {error}"]
        memory = self._arena.memory
        self._table.point(slot, entries_in(memory[placed.place :], len(self._parts)), memory)
        self._placed[number] = placed
        return []

    def _drop(self, reading: Future[_Placed]) -> None:
        """Free an adapter that was removed while it was read."""
        if reading.exception() is None:
            self._arena.give(reading.result().place, reading.result().nbytes)

    def _reserve(self, number: int) -> None:
        while number >= len(self._slot_of):
            self._slot_of = np.concatenate((self._slot_of, np.full_like(self._slot_of, BASE_SLOT)))

    def _take(self, number: int) -> int:
        """Assign a free slot to a number."""
        if not self._free:
            raise NoRoomError(f"{SLOTS - 1} adapters are loaded; lower device_bytes")
        slot = self._free.pop()
        self._slots[number] = slot
        self._slot_of[number] = slot
        return slot

    def _begin(self, number: int, path: str) -> Future[_Placed]:
        """Begin to load an adapter in a thread, from its folder or from a file of `files.Channel`."""
        self._reserve(number)
        steps = torch.cuda.current_stream(self._device) if self._stream is not None else None
        self._loading[number] = self._threads.submit(self._load, Path(path), steps)
        return self._loading[number]

    def _load(self, path: Path, steps: torch.cuda.Stream | None) -> _Placed:
        """Copy an adapter to the device (a thread of its own).

        Whenever this thread needs Python's lock, it waits for the thread that generates, and then that thread
        waits for it. So it makes some calls for each piece, and none for each layer.
        """
        image: Bytes
        if path.is_dir():
            image = Image(factors_of(AdapterArtifact.load(path)), self._parts, self._table.dtype)
        else:
            image = self._inbox.image(path)
        place = self._arena.take(image.nbytes)
        try:
            done = self._copy(image, place, steps)
        except BaseException:
            self._arena.give(place, image.nbytes)
            raise
        return _Placed(place, image.nbytes, done)

    def _copy(self, image: Bytes, place: int, steps: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """Copy an image to its place through pinned memory, on a stream beside the steps'."""
        copied: Sequence[torch.cuda.Event | None] = (None, None)
        if self._stream is not None:
            # Steps that were launched before the place was given back may still read it.
            assert steps is not None
            freed = torch.cuda.Event()
            freed.record(steps)
            self._stream.wait_event(freed)
            copied = torch.cuda.Event(), torch.cuda.Event()
        memory, begin = self._arena.memory[place : place + image.nbytes], 0
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for half, done in cycle(zip(self._staging, copied, strict=True)):
                if done is not None:
                    # The piece that was there before; at once if there was none.
                    done.synchronize()
                count = image.read(half, begin)
                if begin == 0:
                    locate(entries_in(half, len(self._parts)), memory.data_ptr())
                memory[begin : begin + count].copy_(half[:count], non_blocking=True)
                if done is not None:
                    done.record(self._stream)
                begin += count
                if begin >= image.nbytes:
                    break
        if done is not None:
            # The next load writes to the pinned memory.
            done.synchronize()
        return done


class WorkerExtension:
    """Methods that the engine calls in every worker (vLLM's `worker_extension_cls`), between two steps."""

    model_runner: Any

    def rayft_load(self, number: int, path: str) -> None:
        """Begin to load an adapter (see `WorkerManager.begin`)."""
        self.model_runner.lora_manager.begin(number, path)

    def rayft_loaded(self, number: int) -> Any:
        """Return whether an adapter is usable (see `WorkerManager.loaded`)."""
        return self.model_runner.lora_manager.loaded(number)

    def rayft_view(self, number: int, of: int, rank: int) -> Any:
        """Make an adapter usable at a lower rank (see `WorkerManager.view`)."""
        return self.model_runner.lora_manager.view(number, of, rank)

    def rayft_unload(self, numbers: Sequence[int]) -> int:
        """Free adapters; return the number of bytes that are free then."""
        for number in numbers:
            self.model_runner.lora_manager.remove_adapter(number)
        return int(self.model_runner.lora_manager.free_bytes)


FORWARDS = tuple(kind.forward for kind in (ReplicatedLinear, ColumnParallelLinear, RowParallelLinear))
"""The forwards that compute the product by the layer's `quant_method`, which has the adapters; others may use
the weight itself."""


def fused_layers(model: Any) -> list[tuple[Any, int, tuple[Part, ...]]]:
    """Find the linear layers of vLLM's model: each with its inputs here, and what it fuses.

    Layers that can't have adapters here are left out: more fused layers than the kernels take, one layer of
    the files that several GPUs divide otherwise than its outputs or inputs, the output layer, and
    layers whose weight vLLM also reads elsewhere than in their product.
    """
    # Attention over a latent (MLA) splits the weight of this layer, and calls the layer for prompts only.
    absorbed = {
        one.kv_b_proj for one in model.modules() if hasattr(one, "kv_b_proj") and hasattr(one, "kv_lora_rank")
    }
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    found = []
    for path, layer in model.named_modules():
        parent, _, child = path.rpartition(".")
        if not isinstance(layer, LinearBase) or child == "lm_head" or layer in absorbed:
            continue
        if type(layer).forward not in FORWARDS:
            continue
        names = [f"{parent}.{name}" if parent else name for name in packed.get(child, [child])]
        sizes = getattr(layer, "output_sizes", None)
        if len(names) > SLICES or (layer.tp_size > 1 and len(names) == 1 and sizes and len(sizes) > 1):
            continue
        inputs = layer.input_size_per_partition if isinstance(layer, RowParallelLinear) else layer.input_size
        found.append((layer, int(inputs), tuple(_parts(layer, names))))
    return found


def _parts(layer: Any, names: Sequence[str]) -> Iterator[Part]:
    """Describe what a layer fuses, and which outputs or inputs of each this worker has."""
    sizes = getattr(layer, "output_sizes", None) if len(names) > 1 else None
    for index, name in enumerate(names):
        size = int(sizes[index] if sizes else layer.output_size)
        if isinstance(layer, RowParallelLinear):
            width = layer.input_size_per_partition
            first = layer.tp_rank * width
            yield Part(name, (size, layer.input_size), (0, size), (first, first + width))
        elif isinstance(layer, ColumnParallelLinear):
            here = size // layer.tp_size
            # If there are fewer heads of keys and values than GPUs, several GPUs have the same ones, and the
            # layer's sizes count them as often.
            shared = int(layer.num_kv_head_replicas) if index and isinstance(layer, QKVParallelLinear) else 1
            first = layer.tp_rank // shared * here
            yield Part(name, (size // shared, layer.input_size), (first, first + here), (0, layer.input_size))
        else:
            yield Part(name, (size, layer.input_size), (0, size), (0, layer.input_size))


def _product(inner: Any, layer: torch.nn.Module) -> Product:
    apply: Callable[..., torch.Tensor] = inner.apply
    return lambda x, bias: apply(layer, x, bias)


def _weight(layer: Any) -> Callable[[], torch.Tensor] | None:
    """Return what gives a layer's weight (O × I), which may be replaced later; None if it is quantised."""
    if type(layer.quant_method) is not UnquantizedLinearMethod:
        return None
    return lambda: layer.weight


def _answer(parts: Parts) -> None:
    """Let the engine know that the plugin is active in this worker, and what the worker has."""
    if folder := os.environ.get(ANSWERS):
        write_file(Path(folder) / f"{os.getpid()}.json", described(parts))
