"""kdcore: distil language models, draft for them, with methods that plug in and compose.

This package holds no method and imports no plugin; see `kdcore.method.protocols` for what a method
is.
"""

__version__ = "0.1.0"
