"""Train the demo model on the running interpreter's standard library: `python examples/demo_model/train.py --help`."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import bpe
import data
import evaluate
import model as llama
import numpy as np
import optim
import parallel
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

HERE = Path(__file__).resolve().parent
BATCH_TOKENS = 8192
PART_TOKENS = 1024  # tokens of a part, which a process computes at a time
MATRIX_LR, OTHER_LR = 0.02, 0.003
WARMUP_STEPS = 50
LOG_STEPS = 25
SEED = 20260203
# (progress 0..1, tokens of a window from there on): short windows are cheap and teach most.
PHASES = ((0.0, 256), (0.82, 2048))


@dataclass
class Corpus:
    """Token arrays of training and held-out files: uint16, each begins with the separator."""

    train: list[np.ndarray]
    weights: list[float]
    held_out: list[np.ndarray]
    held_out_bytes: int
    report: dict


def load_corpus(tokenizer_dir: Path) -> Corpus:
    """Read and split the library, train the tokenizer unless `tokenizer_dir` has one, and encode everything."""
    train, held_out, overlap = data.split(data.stdlib_files())
    file = tokenizer_dir / "tokenizer.json"
    if file.exists():
        tokenizer = bpe.load_tokenizer(file)
    else:
        draw = np.random.default_rng(SEED)
        tokenizer = bpe.train_tokenizer((f.text for f in train if draw.random() < f.weight), llama.Shape.vocab_size)
        tokenizer.save_pretrained(tokenizer_dir)

    def encode(files: list[data.SourceFile]) -> list[np.ndarray]:
        return bpe.encode_texts(tokenizer, [f.text for f in files])

    files = [
        {"path": f.path, "bytes": len(f.text.encode()), "shared_lines": round(overlap[f.path][0], 4)} for f in held_out
    ]
    report = {"python": platform.python_version(), "bytes": sum(f["bytes"] for f in files), "files": files}
    return Corpus(encode(train), [f.weight for f in train], encode(held_out), report["bytes"], report)


def learning_rate(progress: float, step: int, decay: float) -> float:
    """Return the factor of the peak rates: linear warm-up, flat, then linear to zero over the last `decay` of a run."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (1 - progress) / decay))


class Run:
    """A training run that ends when its tokens or its minutes are used up, whichever comes first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        self.corpus = load_corpus(args.work)
        shape = llama.Shape()
        self.model = llama.Llama(shape).to(torch.bfloat16)
        self.workers = parallel.GradientWorkers(self.model, args.processes, BATCH_TOKENS, PART_TOKENS, args.compile)
        m = self.model
        matrices = {
            m.qkv: [shape.q_rows, shape.kv_rows, shape.kv_rows],
            m.o: [shape.hidden_size],
            m.gate_up: [shape.intermediate_size] * 2,
            m.down: [shape.hidden_size],
        }
        self.names = {param: name for name, param in m.named_parameters()}
        self.optimiser = optim.Optimiser(matrices, [m.embed, m.norms, m.final_norm])
        self.stream = data.WindowStream(self.corpus.train, self.corpus.weights, SEED, PHASES[0][1])
        self.tokens, self.steps, self.seconds = 0, 0, 0.0
        self.stopping = False

    def _stop(self, *_: object) -> None:
        self.stopping = True  # the current step is finished first

    @property
    def progress(self) -> float:
        """Return the used share of the budget, 0..1."""
        return max(self.tokens / self.args.tokens, self.seconds / 60 / self.args.minutes)

    def train(self) -> None:
        """Train to the end of the budget, with checkpoints and exports in between."""
        signal.signal(signal.SIGTERM, self._stop)
        saved = exported = logged = self.seconds
        losses: list[float] = []
        origin = time.monotonic() - self.seconds
        while (progress := self.progress) < 1:
            window = next(size for start, size in reversed(PHASES) if progress >= start)
            if window != self.stream.window:
                self.stream.start(window, self.stream.epoch + 1, 0)
            losses.append(self.step(learning_rate(progress, self.steps, self.args.decay)))
            # A pause counts as used time, so that the run ends when announced.
            self.seconds = time.monotonic() - origin
            if self.steps % LOG_STEPS == 0:
                rate = len(losses) * BATCH_TOKENS / max(self.seconds - logged, 1e-9)
                logged, loss = self.seconds, sum(losses) / len(losses)
                losses.clear()
                print(
                    f"step {self.steps} tokens {self.tokens / 1e6:.2f}M epoch {self.stream.epoch} window {window} "
                    f"progress {progress:.3f} loss {loss:.3f} nats/token, {rate:.0f} tokens/s, "
                    f"{self.seconds / 60:.1f} min",
                    flush=True,
                )
            if self.stopping:
                self.save()
                raise SystemExit("stopped; --resume goes on from here")
            if self.seconds - saved > 60 * self.args.save_minutes:
                self.save()
                saved = self.seconds
            if self.seconds - exported > 60 * self.args.export_minutes:
                self.validate_quickly()
                self.export(None)
                exported = self.seconds
        self.save()

    def step(self, rate: float) -> float:
        """Take an optimiser step over `BATCH_TOKENS` tokens; return the mean loss in nats per token."""
        batch = torch.from_numpy(self.stream.batch(BATCH_TOKENS // self.stream.window))
        loss, grads = self.workers.gradients(batch)
        grads = [grads[self.names[param]] for param in self.optimiser.params]
        self.optimiser.step(grads, MATRIX_LR * rate, OTHER_LR * rate)
        self.steps += 1
        self.tokens += BATCH_TOKENS
        return loss

    def validate_quickly(self) -> None:
        """Print the loss on the beginnings of a few held-out files."""
        docs = [doc[:1025] for doc in self.corpus.held_out[:8]]
        nats = evaluate.total_nll(self.model.nll, docs)
        print(f"validation {nats / sum(len(d) - 1 for d in docs):.3f} nats/token on a sample", flush=True)

    def validate(self) -> float:
        """Return the bits per byte over all held-out files."""
        return evaluate.bits_per_byte(
            evaluate.total_nll(self.model.nll, self.corpus.held_out), self.corpus.held_out_bytes
        )

    def save(self) -> None:
        """Write the checkpoint that `--resume` reads."""
        state = {
            "optimiser": self.optimiser.state_dict(),
            "stream": self.stream.state,
            "counters": (self.tokens, self.steps, self.seconds),
        }
        partial = self.args.work / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.args.work / "checkpoint.pt")

    def resume(self) -> None:
        """Load the checkpoint from the work directory."""
        state = torch.load(self.args.work / "checkpoint.pt", weights_only=True)
        self.optimiser.load_state_dict(state["optimiser"])
        self.stream.start(*state["stream"])
        self.tokens, self.steps, self.seconds = state["counters"]

    def export(self, bits: float | None) -> None:
        """Write the model directory: weights, configurations, tokenizer, held-out list and the measured figures."""
        out: Path = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = bpe.load_tokenizer(self.args.work / "tokenizer.json")
        ids = {f"{name}_token_id": tokenizer.bos_token_id for name in ("bos", "eos", "pad")}
        fields = asdict(self.model.shape)
        config = LlamaConfig(
            **{k: v for k, v in fields.items() if k != "rope_theta"},
            rope_parameters={"rope_type": "default", "rope_theta": fields["rope_theta"]},
            architectures=["LlamaForCausalLM"],
            tie_word_embeddings=True,
            dtype="bfloat16",
            **ids,
        )
        config.save_pretrained(out)
        GenerationConfig(do_sample=False, **ids).save_pretrained(out)
        tokenizer.save_pretrained(out)
        partial = out / "model.safetensors.partial"
        save_file(self.model.hf_state_dict(), partial, metadata={"format": "pt"})
        partial.chmod(0o644)
        os.replace(partial, out / "model.safetensors")
        figures = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens_seen": self.tokens,
            "steps": self.steps,
            "minutes": round(self.seconds / 60, 1),
            "bits_per_byte": None if bits is None else round(bits, 4),
            "context": evaluate.CONTEXT,
            "stride": evaluate.STRIDE,
        }
        (out / "heldout.json").write_text(json.dumps(figures | self.corpus.report, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=115, help="time budget, wall clock")
    parser.add_argument("--tokens", type=float, default=24e6, help="token budget")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the budget over which the rate falls to 0")
    parser.add_argument("--work", type=Path, default=Path("demo_model_work"), help="checkpoint and tokenizer")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="the model directory to write")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--export-minutes", type=float, default=10)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not use torch.compile")
    return parser.parse_args()


def main() -> None:
    """Train, measure and export the model."""
    args = parse_args()
    torch.set_num_threads(1)  # processes run in parallel instead, see parallel.py
    run = Run(args)
    train_tokens = math.fsum(w * len(d) for w, d in zip(run.corpus.weights, run.corpus.train, strict=True))
    print(
        f"{len(run.corpus.train)} files, {train_tokens / 1e6:.2f}M tokens an epoch; held out: "
        f"{len(run.corpus.held_out)} files, {run.corpus.held_out_bytes} bytes, "
        f"{sum(map(len, run.corpus.held_out))} tokens",
        flush=True,
    )
    if args.resume:
        run.resume()
    run.train()
    bits = run.validate()
    run.export(bits)
    print(
        f"{run.tokens} tokens in {run.seconds / 60:.1f} min; held out: {bits:.4f} bits per byte at a context of "
        f"{evaluate.CONTEXT}",
        flush=True,
    )


if __name__ == "__main__":
    main()
