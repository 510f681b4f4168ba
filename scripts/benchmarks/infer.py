"""Inference: ws_resnet50 as it is and folded, beside timm's resnet50 as it is and with its batch norms fused."""
import copy
from collections.abc import Callable

import timm
import torch
import torch.nn as nn
from torch.fx.experimental.optimization import fuse

import timm_aws  # noqa: F401  registers ws_resnet50
from timm_aws.layers import NormalizedConv2d

from .turns import about, compare, save, show, take_turns

__all__ = ['infer']

ROUNDS = 9
BASE_OF = {
    'resnet50': 'resnet50',
    'resnet50, batch norm fused': 'resnet50, batch norm fused',
    'ws_resnet50 as trained': 'resnet50',
    'ws_resnet50, standardization folded': 'resnet50',
    'ws_resnet50, batch norm folded too': 'resnet50, batch norm fused',
}


def infer(img_size: int) -> None:
    """Checks, times, prints and writes."""
    models = _models()
    images = torch.randn(4, 3, img_size, img_size, device=next(models['resnet50'].parameters()).device)
    error = _check(models, images)
    modes = {}
    for threads, batch_sizes in ((2, (1, 32)), (1, (1,))):
        torch.set_num_threads(threads)
        for batch_size in batch_sizes:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                layout = 'channels_last' if memory_format is torch.channels_last else 'contiguous'
                title = f'{threads} threads, batch {batch_size}, {layout}'
                batch = images[:1].expand(batch_size, -1, -1, -1).contiguous(memory_format=memory_format)
                rows = {name: _forward(model.to(memory_format=memory_format), batch) for name, model in models.items()}
                modes[title] = compare(take_turns(title, rows, ROUNDS), BASE_OF)
                show(title, modes[title])
    save('infer', {
        **about(f'infer --img-size {img_size}'), 'rounds': ROUNDS, 'error_of_the_logits': error, 'modes': modes})


def _models() -> dict[str, nn.Module]:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    plain = timm.create_model('resnet50').to(device).eval()
    ours = timm.create_model('ws_resnet50').to(device).eval()
    return dict(zip(BASE_OF, (
        plain, fuse(plain), ours, _without_standardization(ours), timm.utils.reparameterize_model(ours))))


def _without_standardization(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, NormalizedConv2d):
            model.set_submodule(name, module.fuse())
    return model


@torch.no_grad()
def _check(models: dict[str, nn.Module], images: torch.Tensor) -> float:
    """Compares the folded networks with the standardizing one; returns the largest error of a logit."""
    expected = models['ws_resnet50 as trained'](images)
    error = max(((models[name](images) - expected).abs().max() / expected.abs().max()).item()
                for name in BASE_OF if name.startswith('ws_'))
    if error > 1e-4:
        raise ValueError(f'A folded ws_resnet50 is {error:.1e} away from the one that standardizes.')
    return error


def _forward(model: nn.Module, batch: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def forward() -> None:
        model(batch)

    return forward
