"""Blocks of attention fit every device, and docs/results/kernel-resources.md has what the launchers ask for."""

from __future__ import annotations

import check_sass
import kernel_resources
import pytest
from kernel_resources import LIMITS, PAGE, Use

SMALLEST = min(LIMITS.values())
WIDTHS = range(8, 257, 8)


@pytest.fixture(scope="module")
def tiles():
    return kernel_resources.attention_tiles(LIMITS.values())


def test_every_tile_that_attention_may_launch_fits_its_device(tiles):
    assert {(t.limit, t.dtype, t.head_dim) for t in tiles} == {
        (limit, dtype, width) for limit in LIMITS.values() for dtype in ("f32", "bf16", "f16") for width in WIDTHS
    }
    assert [tile for tile in tiles if tile.bytes > tile.limit] == []


def test_only_wide_heads_on_small_devices_get_smaller_tiles(tiles):
    for limit in set(LIMITS.values()):
        for dtype in ("f32", "bf16", "f16"):
            widest = 256 if limit > SMALLEST else 232 if dtype == "f32" else 200
            with_largest = [t.head_dim for t in tiles if (t.limit, t.dtype, t.queries) == (limit, dtype, 32)]
            assert with_largest == [width for width in WIDTHS if width <= widest]
            assert [t.queries for t in tiles if (t.limit, t.dtype, t.head_dim) == (limit, dtype, 256)][:3] == [4, 8, 16]


def test_the_page_states_what_the_launchers_ask_for(tiles):
    text = PAGE.read_text(encoding="utf-8")
    for table in (kernel_resources.largest_tiles(tiles), kernel_resources.bytes_of_tiles(tiles)):
        assert table in text, "run scripts/kernel_resources.py"
    assert f"asks for {kernel_resources.kv_project_bytes():,} bytes" in text, "run scripts/kernel_resources.py"


def test_the_page_has_every_kernel():
    text = PAGE.read_text(encoding="utf-8")
    sources = (kernel_resources.ROOT / "cuda").glob("*.cu")
    kernels = {name for path in sources for name in check_sass.KERNEL.findall(path.read_text(encoding="utf-8"))}
    assert len(kernels) > 10
    assert [name for name in sorted(kernels) if f"`{name}`" not in text and f"`{name}<" not in text] == []


def test_what_ptxas_prints_is_read():
    text = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_kernel' for 'sm_80'
ptxas info    : Function properties for a_kernel
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'b_kernel' for 'sm_90a'
ptxas info    : Function properties for b_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 400 bytes cmem[0]
"""
    assert kernel_resources.parse_uses(text) == [
        Use("a_kernel", "80", registers=40, shared=256, spilled=4),
        Use("b_kernel", "90a", registers=255, shared=0, spilled=0),
    ]
