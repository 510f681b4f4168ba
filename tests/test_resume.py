"""Interrupted training ends where uninterrupted does, bit for bit; states move to torch's optimizers and back."""
import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import resume_worker
import timm.optim
import torch
from PIL import Image
from resume_worker import CASES, PATHS, SAVED_AT, STEPS, train

from timm_aws import AwsAdam, AwsSGD
from timm_aws.checkpoint.train_run import load_checkpoint
from timm_aws.wrap_optimizer import aws_optimizer

AwsLion = aws_optimizer(timm.optim.Lion)
EAGER = [path for path in PATHS if path != 'compiled']


def _equal(first, second):
    if torch.is_tensor(first):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first == second


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
    """Every case saved in the middle, and ended by a process of its own: one for all, as it imports for seconds."""
    folder = tmp_path_factory.mktemp('resume')
    torch.save({name: train(case, None, SAVED_AT) for name, case in CASES.items()}, folder / 'saved.pt')
    subprocess.run(
        [sys.executable, resume_worker.__file__, str(folder / 'saved.pt'), str(folder / 'ended.pt')],
        check=True, timeout=600)
    return torch.load(folder / 'ended.pt')


@pytest.mark.parametrize('name', CASES)
def test_resume_in_a_new_process_is_exact(resumed, name):
    expected = train(CASES[name], None, STEPS)
    assert _equal(resumed[name], expected)
    if name.endswith('amp'):  # one good step, one skipped, four good
        assert expected['scaler']['scale'] == 2. ** 10 / 2 * 2 * 2
    steps = [float(state['step']) for state in expected['optimizer']['state'].values() if 'step' in state]
    assert set(steps) <= {STEPS - 1. if name.endswith('amp') else STEPS}


def _problem():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (5, 4), (4,)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.2) for shape in shapes]
    return params, [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(STEPS)]


def _step(optimizer, grads):
    params = [param for group in optimizer.param_groups for param in group['params']]
    for step in grads:
        for param, grad in zip(params, step):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach().clone() for param in params]


def _build(cls, **options):
    """An optimizer of its own parameters, that shrinks a convolution and a matrix and decays a bias."""
    defaults = {'lr': 0.1, 'weight_decay': 0.05}
    if issubclass(cls, torch.optim.SGD):
        defaults['momentum'] = 0.9
    return cls(_problem()[0], **{**defaults, **options})


def _copy_of(optimizer, cls, **options):
    """Another optimizer, not loaded yet, of parameters that are where those of the first one are."""
    other = _build(cls, **options)
    with torch.no_grad():
        for mine, theirs in zip(other.param_groups[0]['params'], optimizer.param_groups[0]['params']):
            mine.copy_(theirs)
    return other


@pytest.mark.parametrize('path', EAGER)
@pytest.mark.parametrize(('ours', 'options', 'theirs'), [
    (AwsSGD, {'decoupled': False}, torch.optim.SGD),
    (AwsSGD, {'decoupled': True}, torch.optim.SGD),
    (AwsAdam, {'decoupled': True}, torch.optim.AdamW),
    (AwsAdam, {'decoupled': False}, torch.optim.Adam),
])
def test_at_alpha_zero_a_run_moves_to_torch_and_back_exactly(ours, options, theirs, path):
    grads = _problem()[1]
    options = {**options, 'alpha': 0}
    expected = _step(_build(theirs, **PATHS[path]), grads)
    first = _build(ours, **options, **PATHS[path])
    _step(first, grads[:2])
    second = _copy_of(first, theirs, lr=0.7)
    second.load_state_dict(first.state_dict())
    _step(second, grads[2:4])
    third = _copy_of(second, ours, lr=0.7, **options)
    third.load_state_dict(second.state_dict())
    assert all(map(torch.equal, _step(third, grads[4:]), expected))


@pytest.mark.parametrize(('ours', 'theirs'), [
    (AwsSGD, torch.optim.SGD),
    (AwsAdam, torch.optim.AdamW),
    (AwsAdam, torch.optim.Adam),  # loses to decoupled=True of the groups here, as to AdamW
    (AwsLion, timm.optim.Lion),
])
def test_state_without_the_keys_of_the_shrink_goes_on_with_those_of_the_groups_and_warns(ours, theirs):
    grads = _problem()[1]
    saved = _build(theirs)
    _step(saved, grads[:3])
    optimizer = _copy_of(saved, ours, lr=0.7, alpha=0.3, normalization='cwn')
    with pytest.warns(UserWarning, match='holds no alpha, normalization.*keeps that of its own groups'):
        optimizer.load_state_dict(saved.state_dict())
    # The same buffers under an optimizer that had the options from the start.
    expected = _copy_of(saved, ours, alpha=0.3, normalization='cwn')
    state = copy.deepcopy(expected.state_dict())
    state['state'] = copy.deepcopy(saved.state_dict()['state'])
    expected.load_state_dict(state)
    assert all(map(torch.equal, _step(optimizer, grads[3:]), _step(expected, grads[3:])))


@pytest.mark.parametrize(('cls', 'saved_with', 'built_with', 'message'), [
    (AwsSGD, {'decoupled': True}, {'decoupled': False}, 'decoupled=True.*group 0 has decoupled=False.*build.*delete'),
    (AwsSGD, {'decoupled': False}, {'decoupled': True}, 'decoupled=False.*group 0 has decoupled=True'),
    (AwsAdam, {'decoupled': True}, {'decoupled': False}, 'decoupled=True.*group 0 has decoupled=False'),
    (AwsSGD, {'normalization': 'ws'}, {'normalization': 'wn'}, "normalization='ws'.*group 0 has normalization='wn'"),
    (AwsLion, {'normalization': 'wn'}, {'normalization': 'cwn'}, "normalization='wn'.*has normalization='cwn'"),
])
def test_state_of_another_rule_is_refused_whole_and_its_buffers_load_without_the_key(
        cls, saved_with, built_with, message):
    saved = _build(cls, **saved_with)
    _step(saved, _problem()[1][:2])
    optimizer = _build(cls, lr=0.7, **built_with)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert _equal(optimizer.state_dict(), before)
    key, value = next(iter(built_with.items()))
    state = copy.deepcopy(saved.state_dict())
    for group in state['param_groups']:
        del group[key]
    with pytest.warns(UserWarning, match=f'holds no {key}: '):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0][key] == value
    assert optimizer.param_groups[0]['lr'] == 0.1
    assert _equal(optimizer.state_dict()['state'], saved.state_dict()['state'])


def test_saved_alpha_wins_as_every_option_does(recwarn):
    saved = _build(AwsSGD, alpha=0.3)
    optimizer = _build(AwsSGD, alpha=0.1)
    recwarn.clear()  # of what an optimizer of bare parameters says
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]['alpha'] == 0.3
    assert not recwarn


def test_state_with_an_option_that_is_no_number_is_refused():
    state = _build(AwsSGD).state_dict()
    state['param_groups'][0]['alpha'] = float('nan')
    with pytest.raises(ValueError, match='Invalid alpha: nan'):
        _build(AwsSGD).load_state_dict(state)


@pytest.mark.parametrize('after', EAGER)
@pytest.mark.parametrize('before', EAGER)
@pytest.mark.parametrize(('cls', 'decoupled'), [(AwsSGD, False), (AwsSGD, True), (AwsAdam, False), (AwsAdam, True)])
def test_state_moves_between_loop_foreach_and_fused(cls, decoupled, before, after):
    grads = _problem()[1]
    saved = _build(cls, alpha=0.5, decoupled=decoupled, **PATHS[before])
    _step(saved, grads[:3])
    stays, changes = (_copy_of(saved, cls, alpha=0.5, decoupled=decoupled, **PATHS[after]) for _ in range(2))
    for optimizer in (stays, changes):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    changes.param_groups[0].update({'foreach': None, 'fused': None, **PATHS[after]})
    expected = _step(saved, grads[3:])
    assert all(map(torch.equal, _step(stays, grads[3:]), expected))  # the saved path wins, as every option does
    torch.testing.assert_close(_step(changes, grads[3:]), expected, rtol=2e-6, atol=1e-6)


# Each image is the same and of the same class: train.py does not restore the random number generator, from which the
# order of the images comes, so the order of a resumed epoch is another one. That is all that differs (--no-aug), and
# here it makes no difference.
@pytest.fixture
def images(tmp_path):
    image = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for split, count in (('train', 60), ('validation', 2)):
        folder = tmp_path / 'images' / split / 'thing'
        folder.mkdir(parents=True)
        for index in range(count):
            Image.fromarray(image.numpy()).save(folder / f'{index}.png')
    return tmp_path / 'images'


def _start_train_py(images, experiment, record, *options):
    scripts = os.environ.get('TIMM_SCRIPTS')
    if not scripts:
        pytest.skip("train.py is not in timm's wheel: TIMM_SCRIPTS names no folder of timm's scripts")
    return subprocess.Popen(
        [sys.executable, str(Path(scripts, 'train.py').resolve()), '--data-dir', str(images), '--no-aug',
         '--device', 'cpu', '--device-modules', 'timm_aws', '--model', 'test_ws_resnet', '--num-classes', '3',
         '--img-size', '32', '--batch-size', '2', '--workers', '1', '--epochs', '2', '--warmup-epochs', '0',
         '--opt', 'aws_sgd', '--opt-kwargs', 'alpha=0.5', f"record='{images.parent / record}'", 'record_every=50',
         '--lr', '0.05', '--weight-decay', '0.01', '--log-interval', '1', '--output', str(images.parent),
         '--experiment', experiment,
         *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_train_py_goes_on_exactly_after_it_was_killed_in_the_middle_of_an_epoch(images):
    killed = _start_train_py(images, 'killed', 'interrupted.csv')
    log = []
    for line in killed.stderr:
        log.append(line)
        if 'Train: 1 [' in line:
            killed.kill()
    assert killed.wait() == -signal.SIGKILL, ''.join(log[-20:])
    folder = images.parent
    assert sorted(path.name for path in folder.glob('killed/*checkpoint*')) == ['checkpoint-0.pth.tar']
    resumed = _start_train_py(
        images, 'resumed', 'interrupted.csv', '--resume', str(folder / 'killed' / 'last.pth.tar'))
    whole = _start_train_py(images, 'whole', 'whole.csv')
    log, whole_log = resumed.communicate()[1], whole.communicate()[1]
    assert (resumed.returncode, whole.returncode) == (0, 0), log[-2000:] + whole_log[-2000:]
    assert 'Train: 0 [' not in log
    assert 'Train: 1 [   0/' in log
    assert 'holds no' not in log  # no warning of missing keys
    first, second = (load_checkpoint(folder / name / 'last.pth.tar') for name in ('resumed', 'whole'))
    assert (first.epochs, second.epochs) == (2, 2)
    for key in ('state_dict', 'optimizer'):
        assert _equal(first.content[key], second.content[key]), key
    assert {(group['alpha'], group['normalization']) for group in first.content['optimizer']['param_groups']} == {
        (0.5, 'ws'), (0., None)}
    record = (folder / 'whole.csv').read_text()
    assert (folder / 'interrupted.csv').read_text() == record
    assert {line.split(',')[0] for line in record.splitlines()[1:]} == {'1', '51'}
