"""What is measured of filters: which are dead, and by how much a step turns them."""
import torch

from timm_aws.effective_lr import angle_between
from timm_aws.rule import filter_length

__all__ = ['DEAD', 'are_dead', 'turned']

DEAD = 1e-6


def are_dead(weight: torch.Tensor) -> torch.Tensor:
    """Tells for each filter whether its standard deviation is below 1e-6, (out_channels,)."""
    return filter_length(weight, 'ws').flatten() < DEAD


def turned(before: torch.Tensor, after: torch.Tensor, normalization: str) -> torch.Tensor:
    """Measures by how much a step has turned each filter.

    Args:
        before: Weight before the step, (out_channels, ...).
        after: Weight after the step, of the same shape.
        normalization: 'ws', 'wn' or 'cwn'; filters are centered where their layer centers them.

    Returns:
        Angles in radians, (out_channels,); NaN for dead filters, which have no direction.
    """
    return angle_between(before, after, normalization).where(~(are_dead(before) | are_dead(after)), torch.nan)
