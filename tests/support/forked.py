"""Run prefills in forked children of this process, and print a line for each. `test_forks` starts it with a time limit.

One line: the threads of parent and child, what the child ran, and what it printed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pop_ext
import torch
from models import hyperclovax, llama, tokens
from op_calls import op_call, run_op
from pop_ext import reference
from torch import Tensor

SECONDS = 20


def in_child(run: Callable[[], object]) -> str:
    """Return what `run` gives or raises in a forked child; "hangs" if it does not end in time."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(run())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.02)
    with os.fdopen(read) as pipe:
        return pipe.read()


@torch.no_grad()
def main() -> None:
    model = llama(hidden=256)
    ids = tokens(model, 1, 150)
    twin = pop_ext.enable(llama(hidden=256), "third")
    portable = pop_ext.enable(hyperclovax(hidden=256), "third")
    native = pop_ext.load(model, "third")
    spec, plan = native.spec.to_json(), native.plan.to_json()
    weights = [ref.tensor.detach() for ref in native.description.weights]
    x, weight, norm = torch.randn(4096, 256), torch.randn(256, 256), torch.ones(256)
    written, negated = torch.zeros_like(x), torch._neg_view(x)
    call = op_call(native, [ids[0]])
    pop = torch.ops.pop
    raw: dict[str, Callable[[], object]] = {
        "pop.prefill": lambda: run_op(call),
        "pop.load": lambda: pop.unload(pop.load(spec, plan, weights)),
        "pop.fold_kv": lambda: pop.fold_kv([weight], [weight], [norm]),
        "pop.linear": lambda: pop.linear(x, weight),
        "pop.rms_norm": lambda: pop.rms_norm(x, norm, 1e-6),
        "pop.add_rms_norm": lambda: pop.add_rms_norm(written, negated, norm, 1e-6),
        "pop.gated_act": lambda: pop.gated_act(x, x),
        "pop.quantize_rows": lambda: pop.quantize_rows(x),
        "reference.prefill": lambda: reference.prefill(model, ids, "third"),
        "importance": lambda: pop_ext.importance(model, [ids]),
        "fit": lambda: pop_ext.fit(model, pop_ext.Plan(model.config.num_hidden_layers, [1]), [ids, ids]),
        "explain": lambda: pop_ext.explain(twin, ids, logits_to_keep=1),
        "portable forward": lambda: portable(ids, logits_to_keep=1),
        "portable score": lambda: pop_ext.score(portable, ids, ids),
        "portable explain": lambda: pop_ext.explain(portable, ids, logits_to_keep=1),
        "portable enable": lambda: pop_ext.enable(portable, "third"),
    }
    runs: dict[str, Callable[[], Tensor]] = {
        "native.prefill": lambda: native.prefill(ids).logits,
        "an enabled model": lambda: twin(ids, logits_to_keep=1).logits,
        "load": lambda: pop_ext.load(model, "third").prefill(ids).logits,
    }

    def report(parent: int, child: int) -> None:
        for name, run in runs.items():

            def forked(run: Callable[[], Tensor] = run) -> float:
                torch.set_num_threads(child)
                return round(float(run().sum()), 2)

            print(f"{parent} {child} {name}: {in_child(forked)}", flush=True)

    torch.set_num_threads(1)
    expected = round(float(native.prefill(ids).logits.sum()), 2)
    print(f"expected: {expected}")
    report(1, 2)
    torch.set_num_threads(2)
    native.prefill(ids)
    report(2, 2)
    report(2, 1)
    for name, run in raw.items():
        for child in (2, 1):

            def forked_raw(run: Callable[[], object] = run, child: int = child) -> str:
                torch.set_num_threads(child)
                run()
                return "done"

            print(f"2 {child} {name}: {in_child(forked_raw)}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the first parallel loop
    main()
