"""Random calls of torch.ops.pop.prefill over caches of any strides equal the oracle, and write nothing else."""

from __future__ import annotations

from hypothesis import given
from property_settings import examples
from random_op_prefills import OpPrefill, assert_op_equals_oracle, op_prefills


@examples(100)
@given(op_prefills())
def test_a_random_call_of_the_operator_equals_the_oracle(call: OpPrefill):
    assert_op_equals_oracle(call)
