"""The way into a network of normalized convolutions, and out of it: `convert`, `recalibrate`, `fold_normalization`."""
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .data_flow import ConvNormPair, conv_norm_pairs
from .layers import NormalizedConv2d, fan_in, normalized_class
from .rule import get_normalization

__all__ = ['convert', 'fold_normalization', 'normalize_convs', 'reasons_to_leave', 'recalibrate', 'relative_length',
           'rescaled_statistics']

_logger = logging.getLogger(__name__)


def convert(model: nn.Module, normalization: str) -> nn.Module:
    """Replaces every convolution of a network that a norm layer follows by a normalized one, in place.

    Parameters stay the same objects under the same names. A convolution is left alone if no norm follows it (its
    length matters there: an SE gate, a classifier, the last convolution before a residual addition of a
    pre-activation block), if its filters have a single element, or if it is of a class with a forward of its own.
    What was converted and what was left, with the reason, is logged at level INFO. Fold the network with
    timm.utils.reparameterize_model: a `fuse` of its own reads weights that are not normalized.

    'wn' keeps what a trained network computes in evaluation: the batch norms behind take over the lengths of the
    filters, see `rescaled_statistics`. So it leaves a convolution before a norm that cannot do this too: a GroupNorm
    weighs the filters of a group by their lengths, and a norm that two convolutions share has one set of statistics.
    'ws' and 'cwn' convert these as well, and take the mean off each filter. There is a warning if that changes a
    trained network, one with running statistics (or, without any, with biases) other than at initialization.

    Args:
        model: Network to convert, any nn.Module that contains nn.Conv2d layers.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        The same module.

    Raises:
        ValueError: If the normalization is unknown, or if there is nothing in the model to convert.
    """
    get_normalization(normalization)  # raises where there is none
    pairs = {pair.conv: pair for pair in conv_norm_pairs(model)}
    reasons = _reasons_to_leave(model, pairs)
    if normalization == 'wn':
        reasons = {name: reason or _hindrance(model, pairs[name]) for name, reason in reasons.items()}
    used = _used_filters(model, reasons) if _is_trained(model, pairs) else {}
    converted, left = normalize_convs(model, normalization, reasons)
    _logger.info(
        f'Converted {len(converted)} of {len(converted) + len(left)} convolutions of {type(model).__name__} to '
        f'{normalization}.{f" Left: {_listing(left)}." if left else ""}'
    )
    changed = _hand_lengths_over(model, used, pairs)
    if changed:
        warnings.warn(
            f'{type(model).__name__} is trained, and {normalization!r} changes the outputs of {len(changed)} of its '
            f'convolutions: call timm_aws.recalibrate(model, loader) and fine-tune it, or convert it to '
            f"'wn', which keeps what it computes.",
            stacklevel=2,
        )
    return model


def normalize_convs(
        model: nn.Module,
        normalization: str,
        reasons: Mapping[str, str | None],
) -> tuple[list[str], dict[str, str]]:
    """Normalizes convolutions, whatever that does to what the network computes.

    Args:
        model: Network to convert.
        normalization: 'ws', 'wn' or 'cwn'.
        reasons: Name of each convolution to the reason to leave it, None where it is to be converted.

    Returns:
        Names of the convolutions that were converted, and of those that were left with the reason.

    Raises:
        ValueError: If the normalization is unknown, or if there is nothing in the model to convert.
    """
    get_normalization(normalization)
    converted = [name for name, reason in reasons.items() if reason is None]
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    if not converted:
        raise ValueError(
            f'{type(model).__name__} has no convolution to convert to {normalization!r}: it has '
            f'{_listing(left) if left else "no nn.Conv2d at all"}.'
        )
    for name in converted:
        # The subclass adds no state, so that a change of class is the whole conversion: parameters, hooks, device and
        # mode stay as they are, and nothing is drawn from the random number generator.
        conv: Any = model.get_submodule(name)
        conv.__class__ = normalized_class(_plain_class(conv), normalization)
    return converted, left


def _listing(left: dict[str, str]) -> str:
    return ', '.join(f'{name} ({reason})' for name, reason in left.items())


def reasons_to_leave(model: nn.Module) -> dict[str, str | None]:
    """Tells for every convolution of a network why it cannot be normalized, None where it can.

    Args:
        model: Network to look at; it is traced with torch.fx, not run.

    Returns:
        Module name to reason or None, in the order of `named_modules`.
    """
    return _reasons_to_leave(model, {pair.conv for pair in conv_norm_pairs(model)})


def _reasons_to_leave(model: nn.Module, followed: Container[str]) -> dict[str, str | None]:
    reasons = {
        name: _reason_to_leave(module, name in followed)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    layers_of: dict[Any, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        layers_of[param].append(name.rpartition('.')[0])
    for layers in layers_of.values():
        plain = next((layer for layer in layers if reasons.get(layer, 'no convolution')), None)
        for layer in layers:
            if plain and layer in reasons and reasons[layer] is None:
                reasons[layer] = f'shares its weight with {plain}'
    return reasons


def _plain_class(conv: nn.Conv2d) -> type[nn.Conv2d]:
    return conv.plain_class if isinstance(conv, NormalizedConv2d) else type(conv)


def _reason_to_leave(conv: nn.Conv2d, followed: bool) -> str | None:
    if normalized_class(_plain_class(conv), 'ws') is None:
        return f'{type(conv).__name__} has a forward of its own'
    if not followed:
        return 'no norm follows'
    if fan_in(conv) == 1:
        return 'fan-in 1'
    return None


def _hindrance(model: nn.Module, pair: ConvNormPair) -> str | None:
    """Tells why the norms behind a convolution cannot take over the lengths of its filters, None where they can."""
    for name in pair.channels or (pair.norm,):
        norm = model.get_submodule(name)
        if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)):
            return f'{type(norm).__name__} cannot take over the lengths of its filters'
    return None if pair.channels else f'{pair.norm} has no statistics of it alone'


def _is_trained(model: nn.Module, pairs: Mapping[str, ConvNormPair]) -> bool:
    for norm in {model.get_submodule(pair.norm) for pair in pairs.values()}:
        mean, variance, bias = (getattr(norm, name, None) for name in ('running_mean', 'running_var', 'bias'))
        signs = [bias] if mean is None or variance is None else [mean, variance - 1]
        if any(sign is not None and not sign.is_meta and sign.any() for sign in signs):
            return True
    return False


@torch.no_grad()
def _used_filters(model: nn.Module, reasons: Mapping[str, str | None]) -> dict[str, torch.Tensor]:
    """Returns what the convolutions without a reason convolve with. A mean that these ignore is taken off for good."""
    used = {}
    for name, reason in reasons.items():
        conv: Any = model.get_submodule(name)
        if reason is None and isinstance(conv, NormalizedConv2d):
            used[name] = conv.normalized_weight()
            if conv.normalization != 'wn':
                conv.weight.sub_(conv.weight.mean((1, 2, 3), keepdim=True))
        elif reason is None:
            used[name] = conv.weight
    return used


@torch.no_grad()
def _hand_lengths_over(
        model: nn.Module,
        used: Mapping[str, torch.Tensor],
        pairs: Mapping[str, ConvNormPair],
) -> list[str]:
    """Makes up for the lengths of filters that layers do not use any more, in their biases and the norms behind.

    Args:
        model: Converted network.
        used: Name of each converted layer to the filters that it used before.
        pairs: Name of each converted layer to the norms behind.

    Returns:
        Names of the layers whose outputs change all the same.
    """
    changed, lengths = [], {}
    for name, filters in used.items():
        conv: Any = model.get_submodule(name)
        length = relative_length(filters, conv.normalized_weight())
        rest = filters - length.view(-1, 1, 1, 1) * conv.normalized_weight()
        hindered = _hindrance(model, pairs[name])
        if hindered or rest.norm() > max(1e-4, torch.finfo(filters.dtype).eps) * filters.norm():
            changed.append(name)
        if hindered:
            continue
        for norm, channels in pairs[name].channels.items():
            _rescale_statistics(model.get_submodule(norm), channels, length)
        if conv.bias is not None:
            lengths[conv.bias] = length  # by bias, as two convolutions may share one
    for bias, length in lengths.items():
        bias.div_(length)
    return changed


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


def _rescale_statistics(norm: Any, channels: slice, length: torch.Tensor) -> None:
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


def fold_normalization(
        model: nn.Module,
        reparameterize: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """Folds weight normalization, and the batch norm behind it, into plain convolutions for inference, in place.

    A batch norm is folded where it has running statistics and is the only consumer of the convolution's output.
    The activation that timm's norm-act layers hold stays.

    Args:
        model: Network with normalized convolutions; others are returned as they are.
        reparameterize: Called with the model once its convolutions are plain: blocks that fold themselves read the
            weights of these and need the batch norms.

    Returns:
        The same module, with outputs equal to those in eval mode before.
    """
    plain = {m: m.fuse() for m in model.modules() if isinstance(m, NormalizedConv2d) and m is not model}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            _replace(model, name, plain[module])
    model = reparameterize(model)
    for pair in conv_norm_pairs(model) if plain else ():
        conv: Any = model.get_submodule(pair.conv)
        if pair.exclusive and conv in plain.values():
            _replace(model, pair.norm, _fold_norm(conv, model.get_submodule(pair.norm)))
    return model


def _fold_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Folds a norm layer into the convolution before it; returns what remains of it, all if it cannot be folded."""
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return norm
    if norm.running_mean is None or norm.running_var is None:
        return norm
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        rest: nn.Module = nn.Identity()
    elif isinstance(norm, BatchNormAct2d):
        rest = nn.Sequential(norm.drop, norm.act)
    else:
        return norm  # a subclass that may do anything in its forward
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return rest


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)
