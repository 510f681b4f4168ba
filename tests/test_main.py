"""`timm-aws run`: the script finds what it would find under python itself."""
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


def _run(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kwargs)


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / 'folder' / 'script.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return os.path.join('folder', 'script.py')

    return write


def _both(tmp_path, path, *args):
    return _run(path, *args, cwd=tmp_path), _run('-m', 'timm_aws', 'run', path, *args, cwd=tmp_path)


@pytest.mark.parametrize('args', [(), ('a', 'b c'), ('--help',), ('-x', '--', '--config=y', 'run')])
def test_script_finds_its_own_argv_name_file_and_path(tmp_path, script, args):
    python, ours = _both(tmp_path, script(HELLO), *args)
    assert (ours.stdout, ours.stderr, ours.returncode) == (python.stdout, python.stderr, 0)
    assert '"Doc."' in ours.stdout


@pytest.mark.parametrize('text', [
    'import sys; sys.exit(7)',
    'import sys; sys.exit("message")',
    'def f():\n    raise KeyError("inside")\nf()\n',
    'try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError("outer") from e\n',
    'this is no python',
    'raise KeyboardInterrupt',
])
def test_exit_code_and_traceback_are_those_of_python(tmp_path, script, text):
    python, ours = _both(tmp_path, script(text))
    assert (ours.stdout, ours.stderr, ours.returncode) == (python.stdout, python.stderr, python.returncode)


def test_plugin_is_registered(tmp_path, script):
    path = script('import timm.optim; print(timm.is_model("ws_resnet50"), "aws_sgd" in timm.optim.list_optimizers())')
    python, ours = _both(tmp_path, path)
    assert (python.stdout, ours.stdout) == ('False False\n', 'True True\n')


def test_spawned_workers_find_the_script(tmp_path, script):
    path = script('''
import multiprocessing

def double(x):
    return 2 * x

if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print(pool.map(double, [1, 2]))
''')
    _, ours = _both(tmp_path, path)
    assert (ours.stdout, ours.stderr, ours.returncode) == ('[2, 4]\n', '', 0)


def test_interrupt_reaches_the_script(tmp_path, script):
    path = script('import time\nprint("ready", flush=True)\ntime.sleep(60)\n')
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_aws', 'run', path],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A job that a shell put into the background ignores the signal, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
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
        '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', '-m', 'timm_aws', 'run', path, '--x', '1',
        cwd=tmp_path)
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
    run = _run('-m', 'timm_aws', *args, cwd=tmp_path)
    assert message in run.stderr
    assert 'Traceback' not in run.stderr
    assert run.returncode == code


def test_console_script_is_the_same_program(tmp_path, script):
    path = script(HELLO)
    command = os.path.join(os.path.dirname(sys.executable), 'timm-aws')
    ours = subprocess.run([command, 'run', path, 'x'], cwd=tmp_path, capture_output=True, text=True)
    assert (ours.stdout, ours.stderr) == (_run(path, 'x', cwd=tmp_path).stdout, '')
