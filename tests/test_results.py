"""What results.json tells: the runs that led to a checkpoint, their commands, hours, data and starting weights."""
import csv
import json
import os
import re
import shlex
import subprocess

import pytest
import timm
import torch
import yaml
from checkpoint_files import NAME, SETTINGS, best, weights_of, with_options
from safetensors.torch import save_file

from timm_aws.checkpoint.export import export


def test_nothing_tells_of_the_machine_it_was_made_on(train_run, tmp_path):
    run = train_run()
    export(run, tmp_path / NAME, **SETTINGS)
    for path in (tmp_path / NAME).iterdir():
        assert str(run).encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o777 == (tmp_path / NAME / 'config.json').stat().st_mode & 0o777
    args = yaml.safe_load((tmp_path / NAME / 'args.yaml').read_text())
    assert (args['opt'], args['lr'], 'data_dir' in args) == ('aws_sgd', 0.1, False)


def test_results_tell_how_the_weights_came_about(train_run, tmp_path, measured):
    run = train_run()
    returned = export(run, tmp_path / NAME, **SETTINGS, **measured(model=50.5, half=50.0))
    results = json.loads((tmp_path / NAME / 'results.json').read_text())
    assert results == json.loads(json.dumps(returned))
    assert results['metrics'] == {'top1': 50.0, 'top5': 90.0, 'img_size': 48, 'crop_pct': 1.0,
                                  'interpolation': 'bicubic', 'images': 8, 'by': "timm's validate.py"}
    assert results['metrics_in_full_precision']['top1'] == 50.5  # that it has more points alone is no harm
    assert results['train_py'] == {'epoch': 2, 'top1': 10.0}
    (stage,) = results['training']
    assert stage == {'command': 'python train.py --config args.yaml --data-dir images', 'epochs': 2, 'images': 24}
    assert results['seed'] == 42
    assert results['versions']['torch'] == torch.__version__.split('+')[0]
    parameters = sum(parameter.numel() for parameter in timm.create_model('test_ws_resnet', num_classes=4).parameters())
    assert results['weights']['parameters'] == parameters


def test_alpha_that_like_decay_has_chosen_stands_in_results_and_card(train_run, tmp_path):
    options = {'like_decay': 1e-4, 'record': 'record.csv', 'record_every': 5}
    assert export(train_run(opt_kwargs=options), tmp_path / NAME, **SETTINGS)['alpha'] == 2.5e-3  # as in the state
    assert '(like\\_decay 0.0001, alpha 0.0025)' in (tmp_path / NAME / 'README.md').read_text()
    assert yaml.safe_load((tmp_path / NAME / 'args.yaml').read_text())['opt_kwargs'] == {'like_decay': 1e-4}


def test_runs_before_are_told_in_order(train_run, tmp_path):
    first = train_run(img_size=32, epochs=3, lr=0.2)
    second = train_run(initial_checkpoint=str(first / 'checkpoint-1.pth.tar'))
    stages = export(second, tmp_path / NAME, **SETTINGS)['training']
    assert [stage['epochs'] for stage in stages] == [2, 2]
    assert stages[0]['command'].endswith(
        ' --img-size 32 --lr 0.2 --epochs 3  # the next run starts from epoch 2 of 3')
    assert stages[1]['command'].split()[6:] == ['--initial-checkpoint', f'{first.name}/checkpoint-1.pth.tar']
    with (tmp_path / NAME / 'effective_lr.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == [epoch for epoch in '1234' for _ in range(len(rows) // 4)]
    row = next(row for row in rows if row['epoch'] == '4' and row['layer'] == 'conv1.0.weight')
    std = best(second)['state_dict']['conv1.0.weight'].flatten(1).std(1, correction=0).median()
    assert float(row['length']) == pytest.approx(std.item(), rel=1e-5)
    assert float(row['lr']) == 0.1


def test_runs_that_led_to_a_folder_of_the_same_data_go_before(train_run, tmp_path):
    first = train_run(img_size=32, epochs=3, lr=0.2, amp=False, log_interval=7)  # no part of a command
    second = train_run(initial_checkpoint=str(first / 'checkpoint-1.pth.tar'), smoothing=0.1, aa="it's # 1")
    before = export(second, tmp_path / 'before' / NAME, **SETTINGS)
    path = tmp_path / 'before' / NAME / 'results.json'
    path.write_text(json.dumps(before | {'hardware': 'another CPU'}))
    last = train_run(img_size=64, initial_checkpoint=str(tmp_path / 'before' / NAME / 'model.safetensors'), amp=True)
    results = export(last, tmp_path / NAME, **SETTINGS)
    assert 'start' not in results
    assert results['hardware'] == f'another CPU, then {before["hardware"]}'
    path.write_text(json.dumps(before | {'hardware': results['hardware']}))
    assert export(last, tmp_path / 'again' / NAME, **SETTINGS)['hardware'] == results['hardware']  # once each
    assert [run['epochs'] for run in results['training']] == [2, 2, 2]
    # What the args.yaml of the last run has otherwise is added to the commands, in front of what is said of them.
    commands = [run['command'] for run in results['training']]
    assert before['training'][0]['command'] == (
        'python train.py --config args.yaml --data-dir images --img-size 32 --lr 0.2 --epochs 3'
        '  # with amp: false in args.yaml, the next run starts from epoch 2 of 3')
    assert commands[:2] == [
        "python train.py --config args.yaml --data-dir images --img-size 32 --lr 0.2 --epochs 3 --aa 'it'\"'\"'s # 1' "
        '--smoothing 0.1  # with amp: false in args.yaml, the next run starts from epoch 2 of 3',
        before['training'][1]['command'] + " --aa 'it'\"'\"'s # 1' --img-size 48 --smoothing 0.1"]
    with (tmp_path / NAME / 'effective_lr.csv').open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / 'before' / NAME / 'effective_lr.csv').open() as file:
        assert rows[:len(rows) * 2 // 3] == list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == [epoch for epoch in '123456' for _ in range(len(rows) // 6)]
    assert 'trained from scratch on noise' in ' '.join((tmp_path / NAME / 'README.md').read_text().split())


def test_folder_of_another_network_is_where_the_training_starts(train_run, copied, tmp_path):
    config = json.loads((copied / 'config.json').read_text())
    (copied / 'config.json').write_text(json.dumps(config | {'architecture': 'ws_resnet18'}))
    run = train_run(initial_checkpoint=str(copied / 'model.safetensors'))
    results = export(run, tmp_path / 'further' / NAME, **SETTINGS)
    assert (results['start']['name'], len(results['training'])) == (NAME, 1)


def test_start_that_is_not_found_is_named_with_a_warning(train_run, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    run = train_run(initial_checkpoint='before/model.safetensors')
    assert export(run, tmp_path / NAME, **SETTINGS)['start'] == {'name': 'before/model.safetensors'}
    assert caplog.messages == [
        f'The training started from before/model.safetensors, which is not found from {tmp_path}: the card names it, '
        f'but does not tell what led to it. Export in the folder where train.py ran.']


@pytest.mark.parametrize('kind', ['weights.pth', 'weights.safetensors', NAME])
def test_run_that_started_from_weights_without_a_run(train_run, checkpoint_folder, tmp_path, kind):
    start = tmp_path / 'before' / kind
    start.parent.mkdir()
    weights = weights_of(checkpoint_folder)
    if kind == NAME:
        start = checkpoint_folder / 'model.safetensors'
    elif kind.endswith('.pth'):
        torch.save(weights, start)
    else:
        save_file(weights, start)
    results = export(train_run(initial_checkpoint=str(start)), tmp_path / NAME, **SETTINGS | {'dataset': 'pictures'})
    (stage,) = results['training']
    assert stage['command'].endswith(f'--initial-checkpoint {start.parent.name}/{start.name}')
    expected = {'name': NAME, 'dataset': 'noise', 'license': 'apache-2.0'} if kind == NAME else {
        'name': f'before/{kind}'}
    assert results['start'] == expected
    card = ' '.join((tmp_path / NAME / 'README.md').read_text().split())
    assert 'from scratch' not in card
    assert f'trained further from the weights {expected["name"]}'.replace('_', r'\_') in card
    assert 'pictures only' not in card


def test_pretrained_run_names_its_weights(train_run, tmp_path):
    results = export(train_run(pretrained=True), tmp_path / NAME, **SETTINGS)
    assert results['start'] == {'name': 'test_ws_resnet.untrained', 'license': 'apache-2.0'}
    run = train_run(pretrained=False, pretrained_path='ignored.pth')
    assert 'start' not in export(run, tmp_path / 'scratch' / NAME, **SETTINGS)
    assert 'trained from scratch on noise' in ' '.join((tmp_path / 'scratch' / NAME / 'README.md').read_text().split())


def test_run_of_a_checkpoint_folder(train_run, checkpoint_folder, tmp_path):
    run = train_run(model=f'local-dir:{checkpoint_folder}', pretrained=True)
    assert export(run, tmp_path / NAME, **SETTINGS | {'dataset': 'pictures'})['start'] == {
        'name': NAME, 'dataset': 'noise', 'license': 'apache-2.0'}
    assert json.loads((tmp_path / NAME / 'config.json').read_text())['architecture'] == 'test_ws_resnet'
    assert yaml.safe_load((tmp_path / NAME / 'args.yaml').read_text())['model'] == f'local-dir:{NAME}'
    assert all(str(checkpoint_folder.parent).encode() not in path.read_bytes() for path in (tmp_path / NAME).iterdir())


def test_commands_are_what_a_shell_and_train_py_take(train_run, tmp_path):
    first = train_run(data_dir='/somewhere/My Data', amp=False, aa='it\'s', only_here=3, mean=[0.5, 0.4, 0.3],
                      opt_kwargs={'alpha': 0.0025, 'record': '/somewhere/record.csv', 'record_every': 10})
    second = train_run(initial_checkpoint=str(first / 'last.pth.tar'), amp=True, opt_kwargs={'alpha': 0.1})
    commands = [stage['command'] for stage in export(second, tmp_path / NAME, **SETTINGS)['training']]
    words = shlex.split(commands[0], comments=True)
    assert words[4:6] == ['--data-dir', 'My Data']
    options = {tuple(words[start:end]) for start, end in (
        (words.index('--mean'), words.index('--mean') + 4), (words.index('--aa'), words.index('--aa') + 2),
        (words.index('--only-here'), words.index('--only-here') + 2),
        (words.index('--opt-kwargs'), words.index('--opt-kwargs') + 2))}
    assert options == {('--mean', '0.5', '0.4', '0.3'), ('--aa', "it's"), ('--only-here', '3'),
                       ('--opt-kwargs', 'alpha=0.0025')}
    assert '--amp' not in words
    assert commands[0].endswith('  # with amp: false in args.yaml')
    assert shlex.split(commands[1])[-2:] == ['--initial-checkpoint', f'{first.name}/last.pth.tar']


def test_command_of_the_card_is_one_line_that_a_shell_reads_whatever_was_typed(train_run, tmp_path):
    typed = ['\n```\n# Heading\n', '\r```', "it's\n$HOME", '`date`']
    first = train_run(aa=typed)
    export(train_run(initial_checkpoint=str(first / 'last.pth.tar')), tmp_path / NAME, **SETTINGS)
    card = (tmp_path / NAME / 'README.md').read_text()
    assert '\n# Heading' not in card
    commands = card.split('```bash\n')[2].split('\n```')[0]
    assert commands.count('\n') == 1
    words = subprocess.run(['bash', '-c', 'python() { printf "%s\\0" "$@"; }\n' + commands],
                           capture_output=True, check=True).stdout.decode().split('\0')
    assert words[words.index('--aa') + 1:][:4] == typed


@pytest.mark.parametrize('resume, seconds, hours', [('', 7200, 2.0), ('', 59, None), ('', -1, None),
                                                    ('gone.pth.tar', 7200, None)])
def test_hours_are_told_where_the_times_of_the_files_give_them(train_run, tmp_path, resume, seconds, hours):
    run = train_run(resume=resume)
    started = (run / 'model_best.pth.tar').stat().st_mtime - seconds
    os.utime(run / 'args.yaml', (started, started))
    assert export(run, tmp_path / NAME, **SETTINGS)['training'][0].get('hours') == hours
    told = re.findall('[0-9.]+ hours', (tmp_path / NAME / 'README.md').read_text())
    assert told == ([f'{hours} hours'] if hours else [])


def test_resumed_run_is_told_from_its_beginning(train_run, tmp_path):
    first = train_run()
    second = train_run(epochs=3, resume=str(first / 'last.pth.tar'), data_dir=str(first / 'images'))
    results = export(second, tmp_path / NAME, **SETTINGS)
    assert [stage['epochs'] for stage in results['training']] == [2, 1]
    assert results['train_py']['epoch'] == 3
    assert results['training'][1]['command'].endswith(f' --resume {first.name}/last.pth.tar')
    with (tmp_path / NAME / 'effective_lr.csv').open() as file:
        rows = [row['epoch'] for row in csv.DictReader(file)]
    assert rows == [epoch for epoch in '123' for _ in range(len(rows) // 3)]
    card = ' '.join((tmp_path / NAME / 'README.md').read_text().split())
    assert 'trained from scratch on noise' in card and 'trained on noise only' in card and '3 epochs' in card


@pytest.mark.parametrize('overwritten', [True, False])
def test_run_whose_first_part_is_gone_is_not_told_to_be_from_scratch(train_run, tmp_path, overwritten):
    run = train_run()
    start = run / 'last.pth.tar' if overwritten else run / 'before' / 'last.pth.tar'
    with_options(run, resume=str(start))
    results = export(run, tmp_path / NAME, **SETTINGS)
    name = f'{start.parent.name}/last.pth.tar'
    assert (results['start'], [stage['epochs'] for stage in results['training']]) == ({'name': name}, [2])
    card = ' '.join((tmp_path / NAME / 'README.md').read_text().split())
    assert 'from scratch' not in card and 'noise only' not in card


def test_card_names_teacher_and_data_of_other_runs(train_run, tmp_path, measured):
    options = measured()
    first = train_run(data_dir='/somewhere/else/imgs', kd_model_name='local-dir:/somewhere/resnet50.teacher', epochs=1)
    second = train_run(initial_checkpoint=str(first / 'last.pth.tar'), kd_model_name='resnet18.a1_in1k', epochs=1)
    results = export(second, tmp_path / NAME, **SETTINGS, data_dir=options['data_dir'])
    assert results['besides'] == ['the teacher local-dir:resnet50.teacher', 'the teacher resnet18.a1_in1k',
                                  'the data set imgs']
    assert [stage.get('images') for stage in results['training']] == [None, 12]
    words = 'the teacher local-dir:resnet50.teacher and the teacher resnet18.a1\\_in1k and the data set imgs'
    card = ' '.join((tmp_path / NAME / 'README.md').read_text().split())
    assert f'trained from scratch on noise, with {words}:' in card
    assert f'was trained on noise, and learned from {words}, whose images and terms count too.' in card
    assert 'million images' not in card
    assert '/somewhere' not in card


def test_distributed_run_is_told_by_its_command_and_its_whole_batch(train_run, tmp_path, measured):
    run = train_run(distributed=True, world_size=2, rank=0, local_rank=0, prefetcher=True, grad_accum_steps=3,
                    data_dir='.', train_batches_per_epoch=7)
    results = export(run, tmp_path / NAME, **SETTINGS, data_dir=measured()['data_dir'])
    assert results['training'][0] == {
        'command': 'torchrun --nproc_per_node=2 train.py --config args.yaml --data-dir DATA', 'epochs': 2}
    assert 'momentum 0.9, batch size 48, 2 epochs' in ' '.join((tmp_path / NAME / 'README.md').read_text().split())
    args = yaml.safe_load((tmp_path / NAME / 'args.yaml').read_text())
    assert not args.keys() & {'distributed', 'world_size', 'rank', 'local_rank', 'prefetcher'}
