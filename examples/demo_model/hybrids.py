"""Train small hybrids, and measure what pruned prefills cost them: `python examples/demo_model/hybrids.py --help`.

Each has 8 layers of 128 channels and is trained on the same text in the same order, then prefilled by the portable
backend. They differ in parameters and in loss, so read each against its own full depth. What pruning would cost a large
model is another question.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bpe
import data
import numpy as np
import pop_ext
import torch
import torch.nn.functional as F
import transformers
from pop_ext.evaluation import ablations
from pop_ext.evaluation.arms import logits_after_prefill
from pop_ext.evaluation.results import mean_of
from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import decoder_layers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
SEED = 20261130
LAYERS, HIDDEN, VOCAB = 8, 128, 1024
WINDOW, BATCH = 256, 4
LEARNING_RATE, WARMUP_STEPS, DECAY = 3e-3, 50, 0.4
PROMPT, CONTINUATION = 208, 48
EVAL_BATCH = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_LINEAR, _FULL = "linear_attention", "full_attention"
_MAMBA: dict[str, Any] = {
    "mamba_d_state": 32,
    "mamba_d_head": 32,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen 3.5": (
        "Qwen3_5",
        {
            "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL] * 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "LFM2": ("Lfm2", {"layer_types": [*["conv", "conv", _FULL] * 2, "conv", _FULL], "block_auto_adjust_ff_dim": False}),
    "Granite 4 hybrid": (
        "GraniteMoeHybrid",
        {
            "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 256,
            "attention_multiplier": 32**-0.5,
            **_MAMBA,
        },
    ),
    "DeepSeek V3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,  # that of RoPE
            "kv_lora_rank": 48,
            "q_lora_rank": None,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 32,
            "first_k_dense_replace": LAYERS,
        },
    ),
    "Falcon-H1": ("FalconH1", {"mamba_d_ssm": 256, **_MAMBA}),
}
"""Name -> prefix of the classes of transformers, and its config beside the common sizes."""

LAYER_KINDS = {
    "Llama": "attention",
    "Qwen 3.5": "3 gated delta rule to 1 attention",
    "LFM2": "2 short convolutions to 1 attention",
    "Granite 4 hybrid": "3 Mamba-2 to 1 attention",
    "Falcon-H1": "Mamba-2 and attention in each layer",
    "DeepSeek V3": "latent attention",
}
PLANS = {
    "quarter": pop_ext.Plan(LAYERS, range(6, 8), boundary=1),
    "third": pop_ext.Plan(LAYERS, range(5, 8), boundary=1),
    "third, boundary 16": pop_ext.Plan(LAYERS, range(5, 8), boundary=16),
    "half": pop_ext.Plan(LAYERS, range(4, 8), boundary=1),
}


def build(name: str) -> nn.Module:
    """Return an untrained model in float32, the same one at every call."""
    prefix, special = MODELS[name]
    config = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    torch.manual_seed(SEED)
    return getattr(transformers, f"{prefix}ForCausalLM")(config(**{**_COMMON, **special}))


def load_texts() -> tuple[data.WindowStream, list[np.ndarray]]:
    """Return windows of the training files, and the held-out files, in tokens of a small vocabulary."""
    train, held_out, _ = data.split(data.stdlib_files())
    draw = np.random.default_rng(SEED)
    tokenizer = bpe.train_tokenizer((f.text for f in train if draw.random() < 0.3 * f.weight), VOCAB)

    encoded = bpe.encode_texts(tokenizer, [f.text for f in train])
    return (
        data.WindowStream(encoded, [f.weight for f in train], SEED, WINDOW),
        bpe.encode_texts(tokenizer, [f.text for f in held_out]),
    )


def train(model: nn.Module, stream: data.WindowStream, tokens: int, report: Callable[[str], None]) -> float:
    """Train on ``tokens`` tokens. Return the mean loss of the last 50 steps, in nats a token."""
    stream.start(WINDOW, 0, 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    steps = max(1, tokens // (BATCH * WINDOW))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY * steps))
    )
    model.train()
    losses: list[float] = []
    begin = time.monotonic()
    for step in range(steps):
        window = torch.from_numpy(stream.batch(BATCH))
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            report(f"step {step + 1} of {steps}: {np.mean(losses[-50:]):.3f}, {time.monotonic() - begin:.0f} s")
    model.eval()
    return float(np.mean(losses[-50:]))


def pairs_of(held_out: list[np.ndarray], count: int) -> tuple[Tensor, Tensor]:
    """Return prompts ``[count, PROMPT]`` and their continuations ``[count, CONTINUATION]``, which do not overlap."""
    size = PROMPT + CONTINUATION
    starts = [(doc, at) for doc in held_out for at in range(0, len(doc) - size, size)]
    chosen = np.random.default_rng(SEED).permutation(len(starts))[:count]
    windows = torch.stack([torch.from_numpy(starts[i][0][starts[i][1] :][:size].astype(np.int64)) for i in chosen])
    return windows[:, :PROMPT], windows[:, PROMPT:]


def nats(logits: Tensor, continuation: Tensor) -> list[float]:
    """Return the mean loss of each continuation, in nats a token."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), continuation.flatten(), reduction="none")
    return losses.view(continuation.shape).double().mean(dim=1).tolist()


@torch.no_grad()
def run_oracle(model: nn.Module, plan: pop_ext.Plan, prompt: Tensor, continuation: Tensor) -> Tensor:
    """Return what a pruned prefill must give: omitted layers run in full, then context rows get their input back."""
    undone = ablations.keep_kv_only(prompt.shape[1] - plan.boundary)
    with ExitStack() as stack:
        for index in plan.omit:
            layer = decoder_layers(model)[index]
            stack.enter_context(replaced_forward(layer, undone(layer.forward)))
        return ablations.stock_logits(model, torch.cat([prompt, continuation[:, :-1]], 1), continuation.shape[1])


@torch.no_grad()
def run_portable(model: nn.Module, plan: pop_ext.Plan, prompt: Tensor, continuation: Tensor) -> Tensor:
    """Prefill the prompt by the portable backend, then read the continuation at full depth. Return its logits."""
    with pop_ext.enabled(model, plan.replace(min_tokens=0), strict=True, backend="portable"):
        return logits_after_prefill(
            model, lambda ids: model(input_ids=ids, use_cache=True, logits_to_keep=1), prompt, continuation
        )


def measure(model: nn.Module, held_out: list[np.ndarray], count: int) -> dict[str, Any]:
    """Return the loss at full depth, and what each plan and each ablation of the third adds to it, paired."""
    prompts, continuations = pairs_of(held_out, count)
    third, samples, largest = PLANS["third"], {}, 0.0
    arms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "full": lambda p, c: ablations.stock_logits(model, torch.cat([p, c[:, :-1]], 1), CONTINUATION),
        **{name: lambda p, c, plan=plan: run_portable(model, plan, p, c) for name, plan in PLANS.items()},
        "third, context leaves nothing": lambda p, c: ablations.ablated_logits(model, ablations.NO_KV, third, p, c),
        "third, no boundary": lambda p, c: ablations.ablated_logits(model, ablations.NO_BOUNDARY, third, p, c),
        "third, dropped": lambda p, c: ablations.ablated_logits(model, ablations.DROPPED, third, p, c),
    }
    for name, run in arms.items():
        samples[name] = []
        for prompt, continuation in zip(prompts.split(EVAL_BATCH), continuations.split(EVAL_BATCH), strict=True):
            logits = run(prompt, continuation)
            samples[name] += nats(logits, continuation)
            if name in PLANS and len(samples[name]) <= EVAL_BATCH:
                largest = max(
                    largest, float((logits - run_oracle(model, PLANS[name], prompt, continuation)).abs().max())
                )
    full = samples.pop("full")
    more = {name: mean_of([a - b for a, b in zip(values, full, strict=True)]) for name, values in samples.items()}
    return {
        "full": float(np.mean(full)),
        "more": {name: {"mean": mean.value, "error": mean.error} for name, mean in more.items()},
        "largest_difference_to_oracle": largest,
    }


def table(results: dict[str, Any]) -> list[str]:
    """Return the lines of a Markdown table: what each plan and ablation adds, in nats a token, and standard errors."""
    arms = list(next(iter(results["models"].values()))["more"])
    lines = [f"| model | its layers | parameters | full depth | {' | '.join(arms)} |", "|---" * (4 + len(arms)) + "|"]
    for name, found in results["models"].items():
        cells = [f"{mean['mean']:+.3f} ({mean['error']:.3f})" for mean in found["more"].values()]
        size = f"{found['parameters'] / 1e6:.2f} M"
        lines.append(f"| {name} | {found['layers']} | {size} | {found['full']:.3f} | {' | '.join(cells)} |")
    return lines


def names_of(text: str) -> Iterator[str]:
    """Yield the models that a comma-separated text names."""
    for name in text.split(","):
        if name not in MODELS:
            raise argparse.ArgumentTypeError(f"expected of {', '.join(MODELS)}, got {name}")
        yield name


def main() -> None:
    """Train and measure, and write the results after each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=lambda text: list(names_of(text)), default=list(MODELS), help="names")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="tokens to train each on")
    parser.add_argument("--prompts", type=int, default=192, help="held-out prompts to measure on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "hybrids.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stream, held_out = load_texts()
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    results = found["models"]  # other models that the file holds stay
    for name in args.models:
        model = build(name)
        loss = train(model, stream, args.tokens, lambda line, name=name: print(f"{name}: {line}", flush=True))
        results[name] = {
            "layers": LAYER_KINDS[name],
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_loss": loss,
            **measure(model, held_out, args.prompts),
        }
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        facts = {"tokens": args.tokens, "prompts": args.prompts, "python": platform.python_version(), **versions}
        found = {**facts, "models": results}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
