"""`timm-aws plan`: forecasts are those of recorded runs and of the equation step by step, and warnings come true."""
import csv
import json
import math
import statistics
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from outputs import RESULTS
from reproduce import cell_of
from reproduction.grid import NETWORKS, Cell
from reproduction.rules import make_optimizer
from timm.optim import create_optimizer_v2

import timm_aws
from timm_aws.plan import forecast, plan_run
from timm_aws.ws_resnet import NormalizedResNet
from timm_aws_cli import main

COMMAND = 'plan --model ws_resnet50 --opt aws_sgd --lr 0.1 --epochs 90 --images 1281167 --batch-size 256'
RUN = {'model': 'test_ws_resnet', 'opt': 'aws_sgd', 'lr': 0.1, 'epochs': 10, 'images': 12800, 'batch_size': 128,
       'img_size': 32}


def batches(count, classes=8, size=16):
    """Yields images, a pattern of the class and as much noise, and their labels."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(classes, 3, 32, 32, generator=generator)
    for _ in range(count):
        labels = torch.randint(classes, (size,), generator=generator)
        yield patterns[labels] + torch.randn(size, 3, 32, 32, generator=generator), labels


@pytest.mark.parametrize(('opt', 'lr', 'options'), [
    ('aws_sgd', 0.03, {'momentum': 0.9, 'alpha': 3.}),
    ('aws_sgd', 0.05, {'momentum': 0.9, 'alpha': 20., 'decoupled': True}),
    ('momentum', 0.1, {'momentum': 0.9, 'weight_decay': 0.03}),
    ('aws_adam', 3e-3, {'alpha': 100.}),
    ('adamw', 3e-3, {'weight_decay': 10.}),
])
def test_recorded_angles_are_those_of_the_forecast(tmp_path, opt, lr, options):
    """The median over layers and steps, once the slowest half-life of the shrink is over twice.

    Three runs, as the median of one varies by 0.05 with the seed, and with the rounding of the CPU.
    """
    options = {'weight_decay': 0., **options}
    steps = 160
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = timm.create_model('test_ws_resnet', num_classes=8)
        groups = model if opt.startswith('aws') else timm_aws.param_groups_aws(model, 0., options['weight_decay'])
        optimizer = create_optimizer_v2(groups, opt, lr=lr, **options)
        plan = forecast(model, optimizer, [lr], steps, 16, 32)
        timm_aws.Recorder(optimizer, tmp_path / f'{seed}.csv', 4)
        for images, labels in batches(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        predicted = {layer.name: layer.angle for layer in plan.layers}
        assert max(layer.half_life_steps for layer in plan.layers) < steps / 3
        with (tmp_path / f'{seed}.csv').open(newline='') as file:
            ratios += [float(row['angle']) / predicted[row['layer']]
                       for row in csv.DictReader(file) if int(row['step']) > 2 * steps / 3]
    assert 0.7 < statistics.median(ratios) < 1.4


@pytest.mark.parametrize(('rule', 'strength', 'scale'), [
    ('l2', 0.01, 0.01), ('aws', 0.25, 1.), ('aws', 0.25, 100.), ('aws_decoupled', 10., 1.), ('aws_adam', 100., 1.),
    ('adamw', 10., 1.)])
def test_recorded_lengths_are_those_of_the_forecast(rule, strength, scale):
    """After 702 steps on photographs, runs of scripts/reproduce.py; the median over layers."""
    lr = 1e-3 if 'adam' in rule else 0.1
    cell = Cell('resnet10', 'ws', rule, lr, strength, scale)
    lines = map(json.loads, (RESULTS / 'reproduce_cpu.jsonl').read_text().splitlines())
    record = next(line for line in lines if cell_of(line) == cell)
    torch.manual_seed(0)
    model = NormalizedResNet(**NETWORKS['resnet10'], num_classes=20)
    model.default_cfg = {'input_size': (3, 32, 32)}
    with torch.no_grad():
        for name in record['layers']:
            model.get_parameter(name).mul_(scale)
    plan = forecast(model, make_optimizer(model, rule, lr, strength, 'ws', cell.other_decay), [
        lr * 0.1 ** sum(step >= share * 780 for share in (0.3, 0.6, 0.9)) for step in range(702)], 1, 128, 32)
    assert [layer.length for layer in plan.layers] == pytest.approx(record['lengths'][0], rel=0.05)
    assert 0.7 < statistics.median(
        recorded / layer.final_length for recorded, layer in zip(record['lengths'][9], plan.layers)) < 1.4


@pytest.mark.parametrize(('opt', 'alpha', 'decay', 'scale'), [
    ('aws_sgd', 0.1, 0., 1.), ('aws_sgd', 0.1, 0., 30.), ('sgd', 0., 5e-3, 1.), ('aws_adam', 30., 0., 1.)])
def test_lengths_are_those_of_the_equation_step_by_step(opt, alpha, decay, scale):
    """Without momentum, from the first angle on, under a cosine schedule with warm-up."""
    network = timm.create_model('test_ws_resnet')
    with torch.no_grad():
        for name in timm_aws.normalized_weights(network):
            network.get_parameter(name).mul_(scale)
    adam = opt == 'aws_adam'
    options = {'betas': (0., 0.9)} if adam else {'momentum': 0., **({'nesterov': False} if opt == 'sgd' else {})}
    lrs = [0.01, 0.05, 0.1, 0.08, 0.03, 0.01]
    lrs = [lr / 10 for lr in lrs] if adam else lrs
    groups = timm_aws.param_groups_aws(network, alpha, decay)
    optimizer = create_optimizer_v2(groups, opt, lr=0.1, weight_decay=decay, **options)
    plan = forecast(network, optimizer, lrs, 300, 16, 32)
    for layer, first in zip(plan.layers, plan.epochs):
        length, reached = layer.length, 1.
        for step in range(1800):
            lr = lrs[step // 300]
            turn = first['angle'] * lr / lrs[0] * (layer.length / length) ** (1 if adam else 2)
            gamma = alpha * length + decay
            if step >= 600 and reached == 1 and 0.7 < turn / math.sqrt(2 * lr * gamma) < 1.4:
                reached = step / 1800
            length *= math.hypot(1 - lr * gamma, turn)
        assert layer.final_length == pytest.approx(length, rel=0.02)
        assert layer.share_before == pytest.approx(reached, abs=0.005)
        gamma = alpha * layer.equilibrium_length + decay
        assert layer.angle == pytest.approx(math.sqrt(2 * max(lrs) * gamma))
        assert layer.effective_lr == pytest.approx(max(lrs) / layer.equilibrium_length)
        assert layer.half_life_steps == pytest.approx(math.log(2) / (max(lrs) * (alpha * layer.length + decay)))


def test_command_prints_a_line_for_each_layer_at_once(capsys):
    """In seconds of the processor, which other processes hardly lengthen; imports take 4 before it."""
    start = time.process_time()
    main(COMMAND.split())
    seconds = time.process_time() - start
    table = [line.split() for line in capsys.readouterr().out.splitlines() if '.weight' in line]
    assert len(table) == 53 and {len(row) for row in table} == {8}
    assert seconds < 3


def test_json_and_picture_hold_the_same_forecast(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    picture = tmp_path / 'plan.svg'
    args = [f'--{key.replace("_", "-")}={value}' for key, value in RUN.items()]
    main(['plan', *args, '--opt-kwargs', 'alpha=0.01', '--json', '--plot', str(picture)])
    printed = json.loads(capsys.readouterr().out)
    plan = plan_run(**RUN, opt_kwargs=['alpha=0.01'], weight_decay=2e-5, sched='cosine', warmup_epochs=5)
    assert printed['layers'] == [vars(layer) for layer in plan.layers]
    assert printed['steps'] == 1000
    assert '<svg' in picture.read_text()


@pytest.mark.parametrize(('changes', 'words'), [
    ({'opt_kwargs': ['alpha=0.05']}, []),
    ({'opt_kwargs': ['alpha=1e-6']}, ['15 of 15 layers stay too short']),
    ({'opt_kwargs': ['alpha=1000.0']}, ['overflow']),
    ({'opt': 'sgd', 'weight_decay': 20.}, ['overflow']),
    ({'opt': 'sgd', 'weight_decay': 0.02}, ['dies']),
    ({'opt': 'adamw', 'lr': 1e-3, 'weight_decay': 1e-6}, ['stay too short']),
])
def test_warnings(changes, words):
    plan = plan_run(**{**RUN, 'sched': 'none', **changes})
    assert len(plan.warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, plan.warnings))


@pytest.mark.parametrize(('weight_decay', 'length'), [(20., math.inf), (0.02, 0.)])
def test_what_these_warnings_say_comes_true(weight_decay, length):
    """A filter that gets no gradient, under the learning rate, momentum and decay of the test above."""
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    optimizer = create_optimizer_v2([weight], 'sgd', lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(1000):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert weight.abs().nan_to_num(math.inf).item() == pytest.approx(length, abs=1e-6)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'model': 'resnet_ws50'}, 'Unknown model .*list_models'),
    ({'opt': 'aws_sdg'}, 'Unknown optimizer .*list_optimizers'),
    ({'model': 'test_resnet'}, 'no normalized weights .*convert'),
    ({'model': 'test_resnet', 'opt': 'sgd'}, 'no normalized weights to plan'),
    ({'opt': 'aws_lion'}, 'no forecast for AwsLion .*take SGD or Adam'),
    ({'opt': 'adam', 'weight_decay': 0.1}, 'no forecast for Adam .*decoupled'),
    ({'opt': 'sgd'}, 'no forecast for SGD .*weight_decay above 0'),
    ({'opt_kwargs': ['alpha']}, "Invalid opt_kwargs: 'alpha', write KEY=VALUE"),
    ({'batch_size': 99999}, 'batch_size=99999'),
    ({'epochs': 0}, 'give an epoch'),
    ({'lr': 0.}, 'lr=0.0'),
    ({'momentum': 1.}, 'momentum=1.0.*a momentum below 1'),
    ({'img_size': -32}, 'img_size=-32'),
    ({'opt': 'lookahead_aws_sgd'}, 'no forecast for Lookahead'),
])
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_run(**{**RUN, **changes})


def test_networks_whose_last_gains_are_0_have_a_forecast():
    assert all(layer.final_length > 0 for layer in plan_run(**{**RUN, 'model': 'test_nfnet'}).layers)


def test_double_precision_has_the_same_forecast():
    lengths = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        network = timm.create_model('test_ws_resnet').to(dtype)
        optimizer = create_optimizer_v2(network, 'aws_sgd', lr=0.1, alpha=0.1)
        lengths.append([layer.final_length for layer in forecast(network, optimizer, [0.1], 100, 16, 32).layers])
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-4)
