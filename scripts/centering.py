"""When Weight Standardization is a bad idea: what centering does to filters of few elements.

    python scripts/centering.py DATA          # runs what is not in the file yet
    python scripts/centering.py DATA --list   # prints the means from the file alone

Trains networks of small filters on ten classes of Tiny-ImageNet-200 at 64 px, from scratch, plain and converted in
several ways. 'ws' and 'wn' filters differ, in front of a norm layer, in one thing only: 'ws' takes off the mean of a
filter, so that its output does not depend on the sum of its inputs. A depthwise filter has nine or 25 elements, a
filter of size 1 as many as it has input channels. DATA is the folder that prepare_tiny_imagenet.py made.

Writes one line of JSON for each run to scripts/results/centering.jsonl.
"""
import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from outputs import RESULTS
from provenance import hardware, versions
from reproduction.images import Images, augment, load, normalize
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

import timm_aws
from timm_aws.convert import reasons_to_leave
from timm_aws.layers import fan_in, normalized_class

MODELS = ('mobilenetv3_small_050', 'regnety_002')
SEEDS = (0, 1, 2)
SMALL = 100  # elements of a filter
EPOCHS, BATCH, LR, DECAY = 20, 64, 0.1, 1e-4
OUT = RESULTS / 'centering.jsonl'


def normalize_as(model: nn.Module, choose: Callable[[nn.Conv2d], str | None]) -> nn.Module:
    """Converts each convolution that `convert` would to the normalization that `choose` returns for it."""
    for name, reason in reasons_to_leave(model).items():
        conv = model.get_submodule(name)
        choice = choose(conv) if reason is None else None
        if choice:
            conv.__class__ = normalized_class(type(conv), choice)
    return model


VARIANTS: dict[str, Callable[[nn.Conv2d], str | None]] = {
    'plain, SGD with decay': lambda conv: None,
    'wn': lambda conv: 'wn',
    'ws': lambda conv: 'ws',
    'ws, small wn': lambda conv: 'wn' if fan_in(conv) < SMALL else 'ws',
    'ws, grouped wn': lambda conv: 'wn' if conv.groups > 1 else 'ws',
    'wn, grouped ws': lambda conv: 'ws' if conv.groups > 1 else 'wn',
}


def run(name: str, variant: str, seed: int, images: Images) -> dict:
    """Trains one network. Returns its settings and its accuracy."""
    torch.manual_seed(seed)
    model = normalize_as(timm.create_model(name, num_classes=images.num_classes), VARIANTS[variant])
    if variant.startswith('plain'):
        optimizer = create_optimizer_v2(model, 'momentum', lr=LR, momentum=0.9, weight_decay=DECAY)
    else:
        alpha = timm_aws.alpha_like_decay(model, DECAY)
        optimizer = create_optimizer_v2(model, 'aws_sgd', lr=LR, momentum=0.9, weight_decay=DECAY, alpha=alpha)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last).train()
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(images.train), generator=generator).split(BATCH):
            if len(batch) < BATCH:
                continue
            optimizer.zero_grad()
            F.cross_entropy(
                model(normalize(augment(images.train[batch], generator))), images.train_labels[batch]).backward()
            optimizer.step()
        scheduler.step(epoch + 1)
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(normalize(part)) for part in images.val.split(250)])
    accuracy = (logits.argmax(1) == images.val_labels).float().mean().item()
    return {'model': name, 'variant': variant, 'seed': seed, 'accuracy': round(100 * accuracy, 2)}


def show(lines: list[dict]) -> None:
    """Prints mean and range over seeds."""
    for name in MODELS:
        for variant in VARIANTS:
            found = [line['accuracy'] for line in lines if (line['model'], line['variant']) == (name, variant)]
            if found:
                print(f'{name:24s} {variant:26s} {statistics.mean(found):6.2f} %   ({min(found)} to {max(found)})')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data', type=Path, metavar='DATA')
    parser.add_argument('--list', action='store_true', help='print the means of the runs in the file alone')
    args = parser.parse_args()
    lines = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    if not args.list:
        done = {(line['model'], line['variant'], line['seed']) for line in lines}
        runs = [(m, v, s) for m in MODELS for s in SEEDS for v in VARIANTS if (m, v, s) not in done]
        images = load(args.data, every=20, size=64)
        about = {
            'command': 'python scripts/centering.py DATA', 'data': f'{images.name}, 100 images a class to train on',
            'epochs': EPOCHS, 'lr': LR, 'weight_decay': DECAY, 'versions': versions(), 'hardware': hardware('cpu')}
        few = torch.arange(len(images.train)).view(images.num_classes, -1)[:, :100].flatten()
        images = Images(images.name, images.train[few], images.train_labels[few], images.val, images.val_labels)
        for model, variant, seed in tqdm(runs, disable=None):
            lines.append({**run(model, variant, seed, images), **about})
            with OUT.open('a') as file:
                file.write(json.dumps(lines[-1]) + '\n')
    show(lines)


if __name__ == '__main__':
    main()
