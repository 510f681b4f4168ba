"""Checkpoint folders, `<architecture>.<tag>`: what they hold, what timm learns from them, and checks of their files.

A folder equals its repository on the Hugging Face Hub byte for byte, so `local-dir:` and `hf-hub:` names work as for
any timm model. The project's own folders are in `weights/` and in the wheel, which leaves the weights of some out. A
folder may come without its weights: they are then loaded from the Hub, if it is known where.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

__all__ = [
    'ARGS', 'CARD', 'CONFIG', 'CURVES', 'NAMESPACE_VARIABLE', 'PICTURE', 'RESULTS', 'WEIGHTS', 'check_folder',
    'check_source', 'check_weights', 'git_blob_id', 'own_cfgs', 'pretrained_cfg', 'read_json', 'sha256',
]

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'  # read by timm
ARGS = 'args.yaml'  # every option of train.py
RESULTS = 'results.json'  # accuracies and how they were measured, size and sha256 of the weights
CARD = 'README.md'
CURVES = 'effective_lr.csv'  # exists only if the run kept more than its last checkpoint
PICTURE = 'effective_lr.png'  # exists only if two or more of these epochs ended at a learning rate above 0

NAMESPACE_VARIABLE = 'TIMM_AWS_HUB_NAMESPACE'


def own_cfgs() -> dict[str, dict[str, Any]]:
    """Describes the project's own checkpoints to timm.

    Returns:
        {name of the folder: what timm.models.generate_default_cfgs takes}. Checkpoints with a source of weights come
        first, then the others, each sorted by name.
    """
    cfgs = {path.parent.name: pretrained_cfg(path.parent) for path in sorted(_own_folders().glob(f'*/{CONFIG}'))}
    return dict(sorted(cfgs.items(), key=lambda item: not {'file', 'hf_hub_id'} & item[1].keys()))


def pretrained_cfg(folder: Path) -> dict[str, Any]:
    """Describes a checkpoint to timm.

    Args:
        folder: Checkpoint folder, `<architecture>.<tag>`, with or without its weights.

    Returns:
        What timm.models.generate_default_cfgs takes. The source is the folder's own weights file. Without this file it
        is the repository of the same name whose owner the environment variable TIMM_AWS_HUB_NAMESPACE gives, else the
        hf_hub_id in config.json, else there is none.

    Raises:
        ValueError: If config.json is not valid.
    """
    config = _read_config(folder)
    cfg = {
        **config['pretrained_cfg'],
        **{key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config},
    }
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    if (folder / WEIGHTS).is_file():
        return {**cfg, 'file': str(folder / WEIGHTS)}
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    return {**cfg, 'hf_hub_id': f'{namespace}/{folder.name}'} if namespace else cfg


def check_source(cfg: PretrainedCfg) -> None:
    """Checks that timm can load the pretrained weights of `cfg` and that those of a checkpoint folder are not damaged.

    Raises:
        RuntimeError: If there are no weights; says how to get some.
        ValueError: If the weights in the folder are not the file that its results.json describes.
    """
    if not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f'No pretrained weights exist for {cfg.architecture}. Use `pretrained=False` for random init.\n'
            + _how_to_get_weights(cfg)
        )
    if cfg.file:
        path = Path(cfg.file)
        folder = path if path.is_dir() else path.parent
        if (folder / RESULTS).is_file() and (folder / WEIGHTS).is_file():
            check_weights(folder)


def _how_to_get_weights(cfg: PretrainedCfg) -> str:
    folder = _own_folders() / f'{cfg.architecture}.{cfg.tag}'
    if not (folder / CONFIG).is_file():
        return "timm.list_pretrained('*_aws*') names the networks that have weights."
    return (
        f'{folder.name} has been trained, but its weights are not in {folder}: install a clone with `pip install -e`, '
        f'set {NAMESPACE_VARIABLE} to the user or organization that published it on the Hub, or train it again as its '
        f'card says ({CARD}).'
    )


def check_folder(folder: Path) -> None:
    """Checks that a checkpoint folder holds all of its files, weights among them, and no others.

    Raises:
        ValueError: If a file is missing, damaged or foreign, a pickle for instance; if config.json does not describe a
            checkpoint, or names another source of weights.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder} is not a folder.')
    names = {path.name for path in folder.iterdir()}
    if missing := {WEIGHTS, CONFIG, ARGS, RESULTS, CARD} - names:
        raise ValueError(f'{folder} lacks {", ".join(sorted(missing))}: make it with `timm-aws export`.')
    if foreign := names - {WEIGHTS, CONFIG, ARGS, RESULTS, CARD, CURVES, PICTURE}:
        raise ValueError(f'{folder} holds {", ".join(sorted(foreign))}, which is no part of a checkpoint: remove it.')
    for name in sorted(names):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise ValueError(f'{folder / name} is not a plain file.')
    _read_config(folder)
    check_weights(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_json(path)
    cfg = config.get('pretrained_cfg')
    if not (isinstance(config.get('architecture'), str) and isinstance(config.get('num_classes'), int)
            and isinstance(cfg, dict) and isinstance(config.get('model_args') or {}, dict)):
        raise ValueError(f'{path} must name architecture, num_classes and pretrained_cfg, and model_args as an object.')
    for part in (cfg, config.get('model_args') or {}):
        other = part.get('num_classes', config['num_classes'])
        if other != config['num_classes']:  # timm would leave the classifier at its random initialization
            raise ValueError(f'{path} disagrees with itself on num_classes: {config["num_classes"]} and {other!r}.')
    if elsewhere := {'url', 'file', 'state_dict', 'hf_hub_filename', 'source'} & set(cfg):
        raise ValueError(f'{path} names another source of weights by {", ".join(sorted(elsewhere))}: remove that.')
    size = cfg.get('input_size')
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and 0 < n <= 4096 for n in size)):
        raise ValueError(f'{path} must have an input_size of channels, height and width, not {size!r}.')
    crop = cfg.get('crop_pct', 1.)
    if not (isinstance(crop, (int, float)) and 0.1 <= crop <= 1):  # images are resized to the input size over this
        raise ValueError(f'{path} must have a crop_pct of 0.1 to 1, not {crop!r}.')
    names = config.get('label_names', [])
    if names and not (isinstance(names, list) and len(names) == config['num_classes']
                      and all(isinstance(name, str) for name in names)):
        raise ValueError(f'{path} must name {config["num_classes"]} labels as strings, or none.')
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: If the file is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} must hold a JSON object.')
    return content


def check_weights(folder: Path) -> None:
    """Compares a checkpoint folder's weights with the size and the sha256 in its results.json.

    Raises:
        ValueError: If they differ, or if results.json cannot be read.
    """
    expected = read_json(folder / RESULTS).get('weights')
    if not isinstance(expected, dict) or not {'bytes', 'sha256'} <= set(expected):
        raise ValueError(f'{folder / RESULTS} does not tell size and sha256 of the weights.')
    path = folder / WEIGHTS
    found = {'bytes': path.stat().st_size, 'sha256': sha256(path)}
    for key, value in found.items():
        if value != expected[key]:
            raise ValueError(
                f'{path} is damaged: {key} is {value}, {RESULTS} says {expected[key]}. Get the folder again.'
            )


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_blob_id(path: Path) -> str:
    """Returns git's object name of a file's content, 40 hexadecimal digits."""
    content = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _own_folders() -> Path:
    """Returns `weights/`: inside the package once it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / 'weights'
    return installed if installed.is_dir() else package.parent / 'weights'
