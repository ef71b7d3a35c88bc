"""Measure how soon Ctrl+C ends a long prefill: ``python -m bench.interrupts``.

The model is a Llama of 30 layers with random weights, as wide as SmolLM2-135M. A signal arrives at several points of a
prefill at full depth; the time is from the signal to the KeyboardInterrupt.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from pathlib import Path

import pop_ext
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.environment import environment
from bench.options import at_least

LAYERS = 30


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(2), default=8192)
    parser.add_argument("--signals", type=at_least(1), default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=arguments.tokens,
    )
    torch.manual_seed(0)
    native = pop_ext.load(LlamaForCausalLM(config).eval(), pop_ext.Plan(LAYERS, ()))
    ids = torch.randint(config.vocab_size, (1, arguments.tokens))
    begin = time.perf_counter()
    native.prefill(ids)
    whole = time.perf_counter() - begin
    delays = [delay_of(native, ids, whole * (n + 1) / (arguments.signals + 1)) for n in range(arguments.signals)]
    result = {"tokens": arguments.tokens, "prefill_s": whole, "layer_s": whole / LAYERS, "delay_s": delays}
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps({**result, "environment": environment(torch.device("cpu"))}, indent=1))


def delay_of(native: pop_ext.NativeModel, ids: torch.Tensor, after: float) -> float:
    """Return the seconds from a signal, sent ``after`` seconds into a prefill, to the exception."""
    sent = []

    def send() -> None:
        sent.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(after, send)
    timer.start()
    try:
        native.prefill(ids)
    except KeyboardInterrupt:
        return time.perf_counter() - sent[0]
    raise SystemExit("the prefill ended before the signal")


if __name__ == "__main__":
    main()
