"""What a result in scripts/results was made with: versions and hardware."""
import timm
import torch

import timm_aws
from timm_aws.checkpoint.results import hardware

__all__ = ['hardware', 'versions']


def versions() -> dict[str, str]:
    """Returns name to version of what is installed."""
    return {'torch': torch.__version__, 'timm': timm.__version__, 'timm_aws': timm_aws.__version__}
