"""The lengths that a forward of Weight Standardization has measured, handed over to the step that follows it."""
import torch

from .kept import Kept, can_be_kept
from .shrink import filter_length, length_dtype

__all__ = ['hand_over', 'length_for_step']

# The layers add 1e-16 to the variance, 1e-6 of it at a std of 1e-5.
_LARGEST_RECIPROCAL = 1e5
_handed_over = Kept()


def hand_over(weight: torch.Tensor, reciprocal_std: torch.Tensor) -> None:
    """Takes over what the forward of Weight Standardization has measured, for the step after it: `length_for_step`.

    Left alone where nobody will ask (no gradient), and where filters are so short or so long that the eps of the
    forward, or an overflow, shows in what it has measured.

    Args:
        weight: Filters, (out_channels, ...).
        reciprocal_std: 1 / std of each filter, out_channels elements.
    """
    if not (can_be_kept(weight) and weight.requires_grad and torch.is_grad_enabled()):
        return
    lowest, highest = reciprocal_std.aminmax()
    if lowest > 0 and highest < _LARGEST_RECIPROCAL and reciprocal_std.dtype == length_dtype(weight):
        std = reciprocal_std.detach().reciprocal()
        _handed_over.put(weight, std.view(-1, *[1] * (weight.ndim - 1)))


def length_for_step(weight: torch.Tensor, normalization: str) -> torch.Tensor:
    """Returns `filter_length` of a weight that is about to be updated, as its forward has measured it if it has.

    A length that was handed over is good for one step: torch does not see that a fused step changes the weight. An edit
    of `weight.data` in place between the two is not seen either, and the step then shrinks by the length before it.

    Args:
        weight: Filters, (out_channels, ...).
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Lengths, (out_channels, 1, ...).
    """
    std = _handed_over.get(weight) if normalization == 'ws' and can_be_kept(weight) else None
    if std is None:
        return filter_length(weight, normalization)
    _handed_over.forget(weight)
    return std
