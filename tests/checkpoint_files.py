"""Helpers for tests of checkpoint folders. Child processes import them, and must not start the Hub of conftest.py."""
import hashlib
import json
import re

import timm
import torch
from PIL import Image
from safetensors.torch import load_file

NAME = 'test_ws_resnet.aws_noise'
REPO = f'alice/{NAME}'
SETTINGS = {'dataset': 'noise', 'license': 'apache-2.0'}


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


def best(run):
    return torch.load(run / 'model_best.pth.tar', weights_only=False)


def weights_of(folder):
    return load_file(folder / 'model.safetensors')


def with_options(run, **args):
    """Changes the options in a run's best checkpoint; returns its path."""
    checkpoint = best(run)
    vars(checkpoint['args']).update(args)
    torch.save(checkpoint, run / 'model_best.pth.tar')
    return run / 'model_best.pth.tar'


def run_code_of_card(folder):
    """Runs the card's Python code on an image; returns the variables."""
    image, names = folder.parent / 'image.jpg', {}
    Image.new('RGB', (60, 50)).save(image)
    code = '\n'.join(re.findall('```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL))
    assert f'hf-hub:OWNER/{folder.name}' in re.findall("'(.*?)'", code)
    exec(code.replace(f'hf-hub:OWNER/{folder.name}', f'local-dir:{folder}').replace('image.jpg', str(image)), names)
    return names
