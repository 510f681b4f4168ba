"""The effective learning rate of normalized weights, and weight decay as a schedule of it.

Paper: `Understanding the Disharmony between Weight Normalization Family and Weight Decay` -
    https://doi.org/10.1609/aaai.v34i04.5904
"""
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .rule import filter_length, shrink_factor

__all__ = ['decay_as_lr', 'effective_lr', 'equilibrium_angle']


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
        optimizer: Optimizer whose parameter groups name a normalization, such as AwsSGD and AwsAdam.

    Returns:
        Parameter name (`group.index` where the groups have no names) to the effective learning rates of its filters,
        (out_channels,), in the unit of the learning rate per unit of weight.

    Raises:
        ValueError: If no group of the optimizer names a normalization.
    """
    return {name: group['lr'] / filter_length(param, group['normalization']).flatten()
            for name, param, group in _normalized(optimizer)}


@torch.no_grad()
def equilibrium_angle(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Computes by how much each step turns a filter where gradient and shrink, or weight decay, hold its length.

    A step at a right angle to the filter lengthens it, the shrink undoes that. With gamma the shrink factor at the
    present length (or the weight decay), and m the momentum, steps whose gradients are independent balance at

        sqrt(2 * lr * gamma * (1 - m) / (1 + m))    decoupled, or Adam with m = beta1
        sqrt(2 * lr * gamma / (1 + m))              coupled to momentum, as weight decay in torch.optim.SGD

    There is none for Adam with a coupled shrink, whose size then depends on the gradients.

    Papers:
    * `Spherical Motion Dynamics` - https://arxiv.org/abs/2006.08419
    * `Rotational Equilibrium` - https://arxiv.org/abs/2305.17212

    Args:
        optimizer: Optimizer whose parameter groups name a normalization, such as AwsSGD and AwsAdam.

    Returns:
        Parameter name (`group.index` where the groups have no names) to angles in radians, (out_channels,); NaN for
        Adam with a coupled shrink.

    Raises:
        ValueError: If no group of the optimizer names a normalization.
    """
    angles = {}
    for name, param, group in _normalized(optimizer):
        length = filter_length(param, group['normalization']).flatten()
        alpha = group.get(getattr(optimizer, 'alpha_key', 'alpha'), 0)
        gamma = shrink_factor(alpha, length) if alpha else torch.full_like(length, group.get('weight_decay', 0))
        momentum = group['betas'][0] if 'betas' in group else group.get('momentum', 0)
        coupled = not group.get('decoupled', not isinstance(optimizer, torch.optim.SGD))
        share = math.nan if coupled and 'betas' in group else 1 if coupled else 1 - momentum
        angles[name] = (2 * group['lr'] * gamma * share / (1 + momentum)).sqrt()
    return angles


def _normalized(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Yields name, parameter and group of each normalized weight, and raises ValueError where there is none."""
    found = False
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
