"""What converting a trained plain network costs, and what recalibration and a short fine-tuning give back.

    python scripts/recalibration.py --data-dir DATA

DATA is the folder that prepare_tiny_imagenet.py made. Trains the ResNet of reproduce.py, without normalized weights, on
its twenty classes at 32 px: 390 steps of SGD with weight decay. Then converts it to 'wn', 'cwn' and 'ws', and validates
each after the conversion, after `timm_aws.recalibrate` with 10 batches, and after 78 steps (an epoch) with AWS. For
comparison, the plain network is trained for 78 steps more. A checkpoint of a standardized network would not show this:
turned into a plain one, its filters have mean 0, and conversion changes nothing.

Writes one line of JSON for each seed to scripts/results/recalibration.jsonl, and runs what is not in the file yet. A
seed takes a few minutes on a CPU.
"""
import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from outputs import RESULTS
from provenance import hardware, versions
from reproduction.grid import NETWORKS
from reproduction.images import Images, augment, load, normalize
from timm.models.resnet import ResNet
from timm.optim import create_optimizer_v2

import timm_aws
from timm_aws.data_flow import conv_norm_pairs
from timm_aws.rule import filter_length

SEEDS = (0, 1, 2)
BATCH_SIZE, WEIGHT_DECAY = 128, 1e-2
STEPS, LR = 390, 0.1
TUNING_STEPS, TUNING_LR, CALIBRATION_BATCHES = 78, 0.01, 10


def batches(images: Images, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches of cropped and flipped images, (128, 3, 32, 32), with their labels, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(len(images.train), generator=generator).split(BATCH_SIZE)[:-1]:
            yield normalize(augment(images.train[batch], generator)), images.train_labels[batch]


def train(model: torch.nn.Module, opt: str, lr: float, steps: int, images: Images, seed: int, **options) -> None:
    """Trains a model for a number of steps, with a learning rate that falls to 0 along a cosine."""
    optimizer = create_optimizer_v2(model, opt, lr=lr, weight_decay=WEIGHT_DECAY, momentum=0.9, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for inputs, labels in islice(batches(images, seed), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: Images) -> float:
    """Returns the top-1 accuracy in percent."""
    model.eval()
    hits = sum((model(normalize(batch)).argmax(1) == labels).sum().item()
               for batch, labels in zip(images.val.split(500), images.val_labels.split(500)))
    return round(100 * hits / len(images.val), 2)


def relative_mean(model: torch.nn.Module) -> float:
    """Returns the median of |mean| / std over the filters that a norm follows."""
    weights = [model.get_submodule(pair.conv).weight.detach() for pair in conv_norm_pairs(model)]
    ratios = [weight.mean((1, 2, 3)).abs() / filter_length(weight, 'ws').flatten() for weight in weights]
    return round(torch.cat(ratios).median().item(), 4)


def run(images: Images, seed: int) -> dict:
    """Trains, converts, recalibrates and fine-tunes; returns the accuracies."""
    torch.manual_seed(seed)
    plain = ResNet(**NETWORKS['resnet10'], num_classes=images.num_classes)
    train(plain, 'momentum', LR, STEPS, images, seed)
    result: dict = {'seed': seed, 'relative_mean': relative_mean(plain), 'plain': accuracy(plain, images)}
    for normalization in ('wn', 'cwn', 'ws'):
        model = copy.deepcopy(plain)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that the outputs change
            timm_aws.convert(model, normalization)
        stages = {'converted': accuracy(model, images)}
        timm_aws.recalibrate(model, batches(images, seed + 100), CALIBRATION_BATCHES)
        stages['recalibrated'] = accuracy(model, images)
        alpha = timm_aws.alpha_like_decay(model, WEIGHT_DECAY)
        train(model, 'aws_sgd', TUNING_LR, TUNING_STEPS, images, seed + 200, alpha=alpha)
        result[normalization] = {**stages, 'tuned': accuracy(model, images)}
    train(plain, 'momentum', TUNING_LR, TUNING_STEPS, images, seed + 200)
    return {**result, 'plain_tuned': accuracy(plain, images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of Tiny-ImageNet-200')
    images = load(parser.parse_args().data_dir, every=10, size=32)
    path = RESULTS / 'recalibration.jsonl'
    done = [json.loads(line)['seed'] for line in path.read_text().splitlines()] if path.exists() else []
    for seed in SEEDS:
        if seed not in done:
            line = {
                'command': 'python scripts/recalibration.py --data-dir DATA', 'network': 'resnet10 of reproduce.py',
                'dataset': f'{images.name}, {len(images.train)} images, {len(images.val)} to validate on',
                'steps': STEPS, 'lr': LR, 'weight_decay': WEIGHT_DECAY, 'batch_size': BATCH_SIZE, 'momentum': 0.9,
                'tuning_steps': TUNING_STEPS, 'tuning_lr': TUNING_LR, 'calibration_batches': CALIBRATION_BATCHES,
                'versions': versions(), 'hardware': hardware('cpu'), **run(images, seed),
            }
            with path.open('a') as file:
                file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    main()
