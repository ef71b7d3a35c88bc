"""Read the K and V that a layer writes to its cache, and let it attend over a cache that holds them already.

A layer computes K and V in a way of its own: norms before or after RoPE, multipliers, latents, shared heads. So none of
it is computed here. The layer runs with a ``CaptureCache``, which takes what the layer writes and ends its forward
there, before attention, output projection and MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.modules import Module


@dataclass(frozen=True)
class KeysValues:
    """What a layer writes to its cache in one call.

    Attributes:
        keys, values: ``[batch, kv_heads, rows, head_dim]`` each; the two may differ in ``head_dim``.
        args, kwargs: the further arguments of ``Cache.update``, such as the index of the layer.
    """

    keys: Tensor
    values: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_STATES = ("update_conv_state", "update_recurrent_state")
"""Methods of a cache that bring the state of a recurrent mixer up to date."""


class Captured(Exception):
    """Raised to end a layer's forward once it has written its K and V."""


class _CacheView:
    """Stand for a cache inside a layer. Whatever is not defined here is that of the cache."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        if name.startswith("update_") and name not in _STATES:
            # Whatever a layer keeps beside K and V would be that of some of the rows.
            raise NotImplementedError(f"model: expected layers that keep K and V or a recurrent state, got {name}")
        return getattr(self._cache, name)


class CaptureCache(_CacheView):
    """Take the K and V that a layer writes, and end its forward by raising ``Captured``."""

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self.written: KeysValues | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.written = KeysValues(key_states, value_states, args, kwargs)
        raise Captured


class FilledCache(_CacheView):
    """Give a layer the K and V of all positions, which its cache already holds, for whatever it writes.

    Args:
        cache: the cache.
        filled: K and V as ``Cache.update`` returned them.
        rows: rows of the call that the layer runs, the last of those that the cache holds.
    """

    def __init__(self, cache: Any, filled: tuple[Tensor, Tensor], rows: int) -> None:
        super().__init__(cache)
        self._filled, self._rows = filled, rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._filled

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return int(self._cache.get_seq_length(*args, **kwargs)) - self._rows


class NarrowQuery(nn.Module):
    """Return one head of zeros in place of all queries, which a capture does not read.

    Args:
        attention: the attention module. ``has_heads_in_q_proj`` must hold.
    """

    def __init__(self, attention: Module) -> None:
        super().__init__()
        self.head_dim = attention.q_proj.out_features // attention.config.num_attention_heads

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.head_dim)


def has_heads_in_q_proj(mixer: Module) -> bool:
    """Return whether a mixer looks like an attention whose ``q_proj`` makes all query heads."""
    return hasattr(getattr(mixer, "q_proj", None), "out_features") and hasattr(
        getattr(mixer, "config", None), "num_attention_heads"
    )


class Precomputed(nn.Module):
    """Return what is known before the layer runs, whatever comes in."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


class RecordedMixer(nn.Module):
    """Run a mixer with a state, such as a linear attention, and keep its output for the boundary rows.

    Args:
        mixer: the module of the layer. It brings its state in the cache up to date.
        ends_layer: whether to end the layer's forward after it, since the layer has no attention.
    """

    def __init__(self, mixer: nn.Module, ends_layer: bool) -> None:
        super().__init__()
        self.__dict__["mixer"] = mixer  # no child: the clone must not register it a second time
        self.ends_layer, self.output = ends_layer, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.__dict__["mixer"](*args, **kwargs)
        if self.ends_layer:
            raise Captured
        return self.output

    def replay(self, rows: int) -> nn.Module:
        """Return a module that returns the last rows of the recorded output."""
        return Precomputed(last_rows_of_output(self.output, rows))


def last_rows_of_output(output: Any, rows: int) -> Any:
    """Return the last rows of a tensor ``[..., T, features]``, or of the first of a tuple."""
    if isinstance(output, torch.Tensor):
        return output[..., -rows:, :]
    return (output[0][..., -rows:, :], *output[1:])
