"""The images of a run of train.py: how many there are, and how well a checkpoint does on them."""
import json
import logging
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config

from .train_run import Checkpoint

__all__ = ['check_half', 'count_images', 'validate']

_logger = logging.getLogger(__name__)

# Options of train.py about the data set that validate.py has too.
_DATA = ('dataset', 'class_map', 'input_img_mode', 'input_key', 'target_key')


def validate(
        checkpoint: Checkpoint, folder: Path, data_dir: Path, validate_py: Path, ema: bool | None = None,
) -> dict[str, Any]:
    """Runs timm's validate.py on the folder, or on the checkpoint if `ema` is given."""
    args = checkpoint.args
    weights = ['--pretrained'] if ema is None else ['--checkpoint', str(checkpoint.path)]
    command = [
        sys.executable, '-m', 'timm_aws', 'run', str(validate_py.resolve()), '--data-dir', str(data_dir.resolve()),
        '--model', f'local-dir:{folder.resolve()}', *weights, *(['--use-ema'] if ema else []),
        '--in-chans', str(checkpoint.in_chans), '--split', args['val_split'], '--workers', str(args['workers']),
        '--device', args['device'] if torch.cuda.is_available() else 'cpu',
        *(word for key, value in _data_options(args, 'val').items()
          for word in (f"--{key.replace('_', '-')}", str(value))),
    ]
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside, 'results.json')
        # In a session of its own it gets no Ctrl-C, which would print a traceback. subprocess.run kills it instead.
        done = subprocess.run(
            [*command, '--results-file', str(path), '--results-format', 'json'], cwd=aside, start_new_session=True)
        if done.returncode:
            raise RuntimeError(f'{validate_py} failed with exit code {done.returncode}: see its own words above.')
        found = json.loads(path.read_text())
    return {
        **{key: found[key] for key in ('top1', 'top5', 'img_size', 'crop_pct', 'interpolation')},
        **count_images(checkpoint, 'val', data_dir),
        'by': "timm's validate.py",
    }


def _data_options(args: dict[str, Any], part: str) -> dict[str, Any]:
    """Returns the options that train.py has given about the data set's part 'train' or 'val', as validate.py has them.

    The map of classes may lie in the working directory, which validate.py leaves.
    """
    options = {**{key: args.get(key) for key in _DATA}, 'num_samples': args.get(f'{part}_num_samples')}
    if args.get('class_map') and Path(args['class_map']).is_file():
        options['class_map'] = Path(args['class_map']).resolve()
    return {key: value for key, value in options.items() if value}


def _data_set(checkpoint: Checkpoint, part: str, data_dir: Path) -> Any:
    """Builds the data set's part 'train' or 'val' as train.py does."""
    options = {'input_img_mode': 'RGB' if checkpoint.in_chans == 3 else 'L', **_data_options(checkpoint.args, part)}
    return create_dataset(
        options.pop('dataset', ''), root=str(data_dir), split=checkpoint.args[f'{part}_split'], **options)


def count_images(checkpoint: Checkpoint, part: str, data_dir: Path) -> dict[str, int]:
    """Returns {'images': their number in the data set's part 'train' or 'val'}, {} where they cannot be counted."""
    try:
        return {'images': len(_data_set(checkpoint, part, data_dir))}
    except Exception as error:  # the readers of timm raise many types, and assert
        _logger.warning(f'The {part} images in {data_dir} are not counted: {" ".join(str(error).split())}')
        return {}


@torch.inference_mode()
def check_half(model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, data_dir: Path) -> None:
    """Raises ValueError where the stored weights do worse than the model, image by image.

    What counts are the images on which one of the two is right and the other wrong. Either is as likely where half
    precision does no harm, so by chance they lose as many as here, or more, in one of a hundred cases at least.
    """
    args = checkpoint.args
    device = args['device'] if torch.cuda.is_available() else 'cpu'
    stored: Any = timm.create_model(f'local-dir:{folder}', pretrained=True)
    loader = create_loader(
        _data_set(checkpoint, 'val', data_dir), **resolve_model_data_config(stored), batch_size=args['batch_size'],
        num_workers=args['workers'], device=torch.device(device))
    lost = gained = total = 0
    for images, labels in loader:
        before, after = (network.eval().to(device)(images).argmax(1) == labels for network in (model, stored))
        lost, gained = lost + int((before & ~after).sum()), gained + int((after & ~before).sum())
        total += len(labels)
    differ = lost + gained
    if 100 * sum(math.comb(differ, count) for count in range(lost, differ + 1)) < 2 ** differ:
        raise ValueError(
            f'Half precision turns {lost} right images wrong and {gained} wrong ones right, of {total}: the '
            f'weights are too small or too large for it, give full_precision=True (--full-precision).'
        )
