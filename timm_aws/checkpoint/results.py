"""What results.json tells of a checkpoint beside its accuracy: the runs that led to it, where, when and with what."""
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
from pathlib import Path
from typing import Any

import torch

from .folder import CONFIG, RESULTS, WEIGHTS, read_json, sha256
from .train_run import Checkpoint, stages_of
from .validation import count_images

__all__ = ['hardware', 'results_of', 'settings_of', 'start_of']

# Options of train.py about paths on one machine, and how many checkpoints are kept there; what train.py itself sets.
_PLACES = ('data_dir', 'data', 'output', 'experiment', 'initial_checkpoint', 'resume', 'checkpoint_hist',
           'distributed', 'world_size', 'rank', 'local_rank', 'prefetcher')


def results_of(
        checkpoint: Checkpoint, folder: Path, dataset: str, ema: bool, data_dir: Path | None,
) -> dict[str, Any]:
    """Tells what a checkpoint is and where it comes from.

    Args:
        checkpoint: The last one of the training.
        folder: Checkpoint folder, with its weights.
        dataset: Name of the data set, for people to read.
        ema: Whether the averaged weights were taken.
        data_dir: The data set, whose images are counted; None counts none.

    Returns:
        What results.json holds, without the accuracies.
    """
    weights = folder / WEIGHTS
    args = checkpoint.args
    stages = stages_of(checkpoint)
    return {
        'name': folder.name,
        'dataset': dataset,
        'weights': {
            'bytes': weights.stat().st_size,
            'sha256': sha256(weights),
            'parameters': sum(weight.numel() for name, weight in checkpoint.weights(ema).items()
                              if not name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))),
            'ema': ema,
        },
        'train_py': {'epoch': checkpoint.end, args['eval_metric']: checkpoint.content.get('metric')},
        'training': [_stage(checkpoint, stage, data_dir) for stage in stages],
        'besides': _besides(stages),
        'batch_size': args['batch_size'] * args.get('world_size', 1) * args.get('grad_accum_steps', 1),
        'momentum': checkpoint.content['optimizer']['param_groups'][0].get('momentum'),
        'alpha': checkpoint.alpha,
        'seed': args['seed'],
        'versions': {name: importlib.metadata.version(name) for name in ('timm_aws', 'timm', 'torch')},
        'hardware': hardware(args['device']),
        'date': datetime.date.today().isoformat(),
    }


def hardware(device: str) -> str:
    """Names a GPU of this machine, or its CPU: cores, architecture, model, and the vector instructions torch uses.

    Args:
        device: A device of torch, such as 'cpu' or 'cuda:0'.
    """
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else 'a GPU of another machine'
    cpuinfo = Path('/proc/cpuinfo')  # exists on Linux only, and names no model on ARM
    model = re.search(r'^model name\s*: (.+)$', cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return (f'{os.cpu_count()} cores, {platform.machine()} {model[1] if model else "CPU"}, '
            f'{torch.backends.cpu.get_cpu_capability()}')


def _stage(final: Checkpoint, stage: Checkpoint, data_dir: Path | None) -> dict[str, Any]:
    """Returns the command that repeats one run with the args.yaml of the last run, its epochs, hours and images."""
    found: dict[str, Any] = {'command': _command(final, stage), 'epochs': stage.epochs}
    started = stage.path.with_name('args.yaml')
    if started.is_file() and not stage.args.get('resume'):  # which writes args.yaml anew
        # From the start of the run until the checkpoint was written.
        seconds = stage.path.stat().st_mtime - started.stat().st_mtime
        if seconds >= 60:  # else they are copies, with the time of copying
            found['hours'] = round(seconds / 3600, 2)
    # --train-batches-per-epoch is for batches of several sizes, and does not tell how many images they hold.
    if data_dir and _data_of(stage) == _data_of(final) and not stage.args.get('train_batches_per_epoch'):
        found |= {key: stage.epochs * count for key, count in count_images(stage, 'train', data_dir).items()}
    return found


def _command(final: Checkpoint, stage: Checkpoint) -> str:
    args = stage.args
    last = settings_of(final.args)
    other = {key: value for key, value in settings_of(args).items() if value != last.get(key)}
    for key in ('initial_checkpoint', 'resume'):
        if args.get(key):
            other[key] = _last_parts(args[key])
    processes = args.get('world_size', 1)
    words = [*(['torchrun', f'--nproc_per_node={processes}'] if processes > 1 else ['python']), 'train.py', '--config',
             'args.yaml', '--data-dir', _place(stage)]
    notes = []
    for key, value in other.items():
        if value is None or value is False:  # no option of train.py takes these
            notes.append(f'with {key}: {"null" if value is None else "false"} in args.yaml')
            continue
        if isinstance(value, dict):
            value = [f'{name}={item}' for name, item in value.items()]
        values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    if args is not final.args and stage.end < args['epochs']:
        notes.append(f'the next run starts from epoch {stage.end} of {args["epochs"]}')
    command = shlex.join(words) + (f'  # {", ".join(notes)}' if notes else '')
    for newline in '\n\r':  # one line, whatever has been typed; where a word holds it, shlex has put it into quotes
        command = command.replace(newline, f"'${newline!r}'")
    return command


def start_of(first: Checkpoint, cfg: dict[str, Any]) -> dict[str, Any]:
    """Returns {'start': name and, where known, dataset and license of the weights before the first run}."""
    path = first.start or (first.args.get('pretrained') and (first.args.get('pretrained_path') or cfg.get('file')))
    if path:
        start = {'name': _last_parts(path)}
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if (folder / RESULTS).is_file() and (folder / CONFIG).is_file():
            start = {
                'name': folder.name,
                'dataset': str(read_json(folder / RESULTS).get('dataset', '')),
                'license': str(read_json(folder / CONFIG).get('pretrained_cfg', {}).get('license', '')),
            }
    elif first.args.get('pretrained'):
        start = {'name': f'{cfg["architecture"]}.{cfg.get("tag") or "default"}', 'license': cfg.get('license') or ''}
    else:
        return {}
    return {'start': start}


def _besides(stages: list[Checkpoint]) -> list[str]:
    """Names the teachers of the runs, and the data sets that the last run was not trained on."""
    teachers = [stage.args['kd_model_name'] for stage in stages if stage.args.get('kd_model_name')]
    others = [stage.args.get('dataset') or _place(stage) for stage in stages if _data_of(stage) != _data_of(stages[-1])]
    return list(dict.fromkeys(
        [f'the teacher {_without_place(name)}' for name in teachers] + [f'the data set {name}' for name in others]))


def _data_of(stage: Checkpoint) -> tuple[str, Path]:
    return stage.args.get('dataset') or '', Path(stage.args['data_dir'] or '').resolve()


def _place(stage: Checkpoint) -> str:
    return Path(stage.args['data_dir'] or '').name or 'DATA'


def settings_of(args: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of train.py without the places on one machine."""
    shorten: dict[str, Any] = {
        'model': _without_place, 'kd_model_name': _without_place, 'class_map': os.path.basename,
        'pretrained_path': _last_parts,
    }
    return {key: shorten[key](value) if value and key in shorten else value
            for key, value in args.items() if key not in _PLACES}


def _without_place(model: str) -> str:
    return f'local-dir:{Path(model).name}' if model.startswith('local-dir:') else model


def _last_parts(path: str) -> str:
    return '/'.join(Path(path).parts[-2:])
