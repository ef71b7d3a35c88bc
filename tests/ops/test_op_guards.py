"""The operators refuse or survive misuse that is easy to miss: re-entrance, shared memory, odd sizes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pop_ext
import pytest
import torch
from models import llama
from op_calls import offsets

REPOSITORY = Path(__file__).resolve().parents[2]
ZERO = torch.zeros(1, dtype=torch.int32)


def run(code: str) -> str:
    """Run a script in a new process, since a failure would be a hang or an abort."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_freeing_a_model_may_free_another_one():
    native = pop_ext.load(llama(), "third")
    spec, plan = native.spec.to_json(), native.plan.to_json()
    weights = [ref.tensor.detach().clone() for ref in native.description.weights]
    inner = torch.ops.pop.load(spec, plan, weights)

    class FreesAnother:
        def __del__(self) -> None:
            torch.ops.pop.unload(inner)

    weights[-1].on_death = FreesAnother()
    outer = torch.ops.pop.load(spec, plan, weights)
    del weights
    torch.ops.pop.unload(outer)
    with pytest.raises(RuntimeError, match="not freed"):
        torch.ops.pop.info(outer)


def test_an_inference_mode_cache_is_restored_when_a_layer_fails():
    output = run(
        """
        import sys
        sys.path.insert(0, "tests/support")
        import torch, pop_ext
        from models import llama
        torch.set_num_threads(1)
        model = llama()
        native = pop_ext.load(model, "third")
        spec, rows = native.spec, 200  # more rows than the kernel for few rows supports
        with torch.inference_mode():
            shape = (1, spec.num_kv_heads, rows, spec.head_dim)
            keys = [torch.full(shape, 3.0) for _ in range(spec.num_layers)]
            values = [torch.full(shape, 5.0) for _ in range(spec.num_layers)]
        cos, sin = model.model.rotary_emb(torch.empty(0), torch.arange(rows)[None])
        calls = []

        def mm_out(self, mat2, *, out):
            calls.append(1)
            if len(calls) > 12:
                raise RuntimeError("planted")
            return torch.ops.aten.bmm.out(self[None], mat2[None], out=out[None])[0]

        library = torch.library.Library("aten", "IMPL")
        library.impl("mm.out", mm_out, "CPU")
        zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        lengths = torch.tensor([0, rows], dtype=torch.int32)
        try:
            torch.ops.pop.prefill(
                native.handle, torch.arange(rows) % 50, cos[0], sin[0], lengths, zero, zero, one, one, keys, values
            )
        except RuntimeError:
            print("failed after", len(calls))
        assert all(bool((k == 3.0).all()) for k in keys) and all(bool((v == 5.0).all()) for v in values)
        """
    )
    assert output.strip() == "failed after 13"


def test_attention_refuses_a_window_beyond_32_bits():
    cache = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="window: expected <= 2147483647, got 4294967296"):
        torch.ops.pop.attention(torch.randn(4, 1, 8), cache, cache.clone(), offsets([4]), ZERO, ZERO, 1.0, 2**32)


def test_the_largest_window_sees_everything():
    query, key, value = torch.randn(40, 2, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    call = (query, key, value, offsets([40]), ZERO, ZERO, 0.25)
    assert torch.equal(torch.ops.pop.attention(*call, 2**31 - 1), torch.ops.pop.attention(*call, 0))


def test_attention_refuses_a_query_without_heads():
    cache = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="query: expected a multiple of 1 heads"):
        torch.ops.pop.attention(torch.randn(4, 0, 8), cache, cache.clone(), offsets([4]), ZERO, ZERO, 1.0)


def test_attention_takes_a_single_head_of_any_stride():
    query = torch.randn(1, 4, 8).transpose(0, 1)
    cache = torch.randn(1, 1, 4, 8)
    call = (cache, cache.clone(), offsets([4]), ZERO, ZERO, 1.0)
    assert torch.equal(torch.ops.pop.attention(query, *call), torch.ops.pop.attention(query.contiguous(), *call))


def test_add_rms_norm_refuses_rows_that_share_memory():
    with pytest.raises(RuntimeError, match="x: expected elements that do not share memory"):
        torch.ops.pop.add_rms_norm(torch.randn(1, 8).expand(4, 8), torch.randn(4, 8), torch.ones(8), 1e-6)


def test_rope_cache_write_refuses_a_query_inside_the_cache():
    cache = torch.randn(1, 1, 4, 8)
    query = cache.view(4, 1, 8)
    rope = torch.ones(4, 8), torch.zeros(4, 8)
    with pytest.raises(RuntimeError, match="query: expected memory of its own"):
        torch.ops.pop.rope_cache_write(
            query,
            torch.randn(4, 1, 8),
            torch.randn(4, 1, 8),
            *rope,
            offsets([4]),
            ZERO,
            ZERO,
            cache,
            torch.zeros(1, 1, 4, 8),
        )


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ops.pop.rms_norm(torch.empty(3, 0), torch.empty(0), 1e-6),
        lambda: torch.ops.pop.gated_act(torch.empty(3, 0), torch.empty(3, 0)),
    ],
)
def test_rows_without_channels_are_refused(call):
    with pytest.raises(RuntimeError, match="expected a last dimension of at least 1, got"):
        call()


def test_errors_of_the_core_name_the_operator():
    with pytest.raises(RuntimeError, match="pop::gated_act: .*relu"):
        torch.ops.pop.gated_act(torch.ones(1, 8), torch.ones(1, 8), "relu")
    with pytest.raises(RuntimeError, match="pop::load: "):
        torch.ops.pop.load("{}", "{}", [])


def test_a_weight_whose_layout_changed_in_place_is_stale():
    native = pop_ext.load(llama(hidden=64, heads=4, head_dim=16), "third")
    projection = native.model.model.layers[0].self_attn.q_proj.weight
    projection.data = projection.data.t()
    assert torch.ops.pop.stale_weight(native.handle) == "layers.0.q_proj"


def test_a_disabled_aten_operator_is_never_called():
    output = run(
        """
        import sys
        sys.path.insert(0, "tests/support")
        import torch, pop_ext
        from models import llama, tokens
        native = pop_ext.load(llama(), "third")
        torch.ops.pop.set_foreign("aten::mm.out", -1, "changed")
        hidden = torch.randn(200, 8)  # more rows than the kernel for few rows supports
        rows = lambda *values: torch.tensor(values, dtype=torch.int32)
        cache = lambda: [torch.zeros(1, 1, 200, 8)]
        for call in (
            lambda: torch.ops.pop.kv_project(
                hidden, torch.randn(16, 8), torch.ones(200, 8), torch.zeros(200, 8),
                rows(0, 200), rows(0), rows(0), 1e-6, cache(), cache(),
            ),
            lambda: native.prefill(tokens(native.model, 1, 200)),
        ):
            try:
                call()
                print("ran")
            except RuntimeError as error:
                print(error)
        """
    )
    assert output.splitlines() == ["aten::mm.out: disabled: changed"] * 2
