"""Where the tests find data sets that are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(os.environ.get("UNROLLED_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


def load(name: str) -> Any:
    """The arrays of `name`, an .npz file; the test is skipped where it is missing."""
    if not (FOLDER / name).is_file():
        pytest.skip(f"{name} is not in {FOLDER}: set UNROLLED_DATA to the folder that holds it")
    return np.load(FOLDER / name, allow_pickle=False)
