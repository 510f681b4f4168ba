"""Checkpoint folders made of what timm's train.py leaves: contents, precision, choice of weights, refusals."""
import argparse
import contextlib
import csv
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from checkpoint_files import NAME
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_aws.checkpoint.export import export
from timm_aws.checkpoint.folder import check_folder
from timm_aws_cli import main

SETTINGS = {'dataset': 'noise', 'license': 'apache-2.0'}


def best(run):
    return torch.load(run / 'model_best.pth.tar', weights_only=False)


def weights_of(folder):
    return load_file(folder / 'model.safetensors')


# Stands in for timm's script, with its options and its results file: says what WEIGHTS_TOP1 names for each choice, and
# leaves what it was asked beside it.
VALIDATE = '''
import argparse, json, timm
parser = argparse.ArgumentParser()
for name in ('data-dir', 'dataset', 'split', 'class-map', 'input-img-mode', 'input-key', 'target-key', 'num-samples',
             'model', 'checkpoint', 'device', 'workers', 'results-file', 'results-format'):
    parser.add_argument('--' + name)
parser.add_argument('--in-chans', type=int, default=3)
parser.add_argument('--pretrained', action='store_true')
parser.add_argument('--use-ema', action='store_true')
args = parser.parse_args()
timm.create_model(args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint, in_chans=args.in_chans)
top1 = {top1}['half' if args.pretrained else 'ema' if args.use_ema else 'model']
json.dump(dict(top1=top1, top5=90.0, img_size=48, crop_pct=1.0, interpolation='bicubic', args=str(args)),
          open(args.results_file, 'w'))
json.dump(vars(args), open(__file__ + '.json', 'w'))
'''


@pytest.fixture
def measured(tmp_path):
    """Options that make export measure: what it will find for the two kinds of weights and in half precision."""
    for split, count in (('train', 3), ('val', 2)):
        for label in 'abcd':
            folder = tmp_path / 'images' / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f'{index}.png')

    def options(**top1):
        (tmp_path / 'validate.py').write_text(VALIDATE.replace('{top1}', repr(top1)))
        return {'data_dir': tmp_path / 'images', 'validate_py': tmp_path / 'validate.py'}

    return options


def test_folder_is_whole_and_loads_into_the_same_network(train_run, tmp_path):
    run = train_run()
    export(run, tmp_path / NAME, **SETTINGS)
    check_folder(tmp_path / NAME)
    stored, trained = weights_of(tmp_path / NAME), best(run)['state_dict']
    assert stored.keys() == trained.keys()
    for name, weight in trained.items():
        half = weight.ndim >= 2
        assert stored[name].dtype == (torch.float16 if half else weight.dtype), name
        assert torch.equal(stored[name], weight.half() if half else weight), name
    model = timm.create_model(f'local-dir:{tmp_path / NAME}', pretrained=True)
    assert (model.num_classes, tuple(model.pretrained_cfg['input_size'])) == (4, (3, 48, 48))
    assert model.fc.weight.dtype == torch.float32


def test_config_is_what_timm_reads(checkpoint_folder):
    config = json.loads((checkpoint_folder / 'config.json').read_text())
    assert config['architecture'] == 'test_ws_resnet'
    assert config['num_classes'] == 4
    assert config['label_names'] == ['n0', 'n1', 'n2', 'n3']
    assert config['label_descriptions']['n2'] == 'thing 2'
    cfg = config['pretrained_cfg']
    assert (cfg['tag'], cfg['license'], cfg['paper_ids']) == ('aws_noise', 'apache-2.0', 'doi:10.1609/aaai.v34i04.5904')
    assert (cfg['input_size'], cfg['crop_pct'], cfg['interpolation']) == ([3, 48, 48], 1.0, 'bicubic')
    assert cfg['pool_size'] == [2, 2]


def test_number_of_classes_stands_in_one_place(checkpoint_folder):
    """transformers passes num_classes and model_args to timm.create_model: the key in both is a TypeError."""
    config = json.loads((checkpoint_folder / 'config.json').read_text())
    model = timm.create_model(config['architecture'], **config.get('model_args', {}), num_classes=config['num_classes'])
    assert model.num_classes == 4
    assert timm.create_model(f'local-dir:{checkpoint_folder}').num_classes == 4


def test_transformers_loads_an_export(checkpoint_folder, monkeypatch):
    from transformers import AutoModelForImageClassification

    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForImageClassification.from_pretrained(checkpoint_folder).eval()
    ours = timm.create_model(f'local-dir:{checkpoint_folder}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(theirs(images).logits, ours(images))
    assert theirs.config.id2label[2] == 'n2'


def test_images_may_be_of_another_size_than_in_training(train_run, tmp_path):
    main(['export', str(train_run()), str(tmp_path / NAME), '--dataset', 'noise', '--license', 'mit',
          '--img-size', '64'])
    config = json.loads((tmp_path / NAME / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 64, 64]
    assert yaml.safe_load((tmp_path / NAME / 'args.yaml').read_text())['img_size'] == 48


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


def test_card_has_the_measured_accuracy_in_words_and_in_the_model_index(train_run, tmp_path, measured):
    export(train_run(), tmp_path / NAME, **SETTINGS, **measured(model=50.03, half=50.0))
    card = ModelCard.load(tmp_path / NAME / 'README.md')
    found = {result.metric_name: (result.metric_value, result.dataset_name) for result in card.data.eval_results}
    assert found == {'top-1 (%)': (50.0, 'noise'), 'top-5 (%)': (90.0, 'noise')}
    assert '| 50.00 % | 90.00 % | 48 px |' in card.text
    assert 'no ImageNet-1k model' in card.text


@pytest.mark.parametrize('top1, ema', [({'model': 50, 'ema': 51, 'half': 51}, True),
                                       ({'model': 52, 'ema': 51, 'half': 52}, False)])
def test_weights_that_validate_better_are_taken(train_run, tmp_path, measured, top1, ema):
    run = train_run(with_ema=True)
    assert export(run, tmp_path / NAME, **SETTINGS, **measured(**top1))['weights']['ema'] is ema
    expected = best(run)['state_dict_ema' if ema else 'state_dict']['fc.weight'].half()
    assert torch.equal(weights_of(tmp_path / NAME)['fc.weight'], expected)
    assert not torch.equal(best(run)['state_dict']['fc.weight'], best(run)['state_dict_ema']['fc.weight'])


@pytest.mark.parametrize('ema', [True, False])
def test_weights_that_are_asked_for_are_taken(train_run, tmp_path, ema):
    run = train_run(with_ema=True)
    main(['export', str(run), str(tmp_path / NAME), '--dataset', 'noise', '--license', 'mit',
          '--ema' if ema else '--no-ema'])
    expected = best(run)['state_dict_ema' if ema else 'state_dict']['fc.weight'].half()
    assert torch.equal(weights_of(tmp_path / NAME)['fc.weight'], expected)


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


class Trap:
    def __reduce__(self):
        return (sys.exit, ('the pickle was executed',))


def write_trap(folder):
    path = folder / 'last.pth.tar'
    path.write_bytes(pickle.dumps(Trap()))


def write_zip_trap(folder):
    torch.save({'state_dict': {}, 'args': Trap()}, folder / 'last.pth.tar')


@pytest.mark.parametrize('damage, message', [
    (lambda run: (run / 'last.pth.tar').unlink(), 'is neither a checkpoint nor a folder'),
    (lambda run: (run / 'last.pth.tar').write_bytes(b''), 'cannot be read as a checkpoint'),
    (lambda run: (run / 'last.pth.tar').write_text('epoch: 1'), 'cannot be read as a checkpoint'),
    (lambda run: (run / 'last.pth.tar').write_bytes((run / 'last.pth.tar').read_bytes()[:5000]), 'cannot be read'),
    (lambda run: torch.save({'model': 1}, run / 'last.pth.tar'), "is not a checkpoint of timm's train.py"),
    (write_trap, 'cannot be read as a checkpoint'),
    (write_zip_trap, 'cannot be read as a checkpoint'),
])
def test_what_is_no_checkpoint_is_refused_in_one_line(train_run, tmp_path, capsys, damage, message):
    run = train_run()
    (run / 'model_best.pth.tar').unlink()
    damage(run)
    with pytest.raises(SystemExit) as exit:
        main(['export', str(run), str(tmp_path / NAME), '--dataset', 'noise', '--license', 'mit'])
    error = capsys.readouterr().err
    assert exit.value.code == 1
    assert error.count('\n') == 1
    assert error.startswith('timm-aws: ')
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_refusals_name_what_is_wrong_and_leave_nothing(train_run, tmp_path, measured):
    run = train_run()

    def refused(out, match, source=run, **options):
        with pytest.raises(ValueError, match=match):
            export(source, tmp_path / out, **{**SETTINGS, **options})
        assert not [path for path in tmp_path.iterdir() if 'resnet' in path.name]

    refused('test_ws_resnet', r'must be named test_ws_resnet\.<tag>')
    refused('ws_resnet18.aws_noise', r'must be named test_ws_resnet\.<tag>')
    refused(NAME, 'holds no averaged weights', ema=True)
    refused(NAME, 'choose with ema=True', source=train_run(with_ema=True))
    refused(NAME, 'needs data_dir', validate_py=tmp_path / 'validate.py')
    images = {'data_dir': tmp_path, 'validate_py': tmp_path / 'validate.py'}
    refused(NAME, r'has no val_split: leave it out\.$', source=train_run(val_split='', epochs=1), **images)
    refused(NAME, r'the split batch norms of --split-bn, which', source=train_run(split_bn=True, epochs=1))
    refused(NAME, f'^data_dir {tmp_path}/none does not exist: give one that does', data_dir=tmp_path / 'none')
    refused(NAME, f'^validate_py {tmp_path}/validate.py does not exist: give one that does', **images)
    refused(NAME, r"^dataset must name what the network was trained on, not ' '\.$", dataset=' ')
    for size in (-5, 0, 5000):
        refused(NAME, f'^img_size must be 1 to 4096 pixels, not {size}', img_size=size)
    for license in ('my own', 'banana', 'Apache-2.0', ''):
        refused(NAME, f"license must be an SPDX identifier .*{license!r}", license=license)
    (tmp_path / 'labels.tsv').write_text('')
    refused(NAME, 'names 0 classes, the network has 4', labels=tmp_path / 'labels.tsv')
    (tmp_path / 'labels.tsv').write_text('name\twords\nn0\tone\n')
    refused(NAME, 'names 1 classes, the network has 4', labels=tmp_path / 'labels.tsv')
    for text, wrong in (('n0\n\nn1\nn2\n', "'' in line 3"), ('n0\nn1\nn1\nn2\n', "'n1' in line 4")):
        (tmp_path / 'labels.tsv').write_text(f'name\twords\n{text}')
        refused(NAME, f'^{tmp_path}/labels.tsv must give each class a name of its own, not {wrong}',
                labels=tmp_path / 'labels.tsv')
    (tmp_path / 'labels.tsv').write_text('name\twords\n', encoding='utf-16')
    for path in (tmp_path / 'labels.tsv', tmp_path):
        refused(NAME, f'^labels {path} cannot be read: give a text file in UTF-8', labels=path)
    large = train_run(epochs=1, scale=1e9)
    refused(NAME, r'fc.weight of .* is not finite in half precision: give full_precision=True', source=large)
    export(large, tmp_path / 'out' / NAME, dataset='noise', license='other', full_precision=True)
    assert torch.equal(weights_of(tmp_path / 'out' / NAME)['fc.weight'], best(large)['state_dict']['fc.weight'])


@pytest.mark.parametrize('fourth, class_map', [('d', ''), ('a', 'map.txt')])
def test_half_precision_that_turns_right_images_wrong_is_refused_and_full_precision_taken(
        train_run, tmp_path, monkeypatch, measured, fourth, class_map):
    """A classifier so small that half precision makes it 0: every image goes from the fourth class to the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'map.txt').write_text('d\nc\nb\na\n')
    run = train_run(class_map=class_map and str(tmp_path / class_map))
    checkpoint = best(run)
    for key, value in (('fc.weight', 0.), ('fc.bias', 0.)):
        checkpoint['state_dict'][key].fill_(value)
    checkpoint['state_dict']['fc.weight'][3] = 1e-9
    torch.save(checkpoint, run / 'model_best.pth.tar')
    options = measured(model=50.0, half=50.0)
    for index in range(2, 14):
        shutil.copy(tmp_path / f'images/val/{fourth}/0.png', tmp_path / f'images/val/{fourth}/{index}.png')
    with pytest.raises(ValueError, match=r'turns 14 right images wrong and 2 wrong ones right, of 20: .*--full-'):
        export(run, tmp_path / NAME, **SETTINGS, **options)
    main(['export', str(run), str(tmp_path / NAME), '--dataset', 'noise', '--license', 'mit', '--full-precision',
          '--data-dir', str(options['data_dir']), '--validate', str(options['validate_py'])])
    assert torch.equal(weights_of(tmp_path / NAME)['fc.weight'], checkpoint['state_dict']['fc.weight'])
    assert 'metrics_in_full_precision' not in json.loads((tmp_path / NAME / 'results.json').read_text())
    assert 'half precision' not in (tmp_path / NAME / 'README.md').read_text()
    assert json.loads((tmp_path / 'validate.py.json').read_text())['class_map'] == (
        str(tmp_path / class_map) if class_map else None)
    assert yaml.safe_load((tmp_path / NAME / 'args.yaml').read_text())['class_map'] == class_map


def test_gray_images_of_torchvision_are_counted_and_validated(train_run, tmp_path, measured):
    raw = tmp_path / 'images/MNIST/raw'
    options = measured(model=50.0, half=50.0)
    raw.mkdir(parents=True)
    for part, count in (('train', 6), ('t10k', 5)):
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 2051, count, 8, 8) + bytes(count * 64))
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 2049, count) + bytes(count))
    results = export(train_run(in_chans=1, dataset='torch/mnist'), tmp_path / NAME, **SETTINGS, **options)
    assert (results['training'][0]['images'], results['metrics']['images']) == (2 * 6, 5)
    asked = json.loads((tmp_path / 'validate.py.json').read_text())
    assert (asked['in_chans'], asked['dataset']) == (1, 'torch/mnist')


def test_images_that_cannot_be_counted_are_left_out(train_run, tmp_path, measured, caplog):
    run = train_run(dataset='wds/nothing', val_num_samples=7)
    results = export(run, tmp_path / NAME, **SETTINGS, **measured(model=50.0, half=50.0), full_precision=True)
    assert 'images' not in {**results['training'][0], **results['metrics']}
    assert 'On the validation images of noise,' in (tmp_path / NAME / 'README.md').read_text()
    assert json.loads((tmp_path / 'validate.py.json').read_text())['num_samples'] == '7'
    assert {message.partition(':')[0] for message in caplog.messages} == {
        f'The {part} images in {tmp_path / "images"} are not counted' for part in ('train', 'val')}


def test_epsilon_of_batch_norm_stays(train_run, tmp_path):
    export(train_run(network='test_efficientnet', bn_eps=0.1), tmp_path / 'test_efficientnet.aws_noise', **SETTINGS)
    folder = tmp_path / 'test_efficientnet.aws_noise'
    assert json.loads((folder / 'config.json').read_text())['model_args']['bn_eps'] == 0.1
    assert timm.create_model(f'local-dir:{folder}').bn1.eps == 0.1


def test_without_matplotlib_there_is_no_picture(train_run, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'timm_aws.plot', None)
    export(train_run(), tmp_path / NAME, **SETTINGS)
    check_folder(tmp_path / NAME)
    assert caplog.messages == ['There is no effective_lr.png: install timm_aws[figures] for the picture.']
    assert (tmp_path / NAME / 'effective_lr.csv').is_file()
    assert 'effective_lr.png' not in (tmp_path / NAME / 'README.md').read_text()


def test_damaged_checkpoints_beside_the_best_are_left_out_of_the_curves(train_run, tmp_path):
    run = train_run(epochs=3)
    (run / 'checkpoint-0.pth.tar').write_bytes(b'')
    export(run, tmp_path / NAME, **SETTINGS)
    with (tmp_path / NAME / 'effective_lr.csv').open() as file:
        assert {row['epoch'] for row in csv.DictReader(file)} == {'2', '3'}


def test_what_is_there_already_stays(train_run, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / 'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='exists already: move it away'):
        export(train_run(), tmp_path / NAME, **SETTINGS)
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ['mine.txt']


def test_failing_validation_leaves_nothing(train_run, tmp_path, measured, capfd):
    options = measured()  # the script will look for a figure in vain
    with pytest.raises(SystemExit):
        main(['export', str(train_run()), str(tmp_path / NAME), '--dataset', 'noise', '--license', 'mit',
              '--data-dir', str(options['data_dir']), '--validate', str(options['validate_py'])])
    error = capfd.readouterr().err
    assert 'KeyError' in error
    script = options['validate_py']
    assert error.splitlines()[-1] == f'timm-aws: {script} failed with exit code 1: see its own words above.'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['images', 'validate.py']


def test_card_of_an_unnamed_network_prints_indices(train_run, tmp_path):
    export(train_run(), tmp_path / NAME, **SETTINGS)
    assert "print(f'{probabilities[index]:.1%}', index)" in (tmp_path / NAME / 'README.md').read_text()


def _settings_of(run, **args):
    """Changes the options in a run's best checkpoint; returns its path."""
    checkpoint = best(run)
    vars(checkpoint['args']).update(args)
    torch.save(checkpoint, run / 'model_best.pth.tar')
    return run / 'model_best.pth.tar'


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
    results = export(train_run(initial_checkpoint=str(start)), tmp_path / NAME, **SETTINGS)
    (stage,) = results['training']
    assert stage['command'].endswith(f'--initial-checkpoint {start.parent.name}/{start.name}')
    expected = {'name': NAME, 'dataset': 'noise', 'license': 'apache-2.0'} if kind == NAME else {
        'name': f'before/{kind}'}
    assert results['start'] == expected
    card = ' '.join((tmp_path / NAME / 'README.md').read_text().split())
    assert 'from scratch' not in card
    assert f'trained further from the weights {expected["name"]}'.replace('_', r'\_') in card
    assert 'noise only' not in card


def test_run_that_distils_features_has_curves(train_run, tmp_path):
    """Its optimizer names the weights as parts of a module that holds a projection too; the checkpoint does not."""
    plain, run = train_run(), train_run()
    for path in run.glob('checkpoint-*.pth.tar'):
        checkpoint = torch.load(path, weights_only=False)
        for group in checkpoint['optimizer']['param_groups']:
            group['param_names'] = [f'student.{name}' for name in group['param_names']] + ['projection.weight']
        torch.save(checkpoint, path)
    export(plain, tmp_path / 'plain' / NAME, **SETTINGS)
    export(run, tmp_path / NAME, **SETTINGS)
    assert (tmp_path / NAME / 'effective_lr.csv').read_text() == (
        tmp_path / 'plain' / NAME / 'effective_lr.csv').read_text()


def test_pretrained_run_names_its_weights(train_run, tmp_path):
    results = export(train_run(pretrained=True), tmp_path / NAME, **SETTINGS)
    assert results['start'] == {'name': 'test_ws_resnet.untrained', 'license': 'apache-2.0'}
    run = train_run(pretrained=False, pretrained_path='ignored.pth')
    assert 'start' not in export(run, tmp_path / 'scratch' / NAME, **SETTINGS)
    assert 'trained from scratch on noise' in ' '.join((tmp_path / 'scratch' / NAME / 'README.md').read_text().split())


def test_gray_run_of_a_network_named_with_its_tag(train_run, tmp_path):
    run = train_run()
    checkpoint = best(run)
    checkpoint['state_dict']['conv1.0.weight'] = checkpoint['state_dict']['conv1.0.weight'].sum(1, keepdim=True)
    torch.save(checkpoint, run / 'model_best.pth.tar')
    _settings_of(run, model='test_ws_resnet.untrained', input_size=[1, 64, 64], img_size=None, mean=None)
    for path in run.glob('checkpoint-*'):
        path.unlink()
    export(run, tmp_path / NAME, **SETTINGS)
    model = timm.create_model(f'local-dir:{tmp_path / NAME}', pretrained=True)
    assert model.conv1[0].in_channels == 1
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data['input_size']) == (1, 64, 64)
    assert data['mean'] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert run_code_of_card(tmp_path / NAME)['probabilities'].shape == (4,)


def test_run_of_a_checkpoint_folder(train_run, checkpoint_folder, tmp_path):
    run = train_run(model=f'local-dir:{checkpoint_folder}', pretrained=True)
    assert export(run, tmp_path / NAME, **SETTINGS)['start'] == {
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
    _settings_of(run, resume=str(start))
    results = export(run, tmp_path / NAME, **SETTINGS)
    name = f'{start.parent.name}/last.pth.tar'
    assert (results['start'], [stage['epochs'] for stage in results['training']]) == ({'name': name}, [2])
    card = ' '.join((tmp_path / NAME / 'README.md').read_text().split())
    assert 'from scratch' not in card and 'noise only' not in card


def run_code_of_card(folder):
    """Runs the card's Python code on an image; returns the variables."""
    image, names = folder.parent / 'image.jpg', {}
    Image.new('RGB', (60, 50)).save(image)
    code = '\n'.join(re.findall('```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL))
    assert f'hf-hub:OWNER/{folder.name}' in re.findall("'(.*?)'", code)
    exec(code.replace(f'hf-hub:OWNER/{folder.name}', f'local-dir:{folder}').replace('image.jpg', str(image)), names)
    return names


def test_code_of_the_card_runs_whatever_the_user_has_typed(train_run, tmp_path, capsys):
    """With fewer classes than five, and names that would be a heading, HTML, a picture and code."""
    hostile = 'x\n# Heading\n<script>alert(1)</script> ![p](http://evil) `code`'
    labels = ["'+__import__('os').getcwd()+'", '{1/0}', '"""\\', '```']
    (tmp_path / 'labels.tsv').write_text('name\twords\n' + ''.join(f'{name}\t<b>{name}\n' for name in labels))
    export(train_run(opt=hostile, opt_kwargs={hostile: hostile}), tmp_path / NAME, license='mit', dataset=hostile,
           labels=tmp_path / 'labels.tsv')
    card = ModelCard.load(tmp_path / NAME / 'README.md')
    assert '\n# Heading' not in card.text
    assert not re.search(r'(?<!\\)(<script|\[p\]|`code)', card.text)
    names = run_code_of_card(tmp_path / NAME)
    assert names['probabilities'].shape == (4,)
    assert names['embedding'].shape == (1, 96)
    assert '  # (1, 96)\n' in card.text
    printed = capsys.readouterr().out.splitlines()
    assert {line.partition('% ')[2] for line in printed} == {f'{name} <b>{name}' for name in labels}


@pytest.mark.parametrize('network, embedding, stages', [
    ('test_efficientnet', 256, 5), ('mobilenetv3_small_050', 1024, 5), ('test_nfnet', 192, 5)])
def test_card_of_a_network_of_timm_needs_no_plugin(train_run, tmp_path, network, embedding, stages):
    folder = tmp_path / f'{network}.aws_noise'
    export(train_run(network=network, epochs=1), folder, **SETTINGS)
    card = ModelCard.load(folder / 'README.md')
    assert card.data.tags == ['image-classification', 'timm', 'timm_aws']
    assert f'`{network}` of [timm](https://github.com/huggingface/pytorch-image-models), trained' in card.text
    assert 'pip install timm\n' in card.text
    assert not re.search('import timm_aws|plugin|Unknown model|folds', card.text)
    names = run_code_of_card(folder)
    assert (names['embedding'].shape, len(names['maps'])) == ((1, embedding), stages)
    assert f'  # (1, {embedding})\n' in card.text


def test_code_of_the_card_runs_with_any_number_of_channels(train_run, tmp_path):
    export(train_run(in_chans=4, epochs=1), tmp_path / NAME, **SETTINGS)
    assert run_code_of_card(tmp_path / NAME)['probabilities'].shape == (4,)


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


def test_card_tells_no_momentum_of_adam(train_run, tmp_path):
    run = train_run(opt='aws_adam')
    checkpoint = best(run)
    for group in checkpoint['optimizer']['param_groups']:
        del group['momentum']
    torch.save(checkpoint, run / 'model_best.pth.tar')
    export(run, tmp_path / NAME, **SETTINGS)
    assert r'aws\_adam (alpha 0.0025), batch size 8' in (tmp_path / NAME / 'README.md').read_text()


@pytest.mark.parametrize('tag', ["x'+__import__('os').getcwd()+'", 'a b', 'x\ny', '-x', '<b>'])
def test_hostile_tags_are_refused(train_run, tmp_path, tag):
    with pytest.raises(ValueError, match='must be named'):
        export(train_run(), tmp_path / f'test_ws_resnet.{tag}', **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_averaged_weights_that_do_not_fit_are_refused(train_run, tmp_path):
    run = train_run(with_ema=True)
    checkpoint = best(run)
    checkpoint['state_dict_ema']['fc.bias'] = torch.zeros(5)
    torch.save(checkpoint, run / 'model_best.pth.tar')
    with pytest.raises(RuntimeError, match=r'size mismatch for fc\.bias'):
        export(run, tmp_path / NAME, **SETTINGS, ema=True)
    assert list(tmp_path.iterdir()) == []


def test_blank_lines_at_the_end_of_the_labels_do_not_count(train_run, tmp_path):
    labels = tmp_path / 'labels.tsv'
    labels.write_text('name\twords\n' + ''.join(f'n{index}\tthing\n' for index in range(4)) + '\n \n')
    export(train_run(), tmp_path / NAME, **SETTINGS, labels=labels)
    assert json.loads((tmp_path / NAME / 'config.json').read_text())['label_names'] == ['n0', 'n1', 'n2', 'n3']


def test_two_exports_at_once_leave_the_first(train_run, tmp_path, monkeypatch):
    run = train_run()

    def card(folder):
        (tmp_path / NAME).mkdir()
        (tmp_path / NAME / 'first').touch()
        return ''

    monkeypatch.setattr('timm_aws.checkpoint.export.model_card', card)
    with pytest.raises(ValueError, match='exists already: move it away'):
        export(run, tmp_path / NAME, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ['first']


@pytest.mark.parametrize('signum, ignored', [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGHUP, True)])
def test_signals_leave_no_hidden_folder(train_run, tmp_path, monkeypatch, signum, ignored):
    run = train_run()
    monkeypatch.setattr('timm_aws.checkpoint.export.model_card', lambda folder: signal.raise_signal(signum) or '')
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP)}
    if ignored:
        signal.signal(signum, signal.SIG_IGN)
    try:
        with contextlib.nullcontext() if ignored else pytest.raises(SystemExit, match=str(128 + signum)):
            main(['export', str(run), str(tmp_path / NAME), '--dataset', 'noise', '--license', 'mit'])
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert [path.name for path in tmp_path.iterdir()] == ([NAME] if ignored else [])


@pytest.mark.parametrize('arguments, message', [
    (['export', 'nofolder', NAME, '--dataset', 'x', '--license', 'mit'], 'nofolder does not exist'),
    (['export', 'record.csv', NAME, '--dataset', 'x', '--license', 'mit'],
     'record.csv cannot be read as a checkpoint: it is damaged, or not written by torch.save'),
    (['plot', '.'], '. is not a file: give the CSV file of a record'),
])
def test_messages_say_what_to_do(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'record.csv').write_text('step,layer\n')
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_wrong_weights_for_the_architecture(train_run, tmp_path):
    run = train_run()
    checkpoint = best(run)
    checkpoint['args'] = argparse.Namespace(**{**vars(checkpoint['args']), 'num_classes': 5})
    torch.save(checkpoint, run / 'model_best.pth.tar')
    with pytest.raises(RuntimeError, match='size mismatch for fc'):
        export(run, tmp_path / NAME, **SETTINGS)


def test_damaged_folder_is_not_loaded(train_run, tmp_path):
    folder = tmp_path / NAME
    export(train_run(), folder, **SETTINGS)
    weights = weights_of(folder)
    weights['fc.bias'][0] += 1
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged: sha256 is'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert timm.create_model(f'local-dir:{folder}').num_classes == 4
