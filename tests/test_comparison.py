"""The comparison of aws_sgd with weight decay: what each row trains with, what is not run again, what is written."""
import argparse
import json
import os
from pathlib import Path

import comparison
import pytest
import yaml
from comparison import ROWS, STAGES


class TrainPy:
    """Does as timm's train.py: epochs that are left, a line of the summary for each; keeps the commands.

    The accuracy of a run is 1,000 times its strength, but for those in `worse`, which get 0, and those in `fading`,
    which get 0 after the epoch of tuning.
    """
    def __init__(self, worse=(), fading=()):
        self.commands, self.worse, self.fading = [], worse, fading

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
        fails = strength in self.worse or (strength in self.fading and folder.parent.name != 'tuning')
        accuracy = 0. if fails else 1000 * float(strength)
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
    train_py = TrainPy(worse=['0.0125', '0.3125'])
    measured(train_py)
    assert len(train_py.commands) == (4 + 2 * 2 + len(STAGES) - 1) * len(ROWS)
    out = tmp_path / 'out'
    assert train_py.commands[0][2:] == [
        'train.py', '--config', str(comparison.RECIPE), '--data-dir', 'DATA', '--model', 'ws_resnet18',
        '--opt-kwargs', 'alpha=0.0025', '--output', str(out / 'tuning'), '--experiment', 'ws_resnet18_aws_0.0025',
        '--img-size=32', '--epochs=1', '--lr=0.1', '--min-lr=0']
    assert train_py.commands[-2][2:] == [
        'train.py', '--config', str(comparison.RECIPE), '--data-dir', 'DATA', '--model', 'resnet18', '--opt',
        'momentum', '--opt-kwargs', '--weight-decay', '0.0025', '--output', str(out / 'resnet18_sgd_0.0025'),
        '--experiment', 'stage2', '--img-size=48', '--epochs=3', '--lr=0.05', '--min-lr=0.0125',
        f'--initial-checkpoint={out / "resnet18_sgd_0.0025" / "stage1" / "last.pth.tar"}']


def test_the_best_strength_of_a_row_is_trained(measured):
    record = measured(TrainPy(worse=['0.0125', '0.3125']))
    assert {name: row['strength'] for name, row in record['rows'].items()} == {
        'ws_resnet18_aws': 0.0625, 'ws_resnet18_sgd': 0.0025, 'resnet18_sgd': 0.0025}
    assert record['rows']['ws_resnet18_aws']['tuning'] == {
        '0.0025': 2.5, '0.0125': 0, '0.0625': 62.5, '0.3125': 0}
    assert record['rows']['ws_resnet18_aws']['short'] == {'0.0125': 0., '0.0625': 62.5}
    assert [stage['top1'] for stage in record['rows']['ws_resnet18_aws']['stages']] == [[62.5] * 8, [62.5] * 3, [62.5]]
    assert [stage['hours'] for stage in record['rows']['resnet18_sgd']['stages']] == [1.5] * 3


def test_the_best_of_an_epoch_gives_way_to_a_weaker_one_that_is_better_after_nine(measured):
    row = measured(TrainPy(fading=['0.3125']))['rows']['ws_resnet18_aws']
    assert max(row['tuning'], key=row['tuning'].get) == '0.3125'
    assert row['short'] == {'0.0625': 62.5, '0.3125': 0.}
    assert row['strength'] == 0.0625
    assert [stage['top1'][-1] for stage in row['stages']] == [62.5] * len(STAGES)


def test_the_weakest_strength_has_no_other_beside_it(measured):
    rows = measured(TrainPy(worse=['0.0005', '0.0025', '0.0125', '0.0625', '0.3125']))['rows']
    assert rows['resnet18_sgd']['short'] == {'0.0001': 0.1}


def test_the_fall_starts_from_the_first_stage(measured, tmp_path):
    train_py = TrainPy(fading=['0.3125'])
    measured(train_py)
    row = tmp_path / 'out' / 'ws_resnet18_aws_0.3125'
    falls = [command for command in train_py.commands if 'fall' in command]
    assert falls[1][-8:] == [
        str(row), '--experiment', 'fall', '--img-size=32', '--epochs=1', '--lr=0.05', '--min-lr=0',
        f'--initial-checkpoint={row / "stage1" / "last.pth.tar"}']


def test_the_report_names_what_each_strength_reached(measured):
    text = comparison.text(measured(TrainPy(fading=['0.3125'])))
    assert '| 2.5 (α = 0.0025) | 12.5 (α = 0.0125) | 62.5 (α = 0.0625) | 312.5 (α = 0.3125) |' in text
    assert '| ws_resnet18, aws_sgd | 62.5 (α = 0.0625) | 0.0 (α = 0.3125) |' in text


def test_what_is_there_is_not_run_again_and_the_rest_is_resumed(measured, tmp_path):
    record = measured(TrainPy())
    again = TrainPy()
    assert measured(again) == record
    assert again.commands == []
    stage = tmp_path / 'out' / 'resnet18_sgd_0.0125' / 'stage1'
    lines = (stage / 'summary.csv').read_text().splitlines()
    (stage / 'summary.csv').write_text('\n'.join(lines[:3]) + '\n')
    resumed = measured(again)
    assert [command[-1] for command in again.commands] == [f'--resume={stage / "last.pth.tar"}']
    rows = [found['rows']['resnet18_sgd']['stages'] for found in (record, resumed)]
    assert 'hours' in rows[0][0]
    assert 'hours' not in rows[1][0]  # only the last part of it is known
    assert [found['top1'] for found in rows[0]] == [found['top1'] for found in rows[1]]


def test_rows_that_are_done_are_kept_where_the_next_one_fails(measured):
    class Fails(TrainPy):
        def __call__(self, command, check):
            if 'stage3' in command and 'resnet18' in command:
                raise OSError('no space left')
            super().__call__(command, check)

    with pytest.raises(OSError):
        measured(Fails())
    assert list(json.loads(comparison.RESULT.read_text())['rows']) == ['ws_resnet18_aws', 'ws_resnet18_sgd']


def test_chance_is_that_of_two_shares():
    row = {'stages': [{'top1': [0., 50.]}]}
    assert comparison.noise({'rows': {'a': row, 'b': row}, 'images': {'validation': 10_000}}) == pytest.approx(
        1.96 * 100 * (2 * 0.25 / 10_000) ** 0.5)
