"""The record of effective learning rates: its figures, a resume, a killed run, and the rates that theory gives."""
import csv
import math

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from timm.optim import create_optimizer_v2
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import timm_aws
from timm_aws.record import COLUMNS
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
    assert {row['step'] for row in rows_of(tmp_path / 'run.csv')} == {'1'}


def test_refusals(tmp_path):
    model, optimizer = make()
    with pytest.raises(ValueError, match='Invalid every: 0'):
        timm_aws.Recorder(optimizer, tmp_path / 'run.csv', 0)
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


@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
@pytest.mark.parametrize('momentum, decoupled', [(0., False), (0.9, False), (0.9, True)])
def test_random_gradients_turn_filters_by_the_angle_of_the_theory(normalization, momentum, decoupled):
    """Gradients at a right angle to the filter and inversely to its length, as normalization makes them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 256, generator=generator, dtype=torch.float64))
    optimizer = timm_aws.AwsSGD([weight], lr=0.05, momentum=momentum, alpha=0.05, normalization=normalization,
                                decoupled=decoupled)
    angles = []
    for step in range(3000):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            filters = weight if normalization == 'wn' else weight - weight.mean(1, keepdim=True)
            noise = noise if normalization == 'wn' else noise - noise.mean(1, keepdim=True)
            noise -= filters * (noise * filters).sum(1, keepdim=True) / filters.square().sum(1, keepdim=True)
            scale = {'ws': 256 ** 0.5}.get(normalization, 1.)
            weight.grad = noise * scale / filters.norm(dim=1, keepdim=True)
            before = filters / filters.norm(dim=1, keepdim=True)
        optimizer.step()
        with torch.no_grad():
            filters = weight if normalization == 'wn' else weight - weight.mean(1, keepdim=True)
            after = filters / filters.norm(dim=1, keepdim=True)
            if step >= 2000:
                angles.append((2 * torch.asin((after - before).norm(dim=1) / 2)).square().mean())
    measured = math.sqrt(torch.stack(angles).mean())
    (expected,) = timm_aws.equilibrium_angle(optimizer).values()
    assert measured == pytest.approx(expected.mean().item(), rel=0.1)


def test_adam_has_the_angle_of_the_theory_decoupled_and_none_coupled():
    weight = torch.nn.Parameter(torch.randn(4, 16))
    optimizer = timm_aws.AwsAdam([weight], lr=0.1, alpha=0.5, normalization='wn')
    gamma = 0.5 * weight.detach().norm(dim=1)
    assert torch.allclose(timm_aws.equilibrium_angle(optimizer)['0.0'], (0.2 * gamma * 0.1 / 1.9).sqrt())
    optimizer = timm_aws.AwsAdam([weight], lr=0.1, alpha=0.5, normalization='wn', decoupled=False)
    assert timm_aws.equilibrium_angle(optimizer)['0.0'].isnan().all()
