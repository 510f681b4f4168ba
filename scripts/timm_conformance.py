"""Runs timm's own tests on the models and optimizers of this package.

    python scripts/timm_conformance.py [PYTEST ARGS...]

The tests are those of the installed timm, taken from its source distribution, which pip downloads into a temporary
folder. test_models.py and test_optim.py find our names in timm's registry; only the cases with one of our names run.
timm makes exceptions by name: Kron, Adahessian, listed deviations of single optimizers, lower learning rates where 0.01
diverges. The same name with aws_ before it gets the same exception. The other files run unchanged with the plugin
imported, to check that it leaves timm intact. Every test starts from the same random numbers, so failures can be
repeated.

This file is also the pytest plugin that selects the cases.
"""
import os
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from types import FunctionType

import pytest
import timm
import torch

import timm_aws

_BY_NAME = ('test_models.py', 'test_optim.py')
_AS_THEY_ARE = ('test_factory.py', 'test_hub.py', 'test_layers*.py', 'test_task.py', 'test_utils.py')
_EXCEPTED_BY_TIMM = ('kron*', 'adahessian')


def _our_names() -> set[str]:
    optimizers = timm.optim.list_optimizers('aws_*', [f'aws_{pattern}' for pattern in _EXCEPTED_BY_TIMM])
    models = timm_aws.list_models()
    return {*optimizers, *models, *timm.list_models(models, include_tags=True)}  # timm tests with tags and without


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps, of the files that go by name, the cases that are about one of our names."""
    ours = _our_names()

    def is_ours(item: pytest.Item) -> bool:
        return item.path.name not in _BY_NAME or not ours.isdisjoint(
            value for value in _params(item).values() if isinstance(value, str))

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]
    for module in {item.module for item in items}:
        for exceptions in getattr(module, '_PROPERTY_EXCEPTIONS', {}).values():
            exceptions.update({f'aws_{pattern}': reason for pattern, reason in exceptions.items()})
        if hasattr(module, 'test_optim_factory'):
            _except_within(module.test_optim_factory)


def _except_within(test: FunctionType) -> None:
    """Adds our names to the lists of optimizers that the code of a test holds."""
    known = set(timm.optim.list_optimizers(exclude_filters='aws_*'))

    def with_ours(constant: object) -> object:
        if isinstance(constant, tuple) and constant and known.issuperset(constant):
            return (*constant, *(f'aws_{name}' for name in constant))
        return constant

    code = test.__code__
    test.__code__ = code.replace(co_consts=tuple(with_ours(constant) for constant in code.co_consts))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Starts each test from the same random numbers."""
    torch.manual_seed(0)


def _params(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, 'callspec') else {}


def download_tests(folder: Path) -> Path:
    """Downloads the source distribution of the installed timm and unpacks its tests.

    Args:
        folder: Folder to put them in.

    Returns:
        The folder of the tests.

    Raises:
        subprocess.CalledProcessError: If pip cannot download the distribution.
    """
    requirement = f'timm=={timm.__version__}'
    command = ['download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', str(folder), requirement]
    subprocess.run([sys.executable, '-m', 'pip', *command], check=True)
    archive, = folder.glob('timm-*.tar.gz')
    root = archive.name.removesuffix('.tar.gz')
    with tarfile.open(archive) as tar:
        # With its pyproject.toml, which names the marks and is the configuration that pytest finds there.
        patterns = [f'{root}/tests/*.py', f'{root}/pyproject.toml']
        members = [member for member in tar.getmembers() if any(fnmatch(member.name, p) for p in patterns)]
        tar.extractall(folder, members, filter='data')
    return folder / root / 'tests'


def main() -> int:
    """Downloads the tests and runs them; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        tests = download_tests(Path(folder))
        environment = {**os.environ, 'PYTHONPATH': os.path.dirname(os.path.abspath(__file__)), 'TORCH_DEVICE': 'cpu'}
        # Those that this timm has. Outside the repository: neither our configuration nor our folder is found there.
        files = [path.name for pattern in (*_BY_NAME, *_AS_THEY_ARE) for path in sorted(tests.glob(pattern))]
        command = [sys.executable, '-m', 'pytest', '-p', 'timm_conformance', '-q', *sys.argv[1:], *files]
        return subprocess.run(command, cwd=tests, env=environment).returncode


if __name__ == '__main__':
    sys.exit(main())
