"""What a result in scripts/results was made with: versions and hardware."""
import os
import platform
import re
from pathlib import Path

import timm
import torch

import timm_aws

__all__ = ['hardware', 'versions']


def versions() -> dict[str, str]:
    """Returns name to version of what is installed."""
    return {'torch': torch.__version__, 'timm': timm.__version__, 'timm_aws': timm_aws.__version__}


def hardware(device: str) -> str:
    """Names a GPU, or tells of the CPU: cores, architecture, model, and the vector instructions that torch uses."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{os.cpu_count()} cores, {platform.machine()} {_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}'


def _cpu_model() -> str:
    cpuinfo = Path('/proc/cpuinfo')  # on Linux alone, and without a model's name on ARM
    found = re.search(r'^model name\s*: (.+)$', cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1] if found else 'CPU'
