"""Runs a script, such as timm's train.py, with a faster weight gradient where feature maps are small.

    python scripts/small_maps.py train.py --config weights/ws_resnet18.aws_tin200/args.yaml --data-dir tiny-imagenet

On a CPU without AVX-512, oneDNN makes the weight gradient of a convolution of one matrix product an image. On maps of
few pixels each of them is a thin one that rewrites the whole gradient: for ws_resnet18 on images of 32 px that takes
two thirds of the step. Here it is one product for each weight position of the kernel, over the whole batch. The
gradients are the same but for rounding; whatever this does not suit is left to torch.
"""
import sys

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from timm_aws_cli import main

_MAX_PIXELS = 16  # of an output map: above, oneDNN is as fast, or faster

_torch_conv2d = torch.conv2d


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """torch.nn.functional.conv2d with the faster weight gradient where that suits."""
    plain = bias is None and _pair(dilation) == (1, 1) and groups == 1 and not isinstance(padding, str)
    if plain and input.ndim == 4 and weight.requires_grad and not torch.is_autocast_enabled(input.device.type):
        stride, padding = _pair(stride), _pair(padding)
        size = [_out_size(*sizes) for sizes in zip(input.shape[2:], weight.shape[2:], stride, padding)]
        if 0 < size[0] * size[1] <= _MAX_PIXELS:
            return _Convolution.apply(input, weight, stride, padding)
    return _torch_conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else (*value, *value)[:2]


def _out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, stride, padding):
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        return _torch_conv2d(input, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        input_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = torch.nn.grad.conv2d_input(input.shape, weight, grad, ctx.stride, ctx.padding)
        return input_grad, _weight_grad(input, grad, weight.shape, ctx.stride, ctx.padding), None, None


def _weight_grad(
        input: torch.Tensor, grad: torch.Tensor, shape: torch.Size, stride: tuple[int, int], padding: tuple[int, int],
) -> torch.Tensor:
    """Returns the gradient of a weight of shape (out, in, height, width), channels last."""
    out_channels, in_channels, height, width = shape
    grad, input = grad.permute(0, 2, 3, 1), input.permute(0, 2, 3, 1)
    weight_grad = input.new_zeros(out_channels, height, width, in_channels)
    for row in range(height):
        out_rows, in_rows = _overlap(row, input.shape[1], grad.shape[1], stride[0], padding[0])
        for column in range(width):
            out_columns, in_columns = _overlap(column, input.shape[2], grad.shape[2], stride[1], padding[1])
            outs = grad[:, out_rows, out_columns].reshape(-1, out_channels)
            weight_grad[:, row, column] = outs.T @ input[:, in_rows, in_columns].reshape(-1, in_channels)
    return weight_grad.permute(0, 3, 1, 2)


def _overlap(position: int, in_size: int, out_size: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Returns which outputs see the input, and not its padding, through a position of the kernel, and what they see."""
    offset = position - padding
    first = max(0, -(offset // stride))
    last = min(out_size - 1, (in_size - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)


if __name__ == '__main__':
    F.conv2d = conv2d
    main(['run', *sys.argv[1:]])
