"""The output of timm's train.py: its checkpoints, the options in them, and the chain of runs that led to one."""
import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..rule import filter_length

__all__ = ['Checkpoint', 'find_checkpoint', 'layers_of', 'load_checkpoint', 'stages_of']

_CONTENT = {'args': argparse.Namespace, 'state_dict': dict, 'optimizer': dict, 'epoch': int}
# The options of train.py that an export needs.
_OPTIONS = {
    'batch_size', 'data_dir', 'device', 'epochs', 'eval_metric', 'gp', 'img_size', 'in_chans', 'initial_checkpoint',
    'model', 'model_kwargs', 'momentum', 'num_classes', 'opt', 'seed', 'train_split', 'val_split', 'workers',
}
# Arguments of timm.create_model that load weights. train.py sets them itself, so they cannot be in --model-kwargs.
_LOADING = {'checkpoint_path', 'pretrained'}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of timm's train.py.

    Attributes:
        path: Its file.
        args: Every option of train.py, by name.
        content: What the file holds.
        begin: Number of finished epochs that its run went on from.
    """
    path: Path
    args: dict[str, Any]
    content: dict[str, Any]
    begin: int = 0

    @property
    def end(self) -> int:
        """Number of finished epochs, with those that its run went on from."""
        return self.content['epoch'] + 1

    @property
    def epochs(self) -> int:
        """Number of epochs that its run has finished."""
        return self.end - self.begin

    @property
    def start(self) -> str:
        """File of the weights that its run started from, '' without one."""
        return self.args.get('resume') or self.args['initial_checkpoint']

    @property
    def in_chans(self) -> int:
        """Number of channels of the images."""
        return self.args['in_chans'] or (self.args.get('input_size') or [3])[0]

    @property
    def has_ema(self) -> bool:
        """Whether the file holds averaged weights too."""
        return 'state_dict_ema' in self.content

    @property
    def alpha(self) -> float | None:
        """Shrink coefficient of the first group of normalized weights, None without one."""
        return next((group.get('aws_alpha', group.get('alpha')) for group in self.content['optimizer']['param_groups']
                     if group.get('normalization')), None)

    def weights(self, ema: bool) -> dict[str, torch.Tensor]:
        """Returns the state dict of the averaged weights (True) or of the last ones (False)."""
        return self.content['state_dict_ema' if ema else 'state_dict']


def find_checkpoint(source: Path) -> Path:
    """Returns the best checkpoint in a run's folder, else its last one. A file is returned unchanged.

    Raises:
        ValueError: If there is none.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist: give a folder of timm's train.py, or a checkpoint in it.")
    candidates = [source / 'model_best.pth.tar', source / 'last.pth.tar'] if source.is_dir() else [source]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(f"{source} is neither a checkpoint nor a folder of timm's train.py with {candidates[-1].name}.")


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and executes nothing in it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged, or not a checkpoint of timm's train.py.
    """
    path.open('rb').close()  # raises OSError if the file cannot be read
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many types, depending on the damage
        raise ValueError(
            f'{path} cannot be read as a checkpoint: it is damaged, or not written by torch.save, or it holds more '
            f'than tensors and plain values.'
        ) from error
    problem = _problem(content)
    if problem:
        raise ValueError(f"{path} is not a checkpoint of timm's train.py: {problem}.")
    args = dict(vars(content['args']))
    # A record is a file of one machine.
    args['opt_kwargs'] = {
        key: value for key, value in (args.get('opt_kwargs') or {}).items() if key not in ('record', 'record_every')}
    return Checkpoint(path.resolve(), args, content, begin=args.get('start_epoch') or 0)


def _problem(content: Any) -> str:
    """Returns why something is not what train.py saves, or an empty string if it is."""
    if not isinstance(content, dict):
        return f'it holds a {type(content).__name__}'
    wrong = [key for key, kind in _CONTENT.items() if not isinstance(content.get(key), kind)]
    if wrong:
        return f'it needs {" and ".join(wrong)}'
    args = vars(content['args'])
    if missing := _OPTIONS - set(args):
        return f'its args lack {", ".join(sorted(missing))}'
    if not isinstance(args['model_kwargs'], dict) or _LOADING & set(args['model_kwargs']):
        return f'its model_kwargs are {args["model_kwargs"]!r}'
    return ''


def stages_of(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Follows --resume and --initial-checkpoint back: the last checkpoint of each run that led here, in order of time.

    It stops at weights that no run of train.py has left, such as a plain state dict.
    """
    stages = [checkpoint]
    while (first := stages[0]).start and Path(first.start).is_file():
        try:
            stage = load_checkpoint(Path(first.start))
        except ValueError:
            break
        counts_on = first.args.get('resume') and first.args.get('start_epoch') is None
        later = counts_on and stage.end >= first.end
        if later or str(stage.args) in [str(known.args) for known in stages]:  # overwritten by what started from it
            break
        if counts_on:
            stages[0] = replace(first, begin=stage.end)
        stages.insert(0, stage)
    return stages


def layers_of(checkpoint: Checkpoint) -> list[tuple[str, float, float]]:
    """Returns name, learning rate and median filter length of each normalized weight in a checkpoint."""
    weights = checkpoint.weights(ema=False)
    return [
        (name, float(group['lr']), float(f'{filter_length(weights[name], group["normalization"]).median():.6g}'))
        for group in checkpoint.content['optimizer']['param_groups'] if group.get('normalization')
        # Where train.py distils features, its optimizer has the network as `student`, beside a projection.
        for name in (name.removeprefix('student.') for name in group.get('param_names', ()))
        if name in weights and weights[name].ndim >= 2
    ]
