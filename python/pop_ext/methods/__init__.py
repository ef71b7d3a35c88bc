"""Methods that choose or improve a plan: importance, block influence, least-squares fits and measured time."""
