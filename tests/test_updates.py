"""How a step cuts large weights between filters, puts small ones together, and keeps nothing longer than a part."""
import weakref

import pytest
import torch

from timm_aws import AwsAdam, AwsSGD, optimizers, shrink, updates


def test_large_weights_are_cut_and_small_ones_put_together(monkeypatch):
    monkeypatch.setattr(updates, '_ELEMENTS', 24)
    params = [torch.arange(12. * filters).view(filters, 12) for filters in (1, 1, 5, 1, 2)]
    grads = [-param for param in params]
    whole = [
        updates.Update(param, grad, {'momentum_buffer': 2 * param, 'step': torch.tensor(3.)}, param[:, :1])
        for param, grad in zip(params, grads)
    ]
    parts = list(updates.in_cache(whole))
    assert [[len(update.param) for update in part] for part in parts] == [[1, 1], [2], [2], [1, 1], [2]]
    pieces = [update for part in parts for update in part]
    assert torch.equal(torch.cat([update.param for update in pieces]), torch.cat(params))
    for update in pieces:
        assert torch.equal(update.grad, -update.param)
        assert torch.equal(update.state['momentum_buffer'], 2 * update.param)
        assert torch.equal(update.length, update.param[:, :1])
    assert len({id(update.state['step']) for update in pieces[2:5]}) == 3
    assert pieces[2].state['step'] is whole[2].state['step']
    made = updates.Update(params[2], grads[2], {'momentum_buffer': None})
    assert [len(update.param) for part in updates.in_cache([made]) for update in part] == [5]


def test_a_step_keeps_no_gradient_that_it_made_until_the_next_part(monkeypatch):
    """As many temporary gradients as a part holds, one here."""
    monkeypatch.setattr(updates, '_ELEMENTS', 1)
    params = [torch.nn.Parameter(torch.randn(1, 12)) for _ in range(5)]
    for param in params:
        param.grad = torch.randn(1, 12)
    made, alive = [], []

    def add_and_count(*args):
        alive.append(sum(grad() is not None for grad in made))
        grad = shrink.add_shrink(*args)
        made.append(weakref.ref(grad))
        return grad

    monkeypatch.setattr(optimizers, 'add_shrink', add_and_count)
    AwsSGD(params, lr=0.1, momentum=0.9, nesterov=True, alpha=0.5, foreach=False).step()
    assert len(alive) == 5
    assert max(alive) <= 1


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_filters_that_lie_between_each_other_are_not_cut(cls, monkeypatch):
    monkeypatch.setattr(updates, '_ELEMENTS', 1)
    weight, grad = torch.randn(2, 4, 5).unbind()
    transposed, plain = torch.nn.Parameter(weight.clone().t()), torch.nn.Parameter(weight.t().contiguous())
    for param in (transposed, plain):
        optimizer = cls([param], lr=0.1, alpha=0.5, fused=True)
        for _ in range(3):
            param.grad = grad.t()
            optimizer.step()
    torch.testing.assert_close(transposed, plain)
