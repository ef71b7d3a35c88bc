"""Cases of test_bad_input.py and docs/bad-input.md: a bad argument, and the error that it must get."""

from bad_input.blocks import BLOCKS
from bad_input.budget import AUTOPLAN
from bad_input.enabling import ENABLED, SCORE
from bad_input.fitting import FIT
from bad_input.fixture import Case, Fixture
from bad_input.loading import LOAD, PLAN
from bad_input.op import OP
from bad_input.prefill import PREFILL

__all__ = ["SECTIONS", "Case", "Fixture"]

SECTIONS = {
    "`pop_ext.Plan`": PLAN,
    "`pop_ext.load` and `pop_ext.enable`": LOAD,
    "`pop_ext.fit`, and plans that carry a fit": FIT,
    "`pop_ext.autoplan`": AUTOPLAN,
    "An enabled model": ENABLED,
    "`native.prefill`": PREFILL,
    "`torch.ops.pop.prefill`, `load` and `unload`": OP,
    "The building blocks of `torch.ops.pop`": BLOCKS,
    "`pop_ext.score`": SCORE,
}
