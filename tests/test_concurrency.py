"""Many at once: loading from a cold cache, publishing to one repository, registering from threads and in any order."""
import copy
import functools
import itertools
import multiprocessing
import shutil
import subprocess
import sys
import threading

import pytest
import timm
import torch
from checkpoint_files import REPO, contents, fit_results, logits
from safetensors.torch import load_file, save_file

import timm_aws
from timm_aws.checkpoint.publish import publish


def load_at_once(barrier, cache, out):
    """What each process does: waits for the others, loads both networks, writes their logits to a file."""
    torch.set_num_threads(1)
    from huggingface_hub import constants

    import timm_aws  # noqa: F401

    constants.HF_HUB_CACHE = str(cache)
    barrier.wait(300)
    torch.save([logits(f'hf-hub:{REPO}'), logits('ws_resnet50_aws')], out)


def test_eight_processes_load_from_a_cold_cache_and_agree(hub, checkpoint_folder, tmp_path):
    publish(checkpoint_folder, REPO)
    hub.requests.clear()
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_aws.checkpoint.publish'])
    barrier, outs = context.Barrier(8), [tmp_path / f'{index}.pt' for index in range(8)]
    processes = [context.Process(target=load_at_once, args=(barrier, tmp_path / 'cache', out)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * 8
    assert any('GET /lfs/' in request for request in hub.requests), 'the cache was cold'
    first, *others = [torch.load(out, weights_only=True) for out in outs]
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first, other))
    torch.testing.assert_close(first, [logits(f'local-dir:{checkpoint_folder}'), logits('ws_resnet50_aws')])
    assert not list((tmp_path / 'cache').rglob('*.incomplete'))


@pytest.fixture
def folders(checkpoint_folder, tmp_path):
    """Two checkpoints that differ in weights and options, and of which only the first has curves."""
    first = shutil.copytree(checkpoint_folder, tmp_path / 'first' / checkpoint_folder.name)
    second = shutil.copytree(checkpoint_folder, tmp_path / 'second' / checkpoint_folder.name)
    for name in ('effective_lr.csv', 'effective_lr.png'):
        (second / name).unlink()
    (second / 'args.yaml').write_text('epochs: 3\n')
    weights = load_file(second / 'model.safetensors')
    weights['fc.bias'] += 1
    save_file(weights, second / 'model.safetensors', metadata={'format': 'pt'})
    fit_results(second)
    return first, second


def test_publishing_a_checkpoint_in_place_of_another_leaves_nothing_of_it(hub, folders):
    first, second = folders
    publish(first, REPO)
    assert publish(second, REPO, dry_run=True).remove == ('effective_lr.csv', 'effective_lr.png')
    assert hub.published(REPO) == contents(first)
    assert publish(second, REPO).remove == ('effective_lr.csv', 'effective_lr.png')
    assert hub.published(REPO) == contents(second)
    assert publish(second, REPO).remove == ()


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_publish_in_the_middle_of_another_gives_one_of_the_two_whole(hub, folders, tmp_path, order):
    """The second publishes all it has while the first waits for the answer to one of its requests: each in turn."""
    mine, other = (folders[index] for index in order)
    mixed = shutil.copytree(other, tmp_path / 'mixed')
    shutil.copy(mine / 'args.yaml', mixed)  # what is there before: mine would not send this file
    publish(mixed, REPO)
    before, objects = copy.deepcopy(hub.repositories), dict(hub.objects)
    hub.requests.clear()
    publish(mine, REPO)
    steps = next(index for index, request in enumerate(hub.requests) if '/commit/' in request) + 1
    ended = []
    for moment in range(steps):
        hub.reset()
        hub.repositories, hub.objects = copy.deepcopy(before), dict(objects)

        def interfere(moment=moment, seen=itertools.count()):  # noqa: B008  one count for each moment
            if next(seen) == moment:
                publish(other, REPO)

        hub.fail('', interfere, times=10 ** 6)
        try:
            publish(mine, REPO)
            ended.append('done')
            assert hub.published(REPO) == contents(mine)
        except RuntimeError as error:
            ended.append('told')
            assert f'{REPO} was not published: somebody else has changed it meanwhile, run the comm' in str(error)
            assert hub.published(REPO) == contents(other)
            publish(mine, REPO)
            assert hub.published(REPO) == contents(mine)
    assert ended[0] == 'done' and ended[-1] == 'told'


def test_two_threads_publish_to_a_new_repository_and_one_of_the_two_is_whole(hub, folders):
    barrier, said = threading.Barrier(2), {}

    def race(folder):
        barrier.wait()
        try:
            publish(folder, REPO)
            said[folder] = ''
        except RuntimeError as error:
            said[folder] = str(error)

    threads = [threading.Thread(target=functools.partial(race, folder)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [folder for folder in folders if said[folder] == '']
    assert hub.published(REPO) in [contents(folder) for folder in done]
    assert all('run the command again' in words and '\n' not in words for words in said.values() if words)


# Eight threads import and register at once, then everything is done again; afterwards each name is there once.
REGISTER = '''
import threading, warnings
warnings.simplefilter('error')
import torch, torchvision
warnings.simplefilter('error')
{before}
barrier, errors = threading.Barrier(8), []

def use():
    barrier.wait()
    try:
        import timm_aws
        from timm_aws.timm_registry import register
        register()
        register()
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors

import importlib, timm, timm.optim
import timm_aws
for again in (timm_aws, importlib.reload(timm_aws)):
    again.register()
    optimizer = timm.optim.create_optimizer_v2(timm.create_model('test_ws_resnet'), 'aws_sgd', lr=0.1)
    assert type(optimizer) is again.AwsSGD
    for names in (timm.list_models(), timm.list_pretrained(), again.list_models(),
                  timm.optim.list_optimizers()):
        assert len(names) == len(set(names))
    assert timm.list_models('*ws_resnet50*') == ['ws_resnet50', 'ws_resnet50_aws']
    registry = timm.optim._optim_factory.default_registry
    assert registry.create_optimizer.args[0].__func__ is type(registry).create_optimizer, 'wrapped once'
    assert not hasattr(timm.utils.reparameterize_model.__wrapped__, '__wrapped__'), 'wrapped once'
{after}
'''


@pytest.mark.parametrize('before, after', [
    ('', ''),
    ('import timm\nfrom timm.optim import create_optimizer_v2 as held\n'
     'held(timm.create_model("resnet18"), "sgd", lr=0.1)',
     'assert type(held(timm.create_model("test_ws_resnet"), "aws_sgd", lr=0.1)) is timm_aws.AwsSGD'),
])
def test_registering_from_threads_twice_and_after_timm_was_used(before, after):
    code = REGISTER.format(before=before, after=after)
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, '', '')


def test_networks_are_built_in_threads_while_another_runs():
    model, image, done = timm.create_model('test_ws_resnet').eval(), torch.ones(1, 3, 48, 48), threading.Event()
    expected, built = model(image), []

    def build():
        built.extend(timm_aws.normalized_weights(timm.create_model('test_ws_resnet')) for _ in range(10))

    def build_all():
        threads = [threading.Thread(target=build) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()

    threading.Thread(target=build_all).start()
    while not done.is_set():
        assert torch.equal(model(image), expected)
    assert built == [timm_aws.normalized_weights(model)] * 30
