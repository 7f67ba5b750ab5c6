"""The parts of gpu.py: each is a module with ``NAMES`` and ``measure(section, size)``."""
