"""Makes a checkpoint folder from a run of timm's train.py; timm and the Hugging Face Hub can read it."""
import csv
import json
import logging
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import save_for_hf

from .folder import ARGS, CARD, CONFIG, CURVES, PICTURE, RESULTS, WEIGHTS, read_json
from .model_card import model_card
from .results import Before, before_of, results_of, settings_of
from .train_run import Checkpoint, find_checkpoint, layers_of, load_checkpoint, stages_of
from .validation import check_half, validate

__all__ = ['export']

_logger = logging.getLogger(__name__)

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
    before = before_of(checkpoint, model.pretrained_cfg, dataset)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}.') as aside:
        folder = Path(aside, out.name)
        _write_config(checkpoint, model, folder, license, labels, img_size)
        full = {}
        if validate_py and data_dir:
            full = {use: validate(checkpoint, folder, data_dir, validate_py, use) for use in candidates}
            ema = max(full, key=lambda use: full[use]['top1'])
        ema = bool(ema)
        _write_weights(checkpoint, folder, ema, full_precision)
        results = results_of(checkpoint, before, folder, dataset, ema, data_dir) | {'embedding': _embedding(model)}
        if validate_py and data_dir:
            if not full_precision:
                model.load_state_dict(checkpoint.weights(ema))
                check_half(model, checkpoint, folder, data_dir)
                results['metrics_in_full_precision'] = full[ema]
            results['metrics'] = validate(checkpoint, folder, data_dir, validate_py)
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
        _write_effective_lr(checkpoint, before, folder)
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


@torch.inference_mode()
def _embedding(model: Any) -> list[int]:
    """Returns the shape of what the network gives for one image without its classifier."""
    image = torch.zeros(1, *model.pretrained_cfg['input_size'])
    return list(model.eval().forward_head(model.forward_features(image), pre_logits=True).shape)


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
    (folder / ARGS).write_text(yaml.safe_dump(settings_of(args)), encoding='utf-8')


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


def _write_effective_lr(checkpoint: Checkpoint, before: Before, folder: Path) -> None:
    """Writes the effective learning rate after each epoch of which a checkpoint exists, and draws two or more."""
    rows: list[tuple] = []
    if before.folder and (before.folder / CURVES).is_file():
        with (before.folder / CURVES).open(newline='') as file:
            rows = [(int(row[0]), *row[1:]) for row in list(csv.reader(file))[1:]]
    done = sum(run['epochs'] for run in before.training)
    for stage in stages_of(checkpoint):
        for path in stage.path.parent.glob('checkpoint-*.pth.tar'):
            try:
                saved = load_checkpoint(path)
            except (OSError, ValueError):  # cut off by a full disk, say
                continue
            if stage.begin < saved.end <= stage.end:
                rows += [(done + saved.end - stage.begin, *row) for row in layers_of(saved)]
        done += stage.epochs
    if not rows:
        return
    with (folder / CURVES).open('w', newline='') as file:
        # Sorted by epoch; the layers of one epoch stay in the network's order.
        csv.writer(file).writerows([('epoch', 'layer', 'lr', 'length'), *sorted(rows, key=lambda row: row[0])])
    if len({epoch for epoch, _, lr, _ in rows if float(lr) > 0}) < 2:  # one point is no curve
        return
    try:
        from ..plot import plot_effective_lr
    except ImportError:  # the package can do without matplotlib
        _logger.warning(f'There is no {PICTURE}: install timm_aws[figures] for the picture.')
    else:
        plot_effective_lr(folder / CURVES, folder / PICTURE)
