"""The trials of recipe changes: what each runs, and what is written."""
import argparse
import json
import os
from pathlib import Path

import comparison
import pytest
import recipe_trials
import yaml
from recipe_trials import TRIALS

RECORD = json.loads(recipe_trials.RESULT.read_text())


def train_py(accuracies):
    """Returns what does as timm's train.py, with an accuracy for each experiment, and the list of its commands."""
    commands = []

    def run(command, check):
        assert check
        commands.append(command)
        given = dict(word[2:].split('=', 1) for word in command if word.startswith('--') and '=' in word)
        folder = Path(command[command.index('--output') + 1], command[command.index('--experiment') + 1])
        folder.mkdir(parents=True)
        (folder / 'args.yaml').write_text(yaml.safe_dump({'resume': ''}))
        lines = [f'{epoch},{accuracies.get(folder.parent.name, 20.)}' for epoch in range(int(given['epochs']))]
        (folder / 'summary.csv').write_text('\n'.join(['epoch,eval_top1', *lines]) + '\n')
        (folder / 'last.pth.tar').touch()
        end = (folder / 'args.yaml').stat().st_mtime + 3600
        os.utime(folder / 'last.pth.tar', (end, end))

    return run, commands


@pytest.fixture
def record(monkeypatch, tmp_path):
    """The results of a fake train.py that likes aws_adam."""
    monkeypatch.setattr(recipe_trials, 'RESULT', tmp_path / 'recipe_trials.json')
    run, commands = train_py({'aws_adam': 21.5})
    monkeypatch.setattr(comparison.subprocess, 'run', run)
    options = argparse.Namespace(train=Path('train.py'), data_dir=Path('DATA'), output=tmp_path / 'out')
    recipe_trials.measure(options)
    recipe_trials.measure(options)
    assert len(commands) == sum(len(trial.stages) for trial in TRIALS.values())  # what is there is not run again
    return json.loads(recipe_trials.RESULT.read_text()) | {'commands': commands}


@pytest.mark.parametrize('name', TRIALS)
def test_each_trial_trains_three_epochs(record, name):
    assert sum(len(stage['top1']) for stage in record['trials'][name]) == 3
    assert sum(len(stage['top1']) for stage in RECORD['trials'][name]) == 3
    assert RECORD['trials'][name][-1]['min_lr'] == 0


def test_the_learning_rate_of_a_triangle_rises_and_falls(record, tmp_path):
    folder = tmp_path / 'out' / 'triangle'
    commands = [command[8:] for command in record['commands'] if str(folder) in command]
    assert commands == [
        ['--experiment', 'stage1', '--img-size=32', '--epochs=1', '--lr=1e-06', '--min-lr=0.2'],
        ['--experiment', 'stage2', '--img-size=32', '--epochs=2', '--lr=0.2', '--min-lr=0',
         f'--initial-checkpoint={folder / "stage1" / "last.pth.tar"}']]


def test_the_best_change_stands_first(record):
    rows = [line for line in recipe_trials.text(record).splitlines() if line.startswith('|')]
    assert rows[2] == '| aws_adam, alpha 10, lr 0.002 at first | 21.5 | +1.5 |'
    assert '| none | 20.0 |  |' in rows
    assert len(rows) == 2 + len(TRIALS)


def test_the_readme_is_that_of_the_results():
    assert comparison.RECIPE.with_name('README.md').read_text() == recipe_trials.text(RECORD)
