"""Test packing: from a padded batch to packed rows and cache slots."""

from __future__ import annotations

import pytest
import torch
from pop_ext.hf.packing import pack_batch, per_sequence


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(bit) for bit in row] for row in rows])


def test_a_batch_without_a_mask_is_packed_as_a_view():
    packed = pack_batch(2, 3, 4, None)
    assert (packed.tokens, packed.past, packed.cache_start) == ([3, 3], [4, 4], [0, 0])
    assert packed.row_index is None
    assert packed.slot_table is None
    assert packed.padding() is None
    padded = torch.arange(6).view(2, 3)
    assert packed.pack(padded).data_ptr() == padded.data_ptr()
    assert packed.positions().tolist() == [4, 5, 6, 4, 5, 6]
    assert packed.cu_seqlens().tolist() == [0, 3, 6]
    assert packed.cu_seqlens().dtype == torch.int32


def test_a_mask_of_ones_is_no_mask():
    assert pack_batch(2, 3, 1, torch.ones(2, 4)) == pack_batch(2, 3, 1, None)


def test_left_padding_moves_the_first_slot():
    packed = pack_batch(2, 4, 0, mask("0011", "1111"))
    assert (packed.tokens, packed.past, packed.cache_start) == ([2, 4], [0, 0], [2, 0])
    assert packed.slot_table is None
    assert packed.pack(torch.arange(8).view(2, 4)).tolist() == [2, 3, 4, 5, 6, 7]
    assert packed.positions().tolist() == [0, 1, 0, 1, 2, 3]
    assert packed.padding().tolist() == [[True, True, False, False], [False] * 4]


def test_padding_in_a_first_turn_needs_no_slot_table():
    packed = pack_batch(3, 4, 0, mask("1100", "0110", "0001"))
    assert (packed.tokens, packed.cache_start) == ([2, 2, 1], [0, 1, 3])
    assert packed.slot_table is None
    assert packed.rows == 5


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        (("1111", "1111"), False),
        (("0011", "1111"), False),
        (("1110", "1111"), True),
        (("1111", "0110"), True),
        (("1000", "0001"), True),
    ],
)
def test_padding_after_the_last_token_is_detected(rows, ends):
    assert pack_batch(2, 4, 0, mask(*rows)).ends_with_padding() is ends
    assert pack_batch(2, 4, 2, mask(*(f"10{row}" for row in rows))).ends_with_padding() is ends


def test_a_hole_in_the_past_needs_a_slot_table():
    packed = pack_batch(2, 3, 4, mask("1100111", "1111110"))
    assert (packed.tokens, packed.past, packed.cache_start) == ([3, 2], [2, 4], [0, 0])
    assert packed.slot_table.dtype == torch.int32
    assert packed.slot_table[0, :5].tolist() == [0, 1, 4, 5, 6]
    assert packed.slot_table[1, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.positions().tolist() == [2, 3, 4, 4, 5]


def test_a_past_of_padding_only_starts_at_position_zero():
    packed = pack_batch(2, 2, 3, mask("00011", "11111"))
    assert (packed.past, packed.cache_start) == ([0, 3], [3, 0])
    assert packed.positions().tolist() == [0, 1, 3, 4]
    assert packed.slot_table is None


def test_embeddings_are_packed_by_row():
    packed = pack_batch(2, 2, 0, mask("01", "11"))
    embeds = torch.arange(12.0).view(2, 2, 3)
    assert torch.equal(packed.pack(embeds), embeds.view(4, 3)[1:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_is_read(dtype):
    packed = pack_batch(2, 3, 0, mask("011", "111").to(dtype))
    assert packed.tokens == [2, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (mask("111"), r"attention_mask: expected shape \[2, 3\].*got \[1, 3\]"),
        (mask("1111", "1111"), r"attention_mask: expected shape \[2, 3\].*got \[2, 4\]"),
        (mask("101", "111"), "attention_mask: .*sequence 0 to be consecutive, got holes"),
        (mask("111", "000"), "attention_mask: expected at least one new token for sequence 1, got none"),
        (torch.full((2, 3), -1e9), "attention_mask: expected zeros and ones, got -1"),
        (torch.full((2, 3), float("nan")), "attention_mask: expected zeros and ones, got nan"),
        (torch.ones(2, 1, 3, 3), r"attention_mask: expected shape \[2, 3\].*got \[2, 1, 3, 3\]"),
        ([[1, 1, 1]], "attention_mask: expected a tensor, got list"),
    ],
    ids=["batch", "columns", "holes", "nothing", "additive", "nan", "4-D", "list"],
)
def test_a_bad_mask_is_named(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pack_batch(2, 3, 0, given)


def test_a_batch_without_tokens_is_refused():
    for batch, columns in ((1, 0), (0, 5)):
        with pytest.raises(ValueError, match=rf"input_ids: expected at least one new token.*\[{batch}, {columns}\]"):
            pack_batch(batch, columns, 0, None)


@pytest.mark.parametrize(
    "value", [3, [3, 3], (3, 3), torch.tensor([3, 3]), torch.tensor([3, 3], dtype=torch.uint8)], ids=str
)
def test_one_value_or_one_per_sequence_is_read(value):
    assert per_sequence(value, 2, "boundary") == [3, 3]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "boundary: expected at least 1, got 0 for sequence 0"),
        ([1, -2], ValueError, "boundary: expected at least 1, got -2 for sequence 1"),
        ([1], ValueError, r"boundary: expected 2 values \(one per sequence\), got 1"),
        ([], ValueError, r"boundary: expected 2 values \(one per sequence\), got 0"),
        (1.0, TypeError, "boundary: expected an int or one int per sequence, got float"),
        (True, TypeError, "boundary: expected an int or one int per sequence, got bool"),
        ("11", TypeError, "boundary: expected an int or one int per sequence, got str"),
        (None, TypeError, "boundary: expected an int or one int per sequence, got NoneType"),
        ([1, 2.0], TypeError, "boundary: expected ints, got float for sequence 1"),
        ([1, True], TypeError, "boundary: expected ints, got bool for sequence 1"),
        (torch.tensor([[1, 2]]), TypeError, r"boundary: .*1-D integer tensor.*torch.int64 tensor of shape \[1, 2\]"),
        (torch.tensor(3), TypeError, r"boundary: .*1-D integer tensor.*torch.int64 tensor of shape \[\]"),
        (torch.tensor([1.0, 2.0]), TypeError, r"boundary: .*1-D integer tensor.*torch.float32 tensor of shape \[2\]"),
        (torch.tensor([True, True]), TypeError, r"boundary: .*1-D integer tensor.*torch.bool tensor of shape \[2\]"),
        (
            torch.ones(2, dtype=int, device="meta"),
            ValueError,
            "boundary: expected a tensor with data, got .* meta device",
        ),
    ],
    ids=str,
)
def test_an_invalid_value_is_named(value, error, message):
    with pytest.raises(error, match=message):
        per_sequence(value, 2, "boundary")
