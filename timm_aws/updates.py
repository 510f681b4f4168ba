"""What one step reads and changes of a parameter, and how it is cut so that it is in the cache all the while.

A shrink and torch's update behind it each pass over a parameter and its state. On a CPU the second pass costs little if
the first has left everything in the cache, and as much again if not.
"""
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .shrink import is_free_to_look_at

__all__ = ['Update', 'in_cache']

_ELEMENTS = 2 ** 20  # of one piece: 4 MiB each of weight, gradient and state, the best of 2^16 to 2^21


@dataclass
class Update:
    """What one step reads and changes of a parameter, or of some of its filters.

    Attributes:
        param: Changed in place.
        grad: What torch's update takes for the gradient; read.
        state: Of the optimizer for this parameter, changed in place; None for what the step is still to make.
        length: Filter lengths, (out_channels, 1, ...); None where they are still to be measured.
    """
    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]
    length: torch.Tensor | None = None


def in_cache(updates: Iterable[Update]) -> Iterable[list[Update]]:
    """Cuts large parameters between filters and puts small ones together.

    Args:
        updates: The updates of parameters.

    Returns:
        Copies of the updates, or of pieces of them, in parts that fit into the cache as far as filters do.
    """
    part: list[Update] = []
    left = _ELEMENTS
    for update in updates:
        for piece in _pieces(update):
            left -= piece.param.numel()
            if part and left < 0:
                yield part
                part, left = [], _ELEMENTS - piece.param.numel()
            part.append(piece)
    if part:
        yield part


def _pieces(update: Update) -> list[Update]:
    param, state = update.param, update.state
    filters = max(1, _ELEMENTS * len(param) // max(1, param.numel()))
    # Where the filters do not lie one behind the other, a piece has gaps, over which torch's fused updates would walk.
    # A state that the step is still to make has to be made whole.
    whole = len(param) <= filters or not is_free_to_look_at(param) or param.stride(0) * len(param) != param.numel()
    if whole or any(value is None for value in state.values()):
        return [replace(update)]  # a gradient that the step puts in its place is gone with the part
    params = param.split(filters)
    # What is no tensor of elements is the count of steps, which each piece counts up: all but the first on a copy.
    states = {
        key: value.split(filters) if value.shape == param.shape else [value, *(value.clone() for _ in params[1:])]
        for key, value in state.items()
    }
    lengths = [None] * len(params) if update.length is None else update.length.split(filters)
    return [
        Update(*tensors, {key: values[index] for key, values in states.items()}, lengths[index])
        for index, tensors in enumerate(zip(params, update.grad.split(filters)))
    ]
