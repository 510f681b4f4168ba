"""The way into a network of normalized convolutions, and out of it: `convert` and `fold_normalization`."""
import logging
from collections import defaultdict
from typing import Any

import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .data_flow import conv_norm_pairs
from .layers import NormalizedConv2d, fan_in, normalized_class
from .rule import get_normalization

__all__ = ['convert', 'fold_normalization']

_logger = logging.getLogger(__name__)


def convert(model: nn.Module, normalization: str) -> nn.Module:
    """Replaces every convolution of a network that a norm layer follows by a normalized one, in place.

    Parameters stay the same objects under the same names. A convolution is left alone if no norm follows it (its
    length matters there: an SE gate, a classifier, the last convolution before a residual addition of a
    pre-activation block), if its filters have a single element, or if it is of a class with a forward of its own.
    What was converted and what was left, with the reason, is logged at level INFO.

    Args:
        model: Network to convert, any nn.Module that contains nn.Conv2d layers.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        The same module.

    Raises:
        ValueError: If the normalization is unknown, or if there is nothing in the model to convert.
    """
    converted, left = normalize_convs(model, normalization)
    _logger.info(
        f'Converted {len(converted)} of {len(converted) + len(left)} convolutions of {type(model).__name__} to '
        f'{normalization}.{f" Left: {_listing(left)}." if left else ""}'
    )
    return model


def normalize_convs(model: nn.Module, normalization: str) -> tuple[list[str], dict[str, str]]:
    """Does the work of `convert`, without logging.

    Args:
        model: Network to convert.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Names of the convolutions that were converted, and of those that were left with the reason.

    Raises:
        ValueError: If the normalization is unknown, or if there is nothing in the model to convert.
    """
    get_normalization(normalization)  # raises where there is none
    reasons = reasons_to_leave(model)
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
    """Tells for every convolution of a network why `convert` would leave it, None where it would convert it.

    Args:
        model: Network to look at; it is traced with torch.fx, not run.

    Returns:
        Module name to reason or None, in the order of `named_modules`.
    """
    followed = {pair.conv for pair in conv_norm_pairs(model)}
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


def fold_normalization(model: nn.Module) -> nn.Module:
    """Folds weight normalization, and the batch norm behind it, into plain convolutions for inference, in place.

    A batch norm is folded where it has running statistics and is the only consumer of the convolution's output.
    The activation that timm's norm-act layers hold stays.

    Args:
        model: Network with normalized convolutions; others are returned as they are.

    Returns:
        The same module, with outputs equal to those in eval mode before.
    """
    convs = {name: m for name, m in model.named_modules() if name and isinstance(m, NormalizedConv2d)}
    norm_of = {pair.conv: pair.norm for pair in conv_norm_pairs(model) if pair.exclusive} if convs else {}
    for name, conv in convs.items():
        plain = conv.fuse()
        _replace(model, name, plain)
        if name in norm_of:
            _replace(model, norm_of[name], _fold_norm(plain, model.get_submodule(norm_of[name])))
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
