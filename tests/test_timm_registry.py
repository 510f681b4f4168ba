"""What timm's factory makes of our names, and that it is left alone for every other."""
import argparse
import copy
import importlib
import logging
import subprocess
import sys

import pytest
import timm
import timm.optim
import torch
import torch.nn as nn
from timm.optim import create_optimizer, create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim._optim_factory import OptimInfo, default_registry

import timm_aws
from timm_aws import AwsAdam, AwsSGD

OF_TIMM = list_optimizers(exclude_filters=['aws_*', 'fused*', 'bnb*', 'kron*'])


def _model():
    return timm.create_model('test_ws_resnet', num_classes=7)


def _shrunk(optimizer, key='alpha'):
    return sum(len(group['params']) for group in optimizer.param_groups if group[key] > 0)


def test_ws_resnet50_with_aws_sgd_has_the_promised_groups():
    optimizer = create_optimizer_v2(timm.create_model('ws_resnet50'), 'aws_sgd', lr=0.1, weight_decay=1e-4)
    assert type(optimizer) is AwsSGD
    assert (optimizer.defaults['momentum'], optimizer.defaults['nesterov']) == (0.9, False)
    groups = {
        (g['alpha'], g['normalization'], g['weight_decay'], g['decoupled']): g['param_names']
        for g in optimizer.param_groups
    }
    assert set(groups) == {(2.5e-3, 'ws', 0, False), (0, None, 1e-4, False), (0, None, 0, False)}
    assert len(groups[2.5e-3, 'ws', 0, False]) == 53
    assert groups[0, None, 1e-4, False] == ['fc.weight']
    assert len(groups[0, None, 0, False]) == 107  # weight and bias of 53 batch norms, bias of the classifier


@pytest.mark.parametrize('name', ['aws_sgd', 'AWS_SGD', 'Aws_Sgd'])
def test_aws_sgd_in_every_spelling(name):
    assert type(create_optimizer_v2(_model(), name, lr=0.1)) is AwsSGD
    args = argparse.Namespace(opt=name, lr=0.1, weight_decay=0.1, momentum=0.8, opt_eps=1e-3, opt_betas=[0.9, 0.99])
    optimizer = create_optimizer(args, _model())
    assert type(optimizer) is AwsSGD
    assert optimizer.defaults['momentum'] == 0.8


def test_aws_adam_takes_what_train_py_passes():
    args = argparse.Namespace(
        opt='aws_adam', lr=0.1, weight_decay=0.1, momentum=0.9, opt_eps=1e-3, opt_betas=[0.8, 0.9])
    optimizer = create_optimizer_v2(
        _model(), **timm.optim.optimizer_kwargs(args), alpha=0.0125, decoupled=False, amsgrad=True)
    assert type(optimizer) is AwsAdam
    for group in optimizer.param_groups:
        assert tuple(group['betas']) == (0.8, 0.9)
        assert (group['eps'], group['decoupled'], group['amsgrad']) == (1e-3, False, True)
    assert {group['alpha'] for group in optimizer.param_groups} == {0.0125, 0.}
    assert create_optimizer_v2(_model(), 'aws_adam').defaults['decoupled'] is True


@pytest.mark.parametrize('base', ['sgd', 'adam', 'lion'])
def test_lookahead(base):
    optimizer = create_optimizer_v2(_model(), f'lookahead_aws_{base}', lr=0.1)
    assert type(optimizer) is timm.optim.Lookahead
    assert type(optimizer._base_optimizer) is get_optimizer_class(f'aws_{base}', bind_defaults=False)
    assert _shrunk(optimizer) == len(timm_aws.normalized_weights(_model()))


@pytest.mark.parametrize('name', sorted({*OF_TIMM} - {'sgd', 'adam'}))
def test_shrink_around_every_other_optimizer(name):
    optimizer = create_optimizer_v2(_model(), f'aws_{name}', lr=0.1, alpha=0.25)
    base = get_optimizer_class(name, bind_defaults=False)
    assert isinstance(optimizer, AwsSGD if base is torch.optim.SGD else base)
    assert type(optimizer).__name__ == f'Aws{base.__name__}'
    assert type(optimizer) is get_optimizer_class(f'aws_{name}', bind_defaults=False)
    assert _shrunk(optimizer, type(optimizer).alpha_key) == 15
    twin = create_optimizer_v2(_model(), name, lr=0.1)
    for key, value in twin.defaults.items():
        assert optimizer.defaults[key] == value, key
    assert all(group.get('decoupled', True) for group in optimizer.param_groups) or 'decoupled' in twin.defaults


def test_every_optimizer_of_timm_is_listed_with_ours():
    names = set(list_optimizers(exclude_filters=['fused*', 'bnb*']))  # of apex and bitsandbytes, which are not here
    assert {f'aws_{name}' for name in names if not name.startswith('aws_')} <= names
    assert get_optimizer_info('aws_sgd').opt_class is AwsSGD
    assert get_optimizer_class('aws_adam') is AwsAdam
    assert get_optimizer_class('aws_momentum').keywords == {'nesterov': False, 'decoupled': True}
    assert 'aws_sgd' in dict(list_optimizers('aws_*', with_description=True))


def test_class_of_a_package_that_is_not_there_says_so_as_timm_does():
    for name in ('fusedsgd', 'aws_fusedsgd'):
        with pytest.raises((AssertionError, ImportError), match=r'CUDA|apex'):
            create_optimizer_v2(_model(), name, lr=0.1)


@pytest.mark.parametrize('name', OF_TIMM)
def test_other_names_give_what_timm_gives(name):
    for spelling in (name, f'lookahead_{name}'):
        ours = create_optimizer_v2(_model(), spelling, lr=0.1)
        theirs = type(default_registry).create_optimizer(default_registry, _model(), spelling, lr=0.1)
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)


@pytest.fixture
def late():
    """Registers an optimizer and an alias of it after ours; forgets them in the end."""
    names = {*default_registry._optimizers}

    class ThatOne(torch.optim.SGD):
        pass

    default_registry.register(OptimInfo(name='ThatOne', opt_class=ThatOne, has_eps=False, has_momentum=True))
    default_registry.register_alias('sameone', 'thatone')
    default_registry.register(OptimInfo(name='of_two_words', opt_class=ThatOne, has_eps=False))
    default_registry.register(OptimInfo(name='function', opt_class=lambda params, **options: ThatOne(params)))
    default_registry.register(OptimInfo(name='lazy', opt_class='torch.optim.Adagrad'))
    yield ThatOne
    for name in {*default_registry._optimizers} - names:
        del default_registry._optimizers[name]


def test_optimizer_registered_after_ours_has_its_name_with_aws(late):
    for name in ('thatone', 'sameone', 'of_two_words'):
        assert issubclass(get_optimizer_info(f'aws_{name}').opt_class, late)
        assert get_optimizer_class(f'aws_{name}').__name__ == 'AwsThatOne'
        assert {name, f'aws_{name}'} <= {*list_optimizers()}
        optimizer = create_optimizer_v2(_model(), f'aws_{name}', lr=0.1)
        assert (type(optimizer).__name__, _shrunk(optimizer)) == ('AwsThatOne', 15)
        assert isinstance(create_optimizer_v2(_model(), f'lookahead_aws_{name}')._base_optimizer, late)


def test_optimizer_registered_again_after_ours_replaces_both(late):
    default_registry.register(OptimInfo(name='thatone', opt_class=torch.optim.Adagrad))
    assert type(create_optimizer_v2(_model(), 'aws_thatone')) is get_optimizer_info('aws_thatone').opt_class
    assert isinstance(create_optimizer_v2(_model(), 'aws_thatone'), torch.optim.Adagrad)


def test_functions_have_no_name_with_aws_and_classes_by_their_name_are_made_when_asked_for(late):
    assert 'aws_function' not in list_optimizers()
    with pytest.raises(ValueError, match='aws_function not found in registry'):
        create_optimizer_v2(_model(), 'aws_function')
    for name in ('aws_lazy', 'AWS_Lazy'):
        optimizer = create_optimizer_v2(_model(), name)
        assert type(optimizer).__name__ == 'AwsAdagrad'
        assert type(optimizer) is get_optimizer_info(name).opt_class is get_optimizer_class(name)
    assert get_optimizer_info('lazy').opt_class == 'torch.optim.Adagrad'


@pytest.mark.parametrize('normalization', ['xx', 'wn', 'ws', None])
@pytest.mark.parametrize('name', ['aws_sgd', 'lookahead_aws_adam', 'aws_lion'])
def test_normalization_is_no_option_where_a_model_decides(name, normalization):
    with pytest.raises(ValueError, match=f'normalization={normalization!r} .*leave it out'):
        create_optimizer_v2(_model(), name, lr=0.1, normalization=normalization)


def test_normalization_is_an_option_where_parameters_are_given():
    weight = nn.Parameter(torch.ones(2, 2))
    assert create_optimizer_v2([weight], 'aws_sgd', normalization='wn').param_groups[0]['normalization'] == 'wn'
    with pytest.raises(ValueError, match="Unknown normalization: 'xx'"):
        create_optimizer_v2([weight], 'aws_sgd', normalization='xx')


@pytest.mark.parametrize('name', ['aws_', 'aws_none', 'aws_aws_sgd', 'lookahead_aws_none', 'aws_lookahead_sgd'])
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match='not found in registry'):
        create_optimizer_v2(_model(), name, lr=0.1)


def test_unknown_options_raise():
    for name in ('aws_sgd', 'aws_adam', 'aws_lion'):
        with pytest.raises(TypeError, match='alhpa'):
            create_optimizer_v2(_model(), name, lr=0.1, alhpa=1.)


@pytest.mark.parametrize('name', ['aws_sgd', 'aws_adam', 'aws_lion'])
def test_model_without_normalized_weights_raises_and_names_the_ways_out(name):
    model = timm.create_model('test_resnet')
    for options in ({}, {'like_decay': 1e-4}):
        with pytest.raises(
                ValueError, match=r"ResNet has no normalized.*timm_aws\.convert\(model, 'ws'\).* batch_norm=True "):
            create_optimizer_v2(model, name, lr=0.1, **options)
    with pytest.raises(ValueError, match=r'has no normalized weights') as raised:
        create_optimizer_v2(nn.Linear(2, 2), name, lr=0.1, batch_norm=True)
    assert 'batch_norm' not in str(raised.value)


@pytest.mark.parametrize('name', ['aws_sgd', 'aws_adam', 'aws_lion', 'aws_rmsprop', 'lookahead_aws_sgd'])
def test_batch_norm_shrinks_the_convolutions_of_a_plain_network(name):
    """With gradients of zero, a step is the shrink and the decay alone."""
    model = timm.create_model('test_resnet', num_classes=7)
    options = {'decoupled': True} if name in ('aws_sgd', 'lookahead_aws_sgd') else {}
    optimizer = create_optimizer_v2(
        model, name, lr=0.1, weight_decay=0., alpha=0.25, batch_norm=True, **options)
    found = timm_aws.normalized_weights(model, batch_norm=True)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        length = before[name].flatten(1).norm(dim=1).view(-1, 1, 1, 1) if name in found else 0.
        torch.testing.assert_close(param.detach(), before[name] * (1 - 0.1 * 0.25 * length))


def test_a_group_that_is_added_to_that_of_a_plain_network_is_split_by_the_same_options():
    model = timm.create_model('test_resnet', num_classes=3)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith('fc'))
    optimizer = create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=0.1, batch_norm=True, like_decay=1e-3)
    alpha = timm_aws.alpha_like_decay(model, 1e-3, batch_norm=True)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)  # as training may have done
    optimizer.add_param_group({'params': [param for name, param in model.named_parameters() if name[:2] != 'fc']})
    expected = timm_aws.normalized_weights(model, batch_norm=True)
    for group in optimizer.param_groups:
        for name in group['param_names']:
            assert (group['normalization'], group['alpha']) == (('wn', alpha) if name in expected else (None, 0.))


@pytest.mark.parametrize('name', ['aws_sgd', 'aws_adam'])
def test_training_of_a_plain_network_resumes_with_the_alpha_that_was_chosen_at_its_start(name):
    def started(seed):
        torch.manual_seed(seed)
        model = timm.create_model('test_resnet', num_classes=3)
        return model, create_optimizer_v2(
            model, name, lr=0.01, weight_decay=0.1, batch_norm=True, like_decay=0.1)

    def train(model, optimizer):
        for seed in range(2):
            x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()

    straight = started(0)
    alphas = [group['alpha'] for group in straight[1].param_groups]
    train(*straight)
    saved = copy.deepcopy((straight[0].state_dict(), straight[1].state_dict()))
    train(*straight)
    resumed = started(1)
    assert [group['alpha'] for group in resumed[1].param_groups] != alphas
    for part, state in zip(resumed, saved):
        part.load_state_dict(state)
    assert [group['alpha'] for group in resumed[1].param_groups] == alphas
    train(*resumed)
    for param, expected in zip(resumed[0].parameters(), straight[0].parameters()):
        assert torch.equal(param, expected)


@pytest.mark.parametrize('name', ['aws_sgd', 'lookahead_aws_adam', 'aws_rmsprop'])
def test_like_decay_is_an_option_of_every_optimizer(name, caplog):
    model = _model()
    with caplog.at_level(logging.INFO, logger='timm_aws'):
        optimizer = create_optimizer_v2(model, name, lr=0.1, like_decay=1e-3)
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)
    alpha, = {group[type(optimizer).alpha_key] for group in optimizer.param_groups if group['normalization']}
    assert alpha == optimizer.defaults[type(optimizer).alpha_key] == timm_aws.alpha_like_decay(model, 1e-3)
    assert f'alpha={alpha:.4g} ' in caplog.text
    with pytest.raises(ValueError, match=r'alpha=0.5 and like_decay=0.001 both set alpha'):
        create_optimizer_v2(model, name, lr=0.1, like_decay=1e-3, alpha=0.5)


def test_the_default_alpha_is_logged_where_it_is_far_from_an_ordinary_decay(caplog):
    create_optimizer_v2(_model(), 'aws_sgd', lr=0.1)
    assert not caplog.messages
    create_optimizer_v2(timm.create_model('test_resnet'), 'aws_sgd', lr=0.1, batch_norm=True)
    assert [(record.name, record.levelname) for record in caplog.records] == [('timm_aws.param_groups', 'WARNING')]


@pytest.mark.parametrize('options', [{'like_decay': 1e-4}, {'batch_norm': True}])
def test_options_that_look_at_layers_need_the_model(options):
    with pytest.raises(ValueError, match='give the model in place of its parameters'):
        create_optimizer_v2(_model().parameters(), 'aws_sgd', lr=0.1, **options)


def test_layer_decay_keeps_its_scales_and_splits_each_layer():
    model = timm.create_model('ws_resnet18')
    optimizer = create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=0.1, layer_decay=0.5)
    assert _shrunk(optimizer) == 20
    timms = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale_of = {p: group['lr_scale'] for group in timms for p in group['params']}
    decay_of = {p: group['weight_decay'] for group in timms for p in group['params']}
    for group in optimizer.param_groups:
        for param in group['params']:
            assert group['lr_scale'] == scale_of[param]
            assert group['weight_decay'] == (0. if group['alpha'] else decay_of[param])


def test_param_group_fn_is_split_unless_it_says_alpha_itself():
    model = timm.create_model('ws_resnet18')

    def param_group_fn(model):
        return [
            {'params': model.layer1.parameters(), 'lr': 0.5},
            {'params': list(model.layer2.parameters()), 'alpha': 0.125, 'normalization': 'cwn'},
            {'params': model.fc.weight, 'weight_decay': 0.25},
        ]

    optimizer = create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=0.1, param_group_fn=param_group_fn)
    summary = [
        (len(g['params']), g['lr'], g['alpha'], g['normalization'], g['weight_decay']) for g in optimizer.param_groups]
    assert summary == [
        (4, 0.5, 2.5e-3, 'ws', 0.), (8, 0.5, 0., None, 0.1), (15, 0.1, 0.125, 'cwn', 0.1), (1, 0.1, 0., None, 0.25)]


def test_parameters_that_are_not_of_the_model_are_not_shrunk():
    model, extra = timm.create_model('ws_resnet18'), nn.Parameter(torch.ones(2, 2))
    optimizer = create_optimizer_v2(
        model, 'aws_sgd', lr=0.1, param_group_fn=lambda m: [{'params': [*m.parameters(), extra]}])
    alpha, = [g['alpha'] for g in optimizer.param_groups if any(p is extra for p in g['params'])]
    assert alpha == 0


@pytest.mark.parametrize('groups_of', [
    lambda m: m.named_parameters(), lambda m: [{'params': m.named_parameters()}], lambda m: list(m.parameters())])
def test_groups_may_hold_parameters_with_their_names(groups_of):
    model = _model()
    made = create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=0.1, param_group_fn=groups_of)
    shrunk = {name for group in made.param_groups if group['alpha'] for name in group['param_names']}
    assert shrunk == set(timm_aws.normalized_weights(model))
    assert sum(len(group['params']) for group in made.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize('name', ['aws_sgd', 'aws_rmsprop'])
def test_group_with_an_alpha_of_its_own_shrinks_its_normalized_weights_alone(name, caplog):
    model, key = _model(), {'aws_rmsprop': 'aws_alpha'}.get(name, 'alpha')
    with caplog.at_level(logging.INFO, logger='timm_aws'):
        optimizer = create_optimizer_v2(
            model, name, lr=0.1, weight_decay=0.1, param_group_fn=lambda m: [{'params': m.parameters(), key: 0.3}])
    found = {group['normalization']: (group[key], group['weight_decay']) for group in optimizer.param_groups}
    assert found == {None: (0., 0.1), 'ws': (0.3, 0.)}
    assert caplog.messages == [
        '15 of 16 weights of NormalizedResNet are normalized: they are shrunk and get no weight decay.']


def test_groups_of_param_groups_aws_serve_an_optimizer_with_an_alpha_of_its_own():
    optimizer = create_optimizer_v2(
        _model(), 'aws_rmsprop', lr=0.1, param_group_fn=lambda m: timm_aws.param_groups_aws(m, alpha=0.25))
    assert {(group['normalization'], group['aws_alpha'], group['alpha']) for group in optimizer.param_groups} == {
        (None, 0., 0.9), ('ws', 0.25, 0.9)}


def test_filter_bias_and_bn_off_decays_biases_and_norms_but_no_normalized_weight():
    optimizer = create_optimizer_v2(_model(), 'aws_sgd', lr=0.1, weight_decay=0.1, filter_bias_and_bn=False)
    decay = {name: g['weight_decay'] for g in optimizer.param_groups for name in g['param_names']}
    assert decay['bn1.weight'] == 0.1
    assert all(decay[name] == 0 for name in timm_aws.normalized_weights(_model()))


def test_raw_parameters_get_the_defaults_of_the_class():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = create_optimizer_v2(list(model.parameters()), 'aws_sgd', lr=0.1, weight_decay=0.1, alpha=0.5)
    group, = optimizer.param_groups
    assert (type(optimizer), group['alpha'], group['normalization'], group['weight_decay']) == (AwsSGD, 0.5, 'ws', 0.1)
    groups = [{'params': [model[0].weight], 'alpha': 0.}, {'params': [model[0].bias]}]
    assert [g['alpha'] for g in create_optimizer_v2(groups, 'aws_adam').param_groups] == [0., 2.5e-3]


def test_frozen_weights_are_in_no_group():
    model = timm.create_model('ws_resnet18')
    model.conv1.weight.requires_grad_(False)
    optimizer = create_optimizer_v2(model, 'aws_sgd', lr=0.1)
    assert _shrunk(optimizer) == 19
    assert not any(p is model.conv1.weight for g in optimizer.param_groups for p in g['params'])


def test_modules_that_train_py_passes():
    """A compiled model, a task with EMA, a distillation task with teacher: names differ, the weights are the same."""
    from timm.task import ClassificationTask, FeatureDistillationTask

    compiled = torch.compile(_model())
    assert _shrunk(create_optimizer_v2(compiled, 'aws_sgd', lr=0.1)) == 15
    task = ClassificationTask(model=_model(), criterion=nn.CrossEntropyLoss())
    if hasattr(task, 'setup_ema'):
        task.setup_ema()
    trainable = task.get_trainable_module() if hasattr(task, 'get_trainable_module') else task
    optimizer = create_optimizer_v2(trainable, 'aws_sgd', lr=0.1)
    assert _shrunk(optimizer) == 15
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(_model().parameters()))
    distillation = FeatureDistillationTask(
        student_model=_model(), teacher_model=timm.create_model('test_resnet', num_classes=7), verbose=False,
        criterion=nn.CrossEntropyLoss())
    trainable = distillation.get_trainable_module() if hasattr(distillation, 'get_trainable_module') else distillation
    assert _shrunk(create_optimizer_v2(trainable, 'aws_sgd', lr=0.1)) == 15


def test_registering_twice_changes_nothing(caplog):
    before = default_registry.create_optimizer, timm.utils.reparameterize_model, list_optimizers()
    importlib.reload(timm_aws)
    assert (default_registry.create_optimizer, timm.utils.reparameterize_model, list_optimizers()) == before
    assert not caplog.messages


@pytest.mark.parametrize('first', ['import timm', 'import timm_aws'])
def test_importing_prints_nothing_and_touches_no_network(first):
    code = f'''
import socket, warnings
warnings.simplefilter('error')
def refuse(*args, **kwargs):
    raise AssertionError('network')
socket.socket.connect = refuse
import torch, torchvision
warnings.simplefilter('error')
{first}
import timm, timm_aws, timm_aws
from timm.optim import create_optimizer_v2
assert type(create_optimizer_v2(timm.create_model('test_ws_resnet'), 'aws_sgd')) is timm_aws.AwsSGD
'''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, '', '')


def _frozen_but_for_the_classifier():
    model = timm.create_model('test_ws_resnet', num_classes=3)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith('fc'))
    return model, create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize('wrap', [lambda optimizer: optimizer, timm.optim.Lookahead])
def test_a_group_that_is_added_later_is_split_into_normalized_weights_and_the_rest(wrap):
    model, optimizer = _frozen_but_for_the_classifier()
    optimizer = wrap(optimizer)
    rest = [param for name, param in model.named_parameters() if not name.startswith('fc')]
    optimizer.add_param_group({'params': rest, 'lr': 0.01})
    expected = timm_aws.normalized_weights(model)
    seen = set()
    for group in optimizer.param_groups:
        for name in group['param_names']:
            assert group['normalization'] == expected.get(name)
            assert group['alpha'] == (2.5e-3 if name in expected else 0)
            assert group['lr'] == (0.1 if name.startswith('fc') else 0.01)
            seen.add(name)
    assert seen == {name for name, _ in model.named_parameters()}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


def test_a_group_that_is_added_with_names_is_no_classifier_that_is_shrunk():
    _, optimizer = _frozen_but_for_the_classifier()
    head = nn.Linear(4, 3)
    optimizer.add_param_group({'params': list(head.parameters()), 'param_names': ['head.weight', 'head.bias']})
    assert [group['alpha'] for group in optimizer.param_groups if 'head.weight' in group['param_names']] == [0.]


def test_a_copy_refuses_what_nothing_says_is_normalized_and_takes_what_is_named():
    optimizer = copy.deepcopy(_frozen_but_for_the_classifier()[1])
    count = len(optimizer.param_groups)
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r'normalization=None.*name their normalization'):
        optimizer.add_param_group({'params': [weight]})
    assert len(optimizer.param_groups) == count
    optimizer.add_param_group({'params': [weight], 'normalization': 'wn', 'alpha': 0.5})
    assert optimizer.param_groups[-1]['param_names'] == [f'{count}.0']


def _added_to_lookahead(params):
    optimizer = timm.optim.Lookahead(AwsSGD([nn.Parameter(torch.ones(2))]))
    optimizer.add_param_group({'params': params})
    return optimizer


@pytest.mark.parametrize('make', [
    lambda params: AwsSGD(params),
    lambda params: AwsAdam(params, alpha=0.5),
    lambda params: create_optimizer_v2(params, 'aws_sgd', lr=0.1, alpha=0.5),
    lambda params: create_optimizer_v2(params, 'aws_lion', lr=0.1),
    _added_to_lookahead,
])
def test_bare_parameters_are_not_shrunk_without_a_word(make):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match=r'shrinks 2 tensors of shapes \(2, 5\), \(5, 3\), though nothing says'):
        optimizer = make(model.parameters())
    assert type(optimizer.param_groups[-1]['normalization']) is str


def test_named_or_unshrunk_parameters_give_no_warning(recwarn):
    weight = nn.Parameter(torch.ones(2, 2))
    AwsSGD([weight], normalization='ws')
    AwsSGD([weight], alpha=0.)
    AwsSGD([nn.Parameter(torch.ones(2))])
    assert not [warning for warning in recwarn if 'nothing says' in str(warning.message)]
