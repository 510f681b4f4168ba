"""Ctrl-C, full disks, folders that vanish, a failing Hub: one line, an exit code, nothing half done under a final name.

The commands run in processes of their own, forked from one that has imported the package already. Moments are counted
in what a command does with the folder that it writes to, so they are the same on every machine.
"""
import errno
import functools
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import prepare_tiny_imagenet
import pytest
from checkpoint_files import NAME, REPO, contents
from test_prepare_tiny_imagenet import COMPLETE, make_source, read_tree

from timm_aws.checkpoint.folder import check_folder
from timm_aws.checkpoint.publish import publish
from timm_aws_cli import main

SETTINGS = ('--dataset', 'noise', '--license', 'mit')
INTERRUPTED = 'timm-aws: interrupted, run the same command again\n'
FULL = OSError(errno.ENOSPC, 'No space left on device')
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload([
    'pytest', 'timm_aws.checkpoint.export', 'timm_aws.checkpoint.publish', 'timm_aws.plot', 'timm_aws_cli'])


def prepare_tiny(source, out):
    """Runs the script as its command line does, with the small data set of its own tests."""
    sys.exit(prepare_tiny_imagenet.main(
        [str(source), str(out)], prepare_tiny_imagenet.Expected({}, 2, {'train': 3, 'val': 2})))


def in_child(command, prepare, folder):
    """What a child process does: stderr goes to a file, temporary files to a folder of the test's own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    os.dup2(os.open(folder / 'stderr', os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    os.environ['HF_TOKEN'] = 'hf_writer'
    tempfile.tempdir = str(folder / 'temporary')
    prepare()
    command()


class Child:
    """A command in a process of its own."""

    def __init__(self, folder, command, prepare=int):
        self.folder = folder
        (folder / 'temporary').mkdir(parents=True, exist_ok=True)
        self.process = CONTEXT.Process(target=in_child, args=(command, prepare, folder))

    def run(self, meanwhile=int):
        """Returns exit code and stderr; no temporary file may be left."""
        self.process.start()
        meanwhile()
        self.process.join(300)
        assert os.listdir(self.folder / 'temporary') == []
        return self.process.exitcode, (self.folder / 'stderr').read_text()


def at_moment(moment, folder, happen, writes_only, seen):
    """Lets something happen when this process opens, makes, renames or removes something below a folder, the nth time.

    Args:
        moment: How often nothing happens before; -1: it never does.
        folder: The folder.
        happen: What to call.
        writes_only: Count only where files and folders are made or written to.
        seen: Shared integer, counts.
    """
    names = {'open', 'os.mkdir'} if writes_only else {'open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir'}

    def hook(event, args):
        if event in names and str(args[0]).startswith(str(folder)):
            if writes_only and event == 'open' and 'w' not in (args[1] or ''):
                return
            seen.value += 1
            if seen.value == moment + 1:
                happen()

    sys.addaudithook(hook)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def fill_disk():
    raise FULL


def run_at_moments(make_child, number):
    """Runs a command to its end, then again and again until something happens, at moments that are spread over the run.

    Args:
        make_child: Makes the child, given the moment and the counter for `at_moment`.
        number: How many moments, the first and the last that there are among them.

    Yields:
        The moment, and what the child ended with.
    """
    seen = CONTEXT.Value('i')
    assert make_child(-1, seen).run() == (0, '')
    total = seen.value
    assert total >= number
    for moment in (index * (total - 1) // (number - 1) for index in range(number)):
        seen.value = 0
        yield moment, make_child(moment, seen).run()
        assert seen.value > moment


@pytest.mark.parametrize('happen, writes_only, expected', [
    (press_ctrl_c, False, (130, INTERRUPTED)),
    (fill_disk, True, (1, f'timm-aws: {FULL}\n')),
])
def test_export_interrupted_or_on_a_full_disk_leaves_a_whole_folder_or_nothing(
        hub, train_run, tmp_path, happen, writes_only, expected):
    run = train_run()

    def make_child(moment, seen):
        place = tmp_path / str(moment)
        return Child(
            tmp_path / 'child', functools.partial(main, ['export', str(run), str(place / NAME), *SETTINGS]),
            functools.partial(at_moment, moment, place, happen, writes_only, seen))

    ended = []
    for moment, end in run_at_moments(make_child, 6):
        assert end == expected
        out = tmp_path / str(moment) / NAME
        ended.append(out.exists())
        if out.exists():
            check_folder(out)
        else:
            assert not list(out.parent.glob('*'))
    assert ended.count(False) >= 4


def test_export_onto_a_full_disk_says_so_where_the_weights_do_not_fit(hub, train_run, tmp_path):
    code, stderr = Child(tmp_path / 'child', functools.partial(
        main, ['export', str(train_run()), str(tmp_path / 'out' / NAME), *SETTINGS]), limit_files).run()
    assert code == 1
    assert stderr.startswith('timm-aws: ') and stderr.count('\n') == 1
    assert 'File too large' in stderr
    assert os.listdir(tmp_path / 'out') == []


def limit_files():
    """Lets no file grow beyond 100 kB: the system refuses as it does when a disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize('signum, end', [(signal.SIGINT, (130, INTERRUPTED)), (signal.SIGHUP, (129, ''))])
def test_ctrl_c_and_closing_the_terminal_end_validation_without_a_traceback(hub, train_run, tmp_path, signum, end):
    """As a terminal does it: the signal goes to all processes of the group."""
    (tmp_path / 'images').mkdir()
    ready = tmp_path / 'ready'
    (tmp_path / 'validate.py').write_text(
        f'import os, time; open({str(ready)!r}, "w").write(str(os.getpid())); time.sleep(600)')
    child = Child(tmp_path / 'child', functools.partial(main, [
        'export', str(train_run()), str(tmp_path / 'out' / NAME), *SETTINGS, '--data-dir', str(tmp_path / 'images'),
        '--validate', str(tmp_path / 'validate.py')]), os.setsid)

    def press():
        _wait_until(lambda: ready.exists() and ready.read_text())
        os.killpg(child.process.pid, signum)

    assert child.run(press) == end
    assert os.listdir(tmp_path / 'out') == []
    _wait_until(lambda: not Path('/proc', ready.read_text()).exists())


def _wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        _pause()
    raise TimeoutError


def _pause():
    """Waits for 0.1 s; `hub` has switched time.sleep off."""
    multiprocessing.connection.wait([], 0.1)


def test_prepare_interrupted_is_resumed_and_leaves_nothing_under_its_name_before(hub, tmp_path):
    source, _ = make_source('zip', tmp_path / 'source')

    def make_child(moment, seen):
        out = tmp_path / str(moment) / 'tiny'
        return Child(tmp_path / 'child', functools.partial(prepare_tiny, source, out),
                     functools.partial(at_moment, moment, out.parent, press_ctrl_c, False, seen))

    for moment, end in run_at_moments(make_child, 6):
        assert end == (130, 'interrupted: run the same command again to resume\n')
        out = tmp_path / str(moment) / 'tiny'
        assert not out.exists()
        assert Child(tmp_path / 'child', functools.partial(prepare_tiny, source, out)).run() == (0, '')
        assert read_tree(out) == COMPLETE
        assert os.listdir(out.parent) == ['tiny']


def test_prepare_whose_source_vanishes_says_so_and_goes_on_with_another(hub, tmp_path):
    source, _ = make_source('unpacked', tmp_path / 'source')
    out = tmp_path / 'data' / 'tiny'
    seen = CONTEXT.Value('i')  # the parent has to hold it
    code, stderr = Child(
        tmp_path / 'child', functools.partial(prepare_tiny, source, out), functools.partial(
            at_moment, 5, out.parent, functools.partial(shutil.rmtree, source), True, seen)).run()
    assert (code, stderr.count('\n')) == (1, 1)
    assert stderr.startswith('error: ') and 'No such file or directory' in stderr
    assert not out.exists()
    other = source.parent / 'tiny-imagenet-200.zip'
    assert Child(tmp_path / 'child', functools.partial(prepare_tiny, other, out)).run() == (0, '')
    assert read_tree(out) == COMPLETE


def _line_of(stderr):
    """Returns the one line that is no progress bar of the Hub's client."""
    assert 'Traceback' not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith('timm-aws: ')]
    return line


def test_publish_interrupted_says_so_and_the_hub_has_all_or_nothing(hub, checkpoint_folder, tmp_path):
    whole = contents(checkpoint_folder)
    publish(checkpoint_folder, REPO)
    total = len(hub.requests)
    for moment in range(0, total, -(-total // 5)):
        hub.reset()
        child = Child(tmp_path / 'child', functools.partial(main, ['publish', str(checkpoint_folder), REPO]))

        def press(moment=moment, child=child, seen=itertools.count()):  # noqa: B008  one count for each moment
            if next(seen) == moment:
                os.kill(child.process.pid, signal.SIGINT)
                _pause()  # let the signal come before the answer

        hub.fail('', press, times=10 ** 6)
        code, stderr = child.run()
        assert (code, _line_of(stderr) + '\n') == (130, INTERRUPTED)
        assert all(hub.published(name) in ({}, whole) for name in hub.repositories)


def test_publish_that_cannot_fetch_back_for_want_of_room_says_that_it_is_published(hub, checkpoint_folder, tmp_path):
    code, stderr = Child(
        tmp_path / 'child', functools.partial(main, ['publish', str(checkpoint_folder), REPO]), limit_files).run()
    assert code == 1
    assert f'{REPO} was published, but could not be fetched back to be compared: ' in _line_of(stderr)
    assert 'File too large' in _line_of(stderr)
    assert hub.published(REPO) == contents(checkpoint_folder)


@pytest.mark.parametrize('request_, message', [
    ('POST /api/repos/create', f'{REPO} was not published: [Errno 2] No such file or directory'),
    ('POST /.*/paths-info/', "Provided path: '"),  # by the client, which goes on: is not a file
    ('POST /.*/objects/batch', f'{REPO} was not published: [Errno 2] No such file or directory'),
    ('POST /.*/verify', f'{REPO} was not published: [Errno 2] No such file or directory'),
    ('POST /.*/commit/', f'{REPO} was published, but could not be fetched back to be compared: [Errno 2] No such file'),
])
def test_folder_that_vanishes_while_it_is_published(hub, copied, capsys, request_, message):
    whole = contents(copied)
    hub.fail(request_, functools.partial(shutil.rmtree, copied))
    with pytest.raises(SystemExit) as exit:
        main(['publish', str(copied), REPO])
    assert exit.value.code == 1
    assert _line_of(capsys.readouterr().err).startswith(f'timm-aws: {message}')
    assert hub.published(REPO) == (whole if 'commit' in request_ else {})


def _read_only_folder(tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip('permissions mean nothing to this user')
    return folder


def _file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('mine')
    return path


@pytest.mark.parametrize('make_place', [_read_only_folder, _file])
def test_export_to_where_nothing_can_be_made_is_one_line(train_run, tmp_path, capsys, make_place):
    place = make_place(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as exit:
        main(['export', str(train_run()), str(place / NAME), *SETTINGS])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 1
    assert line.startswith(f'timm-aws: {place} is a file, ' if place.is_file() else 'timm-aws: [Errno ')
    assert str(place) in line
    assert sorted(tmp_path.rglob('*')) == before


def test_error_that_nobody_expects_is_one_line_too(train_run, tmp_path, capsys):
    run = train_run(mean='dark')
    with pytest.raises(SystemExit) as exit:
        main(['export', str(run), str(tmp_path / NAME), *SETTINGS])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 1
    assert line.startswith('timm-aws: ') and line.endswith(' (--traceback shows where)')


SECRET = 'hf_thisIsAliceHerSecret'


@pytest.mark.parametrize('request_, action, token', [
    ('/api/repos/create', 500, SECRET),
    ('/preupload/', 403, SECRET),
    ('/objects/batch', 401, SECRET),
    ('PUT /lfs/', 'drop', SECRET),
    ('/commit/', 412, SECRET),
    ('GET /lfs/', 'corrupt', SECRET),
    ('no fault', 500, SECRET + 'Wrong'),
])
def test_token_is_in_nothing_that_a_failing_publish_says(
        hub, checkpoint_folder, monkeypatch, capfd, caplog, request_, action, token):
    hub.users[SECRET] = hub.users['hf_writer']
    hub.fail(request_, action, times=99)
    monkeypatch.setenv('HF_TOKEN', token)
    for name in (None, 'huggingface_hub'):
        caplog.set_level(logging.DEBUG, name)
    with pytest.raises(Exception) as caught:
        main(['publish', str(checkpoint_folder), REPO, '--traceback'])
    assert 'POST' in caplog.text
    said = ''.join(traceback.format_exception(caught.value)) + caplog.text + ''.join(capfd.readouterr())
    said += ''.join(hub.requests) + Path('/proc/self/cmdline').read_text()
    said += repr([files for repository in hub.repositories.values() for files in repository.branches['main']])
    assert SECRET not in said
