"""Checkpoint folders, `<architecture>.<tag>`: what they hold, how timm finds them, and whether they are whole.

A folder is byte for byte what its repository on the Hugging Face Hub holds, so `local-dir:` and `hf-hub:` names work as
for any timm model. Those of this project stand in `weights/` and travel in the wheel; only one of them brings its
weights along, the others come from the Hub as soon as they are published there.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

__all__ = [
    'ARGS',
    'CARD',
    'CONFIG',
    'CURVES',
    'NAMESPACE_VARIABLE',
    'PICTURE',
    'RESULTS',
    'WEIGHTS',
    'check_folder',
    'check_source',
    'check_weights',
    'git_blob_id',
    'pretrained_cfg',
    'sha256',
]

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'  # as timm reads it
ARGS = 'args.yaml'  # every option of train.py
RESULTS = 'results.json'  # accuracies, how they came about, size and sha256 of the weights
CARD = 'README.md'
CURVES = 'effective_lr.csv'  # this and its picture only where the run left more than its last checkpoint
PICTURE = 'effective_lr.png'

NAMESPACE_VARIABLE = 'TIMM_AWS_HUB_NAMESPACE'


def pretrained_cfg(name: str) -> dict[str, Any]:
    """Describes one of the project's checkpoints to timm.

    Args:
        name: Folder, `<architecture>.<tag>`.

    Returns:
        What timm.models.generate_default_cfgs takes. The source is the folder's own weights file. Without one it is the
        repository of the same name of the owner that the environment variable TIMM_AWS_HUB_NAMESPACE gives, else the
        one that config.json names as its hf_hub_id.
    """
    folder = _folder(name)
    config = _read_json(folder / CONFIG)
    cfg = {
        **config['pretrained_cfg'],
        **{key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config},
    }
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    if (folder / WEIGHTS).is_file():
        return {**cfg, 'file': str(folder / WEIGHTS)}
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    return {**cfg, 'hf_hub_id': f'{namespace}/{name}'} if namespace else cfg


def check_source(cfg: PretrainedCfg) -> None:
    """Sees to it that pretrained weights can be had and, where they lie in a checkpoint folder, that they are whole.

    Args:
        cfg: What timm is about to load.

    Raises:
        RuntimeError: If there are no weights; says how to get some.
        ValueError: If the file in the folder is not the one that the folder's results.json speaks of.
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
    name = f'{cfg.architecture}.{cfg.tag}'
    if not (_folder(name) / CONFIG).is_file():
        return "timm.list_pretrained('*_aws*') names the networks that have weights."
    return (
        f'{name} has been trained, but its weights do not come with the package: set {NAMESPACE_VARIABLE} to the user '
        f'or organization that published it on the Hub, or train it again as its card says ({_folder(name) / CARD}).'
    )


def check_folder(folder: Path) -> None:
    """Sees to it that a folder holds what a checkpoint folder must hold, and nothing else.

    Args:
        folder: A checkpoint folder with its weights.

    Raises:
        ValueError: If a file is missing, damaged, or none of those that belong there, a pickle for instance; if
            config.json does not describe such a checkpoint, or names another place to take weights from.
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
    _check_config(folder / CONFIG)
    check_weights(folder)


def _check_config(path: Path) -> None:
    config = _read_json(path)
    cfg = config.get('pretrained_cfg')
    if not (isinstance(config.get('architecture'), str) and isinstance(config.get('num_classes'), int)
            and isinstance(cfg, dict) and isinstance(config.get('model_args') or {}, dict)):
        raise ValueError(f'{path} must name architecture, num_classes and pretrained_cfg, and model_args as an object.')
    for part in (cfg, config.get('model_args') or {}):
        told = part.get('num_classes', config['num_classes'])
        if told != config['num_classes']:  # timm would leave the classifier at its random initialization
            raise ValueError(f'{path} disagrees with itself on num_classes: {config["num_classes"]} and {told!r}.')
    if elsewhere := {'url', 'file', 'state_dict', 'hf_hub_filename', 'source'} & set(cfg):
        raise ValueError(f'{path} names another source of weights by {", ".join(sorted(elsewhere))}: remove that.')
    size = cfg.get('input_size')
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and 0 < n <= 4096 for n in size)):
        raise ValueError(f'{path} must have an input_size of channels, height and width, not {size!r}.')
    names = config.get('label_names', [])
    if names and not (isinstance(names, list) and len(names) == config['num_classes']):
        raise ValueError(f'{path} must name {config["num_classes"]} labels, or none.')


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} must hold a JSON object.')
    return content


def check_weights(folder: Path) -> None:
    """Compares a folder's weights with the size and the sha256 in its results.json.

    Args:
        folder: A checkpoint folder.

    Raises:
        ValueError: If they differ, or if results.json cannot be read.
    """
    expected = _read_json(folder / RESULTS).get('weights')
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
    """Returns the name that git gives to a file's content, 40 hexadecimal digits."""
    content = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _folder(name: str) -> Path:
    """Returns a checkpoint's folder: inside the package when it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    root = package / 'weights' if (package / 'weights').is_dir() else package.parent / 'weights'
    return root / name
