"""Where the public data lies that tests read: ``KDCORE_DATA``, else beside the project."""

from __future__ import annotations

import os
from pathlib import Path

BESIDE = Path(__file__).parent.parent.parent / "shared" / "data"
DATA = Path(os.environ.get("KDCORE_DATA", BESIDE))
