"""How alike two sketches are."""

from __future__ import annotations

from torch import Tensor

from unrolled import _check


def similarity(sketch: Tensor, other: Tensor, baseline: Tensor | None = None) -> Tensor:
    r"""$\langle s - b, s' - b \rangle / (\|s - b\| \|s' - b\|)$: near the share of what two sketches have in common.

    Of two lengths the common prefix counts: a sketch whose end was erased is compared with a whole one.

    Args:
        sketch, other: made with the same seed and d, the ends of which may have been erased.
        baseline: $b$, what all sketches have in common, such as their mean; nothing where not given.

    Shape:
        - sketch, other, baseline: (..., d) or prefixes
        - output: (...)

    Raises:
        TypeError: no floating point tensors.
        ValueError: NaN, or a sketch that is zero (or equal to the baseline).

    Example:
        >>> sketcher = Sketcher(4096)
        >>> first, second = (sketcher.sketch([Item(m, torch.ones(3)) for m in names]) for names in ("ab", "ac"))
        >>> similarity(first, second).round(decimals=1)
        tensor(0.5000)
    """
    given = [("sketch", sketch), ("other", other), *([] if baseline is None else [("baseline", baseline)])]
    for name, value in given:
        if _check.tensor(name, value).dim() == 0:
            raise ValueError(f"{name} must have shape (..., d), got a number.")
        _check.finite(name, value)
    common = min(value.shape[-1] for _, value in given)
    first, second = sketch[..., :common], other[..., :common]
    if baseline is not None:
        first, second = first - baseline[..., :common], second - baseline[..., :common]
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    if not bool((norms > 0).all()):
        raise ValueError("a sketch is zero (or equal to the baseline): it has no direction to compare.")
    return (first * second).sum(-1) / norms
