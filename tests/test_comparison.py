"""The comparison of aws_sgd with weight decay: what each row trains with, what is not run again, what is written."""
import argparse
import json
import os
import statistics
from pathlib import Path

import comparison
import pytest
import timm
import yaml
from comparison import ROWS, STAGES, TUNING


class TrainPy:
    """Does as timm's train.py: epochs that are left, a line of the summary for each; keeps the commands.

    The accuracy of a run is 1,000 times its strength, but for those in `worse`, which get 0.
    """
    def __init__(self, worse=()):
        self.commands, self.worse = [], worse

    def __call__(self, command, check):
        assert check
        given = dict(word[2:].split('=', 1) for word in command if word.startswith('--') and '=' in word)
        folder = Path(command[command.index('--output') + 1], command[command.index('--experiment') + 1])
        self.commands.append(command)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'args.yaml').write_text(yaml.safe_dump({'resume': given.get('resume', '')}))
        done = len(comparison.top1(folder))
        strength = next(command[at + 1].removeprefix('alpha=') for at, word in reversed(list(enumerate(command)))
                        if word in ('--weight-decay', '--opt-kwargs'))
        accuracy = 0. if strength in self.worse else 1000 * float(strength)
        with (folder / 'summary.csv').open('a') as summary:
            summary.write('epoch,eval_top1\n')  # train.py writes it anew after --resume
            for epoch in range(done, int(given['epochs'])):
                summary.write(f'{epoch},{accuracy}\n')
        (folder / 'last.pth.tar').touch()
        end = (folder / 'args.yaml').stat().st_mtime + 5400
        os.utime(folder / 'last.pth.tar', (end, end))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Returns a function that runs the comparison with a TrainPy and returns what it wrote."""
    monkeypatch.setattr(comparison, 'RESULT', tmp_path / 'comparison.json')

    def measure(train_py):
        monkeypatch.setattr(comparison.subprocess, 'run', train_py)
        comparison.measure(argparse.Namespace(train=Path('train.py'), data_dir=Path('DATA'), output=tmp_path / 'out'))
        return json.loads(comparison.RESULT.read_text())

    return measure


def test_a_row_starts_each_stage_from_the_one_before(measured, tmp_path):
    train_py = TrainPy(worse=['0.0025', '0.0625'])
    measured(train_py)
    assert len(train_py.commands) == (3 + len(STAGES)) * len(ROWS)
    out = tmp_path / 'out'
    assert next(command[1:] for command in train_py.commands if 'ws_resnet18_aws_0.0025' in command) == [
        'train.py', '--config', str(comparison.RECIPE), '--data-dir', 'DATA', '--model', 'ws_resnet18',
        '--opt-kwargs', 'alpha=0.0025', '--output', str(out / 'tuning'), '--experiment', 'ws_resnet18_aws_0.0025',
        '--img-size=32', '--epochs=3', '--lr=0.2', '--min-lr=0']
    of_row = [command for command in train_py.commands if str(out / 'resnet18_sgd_0.0005') in command]
    assert [command[command.index('--experiment') + 1] for command in of_row] == ['stage1', 'stage2', 'stage3']
    assert of_row[1][1:] == [
        'train.py', '--config', str(comparison.RECIPE), '--data-dir', 'DATA', '--model', 'resnet18', '--opt',
        'momentum', '--opt-kwargs', '--weight-decay', '0.0005', '--output', str(out / 'resnet18_sgd_0.0005'),
        '--experiment', 'stage2', '--img-size=48', '--epochs=3', '--lr=0.1', '--min-lr=0.025',
        f'--initial-checkpoint={out / "resnet18_sgd_0.0005" / "stage1" / "last.pth.tar"}']


def test_the_strength_that_is_best_on_average_is_trained(measured):
    record = measured(TrainPy(worse=['0.0025', '0.0625']))
    assert {name: row['strength'] for name, row in record['rows'].items()} == {
        'ws_resnet18_aws': 0.0125, 'ws_resnet18_sgd': 0.0005, 'resnet18_sgd': 0.0005}
    row = record['rows']['ws_resnet18_aws']
    assert row['tuning'] == {'0.0025': 0., '0.0125': 12.5, '0.0625': 0.}
    assert [stage['top1'] for stage in row['stages']] == [[12.5] * stage.epochs for stage in STAGES]
    assert [stage['hours'] for stage in row['stages']] == [1.5] * 3


@pytest.mark.parametrize('tuned, level', [
    ({'a': {'0.1': 3., '0.5': 2., '2.5': 0.}, 'b': {'1': 4., '5': 6., '25': 7.}}, 1),
    ({'a': {'0.1': 3., '0.5': 2., '2.5': 0.}, 'b': {'1': 6., '5': 6., '25': 7.}}, 0)])
def test_a_level_counts_by_its_mean_over_the_rows(tuned, level):
    assert comparison.best_level(tuned) == level


def test_a_level_shrinks_the_filters_of_both_rules_about_alike_at_first():
    stds = [weight.std().item() for name, weight in timm.create_model('ws_resnet18').named_parameters()
            if weight.ndim == 4]
    for alpha, decay in zip(comparison.ALPHAS, comparison.DECAYS):
        assert alpha * statistics.mean(stds) == pytest.approx(decay, rel=0.25)


def test_the_report_names_what_each_strength_reached(measured):
    text = comparison.text(measured(TrainPy()))
    assert '| ws_resnet18, aws_sgd | 2.5 (α = 0.0025) | 12.5 (α = 0.0125) | 62.5 (α = 0.0625) |' in text
    assert '| resnet18 | SGD with weight decay | λ = 0.0025 | 2.50 % |' in text


def test_what_is_there_is_not_run_again_and_the_rest_is_resumed(measured, tmp_path):
    record = measured(TrainPy())
    again = TrainPy()
    assert measured(again) == record
    assert again.commands == []
    stage = tmp_path / 'out' / 'resnet18_sgd_0.0025' / 'stage1'
    lines = (stage / 'summary.csv').read_text().splitlines()
    (stage / 'summary.csv').write_text('\n'.join(lines[:3]) + '\n')
    resumed = measured(again)
    assert [command[-1] for command in again.commands] == [f'--resume={stage / "last.pth.tar"}']
    rows = [found['rows']['resnet18_sgd']['stages'] for found in (record, resumed)]
    assert 'hours' in rows[0][0]
    assert 'hours' not in rows[1][0]  # only the last part of it is known
    assert [found['top1'] for found in rows[0]] == [found['top1'] for found in rows[1]]


def test_a_row_that_fails_is_reported(measured):
    class Fails(TrainPy):
        def __call__(self, command, check):
            if 'stage3' in command and 'resnet18' in command:
                raise OSError('no space left')
            super().__call__(command, check)

    with pytest.raises(OSError, match='no space left'):
        measured(Fails())
    assert not comparison.RESULT.exists()


def test_chance_is_that_of_two_shares():
    assert comparison.chance([0., 100.], 10_000) == pytest.approx(1.96 * 100 * (2 * 0.25 / 10_000) ** 0.5)


RECORD = json.loads(comparison.RESULT.read_text())


@pytest.mark.parametrize('name', ROWS)
def test_the_results_are_those_of_the_stages_and_of_the_best_level(name):
    row = RECORD['rows'][name]
    assert RECORD['tuning'] == TUNING._asdict()
    assert [stage | {'top1': None, 'hours': None} for stage in row['stages']] == [
        stage._asdict() | {'top1': None, 'hours': None} for stage in STAGES]
    assert [len(stage['top1']) for stage in row['stages']] == [stage.epochs for stage in STAGES]
    assert set(row['tuning']) == {f'{strength:g}' for strength in ROWS[name].strengths}
    level = comparison.best_level({other: found['tuning'] for other, found in RECORD['rows'].items()})
    assert row['strength'] == ROWS[name].strengths[level]
    assert sum(stage['hours'] for stage in row['stages']) <= 2


def test_recipe_card_and_report_are_those_of_the_results():
    row, results = RECORD['rows']['ws_resnet18_aws'], json.loads((comparison.FOLDER / 'results.json').read_text())
    assert yaml.safe_load(comparison.RECIPE.read_text())['opt_kwargs']['alpha'] == row['strength']
    assert results['comparison']['table'] == comparison.table(RECORD)
    assert comparison.RESULT.with_suffix('.md').read_text() == comparison.text(RECORD)
