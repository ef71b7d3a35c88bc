"""From a padded batch to packed rows: padding is never computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

PerSequence = int | Sequence[int] | torch.Tensor

CPU = torch.device("cpu")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class PackedBatch:
    """The real new tokens of a batch, one after the other, and where the cache has their slots.

    Attributes:
        batch, columns: shape of the padded new tokens ``[batch, columns]``.
        past_slots: cache slots before the new tokens, padding included.
        row_index: ``[rows]`` int64, index of each row in the flattened ``[batch * columns]`` tokens,
            or None when every token is real.
        tokens, past: per sequence, real new tokens and real cached positions.
        cache_start: slot of each sequence's first position, where ``slot_table`` is None.
        slot_table: ``[batch, max(past + tokens)]`` int32 slot of each position, when some sequence's
            real slots are not consecutive (a turn that was padded on the right, say).
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
        """Cache slots after the call, padding included."""
        return self.past_slots + self.columns

    @property
    def rows(self) -> int:
        return sum(self.tokens)

    def ends_with_padding(self) -> bool:
        """Whether the last column of some sequence holds no token."""
        if self.row_index is None:
            return False
        last = self.row_index[self.cu_seqlens()[1:].long() - 1]
        return bool((last % self.columns != self.columns - 1).any())

    def padding(self) -> torch.Tensor | None:
        """``[batch, columns]`` bool, True where a new column holds no token; None: nowhere."""
        if self.row_index is None:
            return None
        padding = torch.ones(self.batch * self.columns, dtype=torch.bool, device="cpu")
        padding[self.row_index] = False
        return padding.view(self.batch, self.columns)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """``[batch, columns, ...]`` -> ``[rows, ...]``, the real tokens by sequence."""
        flat = padded.reshape(self.batch * self.columns, *padded.shape[2:])
        return flat if self.row_index is None else flat[self.row_index.to(flat.device)]

    def positions(self) -> torch.Tensor:
        """``[rows]`` int64: position of each row, counting its sequence's real tokens."""
        spans = zip(self.past, self.tokens, strict=True)
        return torch.cat([torch.arange(past, past + tokens, device="cpu") for past, tokens in spans])

    def cu_seqlens(self) -> torch.Tensor:
        """``[batch + 1]`` int32."""
        return offsets(self.tokens)


def lengths(values: list[int]) -> torch.Tensor:
    """``[len(values)]`` int32 on the CPU, where the operator reads lengths, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def offsets(values: list[int]) -> torch.Tensor:
    """``[len(values) + 1]`` int32 on the CPU: where each of several packed pieces begins, and where all end."""
    return lengths([0, *values]).cumsum(0, dtype=torch.int32)


def check_device(tensor: torch.Tensor, device: torch.device, name: str) -> None:
    """Raises ValueError unless a tensor that is read on the CPU is there, or on the model's device."""
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"{name}: expected device {device} like the model, got {tensor.device}")


def pack_batch(
    batch: int, columns: int, past_slots: int, attention_mask: torch.Tensor | None, device: torch.device = CPU
) -> PackedBatch:
    """Reads a mask ``[batch, past_slots + columns]`` (1: real token), or all ones for None.

    Args:
        device: the model's, where the mask may be, too.

    Raises:
        TypeError: a mask that is no tensor.
        ValueError: a mask of another shape or device, holes in the new tokens, or a sequence without a new token.
    """
    if columns == 0 or batch == 0:
        raise ValueError(f"input_ids: expected at least one new token per sequence, got shape [{batch}, {columns}]")
    if attention_mask is not None:
        mask = _check_mask(attention_mask, batch, past_slots + columns, device)
        if mask is not None:
            return _pack_masked(mask, columns, past_slots)
    return PackedBatch(batch, columns, past_slots, None, [columns] * batch, [past_slots] * batch, [0] * batch, None)


def _check_mask(attention_mask: torch.Tensor, batch: int, slots: int, device: torch.device) -> torch.Tensor | None:
    """The mask as bool on the CPU; None: all ones."""
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
    if tuple(attention_mask.shape) != (batch, slots):
        raise ValueError(
            f"attention_mask: expected shape [{batch}, {slots}] (past and new tokens), got {list(attention_mask.shape)}"
        )
    check_device(attention_mask, device, "attention_mask")
    mask = attention_mask.cpu()  # waits for a device once, and reads here
    ones = mask if mask.dtype == torch.bool else mask == 1
    if bool(ones.all()):
        return None
    other = mask[(mask != 0) & ~ones]
    if len(other) > 0:
        raise ValueError(f"attention_mask: expected zeros and ones, got {other[0].item()}")
    return ones


def _pack_masked(mask: torch.Tensor, columns: int, past_slots: int) -> PackedBatch:
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
    """An int for all sequences, or one for each.

    Raises:
        TypeError: not an int, a sequence of ints or a 1-D integer tensor.
        ValueError: a length other than ``batch``, a value below 1, or a tensor without data.
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
    """An integer of Python's or NumPy's, no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _tensor_values(tensor: torch.Tensor, name: str) -> list[int]:
    # A 0-d tensor may mean one number or an index: neither is guessed.
    if tensor.ndim != 1 or tensor.dtype not in INTEGERS:
        raise TypeError(
            f"{name}: expected an int or one int per sequence (a 1-D integer tensor), "
            f"got a {tensor.dtype} tensor of shape {list(tensor.shape)}"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    return tensor.tolist()
