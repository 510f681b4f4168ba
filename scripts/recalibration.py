"""What converting a trained plain ResNet-50 costs, and what recalibration and a short fine-tuning give back.

    python scripts/recalibration.py --data-dir DATA

DATA holds Tiny-ImageNet-200 in the folders train and validation, see prepare_tiny_imagenet.py. The bundled checkpoint
of ws_resnet50 is turned into a plain ResNet-50 with the same outputs. Its filters have mean 0, which conversion would
not change. So each gets a random mean, with a standard deviation of 5 % of its own, and the network is recalibrated and
trained for 16 steps as a plain one. It is then converted to 'wn' and to 'ws', and validated after the conversion, after
`timm_aws.recalibrate`, and after 8 steps with AWS; for comparison, the plain network is trained for 8 steps more.

Writes scripts/results/recalibration.json. Takes about 6 minutes on one CPU thread.
"""
import argparse
import copy
import json
import warnings
from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from outputs import RESULTS, write
from provenance import hardware, versions
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, Subset

import timm_aws
from timm_aws.data_flow import conv_norm_pairs
from timm_aws.norm_statistics import rescaled_statistics
from timm_aws.rule import filter_length

SEED = 0
BATCH_SIZE = 64
VALIDATION_IMAGES = 400
PLAIN_STEPS, TUNING_STEPS, CALIBRATION_BATCHES = 16, 8, 6
LR, WEIGHT_DECAY = 0.01, 1e-4
RELATIVE_MEAN = 0.05


@torch.no_grad()
def plain_resnet50(ours: torch.nn.Module) -> torch.nn.Module:
    """Returns a plain ResNet-50 with the outputs of a weight-standardized one, and with the lengths of its filters."""
    plain = timm.create_model('resnet50', num_classes=ours.num_classes)
    plain.load_state_dict(ours.state_dict())
    for pair in conv_norm_pairs(plain):
        conv, norm = plain.get_submodule(pair.conv), plain.get_submodule(pair.norm)
        length = filter_length(conv.weight, 'ws')
        conv.weight.sub_(conv.weight.mean((1, 2, 3), keepdim=True))
        values = rescaled_statistics(norm.running_mean, norm.running_var, norm.weight, norm.eps, 1 / length.flatten())
        for tensor, value in zip((norm.running_mean, norm.running_var, norm.weight), values):
            tensor.copy_(value)
    return plain


@torch.no_grad()
def add_means(model: torch.nn.Module) -> None:
    """Adds a random constant to each filter that a norm follows."""
    for pair in conv_norm_pairs(model):
        weight = model.get_submodule(pair.conv).weight
        length = filter_length(weight, 'ws')
        weight.add_(length * torch.randn_like(length), alpha=RELATIVE_MEAN)


def train(model: torch.nn.Module, opt: str, steps: int, batches: Iterator, **options) -> None:
    """Trains a model for a number of steps, with a learning rate that falls to 0 along a cosine."""
    optimizer = create_optimizer_v2(model, opt, lr=LR, weight_decay=WEIGHT_DECAY, momentum=0.9, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        images, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    """Returns the top-1 accuracy in percent."""
    model.eval()
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return round(100 * right / len(loader.dataset), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-dir', required=True, help='folder of Tiny-ImageNet-200, with train and validation')
    data_dir = parser.parse_args().data_dir
    torch.manual_seed(SEED)
    ours = timm.create_model('ws_resnet50_aws', pretrained=True)
    config = resolve_data_config({}, model=ours)
    train_set, validation_set = (
        create_dataset('', root=data_dir, split=split, transform=create_transform(**config))
        for split in ('train', 'validation'))
    chosen = torch.randperm(len(validation_set))[:VALIDATION_IMAGES].tolist()
    validation = DataLoader(Subset(validation_set, chosen), BATCH_SIZE)

    def batches() -> DataLoader:
        """The same batches for every network."""
        return DataLoader(train_set, BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(SEED))

    plain = plain_resnet50(ours).eval()
    images, _ = next(iter(validation))
    torch.testing.assert_close(plain(images), ours.eval()(images), rtol=1e-3, atol=1e-3)
    add_means(plain)
    timm_aws.recalibrate(plain, batches(), CALIBRATION_BATCHES)
    train(plain, 'momentum', PLAIN_STEPS, iter(batches()))
    result = {'plain': accuracy(plain, validation)}
    print(result, flush=True)
    for normalization in ('wn', 'ws'):
        model = copy.deepcopy(plain)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            timm_aws.convert(model, normalization)
        stages = {'warning': str(caught[0].message) if caught else None, 'converted': accuracy(model, validation)}
        timm_aws.recalibrate(model, batches(), CALIBRATION_BATCHES)
        stages['recalibrated'] = accuracy(model, validation)
        alpha = timm_aws.alpha_like_decay(model, WEIGHT_DECAY)
        train(model, 'aws_sgd', TUNING_STEPS, iter(batches()), alpha=alpha)
        stages['fine-tuned'] = accuracy(model, validation)
        result[normalization] = stages
        print(normalization, stages, flush=True)
    train(plain, 'momentum', TUNING_STEPS, iter(batches()))
    result['plain, trained on'] = accuracy(plain, validation)
    write(RESULTS / 'recalibration.json', json.dumps({
        'command': 'python scripts/recalibration.py --data-dir DATA', 'seed': SEED,
        'dataset': f'Tiny-ImageNet-200 at 64 px, {VALIDATION_IMAGES} of its validation images',
        'batch_size': BATCH_SIZE, 'lr': LR, 'weight_decay': WEIGHT_DECAY, 'plain_steps': PLAIN_STEPS,
        'tuning_steps': TUNING_STEPS, 'calibration_images': BATCH_SIZE * CALIBRATION_BATCHES,
        'relative_mean': RELATIVE_MEAN, 'top1': result, 'versions': versions(), 'hardware': hardware('cpu'),
    }, indent=2) + '\n')


if __name__ == '__main__':
    main()
