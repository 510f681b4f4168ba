"""The effective learning rate of normalized weights, and weight decay as a schedule of it.

Paper: `Understanding the Disharmony between Weight Normalization Family and Weight Decay` -
    https://doi.org/10.1609/aaai.v34i04.5904
"""
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .optimizers import AwsAdam, AwsSGD
from .rule import NORMALIZATIONS, filter_length, shrink_factor

__all__ = [
    'angle_at',
    'angle_between',
    'decay_as_lr',
    'effective_lr',
    'equilibrium_angle',
    'gradient_sums',
    'normalized_parameters',
    'shrinks_at',
    'unwrap',
]


def decay_as_lr(weight_decay: float, lrs: Iterable[float]) -> list[float]:
    """Computes what weight decay does to the learning rate of normalized weights (Eq. 14 to 17).

    Plain SGD with weight decay and plain SGD without it, but with the learning rate of step t times d_t, give the same
    normalized weights from the same start:

        d_t = 1 / (p_t^2 (1 - weight_decay * lr_t)),    p_0 = 1,    p_{t+1} = (1 - weight_decay * lr_t) p_t

    Args:
        weight_decay: Weight decay, lambda in the paper.
        lrs: Learning rate of each step.

    Returns:
        The multiplier d_t of each step; infinite from where the decayed weight would be too small for a float.

    Raises:
        ValueError: If weight_decay * lr is negative or not below 1, where a step of decay would flip the weight.
    """
    multipliers, log_p = [], 0.
    for step, lr in enumerate(lrs):
        share = weight_decay * lr
        if not 0 <= share < 1:
            raise ValueError(
                f'weight_decay * lr must be at least 0 and below 1, but is {weight_decay!r} * {lr!r} at step {step}: '
                f'lower one of them.'
            )
        log_d = -2 * log_p - math.log1p(-share)
        multipliers.append(math.exp(log_d) if log_d < 709 else math.inf)  # the largest float is about exp(709.8)
        log_p += math.log1p(-share)
    return multipliers


@torch.no_grad()
def effective_lr(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Divides the learning rate by the length of each filter of the normalized weights (Eq. 12 and 13).

    Args:
        optimizer: Optimizer whose parameter groups name a normalization, as AwsSGD or AwsAdam, or a wrapper of one.

    Returns:
        Parameter name (`group.index` where the groups have no names) to the effective learning rates of its filters,
        (out_channels,), in the unit of the learning rate per unit of weight.

    Raises:
        ValueError: If no group of the optimizer names a normalization.
        TypeError: If it is no optimizer of torch.
    """
    return {name: _lr(group) / filter_length(param, group['normalization']).flatten()
            for name, param, group in normalized_parameters(optimizer)}


@torch.no_grad()
def equilibrium_angle(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Computes by how much each step turns a filter where gradient and shrink, or weight decay, hold its length.

    A step at a right angle to the filter lengthens it, the shrink undoes that. With gamma the shrink factor at the
    present length (or the weight decay), steps whose gradients are independent balance at

        sqrt(2 * lr * gamma * P / S^2)    decoupled
        sqrt(2 * lr * gamma * P / S)      coupled: gamma * W is summed as gradients are

    where S is the sum and P the sum of squares of the weights c_k with which a gradient enters the k-th step after its
    own. With momentum m and dampening d (0 where m is, as in torch) they are

        (1 - d) * m^k                                SGD
        1 + (1 - d) * m, then (1 - d) * m^(k + 1)    SGD with Nesterov momentum
        (1 - m) * m^k                                Adam with m = beta1; decoupled only
        m^k                                          RMSprop; decoupled only

    Lookahead takes part of each move back, which divides lr * gamma by lookahead_alpha.

    Papers:
    * `Spherical Motion Dynamics` - https://arxiv.org/abs/2006.08419
    * `Rotational Equilibrium` - https://arxiv.org/abs/2305.17212

    Args:
        optimizer: Optimizer whose parameter groups name a normalization, as AwsSGD or AwsAdam, or a wrapper of one.

    Returns:
        Parameter name (`group.index` where the groups have no names) to angles in radians, (out_channels,): 0 without
        shrink and decay, NaN where no formula holds, as for other optimizers than torch's SGD, Adam, RMSprop and what
        is made from them, and for a coupled shrink in the latter two, whose size then depends on the gradients.

    Raises:
        ValueError: If no group of the optimizer names a normalization.
        TypeError: If it is no optimizer of torch.
    """
    stepper = unwrap(optimizer)
    stepper = getattr(stepper, 'optim', stepper)  # that of one process, in a ZeroRedundancyOptimizer
    return {name: angle_at(stepper, group, filter_length(param, group['normalization']).flatten())
            for name, param, group in normalized_parameters(optimizer)}


def angle_between(before: torch.Tensor, after: torch.Tensor, normalization: str) -> torch.Tensor:
    """Measures by how much each filter has turned.

    Args:
        before: Weight, (out_channels, ...).
        after: The same weight later.
        normalization: 'ws', 'wn' or 'cwn'; filters are centered where their layer centers them.

    Returns:
        Angles in radians, (out_channels,).
    """
    pair = [weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32)) for weight in (before, after)]
    if NORMALIZATIONS[normalization].centered:
        pair = [weight - weight.mean(1, keepdim=True) for weight in pair]
    first, second = (torch.nn.functional.normalize(weight, dim=1) for weight in pair)
    # From the chord: the arc cosine has no digits left at the angles of one step.
    return 2 * torch.asin((first - second).norm(dim=1).div(2).clamp(max=1))


def angle_at(optimizer: torch.optim.Optimizer, group: dict[str, Any], length: torch.Tensor) -> torch.Tensor:
    """Computes the equilibrium angles of filters of these lengths, (n,), by the options of a group."""
    total, squares = gradient_sums(optimizer, group)
    coupled = total if isinstance(optimizer, torch.optim.SGD) else math.nan
    gamma = torch.zeros_like(length)
    for is_decoupled, part in shrinks_at(optimizer, group, length):
        gamma = gamma + part * (1 if is_decoupled else coupled)
    return (2 * _lr(group) * gamma * squares / group.get('lookahead_alpha', 1)).sqrt() / total


def gradient_sums(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[float, float]:
    """Returns S and P of `equilibrium_angle`, NaN where no formula holds."""
    nesterov, kept = False, 1.
    if isinstance(optimizer, torch.optim.SGD):
        momentum, nesterov = group['momentum'], group['nesterov']
        kept = 1 - group['dampening'] if momentum else 1.
    elif isinstance(optimizer, torch.optim.Adam):
        momentum = group['betas'][0]
        kept = 1 - momentum
    else:
        momentum = group['momentum'] if isinstance(optimizer, torch.optim.RMSprop) else math.nan
    if not momentum < 1:
        return math.nan, math.nan
    first, second = (1 + momentum * kept, momentum ** 2 * kept) if nesterov else (kept, momentum * kept)
    return first + second / (1 - momentum), first ** 2 + second ** 2 / (1 - momentum ** 2)


def shrinks_at(
        optimizer: torch.optim.Optimizer, group: dict[str, Any], length: torch.Tensor) -> Iterator[tuple[bool, Any]]:
    """Yields whether a shrink is decoupled, and its gamma or weight decay for filters of these lengths."""
    alpha = group.get(getattr(optimizer, 'alpha_key', ''), 0)  # torch's own optimizers know no alpha
    if alpha:
        yield group.get('decoupled', True), shrink_factor(alpha, length)
    if group['weight_decay'] and not (alpha and isinstance(optimizer, (AwsSGD, AwsAdam))):  # there instead of decay
        yield group.get('decoupled_weight_decay', False), group['weight_decay']


def _lr(group: dict[str, Any]) -> Any:
    """Returns the learning rate, without dimensions where it is a tensor of one element."""
    return group['lr'].reshape(()) if isinstance(group['lr'], torch.Tensor) else group['lr']


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the optimizer that takes the steps, within timm's Lookahead or a wrapper as accelerate's (`.optimizer`).

    Raises:
        TypeError: If it is no optimizer of torch.
    """
    for key in ('_base_optimizer', 'optimizer'):
        if isinstance(inner := getattr(optimizer, key, None), torch.optim.Optimizer):
            return unwrap(inner)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f'{type(optimizer).__name__} is no torch.optim.Optimizer: give the optimizer that it wraps.')
    return optimizer


def normalized_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Yields name, parameter and group of each normalized weight, and raises ValueError where there is none."""
    found = False
    optimizer = unwrap(optimizer)
    for group_index, group in enumerate(optimizer.param_groups):
        if group.get('normalization') is None:
            continue
        names = group.get('param_names') or [f'{group_index}.{index}' for index in range(len(group['params']))]
        for name, param in zip(names, group['params']):
            if param.ndim >= 2:
                found = True
                yield name, param, group
    if not found:
        raise ValueError(
            f'No parameter group of {type(optimizer).__name__} holds normalized weights: '
            f'make it with aws_sgd, aws_adam or param_groups_aws.'
        )
