"""The rules that scripts/reproduce.py compares, against their equations as slow loops over Python floats."""
import math
import statistics

import pytest
import torch
from reference import filter_length
from reproduction.measures import turned
from reproduction.rules import RULES

MOMENTUM = 0.9
LRS = (0.1, 0.1, 0.01)
SHAPE = (3, 2, 2, 3)


def dot(one, other):
    return math.fsum(x * y for x, y in zip(one, other))


def centered(elements, normalization):
    mean = 0. if normalization == 'wn' else math.fsum(elements) / len(elements)
    return [x - mean for x in elements]


def scaled(elements, factor):
    return [factor * x for x in elements]


def added(one, other, factor=1.):
    return [x + factor * y for x, y in zip(one, other)]


class Filter:
    """One filter under SGD with momentum: `step` has an equation of each rule."""

    def __init__(self, elements, normalization, strength, layer_length):
        self.w, self.kind, self.s, self.layer_length = elements, normalization, strength, layer_length
        self.first = self.length(elements)
        self.buffer = None
        self.mean_square, self.count = 0., 0

    def length(self, elements):
        return filter_length(elements, self.kind)

    def update(self, gradient):
        self.buffer = gradient if self.buffer is None else added(gradient, self.buffer, MOMENTUM)
        return self.buffer

    def fixed(self, moved):
        return scaled(moved, self.first / self.length(moved))

    def step(self, rule, gradient, lr):
        w, s = self.w, self.s
        mean = math.fsum(w) / len(w)
        if rule == 'none':
            return added(w, self.update(gradient), -lr)
        if rule in ('l2', 'l2_then_aws'):
            return added(w, self.update(added(gradient, w, s)), -lr)
        if rule == 'sgdw':
            return added(scaled(w, 1 - lr * s), self.update(gradient), -lr)
        if rule == 'sgdc':
            return added(scaled(w, 1 - lr * lr / LRS[0] * s), self.update(gradient), -lr)
        if rule == 'shifted':
            std = filter_length(w, 'ws')
            pull = [(1 - 1e-3 / std) * (x - mean) + mean for x in w]
            return added(w, self.update(added(gradient, pull, s)), -lr)
        if rule == 'sgdp':  # the gradient is at a right angle to w, where SGDP projects
            update = self.update(gradient)
            update = added(update, w, -dot(update, w) / dot(w, w))
            return added(scaled(w, 1 - lr * s * 0.1 / (1 - MOMENTUM)), update, -lr)
        if rule == 'cautious':
            return [x - lr * (u + s * x) if u * x >= 0 else x - lr * u for u, x in zip(self.update(gradient), w)]
        if rule == 'target':
            return added(scaled(w, 1 - lr * s * (1 - self.first / self.length(w))), self.update(gradient), -lr)
        if rule == 'forced':
            moved = centered(added(w, self.update(gradient), -lr), self.kind)
            return scaled(moved, s / self.length(moved))
        if rule == 'hyperball':
            update = centered(self.update(gradient), self.kind)
            return self.fixed(added(centered(w, self.kind), update, -lr * s * self.first / self.length(update)))
        if rule == 'req':
            start, update = centered(w, self.kind), centered(self.update(gradient), self.kind)
            update = added(update, start, -dot(update, start) / dot(start, start))
            self.count += 1
            self.mean_square = 0.9 * self.mean_square + 0.1 * self.length(update) ** 2
            typical = math.sqrt(self.mean_square / (1 - 0.9 ** self.count))
            angle = math.sqrt(2 * lr * s / (1 + MOMENTUM))
            return self.fixed(added(start, update, -angle * self.first / typical))
        if rule == 'aws':
            return added(w, self.update(added(gradient, w, s * self.length(w))), -lr)
        if rule == 'aws_decoupled':
            return added(scaled(w, 1 - lr * s * self.length(w)), self.update(gradient), -lr)
        assert rule == 'aws_by_layer'
        return added(w, self.update(added(gradient, w, s / self.layer_length * self.length(w))), -lr)


@pytest.mark.parametrize('normalization', ['ws', 'wn'])
@pytest.mark.parametrize('rule', [rule for rule in RULES if not RULES[rule].adam])
def test_rule_is_its_equation(rule, normalization):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64))
    strength = 0.3
    layer_length = statistics.median(filter_length(row, normalization) for row in weight.flatten(1).tolist())
    filters = [Filter(row, normalization, strength, layer_length) for row in weight.flatten(1).tolist()]
    group = {'params': [weight], 'normalization': normalization, 'alpha': 0.}
    optimizer = RULES[rule].make([group], LRS[0], strength)
    for lr in LRS:
        raw = torch.randn(SHAPE, generator=generator, dtype=torch.float64).flatten(1).tolist()
        # At a right angle to the filter, as the gradient of a loss that its length does not change.
        gradients = [added(row, one.w, -dot(row, one.w) / dot(one.w, one.w)) for row, one in zip(raw, filters)]
        weight.grad = torch.tensor(gradients, dtype=torch.float64).view(SHAPE)
        for one, gradient in zip(filters, gradients):
            one.w = one.step(rule, gradient, lr)
        for options in optimizer.param_groups:
            options['lr'] = lr
        optimizer.step()
        expected = torch.tensor([one.w for one in filters], dtype=torch.float64).view(SHAPE)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('normalization', ['ws', 'wn'])
def test_angle_of_a_step(normalization):
    first = torch.tensor([[1., -1., 0., 0.], [1., -1., 0., 0.], [0., 0., 0., 0.]])
    second = torch.tensor([[0., 0., 5., -5.], [1., -1., 1e-4, -1e-4], [1., -1., 0., 0.]])
    angles = turned(first, second, normalization)
    torch.testing.assert_close(angles[:2], torch.tensor([math.pi / 2, 1e-4]), rtol=1e-3, atol=0)
    assert angles[2].isnan(), 'a filter of length 0 has no direction'
