"""Helpers for tests of checkpoint folders. Child processes import them, and must not start the Hub of conftest.py."""
import hashlib
import json

import timm
import torch

NAME = 'test_ws_resnet.aws_noise'
REPO = f'alice/{NAME}'


def contents(folder):
    """Returns {file name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fit_results(folder):
    """Writes size and sha256 of the weights into the folder's results.json."""
    results = json.loads((folder / 'results.json').read_text())
    weights = (folder / 'model.safetensors').read_bytes()
    results['weights'].update(bytes=len(weights), sha256=hashlib.sha256(weights).hexdigest())
    (folder / 'results.json').write_text(json.dumps(results))


def logits(name):
    """Returns the logits of a pretrained network for an image of ones, 48 pixels wide and high."""
    with torch.inference_mode():
        return timm.create_model(name, pretrained=True).eval()(torch.ones(1, 3, 48, 48))
