"""`timm-aws`: it is quick to help and to stop, and `run` lets a script find what it would find under python itself."""
import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = '''
import json, os, sys
print(json.dumps([sys.argv, __name__, __file__, sys.path[0], __doc__, sys.modules['__main__'].__dict__ is globals()]))
sys.stdout.flush()
'''
HELLO = '"""Doc."""' + SCRIPT
CONSOLE = os.path.join(os.path.dirname(sys.executable), 'timm-aws')
MODULE = (sys.executable, '-m', 'timm_aws')
EXPORT = ('export', 'run', 'out', '--dataset', 'noise', '--license', 'mit')
INTERRUPTED = 'timm-aws: interrupted, run the same command again\n'
# As it happens where torch imports NumPy: the exception is lost.
INTERRUPTED_IMPORT = '''
import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
'''
PLAN = ('plan', '--model', 'test_ws_resnet', '--opt', 'aws_sgd', '--lr', '1', '--epochs', '1', '--images', '1')
COMMANDS = [('run', 'script.py'), EXPORT, ('publish', 'folder', 'alice/name'), ('plot', 'record.csv'), PLAN]


def _run(*args, **kwargs):
    return subprocess.run(args, capture_output=True, text=True, **kwargs)


def _heed_interrupts():
    """For a new process: a job that a shell put into the background ignores the signal, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(params=[(CONSOLE,), MODULE], ids=['timm-aws', '-m timm_aws'])
def timm_aws(request):
    """Both spellings of the command. Each start of it imports torch: tests of many cases spread them over the two."""
    return request.param


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / 'folder' / 'script.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return os.path.join('folder', 'script.py')

    return write


def _both(timm_aws, tmp_path, path, *args):
    return _run(sys.executable, path, *args, cwd=tmp_path), _run(*timm_aws, 'run', path, *args, cwd=tmp_path)


@pytest.mark.parametrize(('timm_aws', 'args'), [
    ((CONSOLE,), ()),
    ((CONSOLE,), ('--help',)),
    ((CONSOLE,), ('--', '--x', '--')),
    (MODULE, ('a', 'b c')),
    (MODULE, ('-x', '--', '--config=y', 'run')),
])
def test_script_finds_its_own_argv_name_file_and_path(timm_aws, tmp_path, script, args):
    python, ours = _both(timm_aws, tmp_path, script(HELLO), *args)
    assert (ours.stdout, ours.stderr, ours.returncode) == (python.stdout, python.stderr, 0)
    assert '"Doc."' in ours.stdout


def test_script_may_be_called_run(timm_aws, tmp_path):
    (tmp_path / 'run').write_text('import sys; print(sys.argv)')
    assert _run(*timm_aws, 'run', 'run', '--x', cwd=tmp_path).stdout == "['run', '--x']\n"


@pytest.mark.parametrize(('timm_aws', 'text'), [
    ((CONSOLE,), 'import sys; sys.exit(7)'),
    ((CONSOLE,), 'def f():\n    raise KeyError("inside")\nf()\n'),
    ((CONSOLE,), 'this is no python'),
    (MODULE, 'import sys; sys.exit("message")'),
    (MODULE, 'try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError("outer") from e\n'),
    (MODULE, 'raise KeyboardInterrupt'),
])
def test_exit_code_and_traceback_are_those_of_python(timm_aws, tmp_path, script, text):
    python, ours = _both(timm_aws, tmp_path, script(text))
    assert (ours.stdout, ours.stderr, ours.returncode) == (python.stdout, python.stderr, python.returncode)


def test_plugin_is_registered(timm_aws, tmp_path, script):
    path = script('import timm.optim; print(timm.is_model("ws_resnet50"), "aws_sgd" in timm.optim.list_optimizers())')
    python, ours = _both(timm_aws, tmp_path, path)
    assert (python.stdout, ours.stdout) == ('False False\n', 'True True\n')


def test_spawned_workers_find_the_script(timm_aws, tmp_path, script):
    path = script('''
import multiprocessing

def double(x):
    return 2 * x

if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print(pool.map(double, [1, 2]))
''')
    _, ours = _both(timm_aws, tmp_path, path)
    assert (ours.stdout, ours.stderr, ours.returncode) == ('[2, 4]\n', '', 0)


def test_interrupt_reaches_the_script(timm_aws, tmp_path, script):
    path = script('import time\nprint("ready", flush=True)\ntime.sleep(60)\n')
    process = subprocess.Popen(
        [*timm_aws, 'run', path], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_heed_interrupts)
    assert process.stdout.readline() == 'ready\n'
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert stderr.endswith('KeyboardInterrupt\n')
    assert 'timm_aws' not in stderr
    assert process.returncode in (-signal.SIGINT, 130)


def test_under_torchrun(tmp_path, script):
    path = script('import os, sys, timm; print(os.environ["RANK"], sys.argv[1:], timm.is_model("ws_resnet50"))')
    run = _run(
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
        '-m', 'timm_aws', 'run', path, '--x', '1', cwd=tmp_path)
    assert sorted(run.stdout.splitlines()) == ["0 ['--x', '1'] True", "1 ['--x', '1'] True"]
    assert run.returncode == 0


@pytest.mark.parametrize(('args', 'message', 'code'), [
    (('run', 'missing.py'), "can't open file", 2),
    (('run', '.'), "can't open file", 2),
    (('run',), 'required: SCRIPT', 2),
    ((), 'required: COMMAND', 2),
    (('walk',), "invalid choice: 'walk'", 2),
])
def test_wrong_command_lines(tmp_path, args, message, code):
    run = _run(CONSOLE, *args, cwd=tmp_path)
    assert message in run.stderr
    assert 'Traceback' not in run.stderr
    assert run.returncode == code


@pytest.mark.parametrize('command', [(), *(command[:1] for command in COMMANDS)])
def test_help_imports_no_torch(command):
    run = _run(CONSOLE, *command, '--help', env={**os.environ, 'PYTHONPROFILEIMPORTTIME': '1'})
    assert run.stdout.startswith(f'usage: {" ".join(["timm-aws", *command])} ')
    imported = {line.split('|')[-1].strip() for line in run.stderr.splitlines()}
    assert 'timm_aws_cli' in imported
    assert imported.isdisjoint({'timm_aws', 'timm', 'torch', 'numpy'})


@pytest.fixture
def stub(tmp_path):
    """Makes a package of our name with nothing but the given text in it; returns where and how it comes before ours."""
    def make(text):
        (tmp_path / 'timm_aws').mkdir()
        (tmp_path / 'timm_aws' / '__init__.py').write_text(text)
        (tmp_path / 'script.py').write_text('print("script")')
        return {'cwd': tmp_path, 'env': {**os.environ, 'PYTHONPATH': str(tmp_path)}}

    return make


@pytest.mark.parametrize('command', COMMANDS)
def test_interrupt_while_the_package_is_imported_is_one_line(stub, command):
    run = _run(CONSOLE, *command, **stub(INTERRUPTED_IMPORT), preexec_fn=_heed_interrupts)
    assert (run.stdout, run.stderr, run.returncode) == ('', INTERRUPTED, 130)


@pytest.mark.parametrize(('place', 'name'), [('argparse.ArgumentParser', 'parse_args'), ('gc', 'collect')])
def test_interrupt_while_a_command_begins_or_reports_an_error_is_one_line(stub, place, name):
    code = f'''
import argparse, gc, signal, timm_aws_cli
{place}.{name} = lambda *_: signal.raise_signal(signal.SIGINT)
timm_aws_cli.main(['plot', 'record.csv'])
'''
    run = _run(sys.executable, '-c', code, **stub(''), preexec_fn=_heed_interrupts)
    assert (run.stdout, run.stderr, run.returncode) == ('', INTERRUPTED, 130)


def test_interrupt_stays_ignored_in_a_job_of_the_background(stub):
    run = _run(
        CONSOLE, *COMMANDS[0], **stub(INTERRUPTED_IMPORT),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert (run.stdout, run.stderr, run.returncode) == ('script\n', '', 0)
