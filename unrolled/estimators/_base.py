"""What the estimators share: validation as in scikit-learn, batches, devices, pickles."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_scalar, gen_batches
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

Array = np.ndarray[Any, Any]
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class TorchTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A transformer with a PyTorch module inside, fed by batches of rows.

    Subclasses have the parameters `batch_size`, `device` and `dtype`, the fitted attributes `components_` and
    `network_`, and `_dtype`, the NumPy dtype that the network computes in.
    """

    def _validated(self, X: Any, *, reset: bool) -> Array:
        # dtype="numeric" and no order: a memory-mapped array of bytes, say, stays where it is. Batches are converted.
        return validate_data(self, X, reset=reset, dtype="numeric")

    def _fitted(self, X: Any) -> Array:
        """X, checked against what the estimator was fitted on."""
        check_is_fitted(self)
        return self._validated(X, reset=False)

    def _computing_dtype(self, X: Array) -> np.dtype[Any]:
        """The dtype asked for, or that of X."""
        if self.dtype is None:
            return _float_of(X)
        try:
            name = str(self.dtype).removeprefix("torch.") if isinstance(self.dtype, torch.dtype) else self.dtype
            dtype = np.dtype(name)
        except TypeError:
            dtype = None
        if dtype is None or dtype not in FLOATS:  # to NumPy, None equals float64
            raise ValueError(f"dtype must be None, float32 or float64 (of NumPy or PyTorch), got {self.dtype!r}.")
        return dtype

    def _computing_device(self) -> torch.device:
        """The device asked for, if this machine has it."""
        try:
            device = torch.device("cpu" if self.device is None else self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"device={self.device!r} is not available here: {reason} Use device=None for the CPU."
            ) from error
        return device

    def _tensor(self, rows: Array, device: torch.device | None = None) -> Tensor:
        """A batch in the dtype and on the device of the network: always a copy, as X may be read-only."""
        device = next(self.network_.parameters()).device if device is None else device
        return torch.from_numpy(np.array(rows, dtype=self._dtype, order="C")).to(device)

    def _in_batches(self, function: Callable[[Tensor], Tensor], X: Array, width: int) -> Array:
        """`function` of every batch of X, (len(X), width), in the floating point dtype of X."""
        result = np.empty((len(X), width), dtype=_float_of(X))
        with torch.no_grad():
            for rows in gen_batches(len(X), self.batch_size):
                result[rows] = function(self._tensor(X[rows])).cpu().numpy()
        return result

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # The modules go through torch.save, together (an optimizer holds the parameters of the network), so that what was
    # fitted on an accelerator can be loaded on a machine without one.

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        held = [name for name, value in state.items() if isinstance(value, nn.Module | torch.optim.Optimizer)]
        if held:
            buffer = io.BytesIO()
            torch.save({name: state.pop(name) for name in held}, buffer)
            state["_torch"] = buffer.getvalue()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        saved = state.pop("_torch", None)
        if saved is not None:
            try:
                state |= torch.load(io.BytesIO(saved), weights_only=False)
            except RuntimeError:  # of a device that is not here
                state |= torch.load(io.BytesIO(saved), weights_only=False, map_location="cpu")
        super().__setstate__(state)


def shuffled(num_rows: int, batch_size: int, random: np.random.RandomState) -> Iterator[Array]:
    """Row numbers, batch after batch without end, every row once a pass. Ascending in a batch, which suits a file."""
    while True:
        order = random.permutation(num_rows)
        for rows in gen_batches(num_rows, batch_size):
            yield np.sort(order[rows])


def relative_adam(net: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adam whose steps are relative to the size of what is learned, so that its rate is that of data in any unit."""
    learning = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.Adam([{"params": [p], "lr": learning_rate * _size(p)} for p in learning])


def _size(parameter: Tensor) -> float:
    """Of a matrix's entries; vectors and scalars are logarithms and offsets, of size 1."""
    if parameter.dim() < 2:
        return 1.0
    size = parameter.detach().square().mean().sqrt().item()
    return size if size > 0 else parameter.shape[-1] ** -0.5


def check_parameters(estimator: Any, positive: tuple[str, ...], integers: dict[str, int]) -> None:
    """Positive numbers, and integers with their least values, by scikit-learn's own check."""
    for name in positive:
        check_scalar(getattr(estimator, name), name, Real, min_val=0, include_boundaries="neither")
    for name, least in integers.items():
        check_scalar(getattr(estimator, name), name, Integral, min_val=least)


def _float_of(X: Array) -> np.dtype[Any]:
    """float32 stays float32; whatever else becomes float64, as in scikit-learn."""
    return X.dtype if X.dtype in FLOATS else np.dtype(np.float64)
