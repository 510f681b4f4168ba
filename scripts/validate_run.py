"""Checks the best checkpoint of a timm training run with timm's validate.py and records what it reached.

    python scripts/validate_run.py output/RUN scripts/recipes/NAME.yaml DATA path/to/validate.py

RUN is a folder that timm's train.py wrote (args.yaml, summary.csv, model_best.pth.tar) with the recipe as its config.
validate.py is run through `timm_aws run` on the same data, with the precision, batch size and image size of the run.
Writes scripts/results/NAME.json: both accuracies, the command, settings, versions and hardware. The exit code is 1
where the accuracies differ.
"""
import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import yaml

import timm_aws

RESULTS = Path(__file__).parent / 'results'


def validate(run: Path, args: dict, data_dir: str, script: Path) -> dict:
    """Runs timm's validate.py on the run's best checkpoint.

    Args:
        run: Folder of the run.
        args: The run's args.yaml.
        data_dir: Folder of the images.
        script: Path of timm's validate.py.

    Returns:
        What validate.py reports, `top1` and `top5` in percent among it.

    Raises:
        subprocess.CalledProcessError: If validate.py fails.
    """
    command = [
        sys.executable, '-m', 'timm_aws', 'run', str(script), '--data-dir', data_dir,
        '--model', args['model'], '--num-classes', str(args['num_classes']), '--img-size', str(args['img_size']),
        '--crop-pct', str(args['crop_pct']), '--batch-size', str(args['validation_batch_size'] or args['batch_size']),
        '--device', args['device'], '--workers', str(args['workers']),
        '--checkpoint', str((run / 'model_best.pth.tar').resolve()),
        *(['--amp', '--amp-dtype', args['amp_dtype']] if args['amp'] else []),
        *(['--channels-last'] if args['channels_last'] else []),
    ]
    with tempfile.TemporaryDirectory() as folder:  # validate.py leaves its results in the current folder
        results = Path(folder, 'results.json')
        subprocess.run([*command, '--results-file', str(results), '--results-format', 'json'], check=True, cwd=folder)
        return json.loads(results.read_text())


def record(run: Path, recipe: Path, data_dir: str, script: Path) -> dict:
    """Tells what a run was and what it reached, by train.py's log and by validate.py.

    Args:
        run: Folder of the run.
        recipe: Its config.
        data_dir: Folder of the images.
        script: Path of timm's validate.py.

    Returns:
        The record, ready for JSON.

    Raises:
        ValueError: If the run was made with other settings than those of the recipe.
        subprocess.CalledProcessError: If validate.py fails.
    """
    args, settings = (yaml.safe_load(path.read_text()) for path in (run / 'args.yaml', recipe))
    other = [key for key, value in settings.items() if args[key] != value]
    if other:
        raise ValueError(f'{run} was not made with {recipe}: {", ".join(other)} differ, name the config of the run.')
    with (run / 'summary.csv').open() as file:
        epochs = list(csv.DictReader(file))
    best = max(epochs, key=lambda epoch: float(epoch['eval_top1']))
    validated = validate(run, args, data_dir, script.resolve())
    return {
        'dataset': Path(data_dir).resolve().name,
        'command': f'python train.py --config scripts/recipes/{recipe.name} --data-dir {Path(data_dir).name}',
        'settings': settings,
        'epoch': int(best['epoch']) + 1,
        'train_py': {'top1': float(best['eval_top1']), 'top5': float(best['eval_top5'])},
        'validate_py': {key: validated[key] for key in ('top1', 'top5')},
        'epochs': [{key: float(epoch[key]) for key in ('train_loss', 'eval_loss', 'eval_top1')} for epoch in epochs],
        'hours': round(_training_seconds(run) / 3600, 2),
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'timm_aws': timm_aws.__version__},
        'hardware': f'{os.cpu_count()} cores, {platform.machine()} CPU' if args['device'] == 'cpu'
        else torch.cuda.get_device_name(),
        'date': datetime.date.today().isoformat(),
    }


def _training_seconds(run: Path) -> float:
    """Time from the first file of a run, written before the first epoch, to the last line of its log."""
    return (run / 'summary.csv').stat().st_mtime - (run / 'args.yaml').stat().st_mtime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path, help="folder that timm's train.py wrote")
    parser.add_argument('recipe', type=Path, help='config that the run was made with')
    parser.add_argument('data_dir', help='folder of the images')
    parser.add_argument('validate_py', type=Path, help="path of timm's validate.py")
    options = parser.parse_args()
    result = record(options.run, options.recipe, options.data_dir, options.validate_py)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{options.recipe.stem}.json').write_text(json.dumps(result, indent=2) + '\n')
    print(f'top-1: train.py {result["train_py"]["top1"]} %, validate.py {result["validate_py"]["top1"]} %')
    return int(abs(result['train_py']['top1'] - result['validate_py']['top1']) > 0.005)


if __name__ == '__main__':
    sys.exit(main())
