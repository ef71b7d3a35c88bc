"""Turn a padded batch into packed rows, so that nothing is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from pop_ext.utils.tensors import check_dense, resolved

PerSequence = int | Sequence[int] | torch.Tensor

CPU = torch.device("cpu")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


Spans = list[tuple[int, int, int]]
"""(sequence, begin, end) of real new tokens that attend to each other in both directions, in ascending order."""


@dataclass(frozen=True)
class PackedBatch:
    """Describe where the real new tokens of a batch lie: among the packed rows, and among the slots of the cache.

    Attributes:
        batch, columns: shape of the padded new tokens ``[batch, columns]``.
        past_slots: cache slots before the new tokens, padding included.
        row_index: ``[rows]`` int64, index of each row in the flattened ``[batch * columns]`` tokens; None when every
            token is real.
        tokens, past: per sequence, real new tokens and real cached positions.
        cache_start: per sequence, slot of its first position; unused with ``slot_table``.
        slot_table: ``[batch, max(past + tokens)]`` int32, slot of each position. Present where the real slots of
            some sequence are not consecutive, for example after a turn that was padded on the right.
    """

    batch: int
    columns: int
    past_slots: int
    row_index: torch.Tensor | None
    tokens: list[int]
    past: list[int]
    cache_start: list[int]
    slot_table: torch.Tensor | None

    @property
    def slots(self) -> int:
        """Number of cache slots after the call, padding included."""
        return self.past_slots + self.columns

    @property
    def rows(self) -> int:
        """Number of packed rows."""
        return sum(self.tokens)

    def ends_with_padding(self) -> bool:
        """Return whether the last column of some sequence is padding."""
        if self.row_index is None:
            return False
        last = self.row_index[self.cu_seqlens()[1:].long() - 1]
        return bool((last % self.columns != self.columns - 1).any())

    def padding(self) -> torch.Tensor | None:
        """Return ``[batch, columns]`` bool, True where a new column is padding; None if none is."""
        if self.row_index is None:
            return None
        padding = torch.ones(self.batch * self.columns, dtype=torch.bool, device="cpu")
        padding[self.row_index] = False
        return padding.view(self.batch, self.columns)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Take the real tokens of each sequence: ``[batch, columns, ...]`` to ``[rows, ...]`` in consecutive memory."""
        flat = padded.reshape(self.batch * self.columns, *padded.shape[2:])
        return resolved(flat if self.row_index is None else flat[self.row_index.to(flat.device)])

    def pack_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Pack ``[batch or 1, columns]`` positions to ``[rows]``, or ``[3, batch or 1, columns]`` to ``[3, rows]``."""
        if position_ids.ndim == 3:
            return torch.stack([self.pack_positions(axis) for axis in position_ids])
        return self.pack(position_ids.expand(self.batch, self.columns))

    def positions(self) -> torch.Tensor:
        """Return ``[rows]`` int64 on the CPU: the position of each row, counted over real tokens only."""
        spans = zip(self.past, self.tokens, strict=True)
        return torch.cat([torch.arange(past, past + tokens, device="cpu") for past, tokens in spans])

    def column_position_ids(self, device: torch.device) -> torch.Tensor:
        """Return ``[1, columns]`` int64: positions counted by column, padding included, as the stock forward does."""
        return torch.arange(self.past_slots, self.slots, device=device)[None]

    def cu_seqlens(self) -> torch.Tensor:
        """Return ``[batch + 1]`` int32 on the CPU: the first row of each sequence, then the number of rows."""
        return offsets(self.tokens)


def lengths(values: list[int]) -> torch.Tensor:
    """Return ``[len(values)]`` int32 on the CPU, where the operator reads lengths, whatever the default device is."""
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def offsets(values: list[int]) -> torch.Tensor:
    """Return ``[len(values) + 1]`` int32 on the CPU: the first row of each packed piece, then the number of rows."""
    return lengths([0, *values]).cumsum(0, dtype=torch.int32)


def check_device(tensor: torch.Tensor, device: torch.device, name: str) -> None:
    """Raise ValueError unless a tensor is on the CPU or on the model's device."""
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"{name}: expected device {device} like the model, got {tensor.device}")


def pack_batch(
    batch: int, columns: int, past_slots: int, attention_mask: torch.Tensor | None, device: torch.device = CPU
) -> PackedBatch:
    """Find the real tokens of a batch from its padding mask.

    Args:
        batch: sequences.
        columns: new tokens of each, padding included.
        past_slots: cache slots before the new tokens.
        attention_mask: ``[batch, past_slots + columns]``, 1 for a real token. None: every token is real.
        device: the model's device. The mask may be there or on the CPU.

    Raises:
        TypeError: The mask is no tensor.
        ValueError: The mask has another shape or device, new tokens have holes, or a sequence has no new token.
    """
    if columns == 0 or batch == 0:
        raise ValueError(f"input_ids: expected at least one new token per sequence, got shape [{batch}, {columns}]")
    if attention_mask is not None:
        mask = _check_mask(attention_mask, batch, past_slots + columns, device)
        if mask is not None:
            return _pack_masked(mask, columns, past_slots)
    return PackedBatch(batch, columns, past_slots, None, [columns] * batch, [past_slots] * batch, [0] * batch, None)


def _check_mask(attention_mask: torch.Tensor, batch: int, slots: int, device: torch.device) -> torch.Tensor | None:
    """Return the mask as bool on the CPU, or None if it is all ones."""
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
    if tuple(attention_mask.shape) != (batch, slots):
        raise ValueError(
            f"attention_mask: expected shape [{batch}, {slots}] (past and new tokens), got {list(attention_mask.shape)}"
        )
    check_device(attention_mask, device, "attention_mask")
    if attention_mask.is_complex():
        raise TypeError(f"attention_mask: expected bool, integers or floats, got {attention_mask.dtype}")
    mask = attention_mask.cpu()  # the one synchronisation with a device
    ones = mask if mask.dtype == torch.bool else mask == 1
    if bool(ones.all()):
        return None
    other = mask[(mask != 0) & ~ones]
    if len(other) > 0:
        raise ValueError(f"attention_mask: expected zeros and ones, got {other[0].item()}")
    return ones


def _pack_masked(mask: torch.Tensor, columns: int, past_slots: int) -> PackedBatch:
    """Pack a batch with padding.

    Args:
        mask: bool ``[batch, past_slots + columns]`` on the CPU, True for a real token.
        columns: new tokens of each sequence, padding included.
        past_slots: cache slots before the new tokens.
    """
    row_index, tokens, past, slots = [], [], [], []
    for i, row in enumerate(mask):
        new = row[past_slots:].nonzero().flatten()
        if len(new) == 0:
            raise ValueError(f"attention_mask: expected at least one new token for sequence {i}, got none")
        if int(new[-1] - new[0]) + 1 != len(new):
            raise ValueError(
                f"attention_mask: expected the new tokens of sequence {i} to be consecutive, got holes among them"
            )
        row_index.append(new + i * columns)
        tokens.append(len(new))
        past.append(int(row[:past_slots].sum()))
        slots.append(row.nonzero().flatten())
    consecutive = all(int(s[-1] - s[0]) + 1 == len(s) for s in slots)
    slot_table = None
    if not consecutive:
        slot_table = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True).to(torch.int32)
    index = None if all(t == columns for t in tokens) else torch.cat(row_index)
    return PackedBatch(len(mask), columns, past_slots, index, tokens, past, [int(s[0]) for s in slots], slot_table)


def per_sequence(value: PerSequence, batch: int, name: str) -> list[int]:
    """Expand an argument that is one int for all sequences or one for each into a list ``[batch]``.

    Raises:
        TypeError: The value is neither an int, nor a sequence of ints, nor a 1-D integer tensor.
        ValueError: The length is not ``batch``, a value is below 1, or the tensor has no data.
    """
    values = _tensor_values(value, name) if isinstance(value, torch.Tensor) else value
    if isinstance(values, Integral) and is_int(values):
        values = [int(values)] * batch
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected an int or one int per sequence, got {type(value).__name__}")
    for i, item in enumerate(values):
        if not is_int(item):
            raise TypeError(f"{name}: expected ints, got {type(item).__name__} for sequence {i}")
        if item < 1:
            raise ValueError(f"{name}: expected at least 1, got {item} for sequence {i}")
    if len(values) != batch:
        raise ValueError(f"{name}: expected {batch} values (one per sequence), got {len(values)}")
    return [int(item) for item in values]


def is_int(value: object) -> bool:
    """Return whether a value is an integer of Python or NumPy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _tensor_values(tensor: torch.Tensor, name: str) -> list[int]:
    """Return the values of a 1-D integer tensor. Raise TypeError or ValueError for any other tensor."""
    check_dense({name: tensor})
    # A 0-d tensor is refused: it may mean a number of rows or the index of one.
    if tensor.ndim != 1 or tensor.dtype not in INTEGERS:
        raise TypeError(
            f"{name}: expected an int or one int per sequence (a 1-D integer tensor), "
            f"got a {tensor.dtype} tensor of shape {list(tensor.shape)}"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    return tensor.tolist()


def bidirectional_spans(name: str, token_types: Any, packed: PackedBatch) -> Spans:
    """Find the spans of new tokens that attend to each other in both directions: runs of ones in ``token_types``.

    Args:
        name: of the argument, for error texts.
        token_types: integers ``[batch, columns]`` or ``[batch, past + columns]``; None: no such tokens.
        packed: the real tokens of the same batch.

    Raises:
        TypeError, ValueError: ``token_types`` is no integer tensor of one of these shapes.
    """
    if token_types is None:
        return []
    if not isinstance(token_types, torch.Tensor) or token_types.is_floating_point() or token_types.is_complex():
        found = token_types.dtype if isinstance(token_types, torch.Tensor) else type(token_types).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {found}")
    batch, columns = packed.batch, packed.columns
    if tuple(token_types.shape) not in ((batch, columns), (batch, packed.slots)):
        raise ValueError(
            f"{name}: expected shape [{batch}, {columns}] or [{batch}, {packed.slots}] (with the past), "
            f"got {list(token_types.shape)}"
        )
    rows = packed.pack(token_types[:, -columns:]).cpu() == 1
    spans = []
    for sequence, marked in enumerate(rows.split(packed.tokens)):
        edges = torch.nn.functional.pad(marked.to(torch.int8), (1, 1)).diff()
        begins, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        spans += [(sequence, begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    return spans


def snap_to_span_start(boundary: list[int], tokens: list[int], spans: Spans) -> list[int]:
    """Widen each boundary that would cut a span to the start of that span.

    The rows of a span attend to each other in omitted layers, too, so they run at full depth together.
    """
    snapped = list(boundary)
    for sequence, begin, end in spans:
        if begin < tokens[sequence] - snapped[sequence] < end:
            snapped[sequence] = tokens[sequence] - begin
    return snapped
