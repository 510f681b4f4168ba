"""Checkpoint folders made of what timm's train.py leaves: contents, precision, choice of weights, refusals."""
import argparse
import contextlib
import csv
import json
import pickle
import signal
import sys

import pytest
import timm
import torch
import yaml
from checkpoint_files import NAME, SETTINGS, best, run_code_of_card, weights_of, with_options
from safetensors.torch import save_file

from timm_aws.checkpoint.export import export
from timm_aws.checkpoint.folder import check_folder
from timm_aws_cli import main


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


@pytest.mark.parametrize('ema', [True, False])
def test_weights_that_are_asked_for_are_taken(train_run, tmp_path, ema):
    run = train_run(with_ema=True)
    main(['export', str(run), str(tmp_path / NAME), '--dataset', 'noise', '--license', 'mit',
          '--ema' if ema else '--no-ema'])
    expected = best(run)['state_dict_ema' if ema else 'state_dict']['fc.weight'].half()
    assert torch.equal(weights_of(tmp_path / NAME)['fc.weight'], expected)


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


def test_one_epoch_is_no_curve(train_run, tmp_path):
    export(train_run(epochs=1), tmp_path / NAME, **SETTINGS)
    check_folder(tmp_path / NAME)
    assert (tmp_path / NAME / 'effective_lr.csv').is_file()
    assert not (tmp_path / NAME / 'effective_lr.png').exists()
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


def test_gray_run_of_a_network_named_with_its_tag(train_run, tmp_path):
    run = train_run()
    checkpoint = best(run)
    checkpoint['state_dict']['conv1.0.weight'] = checkpoint['state_dict']['conv1.0.weight'].sum(1, keepdim=True)
    torch.save(checkpoint, run / 'model_best.pth.tar')
    with_options(run, model='test_ws_resnet.untrained', input_size=[1, 64, 64], img_size=None, mean=None)
    for path in run.glob('checkpoint-*'):
        path.unlink()
    export(run, tmp_path / NAME, **SETTINGS)
    model = timm.create_model(f'local-dir:{tmp_path / NAME}', pretrained=True)
    assert model.conv1[0].in_channels == 1
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data['input_size']) == (1, 64, 64)
    assert data['mean'] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert run_code_of_card(tmp_path / NAME)['probabilities'].shape == (4,)


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
    signal.signal(signum, signal.SIG_IGN if ignored else signal.SIG_DFL)  # under nohup SIGHUP is ignored
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
