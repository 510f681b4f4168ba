"""How an optimizer step grows, over networks of 1 to 300 million parameters, numbers of tensors and lengths of filters.

Beside time and the ratio to torch's fused SGD stands the most memory that the step takes on top of what was there, in
units of the largest parameter.
"""
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.resnet import Bottleneck
from torch.profiler import ProfilerActivity, profile

from timm_aws import AwsSGD
from timm_aws.ws_resnet import NormalizedResNet

from .step import ALPHA, DECAY, SGD, params_of_shapes
from .turns import about, compare, save, show, take_turns

__all__ = ['scale']

ROUNDS = 9
BASE, OURS = 'torch SGD, fused', 'AwsSGD, fused'
# Channels of a group in the first stage; 4 is the usual number.
WIDTH = {f'ws_resnext101, {width} wide': width for width in (8, 12, 22)}
NETWORKS = ('test_ws_resnet', 'ws_resnet18', 'ws_resnet50', 'ws_resnet101', 'ws_resnet152', *WIDTH)
NUMEL = 2 ** 24  # of all tensors together in the sweeps of tensors and filters
TENSORS = (1, 4, 16, 64, 256, 1024)
FAN_INS = (4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)


def scale() -> None:
    """Times, prints and writes."""
    sweeps = {
        'network': {name: _shapes(name) for name in NETWORKS},
        'tensors': {str(count): [(NUMEL // count // 256, 256)] * count for count in TENSORS},
        'fan_in': {str(fan_in): [(NUMEL // 16 // fan_in, fan_in)] * 16 for fan_in in FAN_INS},
    }
    result = {}
    for sweep, points in sweeps.items():
        result[sweep] = [_point(f'{sweep} {name}', name, shapes) for name, shapes in points.items()]
    save('scale', {**about('scale'), 'rounds': ROUNDS, **result})


def _shapes(name: str) -> list[torch.Size]:
    with torch.device('meta'):
        if name in WIDTH:
            model: torch.nn.Module = NormalizedResNet(
                Bottleneck, (3, 4, 23, 3), cardinality=32, base_width=WIDTH[name], normalization='ws')
        else:
            model = timm.create_model(name)
    return [param.shape for param in model.parameters()]


def _point(title: str, name: str, shapes: list[Any]) -> dict[str, Any]:
    rows: dict[str, Callable[[], Any]] = {
        BASE: torch.optim.SGD(params_of_shapes(shapes), **SGD, weight_decay=DECAY, fused=True).step,
        OURS: AwsSGD(params_of_shapes(shapes), **SGD, alpha=ALPHA, fused=True).step,
    }
    measured = compare(take_turns(title, rows, ROUNDS), dict.fromkeys(rows, BASE))
    show(title, measured)
    numels = [torch.Size(shape).numel() for shape in shapes]
    return {
        'name': name, 'parameters': sum(numels), 'tensors': len(numels), 'rows': measured,
        'peak_in_largest_parameters': round(_peak(rows[OURS]) / (4 * max(numels)), 2),
    }


def _peak(step: Callable[[], Any]) -> int:
    """Returns the most bytes that a step holds at a time on top of what it finds."""
    activities = [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        held += event.self_device_memory_usage if torch.cuda.is_available() else event.self_cpu_memory_usage
        peak = max(peak, held)
    return peak
