"""The effective learning rate of normalized weights, lr / length per filter (Eq. 12 and 13).

Paper: `Understanding the Disharmony between Weight Normalization Family and Weight Decay` -
    https://doi.org/10.1609/aaai.v34i04.5904
"""
import torch

from .shrink import filter_length

__all__ = ['effective_lr']


@torch.no_grad()
def effective_lr(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Divides the learning rate by the length of each filter of the normalized weights.

    Args:
        optimizer: Optimizer whose parameter groups name a normalization, such as AwsSGD and AwsAdam.

    Returns:
        Parameter name (`group.index` where the groups have no names) to the effective learning rates of its filters,
        (out_channels,), in the unit of the learning rate per unit of weight.

    Raises:
        ValueError: If no group of the optimizer names a normalization.
    """
    rates = {}
    for group_index, group in enumerate(optimizer.param_groups):
        if group.get('normalization') is None:
            continue
        names = group.get('param_names') or [f'{group_index}.{index}' for index in range(len(group['params']))]
        for name, param in zip(names, group['params']):
            if param.ndim >= 2:
                rates[name] = group['lr'] / filter_length(param, group['normalization']).flatten()
    if not rates:
        raise ValueError(
            f'No parameter group of {type(optimizer).__name__} holds normalized weights: '
            f'make it with aws_sgd, aws_adam or param_groups_aws.'
        )
    return rates
