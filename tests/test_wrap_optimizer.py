"""The decoupled shrink around any other optimizer: its step from the shrunk weight, its hooks, its own options."""
import pytest
import timm.optim
import torch

from timm_aws.wrap_optimizer import aws_optimizer


@pytest.mark.parametrize('base', [timm.optim.Lion, torch.optim.AdamW, timm.optim.Lamb, torch.optim.RMSprop])
def test_shrink_around_another_optimizer_is_its_step_from_the_shrunk_weight(base):
    weight, *grads = torch.randn(6, 3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    optimizer, twin = aws_optimizer(base)([ours], lr=0.01, alpha=0.5), base([theirs], lr=0.01)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        with torch.no_grad():
            theirs.mul_(1 - 0.01 * 0.5 * theirs.std(dim=(1, 2, 3), correction=0, keepdim=True))
        optimizer.step()
        twin.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def test_shrink_around_a_second_order_optimizer_leaves_its_graph_whole():
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    optimizer, twin = aws_optimizer(timm.optim.Adahessian)([ours], lr=0.01, alpha=0.5), timm.optim.Adahessian(
        [theirs], lr=0.01)
    decrement = 0.01 * 0.5 * weight.std(dim=(1, 2, 3), correction=0, keepdim=True) * weight
    for param, opt in ((ours, optimizer), (theirs, twin)):
        torch.manual_seed(0)
        param.pow(4).sum().backward(create_graph=True)
        opt.step()
    torch.testing.assert_close(ours.detach(), theirs.detach() - decrement, rtol=1e-12, atol=1e-15)


def test_step_hooks_run_once_around_another_optimizer():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    timm.optim.Lion([torch.nn.Parameter(torch.ones(1))])  # torch wraps the step of a class at its first instance
    optimizer = aws_optimizer(timm.optim.Lion)([weight], lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append('pre'))
    optimizer.register_step_post_hook(lambda *_: calls.append('post'))
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert calls == ['pre', 'post']


def test_rmsprop_keeps_its_own_alpha():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = aws_optimizer(torch.optim.RMSprop)([weight], lr=0.1, alpha=0.5, base_alpha=0.8)
    assert (optimizer.param_groups[0]['alpha'], optimizer.param_groups[0]['aws_alpha']) == (0.8, 0.5)


def test_around_another_optimizer_coupled_and_lr_none_raise():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match='decoupled=False'):
        aws_optimizer(timm.optim.Lion)([weight], lr=0.1, decoupled=False)
    optimizer = aws_optimizer(timm.optim.Adafactor)([weight])
    weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match='give lr'):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_step_that_a_scaler_skips_shrinks_nothing():
    """torch's fused updates skip it themselves, after the shrink: the scaler must do so before."""
    weight = torch.nn.Parameter(torch.eye(2))
    optimizer = aws_optimizer(torch.optim.AdamW)([weight], lr=0.1, normalization='wn', fused=True)
    scaler = torch.amp.GradScaler('cpu')
    scaler.scale(weight.sum()).backward()
    weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    assert torch.equal(weight, torch.eye(2))
