"""Compares aws_sgd with weight decay on all of Tiny-ImageNet-200: three networks, one recipe, each strength tuned.

    python scripts/comparison.py --train train.py --data-dir DATA --output OUT

Runs timm's own train.py with scripts/recipes/tin200_ws_resnet18.yaml. DATA is the folder that prepare_tiny_imagenet.py
made. The four strengths of a row train for one epoch at 32 px. An epoch is too short for weak decay, which needs about
1 / (lr * strength) steps to act: so the best one and the next weaker one train for the first stage of the recipe, eight
epochs at 32 px, and one epoch more in which the learning rate falls to 0. The better of these trains to the end of the
recipe. What is in OUT already is not run again, and a training that was stopped goes on from its last epoch. A first
stage takes an hour on two cores, the whole recipe two; with OMP_NUM_THREADS=1 half as much again.

Writes scripts/results/comparison.json, and from it comparison.md, the README's table and the one in the card of
ws_resnet18.aws_tin200; with `--report` only these.
"""
import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from outputs import RESULTS, ROOT, fill_in, write
from provenance import hardware, versions

from timm_aws.checkpoint.model_card import model_card

RECIPE = ROOT / 'scripts' / 'recipes' / 'tin200_ws_resnet18.yaml'
SMALL_MAPS = ROOT / 'scripts' / 'small_maps.py'
FOLDER = ROOT / 'weights' / 'ws_resnet18.aws_tin200'
RESULT = RESULTS / 'comparison.json'
IMAGES = {'train': 100_000, 'validation': 10_000}


class Row(NamedTuple):
    """A network with a rule, the strengths to choose from, and the options of train.py but the strength."""
    model: str
    rule: str
    symbol: str
    strengths: tuple[float, ...]
    options: tuple[str, ...]


class Stage(NamedTuple):
    """A run of train.py: the learning rate falls from lr to min_lr, step by step."""
    img_size: int
    epochs: int
    lr: float
    min_lr: float


DECAYS = (1e-4, 5e-4, 2.5e-3, 1.25e-2)
# timm's 'sgd' has Nesterov momentum, which aws_sgd has not; its 'momentum' is SGD without. An empty --opt-kwargs takes
# the recipe's alpha away.
DECAY = ('--opt', 'momentum', '--opt-kwargs', '--weight-decay')
ROWS = {
    'ws_resnet18_aws': Row('ws_resnet18', 'aws_sgd', 'α', (2.5e-3, 1.25e-2, 6.25e-2, 0.3125), ('--opt-kwargs',)),
    'ws_resnet18_sgd': Row('ws_resnet18', 'SGD with weight decay', 'λ', DECAYS, DECAY),
    'resnet18_sgd': Row('resnet18', 'SGD with weight decay', 'λ', DECAYS, DECAY),
}
TUNING = Stage(32, 1, 0.1, 0.)
STAGES = (Stage(32, 8, 0.1, 0.05), Stage(48, 3, 0.05, 0.0125), Stage(64, 1, 0.0125, 0.))
FALL = Stage(32, 1, 0.05, 0.)  # after the first stage, in place of the others


def options_of(row: Row, strength: float) -> list[str]:
    """Returns the options of train.py that make the recipe this row."""
    return ['--model', row.model, *row.options, f'alpha={strength:g}' if row.symbol == 'α' else f'{strength:g}']


def top1(folder: Path) -> list[float]:
    """Returns the accuracy after each epoch that train.py has finished, in percent."""
    path = folder / 'summary.csv'
    lines = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    # After --resume train.py writes the header again.
    return [round(float(line['eval_top1']), 2) for line in lines if line['epoch'] != 'epoch']


def train(command: list[str], folder: Path, stage: Stage, start: Path | None = None) -> dict:
    """Runs one stage, or what is left of it.

    Args:
        command: train.py with the options that the stages share.
        folder: Where train.py writes.
        stage: Its images, epochs and learning rates.
        start: Checkpoint to take the weights from; None starts from scratch.

    Returns:
        The stage, the accuracies after its epochs, and its hours unless it was interrupted.
    """
    last = folder / 'last.pth.tar'
    if len(top1(folder)) < stage.epochs:
        options = [f'--{name.replace("_", "-")}={value:g}' for name, value in stage._asdict().items()]
        options += [f'--resume={last}'] if last.exists() else [f'--initial-checkpoint={start}'] if start else []
        subprocess.run(
            [*command, '--output', str(folder.parent), '--experiment', folder.name, *options], check=True)
    found = {**stage._asdict(), 'top1': top1(folder)}
    args = folder / 'args.yaml'  # written when train.py starts
    if not yaml.safe_load(args.read_text())['resume']:
        found['hours'] = round((last.stat().st_mtime - args.stat().st_mtime) / 3600, 2)
    return found


def tune(command: list[str], output: Path, name: str) -> dict[str, float]:
    """Returns the accuracy of each strength after the epoch of tuning."""
    row = ROWS[name]
    return {
        f'{strength:g}': train(
            [*command, *options_of(row, strength)], output / f'{name}_{strength:g}', TUNING)['top1'][-1]
        for strength in row.strengths}


def train_stages(command: list[str], output: Path, name: str, strength: str, count: int) -> list[dict]:
    """Runs the first stages of the recipe, each from the weights of the one before."""
    folders = [output / f'{name}_{strength}' / f'stage{number}' for number in range(1, 1 + count)]
    starts = [None, *(folder / 'last.pth.tar' for folder in folders)]
    return [train([*command, *options_of(ROWS[name], float(strength))], folder, stage, start)
            for folder, stage, start in zip(folders, STAGES, starts)]


def candidates(tuned: dict[str, float]) -> list[str]:
    """Returns the best strength of the epoch of tuning and the next weaker one, the weaker first."""
    strengths = list(tuned)  # the weakest first
    best = strengths.index(max(tuned, key=tuned.__getitem__))
    return strengths[max(0, best - 1):best + 1]


def train_short(command: list[str], output: Path, name: str, strength: str) -> float:
    """Returns the accuracy after the first stage and the epoch of fall."""
    train_stages(command, output, name, strength, 1)
    folder = output / f'{name}_{strength}'
    command = [*command, *options_of(ROWS[name], float(strength))]
    return train(command, folder / 'fall', FALL, folder / 'stage1' / 'last.pth.tar')['top1'][-1]


def train_row(command: list[str], output: Path, name: str) -> dict:
    """Returns what the strengths reached after an epoch and after nine, and the stages of the best."""
    tuned = tune(command, output / 'tuning', name)
    short = {strength: train_short(command, output, name, strength) for strength in candidates(tuned)}
    strength = max(short, key=short.__getitem__)
    stages = train_stages(command, output, name, strength, len(STAGES))
    return {'tuning': tuned, 'short': short, 'strength': float(strength), 'stages': stages}


def measure(options: argparse.Namespace) -> None:
    """Trains what is not in the output folder yet, and writes comparison.json after each row."""
    command = [sys.executable, str(SMALL_MAPS), str(options.train), '--config', str(RECIPE),
               '--data-dir', str(options.data_dir)]
    record: dict = {
        'command': 'python scripts/comparison.py --train train.py --data-dir DATA --output OUT',
        'dataset': 'Tiny-ImageNet-200', 'images': IMAGES, 'seed': yaml.safe_load(RECIPE.read_text())['seed'],
        'versions': versions(), 'hardware': hardware('cpu'), 'threads': torch.get_num_threads(),
        'tuning': TUNING._asdict(), 'fall': FALL._asdict(), 'rows': {},
    }
    for name in ROWS:
        record['rows'][name] = train_row(command, options.output, name)
        write(RESULT, json.dumps(record, indent=1) + '\n')


def final(record: dict) -> dict[str, float]:
    """Returns the accuracy of each row at the end, in percent."""
    return {name: row['stages'][-1]['top1'][-1] for name, row in record['rows'].items()}


def noise(record: dict) -> float:
    """Returns how many points two rows must be apart to differ by more than chance (95 %) on the images held out."""
    share = statistics.mean(final(record).values()) / 100
    return 1.96 * 100 * math.sqrt(2 * share * (1 - share) / record['images']['validation'])


def table(record: dict) -> str:
    """Returns network, rule, strength and accuracy of each row as Markdown."""
    lines = ['| network | rule | strength | top-1 |', '|---|---|---|---|']
    for name, accuracy in final(record).items():
        row = ROWS[name]
        lines.append(f'| {row.model} | {row.rule} | {row.symbol} = {record["rows"][name]["strength"]:g} '
                     f'| {accuracy:.2f} % |')
    return '\n'.join(lines)


def curves(record: dict) -> str:
    """Returns the accuracy after each epoch, a row a network and rule, and the hours, as Markdown."""
    head = [f'{stage.img_size} px' for stage in STAGES for _ in range(stage.epochs)]
    lines = [f'| top-1, % | {" | ".join(head)} | hours |', '|---' * (2 + len(head)) + '|']
    for name, row in record['rows'].items():
        found = [f'{accuracy:.1f}' for stage in row['stages'] for accuracy in stage['top1']]
        hours = [stage.get('hours') for stage in row['stages']]
        lines.append(f'| {ROWS[name].model}, {ROWS[name].rule} | {" | ".join(found)} '
                     f'| {"-" if None in hours else f"{sum(hours):.1f}"} |')
    return '\n'.join(lines)


def strengths(record: dict, key: str, head: str) -> str:
    """Returns the accuracies of the strengths that are under a key of each row, the weakest first, as Markdown."""
    lines = [f'| top-1, % | {head} |', '|---' * (2 + head.count('|')) + '|']
    for name, found in record['rows'].items():
        row = ROWS[name]
        accuracies = [f'{accuracy:.1f} ({row.symbol} = {strength})'
                      for strength, accuracy in sorted(found[key].items(), key=lambda item: float(item[0]))]
        lines.append(f'| {row.model}, {row.rule} | {" | ".join(accuracies)} |')
    return '\n'.join(lines)


def text(record: dict) -> str:
    """Returns the whole of comparison.md."""
    return f"""\
# aws_sgd and weight decay, on one recipe

    {record['command']}

{record['dataset']}: {record['images']['train']:,} images to train on, {record['images']['validation']:,} to validate
on. Recipe: [tin200_ws_resnet18.yaml](../recipes/tin200_ws_resnet18.yaml), seed {record['seed']}.
{record['hardware']}, threads: {record['threads']};
timm {record['versions']['timm']}, torch {record['versions']['torch']}.

{table(record)}

One seed each: differences under {noise(record):.1f} points are within chance.

## After each epoch

{curves(record)}

## The strengths

Each after one epoch at {TUNING.img_size} px, with a learning rate that falls from {TUNING.lr:g} to {TUNING.min_lr:g}:

{strengths(record, 'tuning', 'weakest | weak | strong | strongest')}

The best of them and the next weaker one after the {STAGES[0].epochs} epochs at {STAGES[0].img_size} px and one more, in
which the learning rate falls from {FALL.lr:g} to {FALL.min_lr:g}. The better one is the row above.

{strengths(record, 'short', 'weaker | stronger')}

λ decays all weights but biases and those of norms. α shrinks the convolutions, and λ =
{yaml.safe_load(RECIPE.read_text())['weight_decay']:g} decays the classifier.
"""


def values() -> dict[str, str]:
    """Returns what the README marks a place for."""
    return {'comparison': f'\n{table(json.loads(RESULT.read_text()))}\n'}


def report() -> None:
    """Writes comparison.md, the README's table and the one in the card."""
    record = json.loads(RESULT.read_text())
    write(RESULT.with_suffix('.md'), text(record))
    fill_in(values())
    results = json.loads((FOLDER / 'results.json').read_text())
    results['comparison'] = {
        'about': f'Networks and rules on one recipe, each with the best of four strengths, one seed each: differences '
                 f'under {noise(record):.1f} points are within chance.',
        'table': table(record)}
    write(FOLDER / 'results.json', json.dumps(results, indent=2) + '\n')
    write(FOLDER / 'README.md', model_card(FOLDER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--train', type=Path, help="timm's train.py")
    parser.add_argument('--data-dir', type=Path, help='folder of Tiny-ImageNet-200')
    parser.add_argument('--output', type=Path, help='folder of the trainings')
    parser.add_argument('--report', action='store_true', help='train nothing')
    options = parser.parse_args()
    if not options.report:
        if None in (options.train, options.data_dir, options.output):
            parser.error('give --train, --data-dir and --output, or --report.')
        measure(options)
    report()


if __name__ == '__main__':
    main()
