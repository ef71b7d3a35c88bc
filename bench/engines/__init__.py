"""The inference engines that ``bench/peers.py`` times, each in a process of its own."""
