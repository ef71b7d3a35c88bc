"""Random models, plans and batches: the native prefill and an enabled model equal the oracle."""

from __future__ import annotations

from hypothesis import given
from property_settings import examples
from random_prefills import (
    EnabledCall,
    Prefill,
    assert_enabled_equals_oracle,
    assert_prefill_equals_oracle,
    enabled_calls,
    prefills,
)


@examples(160)
@given(prefills())
def test_a_random_prefill_equals_the_oracle(prefill: Prefill):
    assert_prefill_equals_oracle(prefill)


@examples(50)
@given(enabled_calls())
def test_a_random_call_of_an_enabled_model_equals_the_oracle(call: EnabledCall):
    assert_enabled_equals_oracle(call)
