"""Networks of a layer or two, and their inputs, for the tests of conversion, folding and recalibration."""
import torch
import torch.nn as nn


def an_input(dtype=torch.float64):
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def calibrated(model, *shape):
    """Gives batch norms statistics and affine parameters of their own, with activations of a sane size."""
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative average: one pass sets the statistics
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, *shape[1:]))
    return model.eval()


def a_conv(length=1., bias=False):
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
    with torch.no_grad():
        conv.weight.add_(0.1).mul_(length * torch.logspace(0, 1, 8).view(-1, 1, 1, 1))
    return conv
