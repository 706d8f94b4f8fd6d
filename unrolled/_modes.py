"""Train and eval mode: left as they were found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def modes_kept(net: nn.Module) -> Iterator[None]:
    """Put every module back into the mode, train or eval, that it came in."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
