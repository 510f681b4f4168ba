"""Compares aws_sgd with weight decay on all of Tiny-ImageNet-200: three networks, one recipe, each strength tuned.

    OMP_NUM_THREADS=1 python scripts/comparison.py --train train.py --data-dir DATA --output OUT

Runs timm's own train.py with scripts/recipes/tin200_ws_resnet18.yaml, the three rows side by side: on two cores that is
faster than one after the other with all threads. DATA is the folder that prepare_tiny_imagenet.py made. Each of the
three strengths of a row trains for three epochs at 32 px. At each of these levels the filters of every row shrink alike
at first, and within a row the levels differ by little more than chance. So the level that is best on average over the
rows trains to the end of the recipe, in all of them. What is in OUT already is not run again, and a training that was
stopped goes on from its last epoch.

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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from outputs import RESULTS, ROOT, fill_in, write
from provenance import hardware, versions

from timm_aws.checkpoint.model_card import model_card

RECIPE = ROOT / 'scripts' / 'recipes' / 'tin200_ws_resnet18.yaml'
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


DECAYS = (1e-4, 5e-4, 2.5e-3)
ALPHAS = (2.5e-3, 1.25e-2, 6.25e-2)  # a decay / 0.04, which is about the mean std of the filters at the start
# timm's 'sgd' has Nesterov momentum, which aws_sgd has not; its 'momentum' is SGD without. An empty --opt-kwargs takes
# the recipe's alpha away.
DECAY = ('--opt', 'momentum', '--opt-kwargs', '--weight-decay')
ROWS = {
    'ws_resnet18_aws': Row('ws_resnet18', 'aws_sgd', 'α', ALPHAS, ('--opt-kwargs',)),
    'ws_resnet18_sgd': Row('ws_resnet18', 'SGD with weight decay', 'λ', DECAYS, DECAY),
    'resnet18_sgd': Row('resnet18', 'SGD with weight decay', 'λ', DECAYS, DECAY),
}
TUNING = Stage(32, 3, 0.2, 0.)
STAGES = (Stage(32, 6, 0.2, 0.1), Stage(48, 3, 0.1, 0.025), Stage(64, 1, 0.025, 0.))


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
    """Returns the accuracy of each strength after the epochs of tuning."""
    row = ROWS[name]
    return {
        f'{strength:g}': train(
            [*command, *options_of(row, strength)], output / f'{name}_{strength:g}', TUNING)['top1'][-1]
        for strength in row.strengths}


def train_stages(command: list[str], folder: Path, stages: Sequence[Stage]) -> list[dict]:
    """Runs stages in folders stage1, stage2 and so on, each from the weights of the one before."""
    folders = [folder / f'stage{number}' for number in range(1, 1 + len(stages))]
    starts = [None, *(stage / 'last.pth.tar' for stage in folders)]
    return [train(command, *stage) for stage in zip(folders, stages, starts)]


def train_row(command: list[str], output: Path, name: str, strength: str) -> list[dict]:
    """Runs the recipe to its end for a row at this strength."""
    return train_stages([*command, *options_of(ROWS[name], float(strength))], output / f'{name}_{strength}', STAGES)


def best_level(tuned: dict[str, dict[str, float]]) -> int:
    """Returns which of the strengths, by its place in each row, is best on average over the rows."""
    means = [statistics.mean(accuracies) for accuracies in zip(*(found.values() for found in tuned.values()))]
    return means.index(max(means))


def measure(options: argparse.Namespace) -> None:
    """Trains what is not in the output folder yet, and writes comparison.json."""
    command = [sys.executable, str(options.train), '--config', str(RECIPE), '--data-dir', str(options.data_dir)]
    with ThreadPoolExecutor(len(ROWS)) as pool:
        tuned = dict(zip(ROWS, pool.map(partial(tune, command, options.output / 'tuning'), ROWS)))
        level = best_level(tuned)
        chosen = {name: list(found)[level] for name, found in tuned.items()}
        stages = pool.map(partial(train_row, command, options.output), chosen, chosen.values())
        rows = {name: {'tuning': tuned[name], 'strength': float(chosen[name]), 'stages': found}
                for name, found in zip(ROWS, stages)}
    record = {
        'command': 'OMP_NUM_THREADS=1 python scripts/comparison.py --train train.py --data-dir DATA --output OUT',
        'dataset': 'Tiny-ImageNet-200', 'images': IMAGES, 'seed': yaml.safe_load(RECIPE.read_text())['seed'],
        'versions': versions(), 'hardware': hardware('cpu'), 'tuning': TUNING._asdict(), 'rows': rows,
    }
    write(RESULT, json.dumps(record, indent=1) + '\n')


def final(record: dict) -> dict[str, float]:
    """Returns the accuracy of each row at the end, in percent."""
    return {name: row['stages'][-1]['top1'][-1] for name, row in record['rows'].items()}


def chance(accuracies: Iterable[float], images: int) -> float:
    """Returns how many points two accuracies must be apart to differ by more than chance (95 %) on so many images."""
    share = statistics.mean(accuracies) / 100
    return 1.96 * 100 * math.sqrt(2 * share * (1 - share) / images)


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


def strengths(record: dict) -> str:
    """Returns what each strength reached in the epochs of tuning, the weakest first, as Markdown."""
    lines = ['| top-1, % | weak | middle | strong |', '|---|---|---|---|']
    for name, found in record['rows'].items():
        row = ROWS[name]
        accuracies = [f'{accuracy:.1f} ({row.symbol} = {strength})' for strength, accuracy in found['tuning'].items()]
        lines.append(f'| {row.model}, {row.rule} | {" | ".join(accuracies)} |')
    return '\n'.join(lines)


def text(record: dict) -> str:
    """Returns the whole of comparison.md."""
    held_out = record['images']['validation']
    tuned = [accuracy for row in record['rows'].values() for accuracy in row['tuning'].values()]
    return f"""\
# aws_sgd and weight decay, on one recipe

    {record['command']}

{record['dataset']}: {record['images']['train']:,} images to train on, {held_out:,} to validate on.
Recipe: [tin200_ws_resnet18.yaml](../recipes/tin200_ws_resnet18.yaml), seed {record['seed']}.
{record['hardware']}, the three rows side by side;
timm {record['versions']['timm']}, torch {record['versions']['torch']}.

{table(record)}

One seed each: differences under {chance(final(record).values(), held_out):.1f} points are within chance.

## After each epoch

{curves(record)}

The rows shared the cores, and not evenly: the hours do not tell which is faster.

## The strengths

Each after {TUNING.epochs} epochs at {TUNING.img_size} px, in which the learning rate falls from {TUNING.lr:g} to
{TUNING.min_lr:g}. Weak, middle and strong shrink the filters of every row alike at first. Differences under
{chance(tuned, held_out):.1f} points are within chance, so the rows above share the level that is best on average.

{strengths(record)}

λ decays all weights but biases and those of norms. α shrinks the convolutions, and λ =
{yaml.safe_load(RECIPE.read_text())['weight_decay']:g} decays the classifier.
"""


def values() -> dict[str, str]:
    """Returns what the README marks a place for: the table, and the points that are chance."""
    record = json.loads(RESULT.read_text())
    return {'comparison': f'\n{table(record)}\n',
            'chance': f'{chance(final(record).values(), record["images"]["validation"]):.1f}'}


def report() -> None:
    """Writes comparison.md, the README's table and the one in the card."""
    record = json.loads(RESULT.read_text())
    write(RESULT.with_suffix('.md'), text(record))
    fill_in(values())
    results = json.loads((FOLDER / 'results.json').read_text())
    results['comparison'] = {
        'about': f'Networks and rules after the first {sum(stage.epochs for stage in STAGES)} epochs of this recipe, '
                 f'at the best of three levels of strength, one seed each: differences under {values()["chance"]} '
                 f'points are within chance.',
        'table': table(record)}
    write(FOLDER / 'results.json', json.dumps(results, indent=2) + '\n')
    write(FOLDER / 'README.md', model_card(FOLDER))


def run(description: str, measure: Callable[[argparse.Namespace], None], report: Callable[[], None]) -> None:
    """Is the command of a script that trains, then reports."""
    parser = argparse.ArgumentParser(description=description)
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
    run(__doc__.splitlines()[0], measure, report)
