"""The theory behind the rule, as far as it can be executed, and the effective learning rate."""
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import SGDW, Adafactor, AdamWLegacy, Lamb, Lars, Lion, Lookahead

import timm_aws
from timm_aws import AwsAdam, AwsSGD, CWNConv2d, WNConv2d, WSConv2d
from timm_aws.effective_lr import unwrap
from timm_aws.group_options import ShrinkGroups
from timm_aws.wrap_optimizer import aws_optimizer

LAYERS = [WSConv2d, WNConv2d, CWNConv2d]


class _Network(nn.Module):
    """Two normalized layers with a batch norm and a classifier, float64."""

    def __init__(self, conv):
        super().__init__()
        self.conv1, self.norm1 = conv(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = conv(6, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        x = torch.tanh(self.norm1(self.conv1(x)))
        return self.fc(torch.tanh(self.norm2(self.conv2(x))).mean((2, 3)))

    def convs(self):
        return [self.conv1, self.conv2]


def _problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, 7, 7, generator=generator, dtype=torch.float64)
    return x, torch.arange(12) % 3


def _loss(model):
    x, labels = _problem()
    return F.cross_entropy(model(x), labels)


def _train(conv, lrs, weight_decay, conv_lrs):
    """Plain SGD, the normalized weights with a learning rate and a decay of their own; returns them normalized."""
    torch.manual_seed(0)
    model = _Network(conv)
    rest = [*model.norm1.parameters(), *model.norm2.parameters(), *model.fc.parameters()]
    convs = [layer.weight for layer in model.convs()]
    optimizer = torch.optim.SGD([{'params': convs, 'weight_decay': weight_decay}, {'params': rest}], lr=0.1)
    for lr, conv_lr in zip(lrs, conv_lrs):
        optimizer.param_groups[0]['lr'], optimizer.param_groups[1]['lr'] = conv_lr, lr
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()
    return torch.cat([layer.normalized_weight().detach().flatten() for layer in model.convs()])


@pytest.mark.parametrize('conv', LAYERS)
def test_weight_decay_is_a_schedule_of_the_learning_rate(conv):
    """1,000 steps under a cosine schedule, with a decay that multiplies the learning rate by 7.4 in the end.

    The rate is low enough for training to be stable: in a chaotic regime any two computations part.
    """
    lrs = [0.02 * (1 + math.cos(math.pi * step / 1000)) / 2 for step in range(1000)]
    weight_decay = 0.1
    multipliers = timm_aws.decay_as_lr(weight_decay, lrs)
    decayed = _train(conv, lrs, weight_decay, lrs)
    scheduled = _train(conv, lrs, 0., [lr * d for lr, d in zip(lrs, multipliers)])
    plain = _train(conv, lrs, 0., lrs)
    assert (decayed - scheduled).abs().max() < 1e-10
    assert (decayed - plain).abs().max() > 0.1  # without the schedule it is another network
    assert multipliers[-1] == pytest.approx(7.4, abs=0.05)


def test_multipliers_by_hand():
    """lambda 0.5 and lr 1: p is 1, 0.5, 0.25, so d is 1 / (1 * 0.5), 1 / (0.25 * 0.5), 1 / (0.0625 * 0.5)."""
    assert timm_aws.decay_as_lr(0.5, [1., 1., 1.]) == pytest.approx([2., 8., 32.], rel=1e-14)
    assert timm_aws.decay_as_lr(0., [0.1, 0.2]) == [1., 1.]
    assert timm_aws.decay_as_lr(0.5, [1.] * 600)[-1] == math.inf


@pytest.mark.parametrize(('weight_decay', 'lrs', 'step'), [
    (1., [0.5, 1.], 1), (0.5, [0.1, 2.], 1), (-1., [0.1], 0), (math.nan, [0.1], 0), (0.1, [math.nan], 0)])
def test_decay_that_would_flip_the_weight_is_refused(weight_decay, lrs, step):
    with pytest.raises(ValueError, match=rf'weight_decay \* lr must be .* at step {step}'):
        timm_aws.decay_as_lr(weight_decay, lrs)


@pytest.mark.parametrize('conv', LAYERS)
def test_decay_moves_no_normalized_weight_and_the_loss_gradient_no_length(conv):
    """Eq. 9 and 10: the two terms of the objective act at right angles, one on the length, one on the direction."""
    torch.manual_seed(0)
    model = _Network(conv)
    _loss(model).backward()
    for layer in model.convs():
        before = layer.normalized_weight().detach()
        radial = (layer.weight.grad * layer.weight).sum((1, 2, 3))
        assert radial.abs().max() < 1e-12 * layer.weight.grad.norm() * layer.weight.norm()
        with torch.no_grad():
            layer.weight.sub_(0.3 * layer.weight)  # a step of decay alone
        torch.testing.assert_close(layer.normalized_weight(), before, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('conv', LAYERS)
def test_objective_with_decay_has_no_minimum(conv):
    """Eq. 19: whatever the weights, half as long ones have the same loss and a lower objective."""
    torch.manual_seed(0)
    model = _Network(conv)
    objectives, losses = [], []
    for _ in range(10):
        losses.append(_loss(model).item())
        objectives.append(losses[-1] + 0.5 * 1e-2 * sum(layer.weight.square().sum().item() for layer in model.convs()))
        with torch.no_grad():
            for layer in model.convs():
                layer.weight.mul_(0.5)
    assert losses == pytest.approx([losses[0]] * 10, rel=1e-9)
    assert all(second < first for first, second in itertools.pairwise(objectives))


def test_effective_lr_is_lr_over_length():
    model = nn.Sequential(WSConv2d(2, 1, 2, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[1., 1.], [3., 3.]], [[1., 3.], [1., 3.]]]]))  # std 1
    optimizer = AwsSGD(timm_aws.param_groups_aws(model), lr=0.5)
    assert {k: v.tolist() for k, v in timm_aws.effective_lr(optimizer).items()} == {'0.weight': [0.5]}
    bare = AwsSGD(model[0].parameters(), lr=0.5, normalization='wn')
    rate, = timm_aws.effective_lr(bare)['0.0']
    assert rate.item() == pytest.approx(0.5 / 40 ** 0.5)


def test_effective_lr_refuses_an_optimizer_without_normalized_weights():
    with pytest.raises(ValueError, match='No parameter group of SGD'):
        timm_aws.effective_lr(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1))


def _turned(optimizer, weight, normalization, steps=1500):
    """Trains on random gradients; returns the root of the mean square angle of a step over the last 500, in radians.

    The gradients are independent, at a right angle to the filter and inversely to its length, as normalization makes
    them.
    """
    generator = torch.Generator().manual_seed(1)
    directions, squares = [], []

    def direction(*_):
        filters = weight.detach() if normalization == 'wn' else weight.detach() - weight.detach().mean(1, keepdim=True)
        directions.append(filters / filters.norm(dim=1, keepdim=True))

    base = unwrap(optimizer)
    base.register_step_pre_hook(direction)
    base.register_step_post_hook(direction)
    for step in range(steps):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        filters = weight.detach()
        if normalization != 'wn':
            noise, filters = noise - noise.mean(1, keepdim=True), filters - filters.mean(1, keepdim=True)
        square = filters.square().sum(1, keepdim=True)
        weight.grad = (noise - filters * (noise * filters).sum(1, keepdim=True) / square) / square.sqrt()
        optimizer.step()
        if step >= steps - 500:
            squares.append((2 * torch.asin((directions[1] - directions[0]).norm(dim=1) / 2)).square().mean())
        directions.clear()
    return torch.stack(squares).mean().sqrt().item()


SGD = {'lr': 0.05, 'momentum': 0.9, 'normalization': 'wn'}
ADAM = {'lr': 0.05, 'betas': (0.9, 0.99), 'normalization': 'wn'}
SHRINKS, DECAYS = {'alpha': 0.02}, {'alpha': 0., 'weight_decay': 0.02}


def _optimizer(make, options):
    weight = nn.Parameter(
        torch.randn(16, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8)
    # torch's own optimizers know no normalization; param_groups_aws gives their groups one
    return weight, make([{'params': [weight], 'normalization': options['normalization']}], **{
        key: value for key, value in options.items() if key != 'normalization' or issubclass(make, ShrinkGroups)})


@pytest.mark.parametrize(('make', 'options'), [
    (AwsSGD, {**SGD, **SHRINKS, 'momentum': 0.}),
    (AwsSGD, {**SGD, **SHRINKS, 'momentum': 0., 'dampening': 0.5}),  # without momentum torch does not dampen
    (AwsSGD, {**SGD, **SHRINKS}),
    (AwsSGD, {**SGD, **SHRINKS, 'normalization': 'ws'}),
    (AwsSGD, {**SGD, **SHRINKS, 'normalization': 'cwn', 'decoupled': True}),
    (AwsSGD, {**SGD, **SHRINKS, 'decoupled': True, 'maximize': True}),
    (AwsSGD, {**SGD, **SHRINKS, 'dampening': 0.8}),
    (AwsSGD, {**SGD, **SHRINKS, 'dampening': 0.8, 'decoupled': True}),
    (AwsSGD, {**SGD, **SHRINKS, 'momentum': 0.6, 'nesterov': True}),
    (AwsSGD, {**SGD, **SHRINKS, 'momentum': 0.6, 'nesterov': True, 'decoupled': True}),
    (AwsSGD, {**SGD, **DECAYS, 'decoupled': True}),  # the decay of SGD is coupled all the same
    (AwsSGD, {**SGD, **SHRINKS, 'weight_decay': 1.}),  # the shrink replaces the decay
    (torch.optim.SGD, {**SGD, 'weight_decay': 0.02}),
    (aws_optimizer(torch.optim.SGD), {**SGD, **SHRINKS, 'weight_decay': 0.005}),  # a shrink and a decay
    (AwsAdam, {**ADAM, **SHRINKS}),
    (AwsAdam, {**ADAM, 'alpha': 0., 'weight_decay': 0.1}),
    (torch.optim.AdamW, {**ADAM, 'weight_decay': 0.1}),
    (aws_optimizer(torch.optim.AdamW), {**ADAM, **SHRINKS, 'weight_decay': 0.1}),
    (aws_optimizer(torch.optim.RMSprop), {**SGD, **SHRINKS, 'base_alpha': 0.9}),
])
def test_random_gradients_turn_filters_by_the_angle_of_the_theory(make, options):
    """To 3 %: the formulas are those of small steps, and 16 filters of 128 elements are few."""
    weight, optimizer = _optimizer(make, options)
    measured = _turned(optimizer, weight, options['normalization'])
    expected = timm_aws.equilibrium_angle(optimizer)['0.0'].square().mean().sqrt().item()
    assert measured == pytest.approx(expected, rel=0.03)


class _Holder(torch.optim.Optimizer):
    """A wrapper as accelerate's AcceleratedOptimizer: it calls no constructor of torch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize('wrap', [Lookahead, _Holder, lambda optimizer: _Holder(Lookahead(optimizer, alpha=0.3, k=4))])
@pytest.mark.parametrize(('make', 'options'), [
    (AwsSGD, {**SGD, **SHRINKS}),
    (AwsSGD, {**SGD, **SHRINKS, 'decoupled': True}),
    (aws_optimizer(torch.optim.RMSprop), {**SGD, **SHRINKS, 'base_alpha': 0.9}),  # alpha is another option there
])
def test_angle_of_a_wrapped_optimizer_is_that_of_its_steps(wrap, make, options):
    weight, optimizer = _optimizer(make, options)
    wrapped = wrap(optimizer)
    measured = _turned(wrapped, weight, 'wn')
    angles, rates = timm_aws.equilibrium_angle(wrapped)['0.0'], timm_aws.effective_lr(wrapped)['0.0']
    assert measured == pytest.approx(angles.square().mean().sqrt().item(), rel=0.03)
    assert torch.equal(rates, timm_aws.effective_lr(optimizer)['0.0'])


@pytest.mark.parametrize(('make', 'options'), [
    *((aws_optimizer(base), SHRINKS) for base in (
        Lion, Lamb, Lars, Adafactor, AdamWLegacy, SGDW, torch.optim.NAdam, torch.optim.RAdam)),
    (AwsAdam, {**SHRINKS, 'decoupled': False}),
    (AwsAdam, {**DECAYS, 'decoupled': False}),
    (torch.optim.Adam, {'weight_decay': 0.1}),
    (aws_optimizer(torch.optim.Adam), {**SHRINKS, 'weight_decay': 0.1}),
    (aws_optimizer(torch.optim.RMSprop), {**SHRINKS, 'weight_decay': 0.1}),
    (AwsSGD, {**SHRINKS, 'momentum': 1.}),
])
def test_angle_is_nan_where_no_formula_holds(make, options):
    _, optimizer = _optimizer(make, {'lr': 0.1, 'normalization': 'wn', **options})
    assert timm_aws.equilibrium_angle(optimizer)['0.0'].isnan().all()


def test_angle_is_0_where_nothing_shrinks():
    for make, options in ((AwsSGD, {'alpha': 0.}), (torch.optim.SGD, {}), (AwsAdam, {'alpha': 0., 'decoupled': False})):
        _, optimizer = _optimizer(make, {'lr': 0.1, 'normalization': 'wn', **options})
        optimizer.param_groups[0].setdefault('alpha', 0.5)  # of param_groups_aws: torch.optim.SGD does not look at it
        assert not timm_aws.equilibrium_angle(optimizer)['0.0'].any()


def test_lr_may_be_a_tensor_of_one_element():
    for lr in (torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]], dtype=torch.float64)):
        for function in (timm_aws.effective_lr, timm_aws.equilibrium_angle):
            (_, one), (_, other) = (_optimizer(AwsSGD, {**SGD, **SHRINKS, 'lr': value}) for value in (lr, 0.1))
            torch.testing.assert_close(function(one)['0.0'], function(other)['0.0'], rtol=1e-6, atol=0)


def test_what_is_no_optimizer_is_refused():
    for function in (timm_aws.effective_lr, timm_aws.equilibrium_angle):
        with pytest.raises(TypeError, match=r'Linear is no torch\.optim\.Optimizer'):
            function(nn.Linear(1, 1))
