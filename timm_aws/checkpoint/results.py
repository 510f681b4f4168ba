"""What results.json tells of a checkpoint beside its accuracy: the runs that led to it, where, when and with what."""
import datetime
import importlib.metadata
import logging
import os
import platform
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from .folder import ARGS, CONFIG, RESULTS, WEIGHTS, read_json, sha256
from .train_run import Checkpoint, stages_of
from .validation import count_images

__all__ = ['Before', 'before_of', 'hardware', 'results_of', 'settings_of']

_logger = logging.getLogger(__name__)

# Options of train.py about paths on one machine, how many checkpoints are kept there and how often it prints; what
# train.py itself sets.
_PLACES = ('data_dir', 'data', 'output', 'experiment', 'initial_checkpoint', 'resume', 'checkpoint_hist',
           'log_interval', 'distributed', 'world_size', 'rank', 'local_rank', 'prefetcher')
_COMMENT = '  # '  # between a command and what is to be said of it


@dataclass(frozen=True)
class Before:
    """What is known of the time before the first run.

    Attributes:
        start: Name and, where known, dataset and license of the weights that training started from; empty from scratch.
        folder: The checkpoint folder that the runs go on from, None without one of the same network and data set.
        training: The runs that led to it, as results.json has them.
        besides: What else these learned from.
        hardware: What they ran on.
    """
    start: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    besides: list[str] = field(default_factory=list)
    hardware: str = ''


def results_of(
        checkpoint: Checkpoint, before: Before, folder: Path, dataset: str, ema: bool, data_dir: Path | None,
) -> dict[str, Any]:
    """Tells what a checkpoint is and where it comes from.

    Args:
        checkpoint: The last one of the training.
        before: What was before the first of its runs.
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
        'training': [*before.training, *(_stage(checkpoint, stage, data_dir) for stage in stages)],
        'besides': list(dict.fromkeys([*before.besides, *_besides(stages)])),
        'batch_size': args['batch_size'] * args.get('world_size', 1) * args.get('grad_accum_steps', 1),
        'momentum': checkpoint.content['optimizer']['param_groups'][0].get('momentum'),
        'alpha': checkpoint.alpha,
        'seed': args['seed'],
        'versions': {name: importlib.metadata.version(name) for name in ('timm_aws', 'timm', 'torch')},
        'hardware': ', then '.join(dict.fromkeys(filter(None, [
            *before.hardware.split(', then '), hardware(args['device'])]))),  # each machine once
        'date': datetime.date.today().isoformat(),
        **({'start': before.start} if before.start else {}),
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
    other = _others(settings_of(args), final)
    for key in ('initial_checkpoint', 'resume'):
        if args.get(key):
            other[key] = _last_parts(args[key])
    processes = args.get('world_size', 1)
    words, notes = _words(other)
    if args is not final.args and stage.end < args['epochs']:
        notes.append(f'the next run starts from epoch {stage.end} of {args["epochs"]}')
    launcher = ['torchrun', f'--nproc_per_node={processes}'] if processes > 1 else ['python']
    return _line(
        shlex.join([*launcher, 'train.py', '--config', 'args.yaml', '--data-dir', _place(stage), *words]), notes)


def _command_before(command: str, settings: dict[str, Any], final: Checkpoint) -> str:
    """Returns a command for the args.yaml with these settings as one for that of the last run."""
    given = shlex.split(command, comments=True)
    words, notes = _words({key: value for key, value in _others(settings, final).items() if _option(key) not in given})
    head, note = command, ''
    if given != shlex.split(command):  # it ends in a comment
        head, _, note = command.rpartition(_COMMENT)
    # Only added to: where it holds a line break, what a shell reads differs from what shlex does.
    return _line(' '.join([head, *map(shlex.quote, words)]), [*([note] if note else []), *notes])


def _others(settings: dict[str, Any], final: Checkpoint) -> dict[str, Any]:
    """Returns those of the settings that the last run has not."""
    last = settings_of(final.args)
    return {key: value for key, value in settings.items() if value != last.get(key)}


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _words(settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Returns options of train.py for these settings, and notes for those that no option sets."""
    words, notes = [], []
    for key, value in settings.items():
        if value is None or value is False:  # no option of train.py takes these
            notes.append(f'with {key}: {"null" if value is None else "false"} in args.yaml')
            continue
        if isinstance(value, dict):
            value = [f'{name}={item}' for name, item in value.items()]
        values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        words += [_option(key), *map(str, values)]
    return words, notes


def _line(command: str, notes: list[str]) -> str:
    command += f'{_COMMENT}{", ".join(notes)}' if notes else ''
    for newline in '\n\r':  # one line, whatever has been typed; where a word holds it, shlex has put it into quotes
        command = command.replace(newline, f"'${newline!r}'")
    return command


def before_of(checkpoint: Checkpoint, cfg: dict[str, Any], dataset: str) -> Before:
    """Tells what was before the first run that led to a checkpoint.

    Args:
        checkpoint: The last one of the training.
        cfg: What timm knows of the pretrained weights of its network.
        dataset: Name of the data set of the training. What led to a checkpoint folder of the same network and data set
            is a part of the training.

    Raises:
        ValueError: If the results of the checkpoint folder that the runs started from cannot be read.
    """
    first = stages_of(checkpoint)[0]
    path = first.start or (first.args.get('pretrained') and (first.args.get('pretrained_path') or cfg.get('file')))
    if not path:
        name = f'{cfg["architecture"]}.{cfg.get("tag") or "default"}'
        return Before({'name': name, 'license': cfg.get('license') or ''} if first.args.get('pretrained') else {})
    if not Path(path).exists():
        _logger.warning(
            f'The training started from {path}, which is not found from {Path.cwd()}: the card names it, but does not '
            f'tell what led to it. Export in the folder where train.py ran.')
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not ((folder / RESULTS).is_file() and (folder / CONFIG).is_file()):
        return Before({'name': _last_parts(path)})
    results, config = read_json(folder / RESULTS), read_json(folder / CONFIG)
    same = (results.get('dataset'), config.get('architecture')) == (dataset, cfg['architecture'])
    if same and results.get('training') and (folder / ARGS).is_file():
        settings = settings_of(yaml.safe_load((folder / ARGS).read_text(encoding='utf-8')))
        training = [{**run, 'command': _command_before(run['command'], settings, checkpoint)}
                    for run in results['training']]
        return Before(
            results.get('start', {}), folder, training, results.get('besides', []), results.get('hardware', ''))
    return Before({
        'name': folder.name,
        'dataset': str(results.get('dataset', '')),
        'license': str(config.get('pretrained_cfg', {}).get('license', '')),
    })


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
