"""How fixed decay kills filters, on a network of two layers; and what is recorded and reported of it."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from reproduction.grid import Cell, Task
from reproduction.images import patterns
from reproduction.layers import PublishedWSConv2d
from reproduction.measures import are_dead
from reproduction.training import train_cell

import timm_aws
from timm_aws.layers import WSConv2d
from timm_aws.rule import filter_length

LR, STEPS = 0.1, 300
DECAY, ALPHA = 0.5, 5.  # of equal strength at a std of 0.1


def two_layers(norm_weight, bias, layer=WSConv2d):
    """The first of four filters is behind a batch norm of this weight and bias, and a ReLU."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = norm_weight, bias
    return model


def gradients(model):
    images = torch.randn(16, 3, 6, 6)
    model.zero_grad()
    F.cross_entropy(model(images), (images.mean((1, 2, 3)) > 0).long()).backward()
    return model[0].weight.grad, model[1].weight.grad, model[1].bias.grad


def lengths_after_training(optimizer_of):
    """Trains the filters alone, the first behind a closed ReLU; returns their lengths before and after."""
    model = two_layers(0.05, -0.5)
    optimizer, start = optimizer_of(model[0].weight), filter_length(model[0].weight.detach(), 'ws').flatten()
    for _ in range(STEPS):
        gradients(model)
        optimizer.step()
    return start, filter_length(model[0].weight.detach(), 'ws').flatten()


def test_fixed_decay_kills_a_filter_whose_relu_is_closed():
    start, end = lengths_after_training(lambda weight: torch.optim.SGD([weight], LR, weight_decay=DECAY))
    torch.testing.assert_close(end[0], start[0] * (1 - LR * DECAY) ** STEPS, rtol=1e-3, atol=0)
    assert end[0] < 1e-6
    assert (end[1:] > 1e-2).all(), 'gradients hold the others up'


def test_aws_slows_down_as_such_a_filter_gets_shorter():
    start, end = lengths_after_training(
        lambda weight: timm_aws.AwsSGD([weight], LR, alpha=ALPHA, normalization='ws'))
    # The solution of d length / d step = -lr * alpha * length^2.
    torch.testing.assert_close(end[0], start[0] / (1 + LR * ALPHA * start[0] * STEPS), rtol=0.02, atol=0)
    assert end[0] > 1e-3


def test_a_norm_weight_that_is_small_beside_a_negative_bias_closes_the_relu():
    for norm_weight, is_closed in ((1., False), (0.05, True)):
        of_filters, of_norm_weights, of_biases = gradients(two_layers(norm_weight, -0.5))
        assert (not of_filters[0].any()) is is_closed
        assert (of_norm_weights[0] == 0).item() is is_closed, 'nothing but decay acts on it: it stays closed'
        assert (of_biases[0] == 0).item() is is_closed


@pytest.mark.parametrize('layer', [WSConv2d, PublishedWSConv2d])
def test_a_filter_and_its_norm_weight_at_0_never_come_back_and_a_short_filter_can(layer):
    model = two_layers(0., 0.5, layer)
    with torch.no_grad():
        model[0].weight[0] *= 1e-5
    of_filters, of_norm_weights, _ = gradients(model)
    assert not of_filters[0].any()
    assert of_norm_weights[0] != 0
    with torch.no_grad():
        model[0].weight[0] = 0.
    of_filters, of_norm_weights, _ = gradients(model)
    assert not of_filters[0].any()
    assert of_norm_weights[0] == 0


def test_published_layer_divides_by_the_unbiased_std_and_an_eps():
    torch.manual_seed(0)
    layer = PublishedWSConv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight[1] *= 1e-4
    for weight, normalized in zip(layer.weight, layer.normalized_weight()):
        expected = (weight - weight.mean()) / (weight.std() + 1e-5)
        torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-6)


def test_dead_filters_are_those_of_a_std_below_1e_6():
    weight = torch.tensor([1., -1., 1., -1.]) * torch.tensor([[1e-3], [0.9e-6], [1.1e-6], [0.]]) + 1
    assert are_dead(weight.double()).tolist() == [False, True, False, True]


def test_training_records_every_filter_and_its_decay_can_end():
    task = Task(16, every=0, batch_size=16, epochs=2, epoch_steps=6)
    decayed, freed = (
        train_cell(Cell('narrow10', 'ws_published', 'sgdw', 0.01, 1., decay_until=until), task, patterns(16))
        for until in (1., 0.5))
    assert sum(decayed['filters']) == 592
    for key in ('lengths', 'effective_lr', 'angles', 'moving_lr', 'dead', 'still', 'dead_and_still'):
        assert [len(layers) for layers in decayed[key]] == [13, 13], key
    assert all(0 < angle < 2 for angle in decayed['angles'][-1])
    assert freed['lengths'] == decayed['lengths'], 'both are from before the last epoch'
    assert freed['shortest'][0] == decayed['shortest'][0]
    assert freed['shortest'][1] > decayed['shortest'][1]


def test_alpha_takes_over_from_decay():
    task = Task(16, every=0, batch_size=16, epochs=2, epoch_steps=6)

    def trained(rule, until, alpha=0.):
        cell = Cell('narrow10', 'ws', rule, 0.1, 0.01, decay_until=until, then_alpha=alpha)
        return train_cell(cell, task, patterns(16))

    assert trained('l2_then_aws', 1.)['lengths'] == trained('l2', 1.)['lengths'], 'until then it is SGD with decay'
    freed, weak, strong = (trained('l2_then_aws', 0.5, alpha) for alpha in (0., 1., 10.))
    assert freed['shortest'][0] == weak['shortest'][0] == strong['shortest'][0]
    assert freed['shortest'][1] > weak['shortest'][1] > strong['shortest'][1]
