"""The rule itself, Adaptive Weight Shrink, as pure functions of one weight.

Equations 20 and 21 of Li, Chen and Yang, `Understanding the Disharmony between Weight Normalization Family and Weight
Decay` - https://doi.org/10.1609/aaai.v34i04.5904:

    gamma = alpha * length(W)                 per filter, from the weight before the step
    W <- (1 - lr * gamma) W - lr * gradient   gradient taken at that same weight

A filter is a slice along the first dimension; its length is what divides the learning rate in the effective one.
"""
import math

import torch

__all__ = [
    'DEFAULT_ALPHA',
    'NORMALIZATIONS',
    'add_shrink',
    'filter_length',
    'is_free_to_look_at',
    'is_on_cpu',
    'length_dtype',
    'shrink_multiplier',
]

NORMALIZATIONS = ('ws', 'wn', 'cwn')
DEFAULT_ALPHA = 2.5e-3  # gives gamma about 1e-4, the paper's best weight decay, at the std of 0.04 of He initialization


def filter_length(weight: torch.Tensor, normalization: str) -> torch.Tensor:
    """Measures each filter: std W for 'ws' (biased), ||W|| for 'wn', ||W - mean W|| for 'cwn'.

    Args:
        weight: Filters, (out_channels, ...) with two dimensions or more, in any memory format.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Lengths, (out_channels, 1, ...), in float32 for weights of lower precision. Where the squares of a filter
        overflow, from elements of about 1e19 in float32 on, its length is right on the CPU and inf on other devices.
    """
    # Reduced over the dimensions as they are: flatten would copy a channels_last weight. (torch.std does the same in
    # ten times the time.)
    dims = tuple(range(1, weight.ndim))
    weight = weight.to(length_dtype(weight))
    elements = max(1, math.prod(weight.shape[1:]))
    length, may_be_infinite = _length(weight, normalization, dims, elements)
    if may_be_infinite and not length.sum() < math.inf:
        largest = weight.abs().amax(dims, keepdim=True)
        scaled = largest * _length(weight / largest, normalization, dims, elements)[0]
        length = torch.where(length.isfinite(), length, scaled.clamp_(max=torch.finfo(weight.dtype).max))
    return length / math.sqrt(elements) if normalization == 'ws' else length


def length_dtype(weight: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a weight's filter lengths."""
    return torch.promote_types(weight.dtype, torch.float32)


def is_free_to_look_at(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or for other processes (a DTensor)."""
    return is_on_cpu(tensor) and not torch.compiler.is_compiling()


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all in the memory of this process, not on a device, nor in part in other processes."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == 'cpu'


def _length(
        weight: torch.Tensor, normalization: str, dims: tuple[int, ...], elements: int) -> tuple[torch.Tensor, bool]:
    """Returns ||W|| for 'wn', else ||W - mean W||, and whether it may have overflowed and can be looked at."""
    length, can_be_looked_at = torch.linalg.vector_norm(weight, dim=dims, keepdim=True), is_free_to_look_at(weight)
    if normalization == 'wn':
        return length, can_be_looked_at
    # Not weight.mean: that of a DTensor with fewer filters than processes comes out replicated, and so would the step.
    total = weight.sum(dims, keepdim=True)
    if not can_be_looked_at:
        return torch.linalg.vector_norm(weight - total / elements, dim=dims, keepdim=True), False
    # From ||W|| and mean W alone, where that loses no digits.
    square = length.square_()
    rest = torch.addcmul(square, total, total, value=-1 / elements)
    exact = rest > 0.5 * square
    if exact.all():
        return rest.sqrt_(), False
    # Filter by filter, so that what is in one does not change the last digit of another.
    two_passes = torch.linalg.vector_norm(weight - total / elements, dim=dims, keepdim=True)
    return torch.where(exact, rest.sqrt_(), two_passes), True


def shrink_multiplier(length: torch.Tensor, lr: float | torch.Tensor, alpha: float) -> torch.Tensor:
    """Computes 1 - lr * gamma, what each filter is multiplied by in the decoupled reading of Eq. 21.

    It stops at 0: a shrink never flips the sign of a filter.

    Args:
        length: Filter lengths, (out_channels, 1, ...).
        lr: Learning rate, a number or a tensor of one element.
        alpha: Shrink coefficient, gamma = alpha * length.

    Returns:
        Multipliers, (out_channels, 1, ...).
    """
    # Numbers first: lr * alpha is 0 at lr 0, where a huge alpha times a huge length is inf and 0 * inf is NaN.
    return (1 - (lr * alpha) * length).clamp_(min=0)


def add_shrink(
        grad: torch.Tensor,
        weight: torch.Tensor,
        length: torch.Tensor,
        alpha: float,
        maximize: bool = False,
) -> torch.Tensor:
    """Adds gamma * W to the gradient, the coupled reading of Eq. 21, as weight decay does in torch.optim.SGD.

    Args:
        grad: Gradient, in the shape of the weight; not changed.
        weight: Filters, (out_channels, ...); not changed.
        length: Filter lengths, (out_channels, 1, ...).
        alpha: Shrink coefficient, gamma = alpha * length.
        maximize: Whether the gradient is to be climbed: gamma * W is then taken off, so that W shrinks all the same.

    Returns:
        New tensor in the shape, the dtype and the memory format of the weight.
    """
    shrunk = (weight * ((-alpha if maximize else alpha) * length)).to(weight.dtype)
    return shrunk.add_(grad)
