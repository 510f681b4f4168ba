"""What batch norms know of their inputs: handed over to inputs of another scale, and estimated from images."""
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['have_learned', 'recalibrate', 'relative_length', 'rescale_statistics', 'rescaled_statistics']


def have_learned(norms: Iterable[nn.Module]) -> bool:
    """Whether norm layers hold statistics, or without any biases, other than at initialization."""
    for norm in norms:
        mean, variance, bias = (getattr(norm, name, None) for name in ('running_mean', 'running_var', 'bias'))
        signs = [bias] if mean is None or variance is None else [mean, variance - 1]
        if any(sign is not None and not sign.is_meta and sign.any() for sign in signs):
            return True
    return False


def relative_length(filters: torch.Tensor, normalized: torch.Tensor) -> torch.Tensor:
    """Measures how long filters are, in units of those that they became by a normalization.

    Args:
        filters: Filters, (out_channels, ...).
        normalized: The same, normalized.

    Returns:
        Lengths in float64, (out_channels,), 1 for a filter of zeros.
    """
    filters, normalized = filters.flatten(1).double(), normalized.flatten(1).double()
    length = (filters * normalized).sum(1) / normalized.square().sum(1)
    return length.where(length > 0, 1)


def rescaled_statistics(
        mean: torch.Tensor,
        variance: torch.Tensor,
        gain: torch.Tensor,
        eps: float,
        length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes what a batch norm needs to give the same for inputs that are divided by a length.

    mean / length, variance / length^2, and a gain that makes up for eps, which is added to a variance of another size.

    Args:
        mean: Running mean, (channels,).
        variance: Running variance, (channels,).
        gain: Weight of the batch norm, (channels,).
        eps: The batch norm's.
        length: What the inputs are divided by, (channels,).

    Returns:
        Running mean, running variance and weight for these inputs.
    """
    gain = gain * ((variance + eps * length ** 2) / (variance + eps)).sqrt().to(gain)
    return (mean / length).to(mean), (variance / length ** 2).to(variance), gain


def rescale_statistics(norm: Any, channels: slice, length: torch.Tensor) -> None:
    """Changes some channels of a batch norm, in place, for inputs that are divided by a length, (channels,)."""
    if norm.running_mean is None:  # it measures each input, whatever its length
        return
    mean, variance = norm.running_mean[channels], norm.running_var[channels]
    if norm.weight is None:  # the variance makes up for eps
        mean.div_(length)
        variance.copy_((variance + norm.eps) / length ** 2 - norm.eps)
    else:
        gain = norm.weight[channels]
        values = rescaled_statistics(mean, variance, gain, norm.eps, length)
        for tensor, value in zip((mean, variance, gain), values):
            tensor.copy_(value)


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> nn.Module:
    """Estimates the running statistics of a network's batch norms from images, in place, as after `convert`.

    It does what torch.optim.swa_utils.update_bn does, but runs everything except the batch norms in evaluation, as the
    statistics are used there. Modes and momenta are as before afterwards, whatever happens. A batch norm that stays in
    evaluation in a network in training is frozen, and keeps its statistics.

    Args:
        model: Network with batch norms.
        loader: Batches of images, (batch, channels, height, width), or tuples and lists that begin with them. They are
            moved to the device and the dtype of the model.
        batches: How many batches to take; None takes all.

    Returns:
        The same module.

    Raises:
        ValueError: If the model has no batch norm to estimate, or the loader no batch.
    """
    norms = {
        module: module.momentum for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and (module.training or not model.training)
    }
    inputs = iter(islice(loader, batches))
    first = next(inputs, None)
    if not norms or first is None:
        raise ValueError(
            f'{type(model).__name__} has {len(norms)} batch norms with statistics to estimate, from '
            f'{"no" if first is None else "some"} images: give a network with batch norms and a loader with batches.'
        )
    modes = {module: module.training for module in model.modules()}
    like = next(model.parameters())
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None  # cumulative average
        for batch in chain([first], inputs):
            model((batch[0] if isinstance(batch, (list, tuple)) else batch).to(like))
    finally:
        for module, training in modes.items():
            module.train(training)
        for norm, momentum in norms.items():
            norm.momentum = momentum
    return model
