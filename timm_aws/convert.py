"""The way into a network of normalized convolutions. fold.py is the way out."""
import logging
import warnings
from collections import defaultdict
from collections.abc import Container, Mapping
from typing import Any

import torch
import torch.nn as nn

from .data_flow import ConvNormPair, conv_norm_pairs
from .layers import NormalizedConv2d, compute_weights, fan_in, normalized_class
from .norm_statistics import have_learned, relative_length, rescale_statistics
from .rule import get_normalization

__all__ = ['convert', 'normalize_convs', 'reasons_to_leave']

_logger = logging.getLogger(__name__)

_SMALL = 100  # elements of a filter, below which centering costs accuracy in scripts/centering.py


def convert(model: nn.Module, normalization: str) -> nn.Module:
    """Replaces every convolution of a network that a norm layer follows by a normalized one, in place.

    Parameters stay the same objects under the same names. A convolution is left alone if no norm follows it (its
    length matters there: an SE gate, a classifier, the last convolution before a residual addition of a
    pre-activation block), if its filters have a single element, or if it is of a class with a forward of its own.
    What was converted and what was left, with the reason, is logged at level INFO. Fold the network with
    timm.utils.reparameterize_model: a `fuse` of its own reads weights that are not normalized.

    In a trained network (its norms have running statistics, or without any biases, other than at initialization) 'wn'
    keeps what is computed in evaluation: the batch norms behind take over the lengths of the filters, see
    `rescaled_statistics`. So it leaves a convolution before a norm that cannot do this: a GroupNorm weighs the filters
    of a group by their lengths, and a norm that two convolutions share has one set of statistics. 'ws' and 'cwn'
    convert these as well, and take the mean off each filter. There is a warning if that changes a trained network.

    Centering costs small filters accuracy: a depthwise filter, or one of size 1 with few input channels, then cannot
    respond to the sum of its inputs. There is a warning if 'ws' or 'cwn' meets a network of mostly such filters.

    Args:
        model: Network to convert, any nn.Module that contains nn.Conv2d layers.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        The same module.

    Raises:
        ValueError: If the normalization is unknown, or if there is nothing in the model to convert.
    """
    centered = get_normalization(normalization).centered  # raises where there is none
    pairs = {pair.conv: pair for pair in conv_norm_pairs(model)}
    reasons = _reasons_to_leave(model, pairs)
    compute_weights(model)
    trained = have_learned(model.get_submodule(pair.norm) for pair in pairs.values())
    if trained and not centered:
        reasons = {name: reason or _hindrance(model, pairs[name]) for name, reason in reasons.items()}
    used = _used_filters(model, reasons) if trained else {}
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
    convs: list[Any] = [model.get_submodule(name) for name in converted]
    small = sum(fan_in(conv) < _SMALL for conv in convs)
    if centered and 2 * small >= len(convs):
        warnings.warn(
            f'{small} of the {len(converted)} converted convolutions of {type(model).__name__} have filters of '
            f'fewer than {_SMALL} elements, which lose accuracy without the mean that {normalization!r} takes off: '
            f"convert it to 'wn', which keeps it.",
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
    names = defaultdict(list)
    for name, reason in left.items():
        names[reason].append(name)
    return '; '.join(f'{", ".join(layers)} ({reason})' for reason, layers in names.items())


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


@torch.no_grad()
def _used_filters(model: nn.Module, reasons: Mapping[str, str | None]) -> dict[str, torch.Tensor]:
    """Returns what the convolutions without a reason convolve with. A mean that these ignore is taken off for good."""
    used = {}
    for name, reason in reasons.items():
        conv: Any = model.get_submodule(name)
        if reason is None and isinstance(conv, NormalizedConv2d):
            used[name] = conv.normalized_weight()
            if get_normalization(conv.normalization).centered:
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
            rescale_statistics(model.get_submodule(norm), channels, length)
        if conv.bias is not None:
            lengths[conv.bias] = length  # by bias, as two convolutions may share one
    for bias, length in lengths.items():
        bias.div_(length)
    return changed
