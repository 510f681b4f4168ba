"""Weight Standardization as its authors published it, to compare with the layer of this package."""
import torch

from timm_aws.layers import WSConv2d

__all__ = ['PublishedWSConv2d', 'publish']

_EPS = 1e-5


class PublishedWSConv2d(WSConv2d):
    """Convolves with (W - mean W) / (s + 1e-5), s the unbiased standard deviation, filter by filter.

    So does https://github.com/joe-siyuan-qiao/WeightStandardization. Filters with s far above 1e-5 give the same output
    at any length; below it the output shrinks with them.
    """

    def normalized_weight(self) -> torch.Tensor:
        dims, elements = (1, 2, 3), self.weight[0].numel()
        centered = self.weight - self.weight.mean(dims, keepdim=True)
        std = torch.linalg.vector_norm(centered, dim=dims, keepdim=True) / (elements - 1) ** 0.5
        return centered / (std + _EPS)


def publish(model: torch.nn.Module) -> None:
    """Turns each WSConv2d of a model into the published layer."""
    for module in model.modules():
        if type(module) is WSConv2d:
            module.__class__ = PublishedWSConv2d
