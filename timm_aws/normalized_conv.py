"""Convolutions that normalize their weight before they use it, and the way into such a network and out of it.

A filter is one output channel's slice of the weight, n = in_channels / groups * kh * kw elements. The layers keep the
raw weight W as their parameter and convolve with

    Weight Standardization           W' = (W - mean W) / std W          https://arxiv.org/abs/1903.10520
    Weight Normalization             W' = W / ||W||                     https://arxiv.org/abs/1602.07868
    Centered Weight Normalization    W' = (W - mean W) / ||W - mean W|| Huang et al., ICCV 2017

taken filter by filter, so that the length of a filter no longer changes the output.
"""
import copy
import logging
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, conv2d_same, register_notrace_module
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .data_flow import conv_norm_pairs
from .handed_over import hand_over
from .kept import Kept, can_be_kept
from .shrink import NORMALIZATIONS

__all__ = ['CWNConv2d', 'WNConv2d', 'WSConv2d', 'convert', 'fold_normalization']

_logger = logging.getLogger(__name__)
# torch.fx takes these as they are: it cannot trace that they look at memory formats.
torch.fx.wrap('_standardize')
torch.fx.wrap('normalize_weight')
torch.fx.wrap('center_weight')

# Added to the mean square of a filter's elements, below the root. It decides where scale invariance ends: filters
# whose elements measure 1e-6 still come out right to 5e-5, while the rounding noise that is left of a constant filter
# once its mean is gone (about 1e-9) is not blown up to a filter of its own. (An argument below as TorchScript knows no
# global variables.)
_EPS = 1e-16


def standardize_weight(weight: torch.Tensor, eps: float = _EPS) -> torch.Tensor:
    """Standardizes each filter to mean 0 and (biased) standard deviation 1, Weight Standardization.

    Args:
        weight: Filters, (out_channels, ...), the remaining dimensions hold one filter.
        eps: Added to the mean square of a filter's elements.

    Returns:
        Tensor of the same shape.
    """
    return _standardize(weight, eps)[0]


def _standardize(weight: torch.Tensor, eps: float = _EPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the standardized filters and 1 / std of each, which torch.layer_norm computes as well, but keeps."""
    rows = _rows(weight)
    standardized, _, reciprocal_std = torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)
    return _filters(standardized, weight), reciprocal_std


def _is_channels_last(weight: torch.Tensor) -> bool:
    if weight.ndim != 4 or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=torch.channels_last)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns filters as rows, their elements in the order of memory, which spares channels_last weights two copies."""
    return weight.permute(0, 2, 3, 1).flatten(1) if _is_channels_last(weight) else weight.flatten(1)


def _filters(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns rows, made of what `_rows` returns of a weight, in the shape and the memory format of the weight."""
    if _is_channels_last(weight):
        return rows.view(weight.shape[0], weight.shape[2], weight.shape[3], weight.shape[1]).permute(0, 3, 1, 2)
    return rows.view_as(weight)


def normalize_weight(weight: torch.Tensor, eps: float = _EPS) -> torch.Tensor:
    """Scales each filter to length 1, Weight Normalization without its gain.

    Args:
        weight: Filters, (out_channels, ...), the remaining dimensions hold one filter.
        eps: Added to the mean square of a filter's elements.

    Returns:
        Tensor of the same shape.
    """
    rows = _rows(weight)
    return _filters(F.rms_norm(rows, rows.shape[1:], eps=eps) * rows.shape[1] ** -0.5, weight)


def center_weight(weight: torch.Tensor, eps: float = _EPS) -> torch.Tensor:
    """Centers each filter at 0 and scales it to length 1, Centered Weight Normalization.

    Args:
        weight: Filters, (out_channels, ...), the remaining dimensions hold one filter.
        eps: Added to the mean square of a filter's elements.

    Returns:
        Tensor of the same shape.
    """
    rows = _rows(weight)
    return _filters(F.layer_norm(rows, rows.shape[1:], eps=eps) * rows.shape[1] ** -0.5, weight)


_kept_in_eval = Kept()


def _weight_to_use(conv: 'NormalizedConv2d') -> torch.Tensor:
    """Returns the normalized weight; in evaluation on the CPU that of the last call, if the weight is what it was."""
    weight = conv.weight
    if conv.training or torch.is_grad_enabled() or not can_be_kept(weight):
        return conv.normalized_weight()
    # What torch does not see, its fused optimizers and edits of `.data`, shows in the sums over the filters, or across
    # them where elements change places. They take half of the time that it takes to normalize, and no memory.
    rows = _rows(weight)
    sums = rows.sum(1), rows.sum(0)
    kept = _kept_in_eval.get(weight)
    if kept is not None and kept[0] is type(conv) and all(map(torch.equal, kept[1], sums)):
        return kept[2]
    normalized = conv.normalized_weight()
    _kept_in_eval.put(weight, (type(conv), sums, normalized))
    return normalized


class NormalizedConv2d(nn.Conv2d):
    """A nn.Conv2d that convolves with `normalized_weight()`; the base of the three layers.

    Arguments, parameters and state-dict keys are those of nn.Conv2d. Input (batch, in_channels, height, width),
    output (batch, out_channels, height, width).

    Raises:
        ValueError: If a filter has a single element, whose standard deviation is 0.
    """
    normalization: str  # 'ws', 'wn' or 'cwn'
    plain_class: type[nn.Conv2d] = nn.Conv2d

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if _fan_in(self) == 1:
            raise ValueError(
                f'{type(self).__name__} needs filters of more than one element, but in_channels={self.in_channels}, '
                f'groups={self.groups}, kernel_size={self.kernel_size} gives fan-in 1: use nn.Conv2d here.'
            )

    def normalized_weight(self) -> torch.Tensor:
        """Returns W', the weight that forward convolves with, in the shape of `weight`; each layer has its own."""
        raise NotImplementedError('This is the base of three layers: use WSConv2d, WNConv2d or CWNConv2d.')

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            weight = self.normalized_weight()
        else:
            weight = _weight_to_use(self)
        return self._conv_forward(input, weight, self.bias)

    def train(self, mode: bool = True) -> 'NormalizedConv2d':
        """Sets the mode, and frees the weight that evaluation has kept."""
        _kept_in_eval.forget(self.weight)
        return super().train(mode)

    def fuse(self) -> nn.Conv2d:
        """Returns a plain nn.Conv2d with the same output, the normalized weight as its weight."""
        plain: nn.Conv2d = copy.deepcopy(self)
        plain.__class__ = self.plain_class  # the reverse of what convert does
        plain.weight = nn.Parameter(self.normalized_weight().detach(), requires_grad=self.weight.requires_grad)
        return plain


class WSConv2d(NormalizedConv2d):
    """nn.Conv2d with Weight Standardization, W' = (W - mean W) / std W per filter.

    Paper: `Weight Standardization` - https://arxiv.org/abs/1903.10520
    """
    normalization = 'ws'

    def normalized_weight(self) -> torch.Tensor:
        weight, reciprocal_std = _standardize(self.weight)
        if not torch.jit.is_scripting():
            hand_over(self.weight, reciprocal_std)
        return weight


class WNConv2d(NormalizedConv2d):
    """nn.Conv2d with Weight Normalization, W' = W / ||W|| per filter, without a gain (the norm that follows has one).

    Paper: `Weight Normalization` - https://arxiv.org/abs/1602.07868
    """
    normalization = 'wn'

    def normalized_weight(self) -> torch.Tensor:
        return normalize_weight(self.weight)


class CWNConv2d(NormalizedConv2d):
    """nn.Conv2d with Centered Weight Normalization, W' = (W - mean W) / ||W - mean W|| per filter.

    Paper: `Centered Weight Normalization in Accelerating Training of Deep Neural Networks`, Huang et al., ICCV 2017
    """
    normalization = 'cwn'

    def normalized_weight(self) -> torch.Tensor:
        return center_weight(self.weight)


class _SamePadded(NormalizedConv2d):
    """Pads as timm's Conv2dSame, which timm's ports of TensorFlow models use; made by `convert` only."""
    plain_class = Conv2dSame

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # torch annotates the two numbers of a stride as tuple[int, ...]
        return conv2d_same(
            input,
            weight,
            bias,
            stride=self.stride,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
        )


@register_notrace_module
class WSConv2dSame(_SamePadded, WSConv2d):
    """timm's Conv2dSame with Weight Standardization."""


@register_notrace_module
class WNConv2dSame(_SamePadded, WNConv2d):
    """timm's Conv2dSame with Weight Normalization."""


@register_notrace_module
class CWNConv2dSame(_SamePadded, CWNConv2d):
    """timm's Conv2dSame with Centered Weight Normalization."""


_NORMALIZED = {
    (cls.normalization, cls.plain_class): cls
    for cls in (WSConv2d, WNConv2d, CWNConv2d, WSConv2dSame, WNConv2dSame, CWNConv2dSame)
}


def convert(model: nn.Module, normalization: str) -> nn.Module:
    """Turns every convolution of a network that a norm layer follows into a normalized one, in place.

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
    """Does the work of `convert`, without a word.

    Args:
        model: Network to convert.
        normalization: 'ws', 'wn' or 'cwn'.

    Returns:
        Names of the convolutions that were converted, and of those that were left with the reason.

    Raises:
        ValueError: If the normalization is unknown, or if there is nothing in the model to convert.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f'Unknown normalization: {normalization!r}, choose one of {", ".join(map(repr, NORMALIZATIONS))}.')
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
        conv.__class__ = _NORMALIZED[normalization, getattr(conv, 'plain_class', type(conv))]
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
    return {
        name: _reason_to_leave(module, name in followed)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def _reason_to_leave(conv: nn.Conv2d, followed: bool) -> str | None:
    if type(conv) not in (nn.Conv2d, Conv2dSame, *_NORMALIZED.values()):
        return f'{type(conv).__name__} has a forward of its own'
    if not followed:
        return 'no norm follows'
    if _fan_in(conv) == 1:
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


def _fan_in(conv: nn.Conv2d) -> int:
    return conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
