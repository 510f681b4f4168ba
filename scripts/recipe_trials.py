"""Tries changes of a recipe on Tiny-ImageNet-200, one at a time: what each gives in three epochs of ws_resnet18.

    OMP_NUM_THREADS=1 python scripts/recipe_trials.py --train train.py --data-dir DATA --output OUT

Runs timm's own train.py with scripts/recipes/tin200_ws_resnet18.yaml at 32 px, two trials side by side. DATA is the
folder that prepare_tiny_imagenet.py made. What is in OUT already is not run again, and a training that was stopped goes
on from its last epoch.

Writes scripts/results/recipe_trials.json, and from it scripts/recipes/README.md; with `--report` only this.
"""
import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import yaml
from comparison import IMAGES, RECIPE, TUNING, Stage, chance, run, train_stages
from outputs import RESULTS, write
from provenance import hardware, versions

RESULT = RESULTS / 'recipe_trials.json'


class Trial(NamedTuple):
    """A change of the recipe: what the table calls it, options of train.py, and stages of three epochs in all."""
    change: str
    options: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = (TUNING,)


TRIALS = {
    'as_it_is': Trial('none'),
    'no_smoothing': Trial('no label smoothing', ('--smoothing', '0')),
    'aws_adam': Trial('aws_adam, alpha 10, lr 0.002 at first', ('--opt', 'aws_adam', '--opt-kwargs', 'alpha=10'),
                      (TUNING._replace(lr=2e-3),)),
    'erasing': Trial('random erasing of a quarter of the images', ('--reprob', '0.25')),
    # train.py takes no lr of 0.
    'triangle': Trial('lr rises from 0 to 0.2 in an epoch, and falls to 0 in two', stages=(
        TUNING._replace(epochs=1, lr=1e-6, min_lr=TUNING.lr), TUNING._replace(epochs=2))),
}
COMMAND = 'OMP_NUM_THREADS=1 python scripts/recipe_trials.py --train train.py --data-dir DATA --output OUT'


def measure(options: argparse.Namespace) -> None:
    """Trains what is not in the output folder yet, and writes recipe_trials.json."""
    command = [sys.executable, str(options.train), '--config', str(RECIPE), '--data-dir', str(options.data_dir)]
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(train_stages, [*command, *trial.options], options.output / name, trial.stages)
                for name, trial in TRIALS.items()}
        trials = {name: started.result() for name, started in runs.items()}
    record = {
        'command': COMMAND, 'dataset': 'Tiny-ImageNet-200', 'images': IMAGES,
        'seed': yaml.safe_load(RECIPE.read_text())['seed'], 'versions': versions(), 'hardware': hardware('cpu'),
        'trials': trials,
    }
    write(RESULT, json.dumps(record, indent=1) + '\n')


def top1(record: dict) -> dict[str, float]:
    """Returns the accuracy of each trial after its last epoch, in percent."""
    return {name: stages[-1]['top1'][-1] for name, stages in record['trials'].items()}


def text(record: dict) -> str:
    """Returns the whole of scripts/recipes/README.md."""
    found = top1(record)
    plain, held_out = found['as_it_is'], record['images']['validation']
    lines = [f'| {TRIALS[name].change} | {accuracy:.1f} | {"" if name == "as_it_is" else f"{accuracy - plain:+.1f}"} |'
             for name, accuracy in sorted(found.items(), key=lambda item: -item[1])]
    table = '\n'.join(['| change of the recipe | top-1, % | gain |', '|---|---|---|', *lines])
    return f"""\
# Recipes

Configs for timm's train.py. Each says at its top how to run it, and what to expect.

## Which changes help

    {record['command']}

Three epochs of ws_resnet18 at {TUNING.img_size} px on {record['dataset']} ({record['images']['train']:,} images to
train on, {held_out:,} to validate on), with [tin200_ws_resnet18.yaml](tin200_ws_resnet18.yaml) and a learning rate that
falls from {TUNING.lr:g} to {TUNING.min_lr:g}. Each line changes one thing.

{table}

One seed each ({record['seed']}): differences under {chance(found.values(), held_out):.1f} points are
within chance. What costs accuracy in three epochs may help in a hundred. {record['hardware']};
timm {record['versions']['timm']}, torch {record['versions']['torch']}.
"""


def report() -> None:
    """Writes scripts/recipes/README.md."""
    write(RECIPE.with_name('README.md'), text(json.loads(RESULT.read_text())))


if __name__ == '__main__':
    run(__doc__.splitlines()[0], measure, report)
