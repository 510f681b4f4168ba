"""The project's own checkpoints: their names in timm, their weights, and what happens without weights."""
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from checkpoint_files import REPO, fit_results
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg, load_state_dict

import timm_aws
from timm_aws.checkpoint.folder import NAMESPACE_VARIABLE, check_folder, pretrained_cfg
from timm_aws.checkpoint.model_card import model_card
from timm_aws.checkpoint.publish import publish

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / 'weights' / 'ws_resnet50.aws_tin200'
NAMES = ['ws_resnet18.aws_tin200', 'ws_resnet18_aws', 'ws_resnet50.aws_tin200', 'ws_resnet50_aws',
         'ws_seresnet50.aws_tin200', 'ws_seresnet50_aws']


@pytest.fixture(scope='module')
def model():
    return timm.create_model('ws_resnet50_aws', pretrained=True).eval()


@pytest.mark.parametrize('name', NAMES)
def test_both_names_load_the_weights_of_the_folder(name):
    loaded = timm.create_model(name, pretrained=True).state_dict()
    folder = name if '.' in name else f'{name.removesuffix("_aws")}.aws_tin200'
    stored = load_file(ROOT / 'weights' / folder / 'model.safetensors')
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key].to(loaded[key].dtype)) for key in stored)


@pytest.mark.parametrize('folder', sorted((ROOT / 'weights').iterdir()), ids=lambda folder: folder.name)
def test_bundled_folder_is_whole(folder):
    check_folder(folder)


def test_it_has_two_hundred_classes_with_names_and_takes_128_pixels(model):
    assert (model.num_classes, model.fc.out_features) == (200, 200)
    cfg = model.pretrained_cfg
    assert (cfg['input_size'], cfg['crop_pct']) == ((3, 128, 128), 1.0)
    assert len(cfg['label_names']) == len(cfg['label_descriptions']) == 200
    assert cfg['label_descriptions']['n07873807'] == 'pizza, pizza pie'
    assert timm.create_model('ws_resnet50_aws').num_classes == 200
    assert timm.create_model('ws_resnet50').num_classes == 1000


def test_num_classes_adapts_as_everywhere_in_timm(model):
    other = timm.create_model('ws_resnet50_aws', pretrained=True, num_classes=7)
    assert other.fc.weight.shape == (7, 2048)
    assert torch.equal(other.layer4[2].conv3.weight, model.layer4[2].conv3.weight)
    embedding = timm.create_model('ws_resnet50_aws', pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        image = torch.ones(1, 3, 64, 64)
        assert torch.equal(embedding(image), model.forward_head(model.forward_features(image), pre_logits=True))


def _assert_same_logits(name, in_chans, **kwargs):
    """Compares gray pictures in so many equal channels with the same pictures as RGB."""
    gray = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = timm.create_model(name, pretrained=True, **kwargs).eval()(gray.expand(-1, 3, -1, -1))
        model = timm.create_model(name, pretrained=True, in_chans=in_chans, **kwargs).eval()
        error = (model(gray.expand(-1, in_chans, -1, -1)) - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('in_chans', [1, 6])
def test_gray_pictures_give_the_logits_of_the_same_pictures_as_rgb(hub, checkpoint_folder, in_chans):
    publish(checkpoint_folder, REPO)
    for name in ('ws_resnet50_aws', f'local-dir:{checkpoint_folder}', f'hf-hub:{REPO}'):
        _assert_same_logits(name, in_chans)


@pytest.mark.parametrize('in_chans', [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
def test_every_normalization_keeps_its_output_for_gray_pictures(normalization, in_chans):
    torch.manual_seed(0)
    model = timm.create_model('test_ws_resnet', normalization=normalization)
    model(torch.randn(8, 3, 64, 64))  # running statistics of its own
    overlay = {'state_dict': model.state_dict(), 'input_size': (3, 64, 64)}
    _assert_same_logits('test_ws_resnet', in_chans, normalization=normalization, pretrained_cfg_overlay=overlay)


def test_features_only_gives_the_features_of_the_trained_network(model):
    stages = timm.create_model('ws_resnet50_aws', pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        image = torch.ones(1, 3, 64, 64)
        assert torch.equal(stages(image)[-1], model.forward_features(image))


def test_checkpoint_path_and_overlay(model, tmp_path):
    weights = {key: value + 1 if key == 'fc.bias' else value for key, value in model.state_dict().items()}
    torch.save({'state_dict': weights}, tmp_path / 'mine.pth')
    mine = timm.create_model('ws_resnet50_aws', checkpoint_path=str(tmp_path / 'mine.pth'))
    assert torch.equal(mine.fc.bias, model.fc.bias + 1)
    overlay = {'file': str(tmp_path / 'mine.pth')}
    mine = timm.create_model('ws_resnet50_aws', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(mine.fc.bias, model.fc.bias + 1)
    assert torch.equal(load_state_dict(str(BUNDLED / 'model.safetensors'))['fc.bias'], model.fc.bias)


def test_list_of_pretrained_models_tells_the_truth():
    assert timm.list_pretrained('*aws*') == NAMES
    assert timm.list_pretrained('ws_resnet50*') == NAMES[2:4]
    assert timm.list_models('*_aws') == NAMES[1::2]
    for name in timm.list_models(timm_aws.list_models(), pretrained=True):
        assert Path(get_pretrained_cfg(name).file).is_file()


@pytest.mark.parametrize('folder', sorted((ROOT / 'weights').iterdir()), ids=lambda folder: folder.name)
def test_timm_knows_every_folder_and_its_card_is_up_to_date(folder):
    assert folder.name in timm.list_models(timm_aws.list_models(), include_tags=True)
    assert model_card(folder) == (folder / 'README.md').read_text()


def _checkout(root):
    """Makes a checkout of the package whose weights/ is empty; returns how a process finds it."""
    (root / 'timm_aws').symlink_to(ROOT / 'timm_aws')
    (root / 'weights').mkdir()
    return {'cwd': root, 'env': {'PYTHONPATH': str(root), 'PATH': '/usr/bin', 'HF_HUB_OFFLINE': '1'}}


def _copy_without_weights(parent, name=BUNDLED.name):
    return shutil.copytree(BUNDLED, parent / name, ignore=shutil.ignore_patterns('model.safetensors'))


ADD_FOLDERS = '''
import json, timm, timm_aws
from timm_aws import ws_resnet
try:
    timm.create_model('ws_resnet34.aws_a', pretrained=True)
except RuntimeError as error:
    refusal = str(error)
loaded = {name: timm.create_model(name, pretrained=True).fc.bias[0].item() for name in timm.list_pretrained('*aws*')}
print(json.dumps({
    'ours': timm_aws.list_models(),
    'of ws_resnet34': timm.list_models('ws_resnet34*', include_tags=True),
    'pretrained': timm.list_models(timm_aws.list_models(), pretrained=True),
    'loaded': loaded,
    'refusal': refusal,
    'classes without weights': timm.create_model('ws_resnet34.aws_a').num_classes,
    'default': timm.models.get_pretrained_cfg('ws_resnet34').tag,
    'entry point': ws_resnet.ws_resnet34_aws().pretrained_cfg['tag'],
}))
'''


def _add_folder(folder, bias):
    """Makes a checkpoint folder of a ws_resnet34; without weights if the bias of its classifier is None."""
    _copy_without_weights(folder.parent, folder.name)
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg']['tag'] = folder.name.partition('.')[2]
    (folder / 'config.json').write_text(json.dumps({**config, 'architecture': 'ws_resnet34'}))
    if bias is not None:
        model = timm.create_model('ws_resnet34', num_classes=200)
        torch.nn.init.constant_(model.fc.bias, bias)
        save_file(model.state_dict(), folder / 'model.safetensors', metadata={'format': 'pt'})
        fit_results(folder)


def test_adding_a_folder_adds_its_names(tmp_path):
    """As a checkout whose weights/ holds other folders: without weights, with weights, not trained with AWS."""
    checkout = _checkout(tmp_path)
    for tag, bias in (('aws_a', None), ('aws_b', 1.0), ('aws_c', 2.0), ('decay', 3.0)):
        _add_folder(tmp_path / 'weights' / f'ws_resnet34.{tag}', bias)
    found = json.loads(subprocess.run(
        [sys.executable, '-c', ADD_FOLDERS], capture_output=True, text=True, check=True, **checkout).stdout)
    assert [name for name in found['ours'] if name.endswith('_aws')] == ['ws_resnet34_aws']
    assert found['of ws_resnet34'] == [*(f'ws_resnet34.{tag}' for tag in (
        'aws_a', 'aws_b', 'aws_c', 'decay', 'untrained')), 'ws_resnet34_aws']
    assert found['pretrained'] == ['ws_resnet34.aws_b', 'ws_resnet34.aws_c', 'ws_resnet34.decay', 'ws_resnet34_aws']
    assert found['loaded'] == {'ws_resnet34.aws_b': 1.0, 'ws_resnet34.aws_c': 2.0, 'ws_resnet34_aws': 1.0}
    assert (found['default'], found['entry point']) == ('untrained', 'aws_b')
    assert found['classes without weights'] == 200
    assert re.fullmatch(
        r'No pretrained weights exist for ws_resnet34\. Use `pretrained=False` for random init\.\n'
        r'ws_resnet34\.aws_a has been trained, but its weights are not in .*/weights/ws_resnet34\.aws_a: install a '
        r'clone with `pip install -e`, set TIMM_AWS_HUB_NAMESPACE to the .*, or train it again as .*', found['refusal'])


def test_untrained_networks_are_refused_in_timms_words_and_we_name_the_trained_ones():
    with pytest.raises(RuntimeError, match=(
            r'^No pretrained weights exist for ws_resnet101\. Use `pretrained=False` for random init\.\n'
            r"timm.list_pretrained\('\*_aws\*'\) names the networks that have weights\.")):
        timm.create_model('ws_resnet101', pretrained=True)
    assert timm.create_model('ws_resnet101').num_classes == 1000


def test_checkpoint_without_weights_loads_from_the_namespace_that_is_set(hub, monkeypatch, tmp_path):
    folder = _copy_without_weights(tmp_path)
    assert 'hf_hub_id' not in pretrained_cfg(folder)
    monkeypatch.setenv(NAMESPACE_VARIABLE, 'alice')
    cfg = pretrained_cfg(folder)
    assert cfg['hf_hub_id'] == f'alice/{folder.name}'
    assert 'hf_hub_id' not in pretrained_cfg(BUNDLED), 'the bundled file is nearer'
    torch.manual_seed(0)
    source = timm.create_model('ws_resnet50', num_classes=200)
    save_file(source.state_dict(), folder / 'model.safetensors', metadata={'format': 'pt'})
    fit_results(folder)
    publish(folder, f'alice/{folder.name}')
    loaded = timm.create_model('ws_resnet50', pretrained=True, pretrained_cfg={**cfg, 'architecture': 'ws_resnet50'})
    assert torch.equal(loaded.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


def test_names_follow_the_namespace_at_import(tmp_path):
    checkout = _checkout(tmp_path)
    _copy_without_weights(tmp_path / 'weights')
    code = ('import timm, timm_aws; print(timm.list_pretrained("*aws*"), '
            'timm.models.get_pretrained_cfg("ws_resnet50_aws").hf_hub_id)')
    for namespace, expected in (
            ({}, '[] None\n'),
            ({NAMESPACE_VARIABLE: 'lab'},
             "['ws_resnet50.aws_tin200', 'ws_resnet50_aws'] lab/ws_resnet50.aws_tin200\n")):
        checkout['env'].update(namespace)
        assert subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True, **checkout).stdout == expected


def test_damaged_weights_are_not_loaded(tmp_path, monkeypatch):
    folder = shutil.copytree(BUNDLED, tmp_path / BUNDLED.name)
    weights = bytearray((folder / 'model.safetensors').read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder / 'model.safetensors').write_bytes(weights)
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged: sha256 is .*Get the folder again'):
        timm.create_model('ws_resnet50_aws', pretrained=True,
                          pretrained_cfg_overlay={'file': str(folder / 'model.safetensors')})


def test_loading_takes_less_than_two_seconds():
    start = time.perf_counter()
    timm.create_model('ws_resnet50_aws', pretrained=True)
    assert time.perf_counter() - start < 2


WHEEL = '''
import json, timm, timm_aws
model = timm.create_model('ws_resnet50_aws', pretrained=True)
try:
    timm.create_model('ws_seresnet50_aws', pretrained=True)
except RuntimeError as error:
    refusal = str(error)
print(json.dumps([timm_aws.__file__, model.num_classes, model.pretrained_cfg['file'], timm.list_pretrained('*aws*'),
                  refusal]))
'''


def test_wheel_brings_the_weights_of_two_networks_and_loads_them_offline(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation',
                    '--wheel-dir', tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob('timm_aws-*.whl')
    assert wheel.stat().st_size < 90 * 2**20, 'PyPI takes no more than 100 MB'
    site = tmp_path / 'site'
    shutil.unpack_archive(wheel, site, 'zip')
    environment = {'PYTHONPATH': str(site), 'HF_HUB_OFFLINE': '1', 'HOME': str(tmp_path)}
    module, num_classes, file, pretrained, refusal = json.loads(subprocess.run(
        [sys.executable, '-c', WHEEL], capture_output=True, text=True, check=True, cwd=tmp_path,
        env=environment).stdout)
    path = site / 'timm_aws' / 'weights' / BUNDLED.name / 'model.safetensors'
    assert (module, num_classes, file) == (str(site / 'timm_aws' / '__init__.py'), 200, str(path))
    assert pretrained == NAMES[:4]
    assert 'ws_seresnet50.aws_tin200 has been trained, but its weights are not in' in refusal
    assert (site / 'timm_aws_cli.py').is_file()
    assert path.read_bytes() == (BUNDLED / 'model.safetensors').read_bytes()


def test_entry_points_are_public_and_can_be_pickled():
    entry_point = timm_aws.ws_resnet.ws_resnet50_aws
    assert timm.models.model_entrypoint('ws_resnet50_aws') is entry_point
    assert pickle.loads(pickle.dumps(entry_point)) is entry_point
    assert 'ws_resnet50_aws' in timm_aws.ws_resnet.__all__
    assert entry_point().pretrained_cfg['tag'] == 'aws_tin200'
    assert '`ws_resnet50.aws_tin200`' in entry_point.__doc__
    assert timm.is_model('ws_resnet50_aws') and timm.is_model('ws_resnet18_aws')


def test_list_models_holds_what_timm_registered_for_the_module():
    assert timm_aws.list_models() == sorted(timm.list_models(module='ws_resnet'))
