"""The record of effective learning rates: its figures, a resume, a killed run, and the rates that theory gives."""
import copy
import csv
import importlib.util
import sys
import warnings

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from timm.optim import create_optimizer_v2
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import timm_aws
from timm_aws.record import COLUMNS
from timm_aws.wrap_optimizer import aws_optimizer
from timm_aws_cli import main


def make(path=None, every=1, **options):
    torch.manual_seed(0)
    model = timm.create_model('test_ws_resnet', num_classes=4)
    options = {'opt': 'aws_sgd', 'lr': 0.1, 'momentum': 0.9, **options}
    optimizer = create_optimizer_v2(model, **options)
    if path:
        timm_aws.Recorder(optimizer, path, every)
    return model, optimizer


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
        optimizer.step()


def rows_of(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_figures_of_the_first_step_are_those_worked_out_by_hand(tmp_path):
    model, optimizer = make(tmp_path / 'run.csv')
    name = 'conv1.0.weight'
    before = model.get_parameter(name).detach().clone().double().flatten(1)
    train(model, optimizer, 1)
    after = model.get_parameter(name).detach().double().flatten(1)
    (row,) = [row for row in rows_of(tmp_path / 'run.csv') if row['layer'] == name]
    normalized = [(w - w.mean(1, keepdim=True)) / w.std(1, correction=0, keepdim=True) for w in (before, after)]
    cosine = (normalized[0] * normalized[1]).mean(1)
    assert list(row) == list(COLUMNS)
    assert (row['step'], float(row['lr'])) == ('1', 0.1)
    assert float(row['length']) == pytest.approx(before.std(1, correction=0).median().item(), rel=1e-5)
    assert float(row['angle']) == pytest.approx(cosine.clamp(max=1).acos().median().item(), rel=1e-3)
    gamma = 2.5e-3 * after.std(1, correction=0)
    assert float(row['equilibrium_angle']) == pytest.approx((0.2 * gamma / 1.9).sqrt().median().item(), rel=1e-5)


def test_rows_come_every_so_many_steps_for_every_layer(tmp_path):
    model, optimizer = make(tmp_path / 'run.csv', every=3)
    train(model, optimizer, 8)
    rows = rows_of(tmp_path / 'run.csv')
    layers = list(timm_aws.effective_lr(optimizer))
    assert [(row['step'], row['layer']) for row in rows] == [(str(s), name) for s in (1, 4, 7) for name in layers]


def test_recording_changes_nothing_of_the_training(tmp_path):
    recorded, plain = make(tmp_path / 'run.csv'), make()
    for model, optimizer in (recorded, plain):
        train(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(recorded[0].parameters(), plain[0].parameters()))


@pytest.mark.parametrize('killed_after', [4, 6])
def test_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path, killed_after):
    model, optimizer = make(tmp_path / 'whole.csv')
    train(model, optimizer, 8)
    model, optimizer = make(tmp_path / 'run.csv')
    train(model, optimizer, 4)
    checkpoint = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    train(model, optimizer, killed_after - 4, first=4)  # goes on after its checkpoint, then is killed
    with (tmp_path / 'run.csv').open('a') as file:
        file.write('7,conv1.0.wei')  # in the middle of a row
    model, optimizer = make(tmp_path / 'run.csv')
    checkpoint = torch.load(tmp_path / 'checkpoint.pth')
    model.load_state_dict(checkpoint['model'])
    optimizer.load_state_dict(checkpoint['optimizer'])
    train(model, optimizer, 4, first=4)
    assert rows_of(tmp_path / 'run.csv') == rows_of(tmp_path / 'whole.csv')


@pytest.mark.parametrize('goes_on', [True, False])
def test_rows_of_steps_that_come_again_are_kept_aside(tmp_path, goes_on):
    """In the process that took them, from a state of before; and in another, as where a run branches off."""
    weight, optimizer = record_of_one_weight(tmp_path / 'run.csv', 2)
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        optimizer.step()
    if not goes_on:
        weight, optimizer = record_of_one_weight(tmp_path / 'run.csv', 0)
    optimizer.load_state_dict(state)
    weight.grad = torch.ones(2, 2)
    with pytest.warns(UserWarning, match=r'held 3 rows from step 3 on, which comes again: .*run\.csv\.old1 has'):
        optimizer.step()
    optimizer.step()
    assert [row['step'] for row in rows_of(tmp_path / 'run.csv')] == ['1', '2', '3', '4']
    assert [row['step'] for row in rows_of(tmp_path / 'run.csv.old1')] == ['1', '2', '3', '4', '5']
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match=r'held 2 rows from step 3 on, which comes again: .*run\.csv\.old2 has'):
        optimizer.step()
    assert len(rows_of(tmp_path / 'run.csv.old1')) == 5


def test_state_of_before_the_first_step_starts_the_record_again(tmp_path):
    weight, optimizer = record_of_one_weight(tmp_path / 'run.csv', 0)
    state = copy.deepcopy(optimizer.state_dict())
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match='held 1 rows from step 1 on'):
        optimizer.step()
    assert [row['step'] for row in rows_of(tmp_path / 'run.csv')] == ['1']


def test_path_that_is_none_is_named(tmp_path):
    with pytest.raises(TypeError, match=r'^Invalid path of a record: True, name a CSV file\.$'):
        make(record=True)


def test_run_resumed_by_torch_distributed_checkpoint_has_the_rows_of_an_uninterrupted_one(tmp_path):
    """It makes the state of a new optimizer by a step of its own at lr 0, which is none of the run."""
    model, optimizer = make(tmp_path / 'whole.csv')
    get_state_dict(model, optimizer)
    train(model, optimizer, 8)
    for first in (0, 4):
        model, optimizer = make(tmp_path / 'run.csv')
        state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer)))
        if first:
            dcp.load(state, checkpoint_id=tmp_path / 'checkpoint')
            set_state_dict(
                model, optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
        train(model, optimizer, 4, first=first)
        if not first:
            state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer)))
            dcp.save(state, checkpoint_id=tmp_path / 'checkpoint')
    assert rows_of(tmp_path / 'run.csv') == rows_of(tmp_path / 'whole.csv')


def test_record_of_another_run_is_not_overwritten(tmp_path):
    train(*make(tmp_path / 'run.csv'), 1)
    before = (tmp_path / 'run.csv').read_text()
    model, optimizer = make(tmp_path / 'run.csv')
    with pytest.raises(ValueError, match='holds the record of another run'):
        train(model, optimizer, 1)
    assert (tmp_path / 'run.csv').read_text() == before


@pytest.mark.parametrize('opt', ['aws_sgd', 'aws_adam', 'lookahead_aws_sgd', 'aws_lion'])
def test_factory_takes_a_file_to_record_into(tmp_path, opt):
    model, optimizer = make(opt=opt, record=str(tmp_path / 'run.csv'))
    train(model, optimizer, 2)
    assert {row['step'] for row in rows_of(tmp_path / 'run.csv')} == {'1', '2'}


def test_refusals(tmp_path):
    model, optimizer = make()
    for every in (0, 2.5, 'often'):
        with pytest.raises(ValueError, match='Invalid every'):
            timm_aws.Recorder(optimizer, tmp_path / 'run.csv', every)
    with pytest.raises(ValueError, match='holds normalized weights'):
        timm_aws.Recorder(torch.optim.SGD(model.parameters()), tmp_path / 'run.csv')


def test_closed_recorder_writes_no_more(tmp_path):
    model, optimizer = make()
    recorder = timm_aws.Recorder(optimizer, tmp_path / 'run.csv', 1)
    train(model, optimizer, 1)
    recorder.close()
    train(model, optimizer, 1, first=1)
    assert {row['step'] for row in rows_of(tmp_path / 'run.csv')} == {'1'}


def test_plot_draws_the_record(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    train(*make(tmp_path / 'run.csv'), 3)
    main(['plot', str(tmp_path / 'run.csv')])
    assert (tmp_path / 'run.png').read_bytes().startswith(b'\x89PNG')
    assert capsys.readouterr().out.strip() == str(tmp_path / 'run.png')
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    with pytest.raises(SystemExit):
        main(['plot', str(tmp_path / 'other.csv')])
    assert 'is no record of effective learning rates' in capsys.readouterr().err


def test_plot_never_writes_over_the_record(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    record = tmp_path / 'run.png'
    train(*make(record), 3)
    before = record.read_bytes()
    with pytest.raises(SystemExit):
        main(['plot', str(record)])
    assert capsys.readouterr().err == f'timm-aws: {record} is the record itself: name the picture otherwise.\n'
    assert record.read_bytes() == before
    main(['plot', str(record), str(tmp_path / 'picture')])
    assert capsys.readouterr().out.strip() == str(tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')


def test_plot_without_matplotlib_names_it(tmp_path, monkeypatch, capsys):
    for name in ('matplotlib', 'timm_aws.plot'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(SystemExit):
        main(['plot', str(tmp_path / 'run.csv')])
    assert capsys.readouterr().err == 'timm-aws: pictures need matplotlib: pip install matplotlib\n'


def record_of_one_weight(path, steps, every=None, lr=0.1):
    """Records the training of a weight, so small that many steps take no time."""
    weight = torch.nn.Parameter(torch.eye(2))
    optimizer = timm_aws.AwsSGD([weight], lr=lr, alpha=0.1)
    timm_aws.Recorder(optimizer, path, every)
    for _ in range(steps):
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    return weight, optimizer


def test_record_starts_with_every_step_and_thins_out(tmp_path):
    record_of_one_weight(tmp_path / 'run.csv', 1100)
    steps = [int(row['step']) for row in rows_of(tmp_path / 'run.csv')]
    assert steps == [
        *range(1, 129), *range(130, 257, 2), *range(260, 513, 4), *range(520, 1025, 8), *range(1040, 1101, 16)]


def test_resumed_run_thins_out_as_an_uninterrupted_one(tmp_path):
    record_of_one_weight(tmp_path / 'whole.csv', 300)
    _, saved = record_of_one_weight(tmp_path / 'run.csv', 201)
    weight, optimizer = record_of_one_weight(tmp_path / 'run.csv', 0)
    optimizer.load_state_dict(saved.state_dict())
    for _ in range(99):
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    assert [row['step'] for row in rows_of(tmp_path / 'run.csv')] == [
        row['step'] for row in rows_of(tmp_path / 'whole.csv')]


def test_two_recorders_count_the_same_steps(tmp_path):
    model, optimizer = make(tmp_path / 'one.csv')
    timm_aws.Recorder(optimizer, tmp_path / 'other.csv', 1)
    train(model, optimizer, 2)
    timm_aws.Recorder(optimizer, tmp_path / 'late.csv', 1)
    train(model, optimizer, 2)
    for name, steps in (('one', '1234'), ('other', '1234'), ('late', '34')):
        assert [*dict.fromkeys(row['step'] for row in rows_of(tmp_path / f'{name}.csv'))] == [*steps]
    assert optimizer.param_groups[0]['recorded_steps'] == 4


def test_groups_added_after_the_start_are_recorded(tmp_path):
    weight, optimizer = record_of_one_weight(tmp_path / 'run.csv', 1)
    late = torch.nn.Parameter(torch.eye(3))
    optimizer.add_param_group({'params': [late], 'lr': 0.025})
    weight.grad, late.grad = torch.ones(2, 2), torch.ones(3, 3)
    optimizer.step()
    assert [(row['step'], row['layer'], row['lr']) for row in rows_of(tmp_path / 'run.csv')] == [
        ('1', '0.0', '0.1'), ('2', '0.0', '0.1'), ('2', '1.0', '0.025')]


@pytest.mark.parametrize('lr', [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]], dtype=torch.float64)])
def test_lr_may_be_a_tensor_of_one_element(tmp_path, lr):
    try:
        weight = torch.nn.Parameter(torch.ones(2, 2))
        weight.grad = torch.ones(2, 2)
        torch.optim.SGD([weight], lr).step()
    except TypeError:
        pytest.skip("this torch's own SGD takes no such lr")
    record_of_one_weight(tmp_path / 'run.csv', 2, lr=lr)
    record_of_one_weight(tmp_path / 'number.csv', 2)
    assert (tmp_path / 'run.csv').read_text() == (tmp_path / 'number.csv').read_text()


class Prepared(torch.optim.Optimizer):
    """A wrapper as accelerate's AcceleratedOptimizer: it calls no constructor of torch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize('opt', ['aws_sgd', 'aws_rmsprop'])
@pytest.mark.parametrize('wrap', [timm.optim.Lookahead, Prepared])
def test_record_of_a_wrapped_optimizer_is_that_of_its_steps(tmp_path, wrap, opt):
    model, optimizer = make(tmp_path / 'inside.csv', opt=opt)
    wrapped = wrap(optimizer)
    recorder = timm_aws.Recorder(wrapped, tmp_path / 'around.csv', 1)
    train(model, wrapped, 7)
    rows = rows_of(tmp_path / 'around.csv')
    assert len(rows) == 7 * 15 and rows == rows_of(tmp_path / 'inside.csv')
    recorder.close()
    expected = timm_aws.equilibrium_angle(optimizer)
    last = {row['layer']: float(row['equilibrium_angle']) for row in rows_of(tmp_path / 'around.csv')}
    assert all(0 < last[name] < 1 for name in expected)


@pytest.mark.parametrize('content', [
    b'', b'my notes', b'my notes\n', b'step,layer,lr,length\n1,a,0.1,0.1\n', bytes(range(256)) * 1000,
    b'step,layer,lr,length,angle,equilibrium_angle\r\nfirst,a,1,1,1,1\r\n'])
def test_file_that_is_no_record_is_left_as_it_is(tmp_path, content):
    path = tmp_path / 'notes'
    path.write_bytes(content)
    weight, optimizer = record_of_one_weight(path, 0)
    weight.grad = torch.ones(2, 2)
    if not content:  # nothing to lose
        optimizer.step()
        assert len(rows_of(path)) == 1
        return
    for _ in range(2):  # whoever catches the first error finds no half-open record at the next step
        with pytest.raises(ValueError, match='notes is no record'):
            optimizer.step()
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ['notes']


def test_folder_and_device_are_no_records(tmp_path):
    for path in (tmp_path, '/dev/null'):
        with pytest.raises(ValueError, match='is no record'):
            record_of_one_weight(path, 1)


@pytest.mark.parametrize('cut', [1, 2, 5, 60])
def test_record_that_was_cut_in_its_last_row_can_be_plotted_and_resumed(tmp_path, cut, capsys):
    """Cut by a full disk at step 4, while the training went on to a checkpoint after step 6."""
    pytest.importorskip('matplotlib')
    path = tmp_path / 'run.csv'
    _, saved = record_of_one_weight(path, 6)
    whole = path.read_bytes()
    path.write_bytes(b''.join(whole.splitlines(keepends=True)[:5])[:-cut])
    main(['plot', str(path)])
    assert (tmp_path / 'run.png').read_bytes().startswith(b'\x89PNG')
    weight, optimizer = record_of_one_weight(path, 0)
    optimizer.load_state_dict(saved.state_dict())
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    kept = 4 if cut < 60 else 3
    assert path.read_bytes().splitlines()[:kept] == whole.splitlines()[:kept]
    assert [row['step'] for row in rows_of(path)] == [*'123'[:kept - 1], '7']


@pytest.mark.skipif(sys.platform != 'linux', reason='/dev/full')
def test_full_disk_ends_the_record_with_one_warning_and_not_the_training(tmp_path):
    path = tmp_path / 'run.csv'
    weight, optimizer = record_of_one_weight(path, 2)
    path.unlink()
    path.symlink_to('/dev/full')
    before = weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(3):
            weight.grad = torch.eye(2)
            optimizer.step()
    assert [str(warning.message).partition(', ')[0] for warning in caught] == [f'The record {path} ends before step 3']
    assert optimizer.param_groups[0]['recorded_steps'] == 5
    assert not torch.equal(weight, before)


def test_record_that_cannot_be_made_does_not_end_the_training(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.warns(UserWarning, match='ends before step 1, training goes on'):
        _, optimizer = record_of_one_weight(tmp_path / 'file' / 'run.csv', 2)
    assert optimizer.param_groups[0]['recorded_steps'] == 2


def test_record_that_is_gone_is_not_begun_without_its_header(tmp_path):
    weight, optimizer = record_of_one_weight(tmp_path / 'run.csv', 1)
    (tmp_path / 'run.csv').rename(tmp_path / 'moved.csv')
    weight.grad = torch.eye(2)
    with pytest.warns(UserWarning, match='ends before step 2'):
        optimizer.step()
    assert [path.name for path in tmp_path.glob('*.csv')] == ['moved.csv']


@pytest.mark.skipif(not importlib.util.find_spec('tensorboard'), reason='tensorboard is not installed')
@pytest.mark.parametrize(('name', 'folder'), [('run', 'run.events'), ('run.csv', 'run')])
def test_events_have_a_folder_beside_the_file(tmp_path, name, folder):
    record_of_one_weight(tmp_path / name, 2)
    assert {path.name for path in tmp_path.iterdir()} == {name, folder}
    assert len(rows_of(tmp_path / name)) == 2


def test_filters_of_length_0_and_optimizers_without_a_known_angle_are_recorded_and_plotted(tmp_path):
    pytest.importorskip('matplotlib')
    dead, alive = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.eye(2))
    optimizer = aws_optimizer(timm.optim.Lion)([dead, alive], lr=0.1, normalization='wn')
    timm_aws.Recorder(optimizer, tmp_path / 'run.csv')
    alive.grad = torch.ones(2, 2)
    optimizer.step()
    assert [(row['length'], row['equilibrium_angle']) for row in rows_of(tmp_path / 'run.csv')] == [
        ('0', 'nan'), ('1', 'nan')]
    main(['plot', str(tmp_path / 'run.csv')])
    assert (tmp_path / 'run.png').read_bytes().startswith(b'\x89PNG')


def test_factory_takes_the_steps_between_records(tmp_path):
    model, optimizer = make(opt='lookahead_aws_sgd', record=str(tmp_path / 'run.csv'), record_every=10)
    train(model, optimizer, 12)
    assert {row['step'] for row in rows_of(tmp_path / 'run.csv')} == {'1', '11'}
    with pytest.raises(ValueError, match='record_every=10 without a file'):
        make(record_every=10)
