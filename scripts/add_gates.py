"""Writes the weights that ws_seresnet50 starts from: those of a trained ws_resnet50, and gates that change nothing yet.

    python scripts/add_gates.py weights/ws_resnet50.aws_tin200 start

writes start/ws_resnet50.aws_tin200/model.safetensors, for the option --initial-checkpoint of timm's train.py. Beside it
stand the results.json and config.json of the weights: `timm-aws export` reads there what the card says of the start.

The last convolution of a gate is zero, so each gate is sigmoid(0) = 1/2, where its slope is largest. The batch norm
before it is doubled: the network computes what ws_resnet50 computes, and its gates learn from the first step.
"""
import argparse
import shutil
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

import timm_aws  # noqa: F401  # registers ws_seresnet50


@torch.no_grad()
def with_gates(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the state dict of a ws_seresnet50 that computes what a ws_resnet50 with these weights computes.

    Args:
        weights: State dict of the ws_resnet50, in any precision.
    """
    torch.manual_seed(42)  # of the first convolution of each gate
    model = timm.create_model('ws_seresnet50', num_classes=len(weights['fc.bias']))
    model.load_state_dict({**model.state_dict(), **weights})
    for block in [*model.layer1, *model.layer2, *model.layer3, *model.layer4]:
        for parameter in (block.se.fc2.weight, block.se.fc2.bias):
            parameter.zero_()
        for parameter in (block.bn3.weight, block.bn3.bias):
            parameter.mul_(2)
    return model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path, help='folder of a trained ws_resnet50')
    parser.add_argument('output', type=Path, help='where to write the folder of the start')
    args = parser.parse_args()
    folder = args.output / args.checkpoint.resolve().name
    folder.mkdir(parents=True)
    for name in ('config.json', 'results.json'):
        shutil.copy(args.checkpoint / name, folder)
    save_file(with_gates(load_file(args.checkpoint / 'model.safetensors')), folder / 'model.safetensors')


if __name__ == '__main__':
    main()
