"""What was computed from a weight, kept for as long as the weight is what it was."""
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ['Kept', 'can_be_kept']


def can_be_kept(weight: torch.Tensor) -> bool:
    """Whether something may be kept for a weight: a parameter on the CPU that nothing traces, compiles or batches.

    On other devices to look at a weight means to wait for it, and takes longer than to compute anew.
    """
    return (
        type(weight) is torch.nn.Parameter
        and weight.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not weight.is_inference()  # whose changes torch does not count
    )


class Kept:
    """One value for each weight, forgotten with the weight, or when torch sees that the weight has changed.

    torch counts in-place operations, `load_state_dict` and `copy_` among them, and another dtype or memory format is
    at another address. It does not count the steps of its own fused optimizers, nor what is done to `weight.data` in
    place: who keeps something over these has to look for them. The values are no part of the weights or of their
    modules, so that copies, pickles and state dicts are without them.
    """

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()

    def put(self, weight: torch.Tensor, value: Any) -> None:
        """Keeps a value that was computed from the weight as it is now."""
        self._entries[weight] = _identity(weight), value

    def get(self, weight: torch.Tensor) -> Any:
        """Returns what is kept for the weight as it is now, None if there is nothing."""
        identity, value = self._entries.get(weight, (None, None))
        return value if identity == _identity(weight) else None

    def take(self, weight: torch.Tensor, ahead: int = 0) -> Any:
        """Returns what is kept for the weight as it was `ahead` counted changes ago, and keeps it no longer."""
        identity, value = self._entries.pop(weight, (None, None))
        return value if identity == _identity(weight, ahead) else None

    def forget(self, weight: torch.Tensor) -> None:
        """Forgets what is kept for the weight, if there is anything."""
        self._entries.pop(weight, None)


def _identity(weight: torch.Tensor, ahead: int = 0) -> tuple[int, int]:
    return weight._version - ahead, weight.data_ptr()
