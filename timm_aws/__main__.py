"""The command line: `python -m timm_aws`, installed as `timm-aws`.

    timm-aws run SCRIPT.py [ARGS...]                                     any script, with the plugin registered
    torchrun --nproc_per_node=N -m timm_aws run SCRIPT.py [ARGS...]      the same on N processes
"""
import argparse
import os
import sys
import types
from collections.abc import Sequence

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command.

    Args:
        argv: Arguments, those of the process by default.
    """
    parser = argparse.ArgumentParser(prog='timm-aws', description='Adaptive Weight Shrink for timm.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    run = commands.add_parser(
        'run',
        help="run a script with the plugin registered, such as timm's validate.py",
        description='Runs a Python script as `python SCRIPT ARGS` would, with the timm_aws plugin registered.',
        usage='timm-aws run SCRIPT [ARGS...]',
    )
    run.add_argument('script', metavar='SCRIPT', help='path of the script')
    run.add_argument('args', metavar='ARGS', nargs=argparse.REMAINDER, help="the script's own arguments and options")
    options = parser.parse_args(argv)
    _run(options.script, options.args)


def _run(script: str, args: Sequence[str]) -> None:
    """Runs a script that finds argv, path, `__main__`, exit code and traceback as if python had started it."""
    path = os.path.abspath(script)
    try:
        with open(path, 'rb') as file:
            source = file.read()
    except OSError as error:
        print(f"timm-aws: can't open file {path!r}: {error}", file=sys.stderr)
        sys.exit(2)
    import timm_aws  # noqa: F401  registers the plugin

    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    sys.excepthook = _hook_from(path)
    # A module of its own: spawned worker processes look there for the script, and would find this file in ours.
    module = types.ModuleType('__main__')
    module.__file__ = path
    sys.modules['__main__'] = module
    exec(compile(source, path, 'exec'), module.__dict__)


def _hook_from(path: str):
    """Makes an excepthook whose tracebacks begin in the script rather than in this file."""

    def excepthook(kind, error, traceback):
        first = traceback
        while first is not None and first.tb_frame.f_code.co_filename != path:
            first = first.tb_next
        # None where the script cannot even be compiled: python shows no frames then either.
        sys.__excepthook__(kind, error.with_traceback(first), first)

    return excepthook


if __name__ == '__main__':
    main()
