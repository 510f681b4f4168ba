"""Makes a checkpoint folder from a run of timm's train.py; timm and the Hugging Face Hub can read it."""
import csv
import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import yaml
from timm.data import create_dataset, create_loader, resolve_data_config, resolve_model_data_config
from timm.models import save_for_hf

from .folder import ARGS, CARD, CONFIG, CURVES, PICTURE, RESULTS, WEIGHTS, read_json, sha256
from .model_card import model_card
from .train_run import Checkpoint, find_checkpoint, layers_of, load_checkpoint, stages_of

__all__ = ['export', 'hardware']

_logger = logging.getLogger(__name__)

# Options of train.py about paths on one machine, and how many checkpoints are kept there; what train.py itself sets.
_PLACES = ('data_dir', 'data', 'output', 'experiment', 'initial_checkpoint', 'resume', 'checkpoint_hist',
           'distributed', 'world_size', 'rank', 'local_rank', 'prefetcher')
# Options of train.py about the data set that validate.py has too.
_DATA = ('dataset', 'class_map', 'input_img_mode', 'input_key', 'target_key')
# What the Hub takes for the licence of a model, without the licences of single models.
_LICENSES = '''
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
    bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl
    lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other
    pddl postgresql unknown unlicense wtfpl zlib'''


def export(
        source: Path,
        out: Path,
        *,
        dataset: str,
        license: str,
        ema: bool | None = None,
        labels: Path | None = None,
        img_size: int | None = None,
        data_dir: Path | None = None,
        validate_py: Path | None = None,
        full_precision: bool = False,
) -> dict[str, Any]:
    """Makes a checkpoint folder, which is written aside and renamed when it is complete.

    Args:
        source: Output folder of timm's train.py, of which the best checkpoint is taken, or a checkpoint file.
        out: Folder to make, named `<architecture>.<tag>`.
        dataset: Name of the data set that the network was trained on, for people to read.
        license: Licence of the weights, by the Hub's identifier, or 'other'.
        ema: Take the averaged weights (True) or the last ones (False). None takes what validates better.
        labels: File of a header and one line a class, in the order of the classifier: name, a tab, a description.
        img_size: Height and width in pixels of the images to use the network on. None takes the size of the training.
        data_dir: The data set of the training. Its images are counted and validated on.
        validate_py: timm's validate.py, which measures the accuracy.
        full_precision: Store every tensor with the precision of the training. By default the filters and matrices are
            stored in half precision, and all other tensors with theirs.

    Returns:
        What results.json holds: accuracies, training, versions, hardware, size and sha256 of the weights.

    Raises:
        ValueError: If the source is no checkpoint of train.py or has split batch norms, if `out` exists or is not named
            after the network, if an option is not what it must be, if labels and classes are not equal in number, if
            `ema` has to be chosen, or if half precision turns more right images wrong than chance would.
        RuntimeError: If the weights do not fit the network, or if validate.py fails.
    """
    checkpoint = load_checkpoint(find_checkpoint(source))
    model = _network(checkpoint)
    _check_name(out, model.pretrained_cfg['architecture'])
    _check_choice(checkpoint, ema, data_dir, validate_py)
    _check_values(dataset, license, img_size, labels=labels, data_dir=data_dir, validate_py=validate_py)
    candidates = (False, True)[:1 + checkpoint.has_ema] if ema is None else (ema,)
    for use in candidates:
        model.load_state_dict(checkpoint.weights(use))
    start = _start(stages_of(checkpoint)[0], model.pretrained_cfg)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}.') as aside:
        folder = Path(aside, out.name)
        _write_config(checkpoint, model, folder, license, labels, img_size)
        full = {}
        if validate_py and data_dir:
            full = {use: _validate(checkpoint, folder, data_dir, validate_py, use) for use in candidates}
            ema = max(full, key=lambda use: full[use]['top1'])
        ema = bool(ema)
        _write_weights(checkpoint, folder, ema, full_precision)
        results = {**_results(checkpoint, folder, dataset, ema, data_dir), **start, 'embedding': _embedding(model)}
        if validate_py and data_dir:
            if not full_precision:
                model.load_state_dict(checkpoint.weights(ema))
                _check_half(model, checkpoint, folder, data_dir)
                results['metrics_in_full_precision'] = full[ema]
            results['metrics'] = _validate(checkpoint, folder, data_dir, validate_py)
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
        _write_effective_lr(checkpoint, folder)
        (folder / CARD).write_text(model_card(folder), encoding='utf-8')
        try:
            folder.rename(out)
        except OSError:
            _check_name(out, model.pretrained_cfg['architecture'])  # made by somebody else meanwhile
            raise
    return results


def _network(checkpoint: Checkpoint) -> Any:
    """Builds the network that train.py has built, without weights."""
    args = checkpoint.args
    return timm.create_model(
        args['model'], num_classes=args['num_classes'], in_chans=checkpoint.in_chans, global_pool=args['gp'],
        **_model_args(args))


def _model_args(args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of create_model that config.json has to keep."""
    return args['model_kwargs'] | ({'bn_eps': args['bn_eps']} if args.get('bn_eps') is not None else {})


def _start(first: Checkpoint, cfg: dict[str, Any]) -> dict[str, Any]:
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


@torch.inference_mode()
def _embedding(model: Any) -> list[int]:
    """Returns the shape of what the network gives for one image without its classifier."""
    image = torch.zeros(1, *model.pretrained_cfg['input_size'])
    return list(model.eval().forward_head(model.forward_features(image), pre_logits=True).shape)


def _last_parts(path: str) -> str:
    return '/'.join(Path(path).parts[-2:])


def _check_name(out: Path, architecture: str) -> None:
    name, _, tag = out.name.partition('.')
    if name != architecture or not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', tag):
        raise ValueError(f'The folder must be named {architecture}.<tag>, such as {architecture}.aws_tin200, '
                         f'with a tag of letters, digits, ".", "_" and "-", not {out.name!r}.')
    if files := [path for path in out.parents if path.is_file()]:
        raise ValueError(f'{files[0]} is a file, in which no folder can be made: export to another place.')
    if out.exists():
        raise ValueError(f'{out} exists already: move it away, or export to another place.')


def _check_choice(checkpoint: Checkpoint, ema: bool | None, data_dir: Path | None, validate_py: Path | None) -> None:
    if checkpoint.args.get('split_bn'):
        raise ValueError(f'{checkpoint.path} has the split batch norms of --split-bn, which timm.create_model cannot '
                         f'make: train without it.')
    if validate_py and not data_dir:
        raise ValueError('validate_py needs data_dir, the folder of the images to validate on.')
    if validate_py and not checkpoint.args['val_split']:
        raise ValueError(f'validate_py needs images that the run has not trained on, and {checkpoint.path} has no '
                         f'val_split: leave it out.')
    if ema and not checkpoint.has_ema:
        raise ValueError(f'{checkpoint.path} holds no averaged weights: train with --model-ema, or leave ema out.')
    if checkpoint.has_ema and ema is None and not validate_py:
        raise ValueError(
            f'{checkpoint.path} holds averaged weights too: choose with ema=True (--ema) or ema=False (--no-ema), or '
            f'give validate_py and data_dir (--validate, --data-dir) to take what validates better.'
        )


def _check_values(dataset: str, license: str, img_size: int | None, **paths: Path | None) -> None:
    if not dataset.strip():
        raise ValueError(f'dataset must name what the network was trained on, not {dataset!r}.')
    if license not in _LICENSES.split():
        raise ValueError(f'license must be an SPDX identifier in lower case that the Hub knows, such as apache-2.0, or '
                         f'"other", not {license!r}.')
    if img_size is not None and not 0 < img_size <= 4096:
        raise ValueError(f'img_size must be 1 to 4096 pixels, not {img_size}.')
    for name, path in paths.items():
        if path and not path.exists():
            raise ValueError(f'{name} {path} does not exist: give one that does, or leave it out.')


def _write_config(
        checkpoint: Checkpoint, model: Any, folder: Path, license: str, labels: Path | None, img_size: int | None,
) -> None:
    """Writes config.json and args.yaml."""
    args = checkpoint.args
    data = resolve_data_config(args, model=model)
    channels, *size = data['input_size']
    data['input_size'] = (channels, *([img_size] * 2 if img_size else size))
    for key in ('mean', 'std'):  # of gray images train.py takes the average of the colours
        if len(data[key]) != channels:
            data[key] = (sum(data[key]) / len(data[key]),) * channels
    reduction = model.feature_info[-1]['reduction']
    model.pretrained_cfg = {
        **model.pretrained_cfg, **data, 'tag': folder.name.partition('.')[2], 'license': license,
        'num_classes': model.num_classes, 'label_names': None, 'label_descriptions': None,
        'pool_size': tuple(math.ceil(size / reduction) for size in data['input_size'][1:]),
    }
    config: dict[str, Any] = {}
    if labels:
        names = _read_labels(labels)
        if len(names) != model.num_classes:
            raise ValueError(f'{labels} names {len(names)} classes, the network has {model.num_classes}.')
        config = {'label_names': list(names), 'label_descriptions': names}
    save_for_hf(  # with weights, which _write_weights replaces
        model, str(folder), model_config=config, model_args=_model_args(args) or None, safe_serialization=True)
    exported = read_json(folder / CONFIG)
    exported.get('model_args', {}).pop('num_classes', None)  # transformers passes it a second time and fails
    (folder / CONFIG).write_text(json.dumps(exported, indent=2), encoding='utf-8')
    (folder / ARGS).write_text(yaml.safe_dump(_settings(args)), encoding='utf-8')


def _read_labels(path: Path) -> dict[str, str]:
    """Returns the descriptions of the classes by their names."""
    try:
        lines = path.read_text(encoding='utf-8').rstrip().splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'labels {path} cannot be read: give a text file in UTF-8.') from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 2):
        name, _, words = line.partition('\t')
        if not name.strip() or name in names:
            raise ValueError(f'{path} must give each class a name of its own, not {name!r} in line {number}.')
        names[name] = words
    return names


def _settings(args: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of train.py without the places on one machine."""
    shorten: dict[str, Any] = {
        'model': _without_place, 'kd_model_name': _without_place, 'class_map': os.path.basename,
        'pretrained_path': _last_parts,
    }
    return {key: shorten[key](value) if value and key in shorten else value
            for key, value in args.items() if key not in _PLACES}


def _without_place(model: str) -> str:
    return f'local-dir:{Path(model).name}' if model.startswith('local-dir:') else model


def _write_weights(checkpoint: Checkpoint, folder: Path, ema: bool, full_precision: bool) -> None:
    weights = {}
    for name, weight in checkpoint.weights(ema).items():
        # Norms, biases and running statistics stay in full precision: a variance may be too large for half precision.
        half = not full_precision and weight.ndim >= 2 and weight.is_floating_point()
        weights[name] = (weight.half() if half else weight).contiguous()
        if not weights[name].isfinite().all():
            way_out = ' in half precision: give full_precision=True (--full-precision)' if half else ''
            raise ValueError(f'{name} of {checkpoint.path} is not finite{way_out}.')
    path = folder / WEIGHTS
    safetensors.torch.save_file(weights, path, metadata={'format': 'pt'})
    path.chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read its files


def _validate(
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
        **_images(checkpoint, 'val', data_dir),
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


def _images(checkpoint: Checkpoint, part: str, data_dir: Path) -> dict[str, int]:
    """Returns {'images': their number in the data set's part 'train' or 'val'}, {} where they cannot be counted."""
    try:
        return {'images': len(_data_set(checkpoint, part, data_dir))}
    except Exception as error:  # the readers of timm raise many types, and assert
        _logger.warning(f'The {part} images in {data_dir} are not counted: {" ".join(str(error).split())}')
        return {}


@torch.inference_mode()
def _check_half(model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, data_dir: Path) -> None:
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


def _results(
        checkpoint: Checkpoint, folder: Path, dataset: str, ema: bool, data_dir: Path | None,
) -> dict[str, Any]:
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
    args = stage.args
    last = _settings(final.args)
    other = {key: value for key, value in _settings(args).items() if value != last.get(key)}
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
    stage_results: dict[str, Any] = {'command': command, 'epochs': stage.epochs}
    started = stage.path.with_name('args.yaml')
    if started.is_file() and not args.get('resume'):  # which writes args.yaml anew
        # From the start of the run until the checkpoint was written.
        seconds = stage.path.stat().st_mtime - started.stat().st_mtime
        if seconds >= 60:  # else they are copies, with the time of copying
            stage_results['hours'] = round(seconds / 3600, 2)
    # --train-batches-per-epoch is for batches of several sizes, and does not tell how many images they hold.
    if data_dir and _data_of(stage) == _data_of(final) and not args.get('train_batches_per_epoch'):
        stage_results |= {key: stage.epochs * count for key, count in _images(stage, 'train', data_dir).items()}
    return stage_results


def _write_effective_lr(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the effective learning rate after each epoch of which a checkpoint exists, and draws it."""
    rows = []
    before = 0
    for stage in stages_of(checkpoint):
        for path in stage.path.parent.glob('checkpoint-*.pth.tar'):
            try:
                saved = load_checkpoint(path)
            except (OSError, ValueError):  # cut off by a full disk, say
                continue
            if stage.begin < saved.end <= stage.end:
                rows += [(before + saved.end - stage.begin, *row) for row in layers_of(saved)]
        before += stage.epochs
    if not rows:
        return
    with (folder / CURVES).open('w', newline='') as file:
        # Sorted by epoch; the layers of one epoch stay in the network's order.
        csv.writer(file).writerows([('epoch', 'layer', 'lr', 'length'), *sorted(rows, key=lambda row: row[0])])
    try:
        from ..plot import plot_effective_lr
    except ImportError:  # the package can do without matplotlib
        _logger.warning(f'There is no {PICTURE}: install timm_aws[figures] for the picture.')
    else:
        plot_effective_lr(folder / CURVES, folder / PICTURE)
