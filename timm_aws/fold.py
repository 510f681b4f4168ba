"""The way out of a network of normalized convolutions: into plain ones, for inference."""
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .data_flow import conv_norm_pairs
from .layers import NormalizedConv2d

__all__ = ['fold_normalization']


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
    training, model.training = model.training, False  # in evaluation, a norm of a part in evaluation is none that froze
    pairs = conv_norm_pairs(model) if plain else []
    model.training = training
    for pair in pairs:
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
