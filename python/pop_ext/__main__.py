"""``python -m pop_ext``: the ``pop-ext`` command."""

from pop_ext.cli import main

if __name__ == "__main__":
    main()
