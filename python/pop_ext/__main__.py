"""Run ``pop-ext`` as ``python -m pop_ext``."""

from pop_ext.cli import main

if __name__ == "__main__":
    main()
