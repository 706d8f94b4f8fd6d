"""The trained weights that come with the package: one .npz file each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "weights"


def load(name: str) -> dict[str, Tensor]:
    """The state of the network of this name."""
    path = FOLDER / f"{name}.npz"
    if not path.is_file():
        there = sorted(path.stem for path in FOLDER.glob("*.npz"))
        raise ValueError(f"There are no weights {path.stem}; there are {', '.join(there)}. Train your own: recipes.")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def save(net: nn.Module, path: Path) -> None:
    """Write the state of a network in single precision."""
    state = {key: value.detach().cpu().float().numpy() for key, value in net.state_dict().items()}
    np.savez_compressed(path, **state)
