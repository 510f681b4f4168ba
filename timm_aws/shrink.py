"""The rule itself, Adaptive Weight Shrink, as pure functions of one weight.

Equations 20 and 21 of Li, Chen and Yang, `Understanding the Disharmony between Weight Normalization Family and Weight
Decay` - https://doi.org/10.1609/aaai.v34i04.5904:

    gamma = alpha * length(W)                 per filter, from the weight before the step
    W <- (1 - lr * gamma) W - lr * gradient   gradient taken at that same weight

A filter is a slice along the first dimension; its length is what divides the learning rate in the effective one.
"""
import math

import torch

__all__ = ['DEFAULT_ALPHA', 'NORMALIZATIONS', 'add_shrink', 'filter_length', 'shrink_multiplier']

NORMALIZATIONS = ('ws', 'wn', 'cwn')
DEFAULT_ALPHA = 2.5e-3  # gives gamma about 1e-4, the paper's best weight decay, at the std of 0.04 of He initialization


def filter_length(weight: torch.Tensor, normalization: str) -> torch.Tensor:
    """Measures each filter: std W for 'ws' (biased), ||W|| for 'wn', ||W - mean W|| for 'cwn'.

    Args:
        weight: Filters, (out_channels, ...) with two dimensions or more, in any memory format.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Lengths, (out_channels, 1, ...), in float32 for weights of lower precision.
    """
    # Reduced over the dimensions as they are: flatten would copy a channels_last weight. (torch.std does the same in
    # ten times the time.)
    dims = tuple(range(1, weight.ndim))
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    length = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    if normalization == 'wn':
        return length
    mean = weight.mean(dims, keepdim=True)
    centered = _centered_length(weight, length, mean, dims)
    return centered / math.sqrt(math.prod(weight.shape[1:])) if normalization == 'ws' else centered


def _centered_length(
        weight: torch.Tensor,
        length: torch.Tensor,
        mean: torch.Tensor,
        dims: tuple[int, ...],
) -> torch.Tensor:
    """Returns ||W - mean W||, from ||W|| and mean W alone where that loses no digits to cancellation."""
    # Where looking at the values means to wait for a device or for other processes (a DTensor), it is not done.
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.device.type == 'cpu'
    if plain and not torch.compiler.is_compiling():
        square = length.square()
        rest = torch.addcmul(square, mean, mean, value=-math.prod(weight.shape[1:]))
        if (rest > 0.5 * square).all():
            return rest.sqrt_()
    return torch.linalg.vector_norm(weight - mean, dim=dims, keepdim=True)


def shrink_multiplier(
        weight: torch.Tensor,
        lr: float | torch.Tensor,
        alpha: float,
        normalization: str,
) -> torch.Tensor:
    """Computes 1 - lr * gamma, what each filter is multiplied by in the decoupled reading of Eq. 21.

    It stops at 0: a shrink never flips the sign of a filter.

    Args:
        weight: Filters, (out_channels, ...).
        lr: Learning rate, a number or a tensor of one element.
        alpha: Shrink coefficient, gamma = alpha * length.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Multipliers, (out_channels, 1, ...).
    """
    return (1 - lr * (alpha * filter_length(weight, normalization))).clamp_(min=0)


def add_shrink(
        grad: torch.Tensor,
        weight: torch.Tensor,
        alpha: float,
        normalization: str,
        maximize: bool = False,
) -> torch.Tensor:
    """Adds gamma * W to the gradient, the coupled reading of Eq. 21, as weight decay does in torch.optim.SGD.

    Args:
        grad: Gradient, in the shape of the weight; not changed.
        weight: Filters, (out_channels, ...); not changed.
        alpha: Shrink coefficient, gamma = alpha * length.
        normalization: 'ws', 'wn' or 'cwn'.
        maximize: Whether the gradient is to be climbed: it then enters with a minus, the shrink does not.

    Returns:
        New tensor in the shape, the dtype and the memory format of the weight.
    """
    shrunk = (weight * (alpha * filter_length(weight, normalization))).to(weight.dtype)
    return shrunk.sub_(grad) if maximize else shrunk.add_(grad)
