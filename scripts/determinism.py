"""Print what changes the bits of a prefill on this processor, and by how much: the table of docs/determinism.md.

PYTHONPATH=python python scripts/determinism.py
POP_CPU_ISA=baseline PYTHONPATH=python python scripts/determinism.py
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

import pop_ext
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from models import pad, shared, tokens

LENGTH = 150
OMIT = (1, 3, 4)
LAYERS = 6


def parts(output, columns: int = LENGTH) -> list[Tensor]:
    """Return the first sequence's logits, and its keys and values in the last columns."""
    layers = output.past_key_values.layers
    return [output.logits[0], *(x[0, :, -columns:] for layer in layers for x in (layer.keys, layer.values))]


def difference(some: Iterable[Tensor], others: Iterable[Tensor]) -> str:
    """Return `same bits`, or the largest difference relative to the largest value of a tensor."""
    pairs = [(one.float(), other.float()) for one, other in zip(some, others, strict=True)]
    if all(torch.equal(one, other) for one, other in pairs):
        return "same bits"
    return f"{max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs):.0e}"


def split(native, ids: Tensor, at: int) -> list[Tensor]:
    cache = DynamicCache()
    native.prefill(ids[:, :at], past_key_values=cache)
    return parts(native.prefill(ids[:, at:], past_key_values=cache))


@torch.no_grad()
def rows(dtype: torch.dtype, hidden: int) -> dict[str, str]:
    """Return what was changed -> difference to the same prompt alone, on one thread."""
    model = shared(dtype=dtype, hidden=hidden, intermediate=3 * hidden)
    plan = pop_ext.Plan(LAYERS, OMIT)
    native, full = pop_ext.load(model, plan), pop_ext.load(model, pop_ext.Plan(LAYERS, ()))
    ids = tokens(model, 1, LENGTH)
    torch.set_num_threads(1)
    alone, full_alone = parts(native.prefill(ids)), parts(full.prefill(ids))
    found = {"the call again": difference(parts(native.prefill(ids)), alone)}
    found["the model loaded again"] = difference(parts(pop_ext.load(model, plan).prefill(ids)), alone)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        found[f"{threads} threads"] = difference(parts(native.prefill(ids)), alone)
    torch.set_num_threads(1)
    for side in ("left", "right"):
        for mates in ([3], [40, 1], [200, 7, 65]):
            batch, mask = pad([ids[0], *(tokens(model, n, seed=n) for n in mates)], side)
            output = native.prefill(batch, attention_mask=mask)
            ours = parts(output, batch.shape[1])
            at = slice(-LENGTH, None) if side == "left" else slice(LENGTH)
            ours[1:] = [x[:, at] for x in ours[1:]]
            found[f"batch mates of {mates} tokens, padded {side}"] = difference(ours, alone)
    short = ids[:, :20]
    batch, mask = pad([short[0], tokens(model, 200, seed=1)], "left")
    ours = parts(native.prefill(batch, attention_mask=mask), 20)
    found["a prompt of 20 tokens beside one of 200"] = difference(ours, parts(native.prefill(short), 20))
    static = StaticCache(config=model.config, max_cache_len=LENGTH + 27)
    found["a static cache (logits)"] = difference([native.prefill(ids, past_key_values=static).logits[0]], alone[:1])
    for at in (1, 64, LENGTH - 1):
        found[f"split after {at}, all layers"] = difference(split(full, ids, at), full_alone)
    found["split after 64, pruned"] = difference(split(native, ids, 64), alone)
    digest = hashlib.sha256(b"".join(x.float().numpy().tobytes() for x in alone))
    found["SHA-256 of the result"] = digest.hexdigest()[:12]
    return found


def main() -> None:
    print(f"torch {torch.__version__}, {torch.ops.pop.cpu_isa()}")
    columns = {
        f"{str(dtype).removeprefix('torch.')}, {hidden}": rows(dtype, hidden)
        for hidden in (128, 1024)
        for dtype in (torch.float32, torch.bfloat16)
    }
    print("| changed | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
