"""The portable backend: Prefill-Only Pruning inside one forward of the model's own modules.

It runs every decoder whose layers write K and V to a transformers cache, in whatever form their weights are:
quantised, adapted by PEFT, offloaded by accelerate. ``forward.py`` runs the stock forward of the model over shallow
clones of it, in which each omitted layer is a ``PartialLayer`` (``layers.py``). ``packed.py`` does the same for the
packed rows of continuous batching.
"""

from pop_ext.portable.decoder import Decoder, find_decoder
from pop_ext.portable.forward import Rows, run_forward
from pop_ext.portable.packed import PackedRows, run_packed
from pop_ext.portable.trial import try_portable

__all__ = ["Decoder", "PackedRows", "Rows", "find_decoder", "run_forward", "run_packed", "try_portable"]
