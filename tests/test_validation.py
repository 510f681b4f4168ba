"""The images of a run, and timm's validate.py on what was exported: choice of weights, half precision, data sets."""
import json
import shutil
import struct

import pytest
import torch
import yaml
from checkpoint_files import NAME, SETTINGS, best, weights_of

from timm_aws.checkpoint.export import export
from timm_aws_cli import main


@pytest.mark.parametrize('top1, ema', [({'model': 50, 'ema': 51, 'half': 51}, True),
                                       ({'model': 52, 'ema': 51, 'half': 52}, False)])
def test_weights_that_validate_better_are_taken(train_run, tmp_path, measured, top1, ema):
    run = train_run(with_ema=True)
    assert export(run, tmp_path / NAME, **SETTINGS, **measured(**top1))['weights']['ema'] is ema
    expected = best(run)['state_dict_ema' if ema else 'state_dict']['fc.weight'].half()
    assert torch.equal(weights_of(tmp_path / NAME)['fc.weight'], expected)
    assert not torch.equal(best(run)['state_dict']['fc.weight'], best(run)['state_dict_ema']['fc.weight'])


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
