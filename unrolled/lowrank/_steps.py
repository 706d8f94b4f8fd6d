"""What the low-rank encoders share: a weight, a dictionary, thresholds, and the step of those that separate."""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.solvers import Decomposition, lipschitz
from unrolled.step import Step


class FactoredStep(Step):
    r"""A weight $W$ (q, m) and a dictionary $D$ (m, q), which a layer uses one after the other.

    Where `nonnegative`, the parameter is `raw_dictionary` and the dictionary its modulus, otherwise `dictionary`.
    """

    nonnegative = False

    def __init__(self, dictionary: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        check_dictionary(dictionary, nonnegative=self.nonnegative)
        like = _check.converted("dictionary", dictionary, device, dtype)
        self.weight = nn.Parameter(torch.empty_like(like.T, memory_format=torch.contiguous_format))
        matrix = nn.Parameter(torch.empty_like(like, memory_format=torch.contiguous_format))
        self.register_parameter(self._name, matrix)

    @property
    def _name(self) -> str:
        return "raw_dictionary" if self.nonnegative else "dictionary"

    @property
    def matrix(self) -> Tensor:
        """The dictionary as the layer uses it, (m, q)."""
        raw: Tensor = getattr(self, self._name)  # not get_parameter: functional_call swaps in plain tensors
        # Unlike abs, this has a slope at 0, so that entries which start at 0 can grow; unlike relu, none gets stuck.
        return torch.where(raw < 0, -raw, raw) if self.nonnegative else raw

    @torch.no_grad()
    def reset_factors(self, dictionary: Tensor, L: Tensor) -> None:
        """Back to W = D^T / L."""
        check_dictionary(dictionary, nonnegative=self.nonnegative)
        if dictionary.shape != self.weight.mT.shape:
            raise ValueError(
                f"dictionary must have shape {tuple(self.weight.mT.shape)} as before, got {tuple(dictionary.shape)}."
            )
        self.weight.copy_(dictionary.mT / L)
        self.get_parameter(self._name).copy_(dictionary)

    def check(self, x: Tensor) -> None:
        _check.signals("x", x, self.weight, self.weight.shape[1], of="the dictionary")


class _Prepared(NamedTuple):
    x: Tensor  # (..., m)
    weight: Tensor  # W^T, (m, q)
    dictionary: Tensor  # D^T, (q, m)
    step_size: Tensor  # (m,)
    theta: Tensor  # (m,)
    keep: Tensor  # 1 / (1 + damping), (q,)
    zero: Tensor  # the first parts, (..., m), without memory of their own


class SeparationStep(FactoredStep, abc.ABC):
    r"""$r = x - D s - o,\quad s^+ = P\bigl(\tfrac{s + W r}{1 + \delta}\bigr),\quad o^+ = T_\theta(o + \eta r)$.

    The projection $P$ and the threshold $T$ are the subclass's. The state, which is the readout too, carries $D s$:
    the residual needs it anyway, and the answer's low-rank part is made by the last layer's dictionary.
    """

    def __init__(
        self,
        dictionary: Tensor,  # (m, q)
        *,
        ridge: float,
        alpha: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, device, dtype)
        self.ridge = _check.real("ridge", ridge, above=0.0, hint="It weighs half the squared norm of the code.")
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm of the sparse part.")
        q, m = self.weight.shape
        # All three are exp of a parameter: positive whatever the optimiser does.
        self.log_step_size = nn.Parameter(self.weight.new_empty(m))
        self.log_theta = nn.Parameter(self.weight.new_empty(m))
        self.log_damping = nn.Parameter(self.weight.new_empty(q))
        self.reset_parameters(dictionary)

    @property
    def step_size(self) -> Tensor:
        r"""$\eta$, (m,), positive: how much of the residual the sparse part takes up."""
        return self.log_step_size.exp()

    @property
    def theta(self) -> Tensor:
        r"""$\theta$, (m,), positive: the thresholds of the sparse part."""
        return self.log_theta.exp()

    @property
    def damping(self) -> Tensor:
        r"""$\delta$, (q,), positive: the code shrinks by $1 / (1 + \delta)$."""
        return self.log_damping.exp()

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to the proximal solver on this dictionary."""
        L = lipschitz(dictionary) + 1  # of the two blocks together: |[D, I]|^2 = |D|^2 + 1
        self.reset_factors(dictionary, L)
        self.log_step_size.copy_(-L.log().expand_as(self.log_step_size))
        self.log_theta.copy_((self.alpha / L).log().expand_as(self.log_theta))
        self.log_damping.copy_((self.ridge / L).log().expand_as(self.log_damping))

    def prepare(self, x: Tensor) -> _Prepared:
        keep = 1 / (1 + self.damping)
        return _Prepared(
            x, self.weight.mT, self.matrix.mT, self.step_size, self.theta, keep, x.new_zeros(()).expand_as(x)
        )

    def init(self, context: _Prepared) -> Decomposition:
        x = context.x
        return Decomposition(context.zero, context.zero, x.new_zeros(*x.shape[:-1], len(self.weight)))

    def forward(self, state: Decomposition, context: _Prepared) -> Decomposition:
        low_rank, sparse, code = state
        # At the start both parts are 0. Their sums are left out where nobody asks for a gradient: most of the work is
        # passes over memory, and these are a tenth of three layers'.
        still = low_rank is context.zero and not torch.is_grad_enabled()
        residual = context.x if still else context.x - low_rank - sparse
        code = self.project((code + residual @ context.weight) * context.keep)
        taken = residual * context.step_size if still else torch.addcmul(sparse, residual, context.step_size)
        sparse = self.threshold(taken, context.theta)
        return Decomposition(code @ context.dictionary, sparse, code)

    @staticmethod
    @abc.abstractmethod
    def project(code: Tensor) -> Tensor:
        """P: the identity, or onto what codes may be."""

    @staticmethod
    @abc.abstractmethod
    def threshold(sparse: Tensor, theta: Tensor) -> Tensor:
        """T: the proximal operator of the l1 norm on what sparse parts may be; may overwrite its argument."""

    def extra_repr(self) -> str:
        q, m = self.weight.shape
        return f"signal={m}, rank={q}, ridge={self.ridge:g}, alpha={self.alpha:g}"


def check_dictionary(dictionary: Tensor, *, nonnegative: bool) -> None:
    """A real matrix without zero columns, and where asked for without negative entries."""
    _check.dictionary("dictionary", dictionary)
    if nonnegative and _check.can_look_at(dictionary) and bool((dictionary < 0).any()):
        raise ValueError(
            f"dictionary must be at least 0 everywhere, got {dictionary.min().item():g}. Learn one with "
            "fit_basis(..., nonnegative=True) or scikit-learn's NMF, or take RPCAEncoder."
        )
