"""The lengths that a forward of Weight Standardization has measured, handed over to the step that follows it.

A length that was handed over is good for one step: torch does not see that a fused step changes the weight, and a step
of an optimizer that does not ask leaves it behind. So a step of ours shrinks by the length of before where, since the
last forward in training, the weight was changed by torch's own fused optimizers, by an edit of `weight.data` in place
or, if ours is compiled so that it counts its change of the weight only when it makes it (backend `eager`, a graph that
is broken in between), by a single operation in place.
"""
import torch

from .kept import Kept, can_be_kept
from .shrink import filter_length, is_on_cpu, length_dtype

__all__ = ['hand_over', 'lengths_for_step', 'take_over']

# The layers add 1e-16 to the variance, 1e-6 of it at a std of 1e-5.
_LARGEST_RECIPROCAL = 1e5
_handed_over = Kept()


def hand_over(weight: torch.Tensor, reciprocal_std: torch.Tensor) -> None:
    """Hands over what the forward of Weight Standardization has measured to the step after it.

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


def take_over(weight: torch.Tensor, normalization: str, ahead: int = 0) -> torch.Tensor | None:
    """Takes what the forward before a step has handed over.

    Args:
        weight: Filters, (out_channels, ...), about to be updated.
        normalization: 'ws', 'wn' or 'cwn'.
        ahead: How many changes of the weight torch has counted that are still to come.

    Returns:
        Lengths, (out_channels, 1, ...); None where nothing was handed over, or where the weight has changed since.
    """
    return _handed_over.take(weight, ahead) if normalization == 'ws' and can_be_kept(weight) else None


def lengths_for_step(weights: list[torch.Tensor], normalization: str) -> list[torch.Tensor]:
    """Returns `filter_length` of weights that are about to be updated, as their forward has measured it if it has.

    Args:
        weights: Filters, each (out_channels, ...).
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Lengths, each (out_channels, 1, ...).
    """
    if torch.compiler.is_compiling() and weights and all(map(is_on_cpu, weights)):
        return _lengths_as_operator(weights, normalization)
    return _lengths(weights, normalization)


def _lengths(weights: list[torch.Tensor], normalization: str, ahead: int = 0) -> list[torch.Tensor]:
    handed = [take_over(weight, normalization, ahead) for weight in weights]
    return [
        filter_length(weight, normalization) if length is None else length for weight, length in zip(weights, handed)]


# One operator, so that what is compiled measures as eager code does, and takes over what it does. torch 2.15 also fails
# to compile for the CPU what both reduces a weight and updates it (KeyError in torch._inductor, pytorch issue 196570).
@torch.library.custom_op('timm_aws::lengths_for_step', mutates_args=())
def _lengths_as_operator(weights: list[torch.Tensor], normalization: str) -> list[torch.Tensor]:
    # What is compiled counts its change of the weights before it runs.
    return _lengths(weights, normalization, ahead=1)


@_lengths_as_operator.register_fake
def _(weights: list[torch.Tensor], normalization: str) -> list[torch.Tensor]:
    return [weight.new_empty((weight.shape[0], *[1] * (weight.ndim - 1)), dtype=length_dtype(weight))
            for weight in weights]
