"""`freeze` and `unfreeze`: which parameters learn, by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn


def freeze(net: nn.Module, pattern: str) -> list[str]:
    """Set `requires_grad` to False on the parameters whose name matches: training leaves them as they are.

    Args:
        net: the network.
        pattern: a glob, such as `"steps.*.dictionary"` or `"steps.[0-3].*"`; `*` also matches dots. A parameter that
            several layers share goes by all its names, and is frozen in all of them.

    Returns:
        The names that matched.

    Raises:
        ValueError: nothing matches.

    Example:
        >>> freeze(torch.nn.Linear(3, 1), "bias")
        ['bias']
    """
    return _require_grad(net, pattern, False)


def unfreeze(net: nn.Module, pattern: str) -> list[str]:
    """The inverse of `freeze`: set `requires_grad` to True on the parameters of `net` whose name matches.

    Args:
        net: the network.
        pattern: a glob, as for `freeze`.

    Returns:
        The names that matched.

    Raises:
        ValueError: nothing matches.
    """
    return _require_grad(net, pattern, True)


def _require_grad(net: nn.Module, pattern: str, required: bool) -> list[str]:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    names = [name for name in parameters if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(f"pattern {pattern!r} matches no parameter. There are: {', '.join(parameters) or 'none'}.")
    for name in names:
        parameters[name].requires_grad_(required)
        if not required:
            parameters[name].grad = None  # an optimizer would go on using it
    return names
