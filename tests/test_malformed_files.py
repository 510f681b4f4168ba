"""Mutated, incomplete and hostile checkpoints and configs: refused or loaded, nothing executed, nothing written."""
import contextlib
import copy
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import timm
import torch
from checkpoint_files import NAME, REPO, fit_results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from timm_aws.checkpoint.export import export
from timm_aws.checkpoint.folder import check_folder
from timm_aws.checkpoint.publish import publish
from timm_aws.checkpoint.train_run import load_checkpoint, stages_of


class Payload:
    """Unpickled without care, makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def bomb(tmp_path):
    """A pickle that makes a file, and the check that it was never run; that it works is checked too."""
    marker, path = tmp_path / 'executed', tmp_path / 'bomb.pth'
    path.write_bytes(pickle.dumps({'fc.weight': Payload(marker)}))
    pickle.loads(path.read_bytes())
    marker.unlink()
    yield path
    assert not marker.exists()


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin', 'model.pth'])
def test_pickle_in_a_folder_is_neither_published_nor_executed(hub, copied, bomb, name):
    (copied / 'model.safetensors').unlink()
    shutil.copy(bomb, copied / name)
    with pytest.raises((ValueError, RuntimeError, SafetensorError)):
        timm.create_model(f'local-dir:{copied}', pretrained=True)
    if name == 'model.safetensors':
        fit_results(copied)
    with pytest.raises(ValueError):
        publish(copied, REPO)
    assert not hub.requests


@pytest.mark.parametrize('loading', ['checkpoint_path', 'pretrained'])
def test_export_loads_no_weights_that_the_checkpoint_names(train_run, tmp_path, bomb, loading):
    run = train_run(model_kwargs={loading: str(bomb), 'pretrained_cfg': {'file': str(bomb)}})
    with pytest.raises(ValueError, match=f"is not a checkpoint of timm's train.py: its model_kwargs are .*{loading}"):
        export(run, tmp_path / 'out' / NAME, dataset='noise', license='mit')


@pytest.mark.parametrize('change, message', [
    (lambda content: vars(content['args']).pop('gp'), 'its args lack gp'),
    (lambda content: content.pop('epoch'), 'it needs epoch'),
    (lambda content: content.update(optimizer=None, state_dict=[]), 'it needs state_dict and optimizer'),
])
def test_export_names_what_a_checkpoint_lacks(train_run, tmp_path, change, message):
    path = train_run() / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_checkpoint_that_was_written_over_by_the_run_that_started_from_it_is_one_stage(train_run):
    path = train_run() / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    content['args'].initial_checkpoint = str(path)
    torch.save(content, path)
    assert len(stages_of(load_checkpoint(path))) == 1


@pytest.mark.parametrize('change, message', [
    ({'num_classes': 10 ** 9, 'label_names': [], 'model_args': {}, 'pretrained_cfg': {'input_size': [3, 48, 48]}},
     r'fc.bias is \[4\] in model.safetensors, and \[1000000000\] by config.json'),
    ({'model_args': {'stem_width': 10 ** 6}}, r'bn1.bias is \[32\] in model.safetensors, and \[2000000\] by config'),
    ({'model_args': [1]}, 'model_args'),
    ({'pretrained_cfg': {'num_classes': [4], 'input_size': [3, 48, 48]}}, 'num_classes'),
    ({'pretrained_cfg': {'num_classes': 'four', 'input_size': [3, 48, 48]}}, 'num_classes'),
])
def test_config_that_asks_for_another_network_is_refused_before_it_is_built(hub, copied, change, message):
    config = json.loads((copied / 'config.json').read_text())
    (copied / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        publish(copied, REPO)
    assert not hub.requests


def test_weights_that_give_nan_are_not_published(hub, copied):
    weights = load_file(copied / 'model.safetensors')
    weights['fc.bias'][0] = torch.nan
    save_file(weights, copied / 'model.safetensors', metadata={'format': 'pt'})
    fit_results(copied)
    with pytest.raises(ValueError, match='gives logits that are not finite'):
        publish(copied, REPO)
    assert not hub.requests


# What this process has made, written, removed, started or connected to while `watching`.
_ACTS: list[str] = []
_watching = False
_ACT_EVENTS = {'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod',
               'os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen', 'socket.connect'}
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _watch(event, args):
    if _watching and (event in _ACT_EVENTS or (event == 'open' and args[2] & _WRITE)):
        _ACTS.append(f'{event} {args[0]}')


sys.addaudithook(_watch)


@contextlib.contextmanager
def watching():
    """Raises AssertionError if anything but reading happened meanwhile."""
    global _watching
    _ACTS.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert _ACTS == []


# What timm (which asserts), torch and safetensors raise where a file is not what it should be; no OSError is among it.
LOADING_ERRORS = (ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
                  SafetensorError)
FUZZ = settings(max_examples=110, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5000), st.just(-10 ** 30), st.floats(), st.text(max_size=5),
    st.sampled_from(['../../../etc/passwd', '/dev/zero', 'http://localhost/x.pth', 'hf-hub:a/b', 'local-dir:/', '\0']),
    st.lists(st.integers(-2, 500), max_size=4), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
KEYS = ('architecture', 'num_classes', 'num_features', 'pretrained_cfg', 'label_names', 'label_descriptions',
        'model_args', 'global_pool', 'input_size', 'file', 'url', 'source', 'hf_hub_id', 'hf_hub_filename', 'tag',
        'custom_load', 'state_dict', 'first_conv', 'classifier', 'crop_pct', 'mean', 'fixed_input_size', 'in_chans',
        'checkpoint_path', 'pretrained', 'cache_dir', 'features_only', 'block_args', 'act_layer', 'norm_layer')


@st.composite
def mutations_of_config(draw):
    """Draws changes of a config: where in it, which key, and what becomes of it; or bytes of the text cut out."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 30), st.binary(max_size=8)), min_size=1,
                             max_size=3))
    place = st.sampled_from([(), ('pretrained_cfg',), ('model_args',)])
    return draw(st.lists(st.tuples(place, st.sampled_from(KEYS), st.one_of(st.just('remove'), HOSTILE)), min_size=1,
                         max_size=3))


def _mutate_config(text, changes):
    if isinstance(changes[0][0], int):
        data = bytearray(text.encode())
        for start, length, new in changes:
            data[start:start + length] = new
        return bytes(data)
    config = json.loads(text)
    for place, key, value in changes:
        target = config.setdefault(place[0], {}) if place else config
        if not isinstance(target, dict):
            continue
        target.pop(key, None)
        if value != 'remove':
            target[key] = copy.deepcopy(value)
    return json.dumps(config).encode()


def _load_watched(folder):
    """Checks and loads a folder; nothing but the errors of loading may come of it, and nothing may be written."""
    outcome = []
    with watching():
        for step, errors in ((check_folder, ValueError), (_create, LOADING_ERRORS)):
            try:
                step(folder)
                outcome.append('fine')
            except errors:
                outcome.append('refused')
    return outcome


def _create(folder):
    timm.create_model(f'local-dir:{folder}', pretrained=True)


@pytest.fixture
def fuzzed(checkpoint_folder, copied):
    """A folder to spoil, loaded once so that nothing is left to be imported; and what has become of it."""
    outcomes = []
    _create(copied)
    assert _load_watched(copied) == ['fine', 'fine']
    before = {path: path.read_bytes() for path in checkpoint_folder.parent.rglob('*') if path.is_file()}
    yield copied, outcomes
    assert {path: path.read_bytes() for path in before} == before
    assert os.listdir(copied.parent) == [NAME]
    assert len(outcomes) >= 100
    assert ['refused', 'refused'] in outcomes


def test_fuzzed_configs_are_refused_or_loaded_and_nothing_is_written(hub, fuzzed):
    folder, outcomes = fuzzed
    text = (folder / 'config.json').read_text()

    @FUZZ
    @given(mutations_of_config())
    def fuzz(changes):
        (folder / 'config.json').write_bytes(_mutate_config(text, changes))
        outcomes.append(_load_watched(folder))

    fuzz()
    assert ['fine', 'fine'] in outcomes
    assert not hub.requests


@st.composite
def mutations_of_weights(draw):
    """Draws changes of a safetensors file: of its length field, of its header, or of any bytes."""
    kind = draw(st.sampled_from(['length', 'header', 'tensor', 'bytes', 'cut']))
    if kind == 'length':
        return kind, draw(st.sampled_from([0, 1, 7, 10 ** 6, 2 ** 31, 2 ** 63, 2 ** 64 - 1]))
    if kind == 'tensor':
        values = st.one_of(HOSTILE, st.sampled_from(['I8', 'F64', 'BF16', 'X']), st.lists(
            st.integers(0, 2 ** 64), max_size=3))
        return kind, draw(st.sampled_from(['dtype', 'shape', 'data_offsets', 'extra'])), draw(values)
    return kind, draw(st.integers(0, 10 ** 4)), draw(st.binary(min_size=1, max_size=8))


def _mutate_weights(data, change):
    size, = struct.unpack('<Q', data[:8])
    kind, *rest = change
    if kind == 'length':
        return struct.pack('<Q', rest[0]) + data[8:]
    if kind == 'tensor':
        header = json.loads(data[8:8 + size])
        header['fc.weight'][rest[0]] = rest[1]
        text = json.dumps(header).encode()
        return struct.pack('<Q', len(text)) + text + data[8 + size:]
    position, new = rest
    if kind == 'cut':
        return data[:position]
    start = 8 + position % size if kind == 'header' else position * len(data) // 10 ** 4
    return data[:start] + new + data[start + len(new):]


def test_fuzzed_weights_are_refused_or_loaded_and_nothing_is_written(hub, fuzzed):
    folder, outcomes = fuzzed
    data = (folder / 'model.safetensors').read_bytes()

    @FUZZ
    @given(mutations_of_weights(), st.booleans())
    def fuzz(change, fit):
        (folder / 'model.safetensors').write_bytes(_mutate_weights(data, change))
        if fit:
            fit_results(folder)
        outcomes.append(_load_watched(folder))

    fuzz()
    assert ['fine', 'refused'] in outcomes, 'a digest that fits does not make weights of it'
    assert not hub.requests
