"""Every test talks to a Hub of its own process on 127.0.0.1, and to no other: huggingface_hub reads this at import."""
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

sys.path.insert(0, str(Path(__file__).parent.parent / 'scripts'))  # where scripts find each other
HUB = LoopbackHub().start()
_HOME = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(HF_ENDPOINT=HUB.endpoint, HF_HOME=_HOME, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'TIMM_AWS_HUB_NAMESPACE'):
    os.environ.pop(name, None)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub, empty, as is the cache of what was downloaded, and alice's token in the environment."""
    HUB.reset()
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub_cache'))
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # the client waits between its tries
    return HUB


@pytest.fixture(scope='session')
def train_run(tmp_path_factory):
    """Makes folders as timm's train.py leaves them, after two steps of test_ws_resnet, or of another `network`."""
    import argparse

    import timm
    import torch
    import yaml
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, ModelEmaV3

    import timm_aws  # noqa: F401

    def make(**options):
        folder = tmp_path_factory.mktemp('run')
        ema = options.pop('with_ema', False)
        scale = options.pop('scale', 1)
        network = options.pop('network', 'test_ws_resnet')
        args = argparse.Namespace(**{
            'model': network, 'num_classes': 4, 'in_chans': None, 'gp': None, 'model_kwargs': {},
            'img_size': 48, 'crop_pct': 1.0, 'mean': None, 'std': None, 'interpolation': '', 'seed': 42,
            'opt': 'aws_sgd', 'opt_kwargs': {'alpha': 2.5e-3}, 'momentum': 0.9, 'lr': 0.1, 'batch_size': 8,
            'epochs': 2, 'device': 'cpu', 'workers': 1, 'train_split': 'train', 'val_split': 'validation',
            'eval_metric': 'top1', 'data_dir': str(folder / 'images'), 'output': str(folder), 'experiment': 'name',
            'resume': '', 'initial_checkpoint': '', **options})
        torch.manual_seed(0)
        model = timm.create_model(network, num_classes=4, in_chans=args.in_chans, bn_eps=options.get('bn_eps'))
        data = torch.randn(8, args.in_chans or 3, 48, 48)
        averaged = ModelEmaV3(model, decay=0.5) if ema else None
        optimizer = create_optimizer_v2(model, 'aws_sgd', lr=args.lr, weight_decay=1e-4, batch_norm='ws' not in network)
        (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
        saver = CheckpointSaver(model, optimizer, args, averaged, checkpoint_dir=str(folder))
        for epoch in range(args.epochs):
            model(data).square().mean().backward()
            optimizer.step()
            if averaged:
                averaged.update(model)
            with torch.no_grad():
                model.get_classifier().weight.mul_(scale)
            saver.save_checkpoint(epoch, metric=10. * epoch)
        return folder

    return make


@pytest.fixture(scope='session')
def checkpoint_folder(train_run, tmp_path_factory):
    """A checkpoint folder with labels, not validated."""
    from checkpoint_files import NAME

    from timm_aws.checkpoint.export import export

    folder = tmp_path_factory.mktemp('exported')
    labels = folder / 'labels.tsv'
    labels.write_text('name\twords\n' + ''.join(f'n{index}\tthing {index}\n' for index in range(4)))
    out = folder / NAME
    export(train_run(), out, dataset='noise', license='apache-2.0', labels=labels)
    return out


@pytest.fixture
def copied(checkpoint_folder, tmp_path):
    """A copy of the checkpoint folder that a test may change."""
    return shutil.copytree(checkpoint_folder, tmp_path / checkpoint_folder.name)


# Stands in for timm's script, with its options and its results file: finds the top-1 that `measured` was given for
# each choice, and leaves what it was asked beside it.
VALIDATE = '''
import argparse, json, timm
parser = argparse.ArgumentParser()
for name in ('data-dir', 'dataset', 'split', 'class-map', 'input-img-mode', 'input-key', 'target-key', 'num-samples',
             'model', 'checkpoint', 'device', 'workers', 'results-file', 'results-format'):
    parser.add_argument('--' + name)
parser.add_argument('--in-chans', type=int, default=3)
parser.add_argument('--pretrained', action='store_true')
parser.add_argument('--use-ema', action='store_true')
args = parser.parse_args()
timm.create_model(args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint, in_chans=args.in_chans)
top1 = {top1}['half' if args.pretrained else 'ema' if args.use_ema else 'model']
json.dump(dict(top1=top1, top5=90.0, img_size=48, crop_pct=1.0, interpolation='bicubic', args=str(args)),
          open(args.results_file, 'w'))
json.dump(vars(args), open(__file__ + '.json', 'w'))
'''


@pytest.fixture
def measured(tmp_path):
    """Options that make export measure: what it will find for the two kinds of weights and in half precision."""
    import numpy as np
    from PIL import Image

    for split, count in (('train', 3), ('val', 2)):
        for label in 'abcd':
            folder = tmp_path / 'images' / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f'{index}.png')

    def options(**top1):
        (tmp_path / 'validate.py').write_text(VALIDATE.replace('{top1}', repr(top1)))
        return {'data_dir': tmp_path / 'images', 'validate_py': tmp_path / 'validate.py'}

    return options
