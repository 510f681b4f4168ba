"""What timm's train.py leaves behind: its checkpoints, with the options in them, and the runs that led to one."""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .shrink import filter_length

__all__ = ['Checkpoint', 'find_checkpoint', 'layers_of', 'load_checkpoint', 'stages_of']


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of timm's train.py.

    Attributes:
        path: Its file.
        args: Every option of train.py, by name.
        content: What the file holds.
    """
    path: Path
    args: dict[str, Any]
    content: dict[str, Any]

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.path.parent

    @property
    def epochs(self) -> int:
        """Epochs that the run had finished."""
        return self.content['epoch'] + 1

    @property
    def has_ema(self) -> bool:
        """Whether there are averaged weights too."""
        return 'state_dict_ema' in self.content

    def weights(self, ema: bool) -> dict[str, torch.Tensor]:
        """Returns the state dict, or that of the averaged weights."""
        return self.content['state_dict_ema' if ema else 'state_dict']


def find_checkpoint(source: Path) -> Path:
    """Returns the best checkpoint of a run's folder, else its last one; of a file the file itself.

    Raises:
        ValueError: If there is none.
    """
    candidates = [source / 'model_best.pth.tar', source / 'last.pth.tar'] if source.is_dir() else [source]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(f"{source} is neither a checkpoint nor a folder of timm's train.py with {candidates[-1].name}.")


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without executing anything that is in it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged, or is no checkpoint of timm's train.py.
    """
    path.open('rb').close()  # a file that may not be read is another matter than a damaged one
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f'{path} cannot be read as a checkpoint: {reason}') from error
    if not (isinstance(content, dict) and isinstance(content.get('args'), argparse.Namespace)
            and isinstance(content.get('state_dict'), dict)):
        raise ValueError(f"{path} is not a checkpoint of timm's train.py: it needs args and state_dict.")
    return Checkpoint(path.resolve(), dict(vars(content['args'])), content)


def stages_of(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Follows --initial-checkpoint back: where each run that led to the checkpoint ended, the first first."""
    stages = [checkpoint]
    while (start := stages[0].args['initial_checkpoint']) and Path(start).is_file():
        stages.insert(0, load_checkpoint(Path(start)))
    return stages


def layers_of(checkpoint: Checkpoint) -> list[tuple[str, float, float]]:
    """Returns name, learning rate and median filter length of each normalized weight in a checkpoint."""
    content = checkpoint.content
    return [
        (name, float(group['lr']),
         float(f'{filter_length(content["state_dict"][name], group["normalization"]).median():.6g}'))
        for group in content['optimizer']['param_groups'] if group.get('normalization') and 'param_names' in group
        for name in group['param_names'] if content['state_dict'][name].ndim >= 2
    ]
