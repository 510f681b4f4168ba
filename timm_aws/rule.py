"""The rule, Adaptive Weight Shrink (AWS), as pure functions of one weight.

Equations 20 and 21 of Li, Chen and Yang, `Understanding the Disharmony between Weight Normalization Family and Weight
Decay` - https://doi.org/10.1609/aaai.v34i04.5904:

    gamma = alpha * length(W)                 per filter, from the weight before the step
    W <- (1 - lr * gamma) W - lr * gradient   gradient taken at that same weight

A filter is a slice along the first dimension. Its length divides the learning rate in the effective one. With momentum,
Eq. 21 leaves open where the shrink enters:

    coupled      gamma * W joins the gradient before momentum, as weight decay does in torch.optim.SGD
    decoupled    W is multiplied by 1 - lr * gamma, as in torch.optim.AdamW

Everything else follows from this file. Another rule is another `shrink_factor`; another normalization is another
line of `NORMALIZATIONS`, with a class in layers.py.
"""
import math
from typing import Any, NamedTuple

import torch

__all__ = [
    'DEFAULT_ALPHA', 'NORMALIZATIONS', 'Normalization', 'add_shrink', 'filter_length', 'get_normalization', 'is_on_cpu',
    'shrink_factor', 'shrink_multiplier',
]

DEFAULT_ALPHA = 2.5e-3  # gamma is about 1e-4, the paper's best weight decay, at the std of 0.04 of He initialization


class Normalization(NamedTuple):
    """How a layer normalizes the filters of its weight.

    Attributes:
        centered: Whether the mean of a filter is taken off.
        per_element: Whether a normalized filter has mean square 1, rather than norm 1.
    """
    centered: bool
    per_element: bool


NORMALIZATIONS = {
    'ws': Normalization(centered=True, per_element=True),
    'wn': Normalization(centered=False, per_element=False),
    'cwn': Normalization(centered=True, per_element=False),
}


def get_normalization(name: str) -> Normalization:
    """Looks a normalization up by its name.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in NORMALIZATIONS:
        raise ValueError(f'Unknown normalization: {name!r}, choose one of {", ".join(map(repr, NORMALIZATIONS))}.')
    return NORMALIZATIONS[name]


def filter_length(weight: torch.Tensor, normalization: str) -> torch.Tensor:
    """Measures each filter: std W for 'ws' (biased), ||W|| for 'wn', ||W - mean W|| for 'cwn'.

    Args:
        weight: Filters, (out_channels, ...) with two dimensions or more, in any memory format.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Lengths, (out_channels, 1, ...), in float32 for weights of lower precision. Where the squares of a filter
        overflow, from elements of about 1e19 in float32 on, its length is right on the CPU and inf on other devices.
    """
    if torch.compiler.is_compiling() and is_on_cpu(weight):
        return _filter_length_operator(weight, normalization)
    centered, per_element = NORMALIZATIONS[normalization]
    if weight.dtype.itemsize < 4:
        weight = weight.float()
    # Reduced over the dimensions that are there: flatten would copy a channels_last weight.
    dims, elements = tuple(range(1, weight.ndim)), max(1, math.prod(weight.shape[1:]))
    norm = (_norm_on_cpu if is_on_cpu(weight) else _norm)(weight, centered, dims, elements)
    return norm / math.sqrt(elements) if per_element else norm


# torch 2.15 fails to compile for the CPU what both reduces a weight and updates it (KeyError in torch._inductor,
# pytorch issue 196570). As an operator of its own it measures as eager code does.
@torch.library.custom_op('timm_aws::filter_length', mutates_args=())
def _filter_length_operator(weight: torch.Tensor, normalization: str) -> torch.Tensor:
    return filter_length(weight, normalization)


@_filter_length_operator.register_fake
def _(weight: torch.Tensor, normalization: str) -> torch.Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty((weight.shape[0], *[1] * (weight.ndim - 1)), dtype=dtype)


def _norm(weight: torch.Tensor, centered: bool, dims: tuple[int, ...], elements: int) -> torch.Tensor:
    if centered:
        # Not weight.mean: that of a DTensor with fewer filters than processes comes out replicated.
        weight = weight - weight.sum(dims, keepdim=True) / elements
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True)


def _norm_on_cpu(weight: torch.Tensor, centered: bool, dims: tuple[int, ...], elements: int) -> torch.Tensor:
    """Computes `_norm` where values can be read without waiting for a device: faster, and without overflow."""
    norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    if centered:
        # From two moments, in two thirds of the time, where their difference keeps its digits. Filter by filter, so
        # that one filter does not change the last digit of another. (torch.std takes ten times the time.)
        square, total = norm.square_(), weight.sum(dims, keepdim=True)
        rest = torch.addcmul(square, total, total, value=-1 / elements)
        exact = rest > 0.5 * square  # not so either where the square is inf or NaN
        norm = rest.sqrt_()
        if exact.all():
            return norm
        norm = torch.where(exact, norm, _norm(weight, True, dims, elements))
    if norm.sum() < math.inf:
        return norm
    largest = weight.abs().amax(dims, keepdim=True)
    scaled = largest * _norm(weight / largest, centered, dims, elements)
    return torch.where(norm.isfinite(), norm, scaled.clamp_(max=torch.finfo(weight.dtype).max))


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all in the memory of this process, not on a device, nor in part in other processes."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == 'cpu'


def shrink_factor(alpha: Any, length: Any) -> Any:
    """Computes gamma = alpha * length, Eq. 20.

    It is linear in alpha: `shrink_factor(lr * alpha, length)` is lr * gamma.

    Args:
        alpha: Shrink coefficient, times any other number or tensor.
        length: Filter length, a number or a tensor of any shape.

    Returns:
        gamma, in the shape of the lengths.
    """
    return alpha * length


def shrink_multiplier(length: torch.Tensor, lr: float | torch.Tensor, alpha: float) -> torch.Tensor:
    """Computes 1 - lr * gamma, by which the decoupled reading of Eq. 21 multiplies each filter.

    It stops at 0: a shrink never flips the sign of a filter.

    Args:
        length: Filter lengths, (out_channels, 1, ...).
        lr: Learning rate, a number or a tensor of one element.
        alpha: Shrink coefficient.

    Returns:
        Multipliers, (out_channels, 1, ...).
    """
    # Not lr * gamma: a huge alpha times a huge length is inf, and at lr 0 that gives NaN.
    return (1 - shrink_factor(lr * alpha, length)).clamp_(min=0)


def add_shrink(grad: torch.Tensor, weight: torch.Tensor, length: torch.Tensor, alpha: float) -> torch.Tensor:
    """Adds gamma * W to the gradient, the coupled reading of Eq. 21, as weight decay does in torch.optim.SGD.

    Args:
        grad: Gradient, in the shape of the weight; not changed.
        weight: Filters, (out_channels, ...); not changed.
        length: Filter lengths, (out_channels, 1, ...).
        alpha: Shrink coefficient, negative where the gradient is climbed.

    Returns:
        New tensor in the shape, the dtype and the memory format of the weight.
    """
    return (weight * shrink_factor(alpha, length)).to(weight.dtype).add_(grad)
