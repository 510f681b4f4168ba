"""Convolutions that normalize their weight before they use it.

A filter is one output channel's slice of the weight, n = in_channels / groups * kh * kw elements. The layers keep the
raw weight W as their parameter and convolve with

    Weight Standardization           W' = (W - mean W) / std W          https://arxiv.org/abs/1903.10520
    Weight Normalization             W' = W / ||W||                     https://arxiv.org/abs/1602.07868
    Centered Weight Normalization    W' = (W - mean W) / ||W - mean W|| Huang et al., ICCV 2017

filter by filter, so that the length of a filter does not change the output.
"""
import sys
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, conv2d_same, register_notrace_module
from torch.nn.utils import fuse_conv_bn_eval
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .rule import NORMALIZATIONS, is_on_cpu

__all__ = ['CWNConv2d', 'NormalizedConv2d', 'WNConv2d', 'WSConv2d', 'compute_weights', 'normalize_filters',
           'normalized_class']

torch.fx.wrap('normalize_filters')  # a trace takes it for one call: it cannot follow the question for memory formats


def normalize_filters(weight: torch.Tensor, centered: bool, per_element: bool, eps: float = 1e-16) -> torch.Tensor:
    """Centers each filter if asked to, and scales it to mean square 1 or to norm 1.

    Args:
        weight: Filters, (out_channels, ...).
        centered: Whether the mean of a filter is taken off.
        per_element: Whether a filter gets mean square 1, rather than norm 1.
        eps: Added to the mean square of a filter's elements, below the root. It decides where scale invariance ends:
            filters whose elements measure 1e-6 still come out right to 5e-5, while the rounding noise that is left of a
            constant filter without its mean (about 1e-9) is not blown up to a filter of its own.

    Returns:
        Tensor of the same shape and memory format.
    """
    channels_last = weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(
        memory_format=torch.channels_last)
    # In the order of memory, which spares channels_last weights two copies.
    rows = weight.permute(0, 2, 3, 1).flatten(1) if channels_last else weight.flatten(1)
    if centered:
        normalized = F.layer_norm(rows, rows.shape[1:], eps=eps)
    else:
        normalized = _rms_norm(rows, eps)
    if not per_element:
        normalized = normalized * rows.shape[1] ** -0.5
    if channels_last:
        return normalized.view(weight.shape[0], weight.shape[2], weight.shape[3], weight.shape[1]).permute(0, 3, 1, 2)
    return normalized.view(weight.shape)


def _rms_norm(rows: torch.Tensor, eps: float) -> torch.Tensor:
    if torch.jit.is_tracing():  # timm's export to ONNX traces, and knows no rms_norm
        return rows * (rows.square().mean(1, keepdim=True) + eps).rsqrt()
    return F.rms_norm(rows, rows.shape[1:], eps=eps)


class NormalizedConv2d(nn.Conv2d):
    """A nn.Conv2d that convolves with `normalized_weight()`; the base of the three layers.

    Arguments, parameters and state-dict keys are those of nn.Conv2d. Input (batch, in_channels, height, width),
    output (batch, out_channels, height, width). In evaluation on the CPU the layer keeps its normalized weight, and a
    copy of the weight to compare with, until the weight changes. A tool that knows layers by their exact class, as thop
    does to count operations, passes over this one: give it a folded model.

    Raises:
        ValueError: If a filter has a single element, whose standard deviation is 0.
    """
    normalization: str  # 'ws', 'wn' or 'cwn'
    plain_class: type[nn.Conv2d] = nn.Conv2d
    __constants__ = [*nn.Conv2d.__constants__, '_centered', '_per_element']  # noqa: RUF012  TorchScript reads this
    _centered: bool
    _per_element: bool
    _cached = None  # class, bits of the weight, normalized weight

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, 'normalization'):
            cls._centered, cls._per_element = NORMALIZATIONS[cls.normalization]

    def reset_parameters(self) -> None:
        """Initializes the parameters as nn.Conv2d does, whose constructor calls this."""
        if fan_in(self) == 1:
            raise ValueError(
                f'{type(self).__name__} needs filters of more than one element, but in_channels={self.in_channels}, '
                f'groups={self.groups}, kernel_size={self.kernel_size} gives fan-in 1: use nn.Conv2d here.'
            )
        super().reset_parameters()

    def normalized_weight(self) -> torch.Tensor:
        """Returns W', the weight that forward convolves with, in the shape of `weight`."""
        return normalize_filters(self.weight, self._centered, self._per_element)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            weight = self.normalized_weight()
        else:
            weight = self._cached_weight()
        return self._conv_forward(input, weight, self.bias)

    def _cached_weight(self) -> torch.Tensor:
        """Returns the normalized weight; in evaluation on the CPU that of the last call, if no bit has changed.

        The comparison sees every change, however it was made: torch does not count the steps of its fused optimizers,
        nor what is done to `weight.data` in place. On other devices it would have to wait for the device.
        """
        weight = self.weight
        if (
                self.training
                or torch.is_grad_enabled()
                or type(weight) is not nn.Parameter  # traced, batched or distributed
                or not is_on_cpu(weight)
                or torch.compiler.is_compiling()
                or torch.jit.is_tracing()
        ):
            return self.normalized_weight()
        bits, cached = _bits(weight), self._cached
        if type(bits) is not torch.Tensor:  # a fake one
            return self.normalized_weight()
        if cached is None or cached[0] is not type(self) or not _same_bits(cached[1], bits):
            cached = self._cached = (type(self), bits.clone(), self.normalized_weight())
        return cached[2]

    def train(self, mode: bool = True) -> 'NormalizedConv2d':
        """Sets the mode, and frees the weight that evaluation has cached."""
        self._cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_cached'}

    def __reduce_ex__(self, protocol):
        # torch.nn.utils.fuse_conv_bn_eval writes the weight of a fused convolution into a copy of this layer, which
        # would normalize it. Nothing but the caller of copy.deepcopy tells that copy from another.
        caller = sys._getframe(1).f_back
        if caller is not None and caller.f_code is fuse_conv_bn_eval.__code__:
            return self.fuse, ()
        return super().__reduce_ex__(protocol)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Returns a plain nn.Conv2d with the same output, the normalized weight as its weight. Hooks are left out."""
        compute_weights(self)
        plain: Any = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,  # type: ignore
            self.groups, self.bias is not None, self.padding_mode, device='meta')
        plain.__class__ = self.plain_class
        plain.weight = nn.Parameter(self.normalized_weight(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone(), requires_grad=self.bias.requires_grad)
        return plain.train(self.training)


@torch.no_grad()
def compute_weights(model: nn.Module) -> None:
    """Computes the weights that are no parameters, of pruned layers for example, as each of their forwards does.

    A weight may be that of before a checkpoint was loaded. From a forward with gradients, it cannot be copied.

    Args:
        model: Network, or a layer.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
                training, module.training = module.training, False  # in which spectral norm keeps its vectors
                hook(module, ())
                module.training = training


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """Views a weight as integers, in the order of memory where that is without a copy."""
    flat = weight.detach().permute(0, 2, 3, 1).flatten() if not weight.is_contiguous() else weight.detach().flatten()
    return flat.view(torch.int64 if flat.numel() * flat.itemsize % 8 == 0 else torch.uint8)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def fan_in(conv: nn.Conv2d) -> int:
    """Returns the number of elements of a filter."""
    return conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]


class WSConv2d(NormalizedConv2d):
    """nn.Conv2d with Weight Standardization, W' = (W - mean W) / std W per filter.

    Paper: `Weight Standardization` - https://arxiv.org/abs/1903.10520
    """
    normalization = 'ws'


class WNConv2d(NormalizedConv2d):
    """nn.Conv2d with Weight Normalization, W' = W / ||W|| per filter, without a gain (the norm that follows has one).

    Paper: `Weight Normalization` - https://arxiv.org/abs/1602.07868
    """
    normalization = 'wn'


class CWNConv2d(NormalizedConv2d):
    """nn.Conv2d with Centered Weight Normalization, W' = (W - mean W) / ||W - mean W|| per filter.

    Paper: `Centered Weight Normalization in Accelerating Training of Deep Neural Networks`, Huang et al., ICCV 2017
    """
    normalization = 'cwn'


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


_CLASSES = {
    (cls.normalization, cls.plain_class): cls
    for cls in (WSConv2d, WNConv2d, CWNConv2d, WSConv2dSame, WNConv2dSame, CWNConv2dSame)
}


def normalized_class(plain_class: type[nn.Conv2d], normalization: str) -> type[NormalizedConv2d] | None:
    """Returns the layer that does what a class of convolutions does, with a normalized weight; None without one."""
    return _CLASSES.get((normalization, plain_class))
