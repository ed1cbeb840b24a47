"""What vLLM's workers use in place of vLLM's own LoRA manager.

`WorkerManager` has the methods that vLLM's model runners call; they are the same from vLLM 0.26 to 0.32. It
inherits nothing, wraps no layers, and keeps no factors padded to a largest rank. `WorkerExtension` lets the
engine load adapters while the worker generates.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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

from rayft.errors import ArtifactError, RayftError, ResourceError
from rayft.files import write_file
from rayft.kernels.grouped_lora import SLICES, UNIT, WIDEST, AdapterTable, Group
from rayft.kernels.segment_lora import BASE_SLOT, SlotFactors
from rayft.serving.engine.api import NoRoomError
from rayft.serving.engine.vllm.adapters import AdaptedLinear, Batch, Product, Site
from rayft.serving.engine.vllm.arena import Arena, aligned
from rayft.serving.engine.vllm.files import read
from rayft.serving.engine.vllm.plugin import ANSWERS, CONFIG
from rayft.serving.engine.vllm.shard import Part, shard

__all__ = ["WorkerExtension", "WorkerManager"]

SLOTS = 4096
STAGING = 32 * 2**20
"""Bytes that are copied to the device at once."""

SWITCH_SECONDS = 0.0005
"""Interval at which Python's threads give way to each other; ten times as often as by default."""

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
    factors: dict[str, SlotFactors]
    done: torch.cuda.Event | None
    """Recorded behind the copy to the device; None on a CPU."""


class WorkerManager:
    """The adapters of one worker, by the numbers that vLLM's requests carry."""

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        # While an adapter is read, the thread that generates waits no longer than this for the interpreter.
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
        self._staging: torch.Tensor | None = None

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
        self._parts: dict[str, Part] = {}
        for index, (layer, _, parts) in enumerate(found):
            site = Site(index, parts, _product(layer.quant_method, layer), _weight(layer))
            layer.quant_method = AdaptedMethod(layer.quant_method, site, self._batch)
            # Later releases otherwise quantise the input of a quantised layer before it is called.
            layer.requires_unquantized_input = True
            self._parts |= {part.name: part for part in parts}
        self._batch.warm_up()
        _answer({name: part.shape for name, part in self._parts.items()})
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
        self.begin(number, request.lora_path)
        self._loading[number].exception()
        if problem := self.loaded(number):
            raise ResourceError(problem[-1])
        return True

    def begin(self, number: int, path: str) -> None:
        """Begin to load an adapter in a thread, from a folder or a file of `files.written`."""
        self._reserve(number)
        steps = torch.cuda.current_stream(self._device) if self._stream is not None else None
        self._loading[number] = self._threads.submit(self._load, Path(path), steps)

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
        try:
            self._fill(number, {name: _at_rank(f, rank) for name, f in self._placed[of].factors.items()})
        except RayftError as error:
            return [type(error).__name__, str(error)]
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
            self._fill(request.lora_int_id, {})
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
                self._fill(number, placed.factors)
            except BaseException:
                self._arena.give(placed.place, placed.nbytes)
                raise
        except RayftError as error:
            return [type(error).__name__, str(error)]
        except Exception as error:  # noqa: BLE001  (the engine must hear of any)
            return ["ResourceError", f"{type(error).__name__}: {error}"]
        self._placed[number] = placed
        return []

    def _drop(self, reading: Future[_Placed]) -> None:
        """Free an adapter that was removed while it was read."""
        if reading.exception() is None:
            self._arena.give(reading.result().place, reading.result().nbytes)

    def _reserve(self, number: int) -> None:
        while number >= len(self._slot_of):
            self._slot_of = np.concatenate((self._slot_of, np.full_like(self._slot_of, BASE_SLOT)))

    def _fill(self, number: int, factors: Mapping[str, SlotFactors]) -> None:
        if not self._free:
            raise NoRoomError(f"{SLOTS - 1} adapters are loaded; lower device_bytes")
        slot = self._free.pop()
        self._table.set(slot, factors)
        self._slots[number] = slot
        self._slot_of[number] = slot

    def _load(self, path: Path, steps: torch.cuda.Stream | None) -> _Placed:
        """Read an adapter and copy it to the device (a thread of its own)."""
        mine: dict[str, SlotFactors] = {}
        for name, whole in read(path).items():
            part = self._parts.get(name)
            if part is None:
                raise ArtifactError(
                    f"vLLM's model has no linear layer {name} that can have an adapter; train the adapter on "
                    "other layers, or serve it with engine: cpu"
                )
            _check(whole, part)
            if (here := shard(whole, part)) is not None:
                mine[name] = here
        layout = _Layout(self._table.dtype)
        for name, factors in mine.items():
            layout.add(name, factors)
        place = self._arena.take(layout.nbytes)
        try:
            done = self._copy(layout, place, steps)
        except BaseException:
            self._arena.give(place, layout.nbytes)
            raise
        return _Placed(place, layout.nbytes, layout.views(self._arena.memory[place:], mine), done)

    def _copy(self, layout: _Layout, place: int, steps: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """Copy factors to their place through pinned memory, on a stream beside the steps'."""
        if self._staging is None or len(self._staging) < layout.largest:
            size = max(STAGING, layout.largest)
            self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
        event = None
        if self._stream is not None:
            # Steps that were launched before the place was given back may still read it.
            assert steps is not None
            freed = torch.cuda.Event()
            freed.record(steps)
            self._stream.wait_event(freed)
            event = torch.cuda.Event()
        start = end = 0
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():

            def flush() -> None:
                assert self._staging is not None
                target = self._arena.memory[place + start : place + end]
                target.copy_(self._staging[: end - start], non_blocking=True)
                if event is not None:
                    event.record(self._stream)
                    event.synchronize()

            for begin, matrix, width, dtype in layout.matrices:
                nbytes = aligned(matrix.shape[0] * width * dtype.itemsize)
                if begin + nbytes - start > len(self._staging):
                    flush()
                    start = begin
                end = begin + nbytes
                rows = _view(self._staging[begin - start :], matrix.shape[0], width, dtype)
                rows[:, : matrix.shape[1]].copy_(matrix)
                rows[:, matrix.shape[1] :] = 0
            flush()
        return event


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


class _Layout:
    """Where the matrices of an adapter lie in its piece of memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.matrices: list[tuple[int, torch.Tensor, int, torch.dtype]] = []
        """Begin in bytes, matrix, numbers in a row, and dtype."""
        self.nbytes = 0
        """Size of the piece."""
        self.largest = 0
        """Size of the largest matrix."""
        self._places: dict[str, list[int]] = {}

    def add(self, name: str, factors: SlotFactors) -> None:
        """Add a layer: B, whose rows the kernels want in whole units, then A or the columns."""
        rank = factors.b.shape[1]
        self._places[name] = [self._put(factors.b, -(-rank // UNIT) * UNIT, self._dtype)]
        if factors.columns is not None:
            second = self._put(factors.columns[None, :], rank, torch.int64)
        else:
            assert factors.a is not None
            second = self._put(factors.a, factors.a.shape[1], self._dtype)
        self._places[name].append(second)

    def views(self, memory: torch.Tensor, like: Mapping[str, SlotFactors]) -> dict[str, SlotFactors]:
        """Return the layers' factors in memory that begins with this piece."""
        found = {}
        for name, (first, second) in self._places.items():
            factors = like[name]
            outputs, rank = factors.b.shape
            b = _view(memory[first:], outputs, -(-rank // UNIT) * UNIT, self._dtype)[:, :rank]
            if factors.columns is not None:
                columns = _view(memory[second:], 1, rank, torch.int64)[0]
                found[name] = SlotFactors(b=b, scale=factors.scale, columns=columns)
            else:
                assert factors.a is not None
                a = _view(memory[second:], rank, factors.a.shape[1], self._dtype)
                found[name] = SlotFactors(b=b, scale=factors.scale, a=a)
        return found

    def _put(self, matrix: torch.Tensor, width: int, dtype: torch.dtype) -> int:
        begin, size = self.nbytes, aligned(matrix.shape[0] * width * dtype.itemsize)
        self.matrices.append((begin, matrix, width, dtype))
        self.nbytes += size
        self.largest = max(self.largest, size)
        return begin


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


def _check(factors: SlotFactors, part: Part) -> None:
    """Refuse factors that don't fit a layer.

    Raises:
        ArtifactError: if their shapes differ from the layer's.
    """
    outputs, inputs = part.shape
    fits = factors.a is None or factors.a.shape[1] == inputs
    if factors.columns is not None and len(factors.columns):
        fits = int(factors.columns.min()) >= 0 and int(factors.columns.max()) < inputs
    if factors.b.shape[0] != outputs or not fits:
        raise ArtifactError(
            f"{part.name} is {outputs}x{inputs} in vLLM's model, and the adapter's factors are not; use it "
            "with its own base"
        )
    if factors.b.shape[1] > WIDEST:
        raise ArtifactError(
            f"{part.name} has rank {factors.b.shape[1]}, but GPUs serve ranks up to {WIDEST}; reduce it by "
            "`rayft squeeze`"
        )


def _at_rank(factors: SlotFactors, rank: int) -> SlotFactors:
    a = None if factors.a is None else factors.a[:rank]
    columns = None if factors.columns is None else factors.columns[:rank]
    return SlotFactors(b=factors.b[:, :rank], scale=factors.scale, a=a, columns=columns)


def _view(memory: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """View the first bytes of memory as a matrix."""
    return memory[: rows * width * dtype.itemsize].view(dtype).view(rows, width)


def _answer(shapes: Mapping[str, tuple[int, int]]) -> None:
    """Let the engine know that the plugin is active in this worker."""
    if folder := os.environ.get(ANSWERS):
        write_file(Path(folder) / f"{os.getpid()}.json", json.dumps(shapes))
