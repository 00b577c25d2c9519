"""`MemoryState`: the memory of one conversation, or of a batch of them, as a plain value.

A memory holds, for each layer that has one, a float32 state [batch, num_states, rank, rank]: 64 numbers
a layer by default, 9,216 bytes for a model of 36 layers. It knows no model. A call that is given a
memory advances it in place, as `past_key_values` is advanced; everything else here (`fork`, `stack`,
`memory[i]`, `to`) makes a new, independent value.

Under segment writes (`write="message"` or `"sentence"`) a segment may still be open when a call ends;
its running sum is part of the memory: `OpenSegment`.
"""

from __future__ import annotations

import datetime
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .errors import AdapterFormatError, IncompatibleMemoryError
from .files import check_header, checksum, write_atomically

FORMAT = "delta-mem-memory"
FORMAT_VERSION = "1"


@dataclass
class OpenSegment:
    """The segment that has begun and not ended, row by row.

    Attributes:
        sums: {layer: float32 [batch, features]}: the sum over the segment's tokens of what will be
            written (keys, values and gates before their activation).
        count: int64 [batch]: tokens in the sum; 0 where no segment is open.
        ids: int64 [batch]: the segment's id; it goes on for as long as the next token carries the same.
    """

    sums: dict[int, Tensor]
    count: Tensor
    ids: Tensor

    @property
    def features(self) -> int:
        """Numbers in a layer's sum."""
        return next(iter(self.sums.values())).shape[-1]


class MemoryState:
    """The memory of `batch_size` conversations (one per row), all layers.

    Made by `DeltaMemModel.new_memory`, `load`, `from_bytes` or `stack`.

    Attributes:
        layers: {layer index: float32 tensor [batch, num_states, rank, rank]}.
        tokens_written: int64 [batch]: tokens taken in since the memory was new, those that wait in an open
            segment included.
        open_segment: the segments still open, or None for an adapter that writes token by token.
        adapter: fingerprint of the adapter that writes this memory; None if it was in training.
        backbone: name of the backbone, for the record.
        created: when the memory was new, ISO 8601, UTC.
    """

    def __init__(
        self,
        layers: dict[int, Tensor],
        tokens_written: Tensor,
        open_segment: OpenSegment | None = None,
        adapter: str | None = None,
        backbone: str = "",
        created: str | None = None,
    ):
        self.layers = layers
        self.tokens_written = tokens_written
        self.open_segment = open_segment
        self._fix()
        self.adapter = adapter
        self.backbone = backbone
        self.created = created or _now()

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Number of rows: independent conversations."""
        return self.tokens_written.shape[0]

    def __len__(self) -> int:
        return self.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of the states, and of the open segments' sums where there are any."""
        tensors = list(self.layers.values())
        if self.open_segment is not None:
            tensors += self.open_segment.sums.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __repr__(self) -> str:
        num_states, rank = next(iter(self.layers.values())).shape[1:3]
        return (
            f"MemoryState(batch_size={self.batch_size}, layers={len(self.layers)}, "
            f"num_states={num_states}, rank={rank}, nbytes={self.nbytes}, "
            f"tokens_written={self.tokens_written.tolist()})"
        )

    # ---- new values from old ---------------------------------------------------------------------

    def fork(self) -> MemoryState:
        """An independent copy: what is written into one is not in the other."""
        return self._map(torch.clone)

    def __getitem__(self, rows: int | slice) -> MemoryState:
        """Row `rows` as a memory of its own (batch size 1), or a slice of rows. Always a copy.

        Raises:
            IndexError: no such row.
        """
        if not isinstance(rows, (slice, bool, Tensor)) and hasattr(rows, "__index__"):
            rows = operator.index(rows)
            if not -self.batch_size <= rows < self.batch_size:
                raise IndexError(f"memory has {self.batch_size} row(s), no row {rows}.")
            rows = rows % self.batch_size
            rows = slice(rows, rows + 1)
        elif not isinstance(rows, slice):
            raise TypeError(f"a memory is indexed by int or slice, got {type(rows).__name__}.")
        elif not range(self.batch_size)[rows] or (rows.step or 1) < 1:
            raise IndexError(f"memory has {self.batch_size} row(s), none of them in {rows}.")
        return self._map(lambda tensor: tensor[rows].clone())

    def select(self, rows: Tensor | Sequence[int]) -> MemoryState:
        """The rows with these indices (int64 [n]), in their order, with repeats. Always a copy.

        Raises:
            IndexError: no such row, or none at all.
            TypeError: rows that are no integers.
        """
        rows = torch.as_tensor(rows)
        if rows.numel() == 0:
            raise IndexError("select needs at least one row.")
        if rows.dim() != 1 or rows.dtype == torch.bool or rows.is_floating_point():
            raise TypeError(f"rows must be integers in a list, got {rows.dtype} {list(rows.shape)}.")
        if rows.is_cpu and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch_size:
            raise IndexError(f"memory has {self.batch_size} row(s), not all of {rows.tolist()}.")
        rows = rows.long()
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    @staticmethod
    def stack(memories: Iterable[MemoryState]) -> MemoryState:
        """One batch from several memories: their rows, one after the other.

        It is by the adapter of them all, and by none in particular (None) if one of them is.

        Raises:
            IncompatibleMemoryError: they are of different adapters, shapes or devices.
            ValueError: there are none.
        """
        memories = list(memories)
        if not memories:
            raise ValueError("stack needs at least one memory.")
        first, adapters = memories[0], {memory.adapter for memory in memories}
        if len(signed := adapters - {None}) > 1:
            names = ", ".join(sorted(adapter[:12] for adapter in signed))
            raise IncompatibleMemoryError(f"the memories were written by {len(signed)} adapters ({names}).")
        for index, other in enumerate(memories[1:], 1):
            difference = first._difference(other)
            if difference:
                raise IncompatibleMemoryError(f"memory {index} does not stack on memory 0: {difference}")
        result = first.combine(memories, torch.cat)
        result.adapter = None if None in adapters else first.adapter
        result.created = min(memory.created for memory in memories)
        return result

    def to(self, device: torch.device | str) -> MemoryState:
        """The memory on `device` (a copy, also where it is there already). States stay float32.

        Raises:
            TypeError: asked for a dtype: states are float32 whatever the model's.
        """
        if isinstance(device, torch.dtype):
            raise TypeError("a memory's states are float32 whatever the model's dtype; to() takes a device.")
        return self._map(lambda tensor: tensor.to(device, copy=True))

    # ---- changed in place ------------------------------------------------------------------------

    def replace(
        self, layers: dict[int, Tensor], tokens_written: Tensor, open_segment: OpenSegment | None
    ) -> None:
        """Takes over these tensors."""
        self.layers, self.tokens_written, self.open_segment = layers, tokens_written, open_segment
        self._fix()

    def overwrite(
        self, layers: dict[int, Tensor], tokens_written: Tensor, open_segment: OpenSegment | None
    ) -> None:
        """Takes over these tensors' values, in the tensors that are there: a recorded graph finds them."""
        olds, news = list(self.layers.values()), [layers[index] for index in self.layers]
        self.tokens_written.copy_(tokens_written)
        if open_segment is not None:
            own = self.open_segment
            olds += own.sums.values()
            news += [open_segment.sums[index] for index in own.sums]
            own.count.copy_(open_segment.count)
            own.ids.copy_(open_segment.ids)
        torch._foreach_copy_(olds, news)

    def reset(self) -> None:
        """Forgets everything: back to zeros, in place. It is still of the adapter that it was of."""
        blank = self._map(torch.zeros_like)
        blank.created = _now()
        if blank.open_segment is not None:
            blank.open_segment.ids.fill_(-1)
        self.assign(blank)

    def detach(self) -> MemoryState:
        """Cuts the memory's past out of autograd, in place; values stay. Returns the memory itself."""
        self.assign(self._map(torch.Tensor.detach))
        return self

    def __deepcopy__(self, memo: dict) -> MemoryState:
        return self.fork()  # also where gradients are recorded, of which torch copies none

    def __copy__(self) -> MemoryState:
        """A memory with the same tensors."""
        return self._map(lambda tensor: tensor)

    def __getstate__(self) -> dict[str, object]:
        # A call leaves the layers' states in one storage, which each would bring along as a whole.
        return self._map(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x).__dict__

    def assign(self, other: MemoryState) -> None:
        """Takes over the value of `other`, in place (its tensors, not copies of them)."""
        self.__dict__.update(other.__dict__)

    # ---- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Writes the memory to one safetensors file, atomically.

        Raises:
            ValueError: a state holds NaN or infinity; the layer is named and nothing is written.
        """
        write_atomically(path, self.to_bytes())

    @staticmethod
    def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> MemoryState:
        """Reads a memory that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            AdapterFormatError: broken, its tensors changed, or not a memory; file and field are named.
        """
        with open(path, "rb") as file:
            return MemoryState.from_bytes(file.read(), device, name=os.fspath(path))

    def to_bytes(self) -> bytes:
        """The memory as the bytes of a safetensors file.

        Raises:
            ValueError: a state holds NaN or infinity; the layer is named.
        """
        sums = {} if self.open_segment is None else self.open_segment.sums
        for layer, state in self.layers.items():
            finite = torch.isfinite(state).all() and (layer not in sums or torch.isfinite(sums[layer]).all())
            if not finite:
                raise ValueError(f"the memory's state in layer {layer} holds NaN or infinity; not saved.")
        # One tensor for all layers: a header entry per layer would double a 9 KB file.
        tensors = {
            "states": torch.stack([state.detach().cpu() for state in self.layers.values()]),
            "tokens_written": self.tokens_written.cpu(),
        }
        segment = self.open_segment
        if segment is not None and bool((segment.count > 0).any()):
            tensors["open_sums"] = torch.stack([s.detach().cpu() for s in segment.sums.values()])
            tensors["open_count"] = segment.count.cpu()
            tensors["open_ids"] = segment.ids.cpu()
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "adapter": self.adapter or "",
            "backbone": self.backbone,
            "layers": json.dumps(list(self.layers), separators=(",", ":")),
            "segment_features": str(0 if segment is None else segment.features),
            "tokens_written": json.dumps(self.tokens_written.tolist(), separators=(",", ":")),
            "created": self.created,
            "saved": _now(),
            "sha256": checksum(tensors),
        }
        return save_tensors(tensors, metadata)

    @staticmethod
    def from_bytes(
        data: bytes | bytearray | memoryview, device: torch.device | str = "cpu", name: str = "memory"
    ) -> MemoryState:
        """The memory that `to_bytes` made. `name` is what errors call it.

        Raises:
            AdapterFormatError: broken, its tensors changed, or not a memory; `name` and field are named.
        """
        data = bytes(data)
        try:
            tensors, metadata = load_tensors(data), read_metadata(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise AdapterFormatError(f"{name}: not a whole safetensors file ({error}).") from None
        indices, features = _check_file(name, tensors, metadata)
        batch = tensors["states"].shape[1]
        on_device = {key: tensor.to(device) for key, tensor in tensors.items()}
        segment = None
        if features:
            count = on_device.get("open_count", torch.zeros(batch, dtype=torch.int64, device=device))
            ids = on_device.get("open_ids", torch.zeros_like(count))
            no_sums = torch.zeros(len(indices), batch, features, dtype=torch.float32, device=device)
            sums = on_device.get("open_sums", no_sums)
            segment = OpenSegment(dict(zip(indices, sums.unbind(0), strict=True)), count, ids)
        return MemoryState(
            layers=dict(zip(indices, on_device["states"].unbind(0), strict=True)),
            tokens_written=on_device["tokens_written"],
            open_segment=segment,
            adapter=metadata["adapter"] or None,
            backbone=metadata["backbone"],
            created=metadata["created"],
        )

    # ---- helpers ---------------------------------------------------------------------------------

    def _fix(self) -> None:
        """Notes that the tensors stay where they are while the memory is in use.

        Without it torch.compile records no CUDA graph of calls, which write to them. A memory at other
        addresses is recorded anew, not compiled anew; torch keeps all recordings.
        """
        if self.tokens_written.device.type != "cuda" or torch.compiler.is_compiling():
            return
        tensors = [*self.layers.values(), self.tokens_written]
        if self.open_segment is not None:
            tensors += [*self.open_segment.sums.values(), self.open_segment.count, self.open_segment.ids]
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> MemoryState:
        return self.combine([self], lambda tensors: fn(tensors[0]))

    def combine(
        self, memories: Sequence[MemoryState], fn: Callable[[Sequence[Tensor]], Tensor]
    ) -> MemoryState:
        """A memory whose every tensor is `fn` of the same tensor of each of `memories`; the rest is ours."""
        segments = [memory.open_segment for memory in memories]
        segment = None
        if self.open_segment is not None:
            segment = OpenSegment(
                {layer: fn([s.sums[layer] for s in segments]) for layer in self.open_segment.sums},
                fn([s.count for s in segments]),
                fn([s.ids for s in segments]),
            )
        return MemoryState(
            {layer: fn([memory.layers[layer] for memory in memories]) for layer in self.layers},
            fn([memory.tokens_written for memory in memories]),
            segment,
            self.adapter,
            self.backbone,
            self.created,
        )

    def _difference(self, other: MemoryState) -> str | None:
        """Why the two cannot be rows of one batch; None if they can."""
        if list(self.layers) != list(other.layers):
            return f"it has layers {list(other.layers)}, not {list(self.layers)}."
        if (self.open_segment is None) != (other.open_segment is None):
            return "one is of token writes, the other of segment writes."
        if self.open_segment is not None and self.open_segment.features != other.open_segment.features:
            return "their open segments differ in width."
        for layer, state in self.layers.items():
            theirs = other.layers[layer]
            if state.shape[1:] != theirs.shape[1:]:
                return f"layer {layer} is {list(theirs.shape[1:])}, not {list(state.shape[1:])}."
            if state.device != theirs.device:
                return f"layer {layer} is on {theirs.device}, not on {state.device}; use .to(device)."
        return None


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file given as bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _check_file(name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[list[int], int]:
    """The layers of a memory file, and the numbers in a layer's sum of its open segment (0: none is kept).

    Raises:
        AdapterFormatError: the file is not one that `to_bytes` makes; `name` and field are named.
    """

    def fail(field, what):
        raise AdapterFormatError(f"{name}: {field}: {what}")

    fields = ("adapter", "backbone", "layers", "segment_features", "created", "sha256")
    check_header(name, metadata, FORMAT, FORMAT_VERSION, fields)
    if "states" not in tensors:
        fail("states", "missing.")
    if checksum(tensors) != metadata["sha256"]:
        fail("sha256", "the contents are not those that were saved.")
    states = tensors["states"]
    if states.dtype != torch.float32 or states.dim() != 5 or states.shape[-1] != states.shape[-2]:
        fail("states", f"{states.dtype} {list(states.shape)} is not float32 [layers, batch, states, r, r].")
    layers, batch, num_states, rank, _ = states.shape
    if 0 in states.shape:
        fail("states", f"{list(states.shape)} is empty.")
    try:
        indices = json.loads(metadata["layers"])
    except (ValueError, RecursionError):
        indices = None
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        fail("layers", f"{metadata['layers']!r} is no list of layer indices.")
    if not len(indices) == len(set(indices)) == layers:
        fail("layers", f"names {len(set(indices))} layers, states holds {layers}.")
    said, width = metadata["segment_features"], num_states * rank
    features = int(said) if re.fullmatch("[0-9]{1,9}", said) else -1
    # Of keys, values, and one or two gates per state or per row.
    if features != 0 and not 2 * width + num_states <= features <= 4 * width:
        fail("segment_features", f"{said!r} is none of a state of {num_states} times {rank} rows.")
    whole = {"tokens_written": (torch.int64, [batch])}
    if any(name.startswith("open_") for name in tensors):
        whole |= {
            "open_sums": (torch.float32, [layers, batch, features]),
            "open_count": (torch.int64, [batch]),
            "open_ids": (torch.int64, [batch]),
        }
    for field, (dtype, shape) in whole.items():
        tensor = tensors.get(field)
        if tensor is None:
            fail(field, "missing.")
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            fail(field, f"{tensor.dtype} {list(tensor.shape)} is not {dtype} {shape}.")
        if dtype == torch.int64 and field != "open_ids" and (tensor < 0).any():
            fail(field, "is negative.")
    for index, state in zip(indices, states, strict=True):
        if not torch.isfinite(state).all():
            fail("states", f"layer {index} holds NaN or infinity.")
    if "open_sums" in tensors and not torch.isfinite(tensors["open_sums"]).all():
        fail("open_sums", "holds NaN or infinity.")
    return indices, features


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
