"""The command line, installed as `timm-aws`. `python -m timm_aws` is the same, and starts slowly: torch comes first.

    timm-aws run SCRIPT.py [ARGS...]                                     any script, with the plugin registered
    torchrun --nproc_per_node=N -m timm_aws run SCRIPT.py [ARGS...]      the same on N processes
    timm-aws export RUN OUT                                              a checkpoint folder from a run of train.py
    timm-aws publish FOLDER OWNER/NAME                                   the folder on the Hugging Face Hub
    timm-aws plot FILE.csv                                               a picture of recorded effective learning rates
    timm-aws plan --model NAME --opt NAME ...                            what a run will do to the filters, before it

It lies beside the package, as whatever lies in it is imported after torch, which takes seconds. The help has no need of
torch, and a Ctrl-C in these seconds is answered from here.
"""
import argparse
import contextlib
import gc
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ['main']

_INTERRUPTED = 'timm-aws: interrupted, run the same command again'


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command.

    Args:
        argv: Arguments, those of the process by default.
    """
    with _interrupt_exits():
        parser = argparse.ArgumentParser(prog='timm-aws', description='Adaptive Weight Shrink for timm.')
        commands = parser.add_subparsers(required=True, metavar='COMMAND')
        for add in (_add_run, _add_export, _add_publish, _add_plot, _add_plan):
            add(commands)
        argv = list(sys.argv[1:] if argv is None else argv)
        options = parser.parse_args(argv)
        if 'script' in options:
            options.args = argv[argv.index(options.script, 1) + 1:]  # argparse takes the first -- away
    options.command(options)


def _add_run(commands) -> None:
    run = commands.add_parser(
        'run',
        help="run a script with the plugin registered, such as timm's validate.py",
        description='Runs a Python script as `python SCRIPT ARGS` would, with the timm_aws plugin registered.',
        usage='timm-aws run SCRIPT [ARGS...]',
    )
    run.add_argument('script', metavar='SCRIPT', help='path of the script')
    run.add_argument('args', metavar='ARGS', nargs=argparse.REMAINDER, help="the script's own arguments and options")
    run.set_defaults(command=lambda options: _run(options.script, options.args))


def _add_export(commands) -> None:
    export = commands.add_parser(
        'export',
        help="make a checkpoint folder from what timm's train.py left",
        description='Makes a folder of safetensors, config.json, card and records that timm and the Hub read.',
    )
    export.add_argument('source', metavar='RUN', type=Path, help="folder of timm's train.py, or a checkpoint file")
    export.add_argument('out', metavar='OUT', type=Path, help='folder to make, named <architecture>.<tag>')
    export.add_argument('--dataset', required=True, help='name of the data set trained on, such as Tiny-ImageNet-200')
    export.add_argument('--license', required=True, help='licence of the weights, such as apache-2.0, or other')
    export.add_argument('--ema', action=argparse.BooleanOptionalAction, default=None,
                        help='take the averaged weights, or not; if left out, what validates better')
    export.add_argument('--labels', type=Path, help='a header, then a line a class: name, tab, description')
    export.add_argument('--img-size', type=int, metavar='PIXELS', help='size of image to be used on, as in training if '
                        'left out')
    export.add_argument('--data-dir', type=Path, help='folder of the images')
    export.add_argument('--validate', type=Path, metavar='VALIDATE.PY', help="timm's validate.py, to measure with")
    export.add_argument('--full-precision', action='store_true', help='store filters in full precision, not in half')
    _add_traceback(export)
    export.set_defaults(command=_export)


def _add_publish(commands) -> None:
    publish = commands.add_parser(
        'publish',
        help='put a checkpoint folder on the Hugging Face Hub',
        description='Uploads a checkpoint folder in one commit, fetches it back and compares. Uses the token of '
        '`hf auth login` or HF_TOKEN.',
    )
    publish.add_argument('folder', metavar='FOLDER', type=Path, help='checkpoint folder, see export')
    publish.add_argument('repo_id', metavar='OWNER/NAME', help='repository; it is made where there is none')
    publish.add_argument('--private', action='store_true', help='make the repository a private one')
    publish.add_argument('--revision', metavar='BRANCH', help='branch to publish on, made where there is none')
    publish.add_argument('--dry-run', action='store_true', help='check the folder and say what would be uploaded')
    _add_traceback(publish)
    publish.set_defaults(command=_publish)


def _add_plot(commands) -> None:
    plot = commands.add_parser(
        'plot',
        help='draw the effective learning rates of a run',
        description='Draws what timm_aws.Recorder, or train.py with --opt-kwargs record=FILE.csv, has written.',
    )
    plot.add_argument('record', metavar='FILE.csv', type=Path, help='record of a run')
    plot.add_argument('out', metavar='PICTURE', type=Path, nargs='?', help='picture, the name of the record with .png '
                      'if left out; its suffix names the format')
    _add_traceback(plot)
    plot.set_defaults(command=_plot)


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        'plan',
        help='forecast filter lengths and effective learning rates before a run',
        description="Forecasts the normalized weights of a run of timm's train.py, whose options these are.",
    )
    plan.add_argument('--model', metavar='NAME', required=True, help='model with normalized weights')
    plan.add_argument('--opt', metavar='NAME', required=True, help='optimizer, SGD or Adam, under aws_ or not')
    plan.add_argument('--lr', metavar='LR', type=float, required=True, help='learning rate')
    plan.add_argument('--epochs', metavar='N', type=int, required=True, help='epochs of training')
    plan.add_argument('--images', metavar='N', type=int, required=True, help='images in the training set')
    plan.add_argument('--batch-size', metavar='N', type=int, default=128, help='images of a step (%(default)s)')
    plan.add_argument('--img-size', metavar='PIXELS', type=int, help="side of the images (the model's own)")
    plan.add_argument('--opt-kwargs', metavar='KEY=VALUE', nargs='*', default=(), help='such as alpha=0.0025')
    plan.add_argument('--weight-decay', metavar='DECAY', type=float, default=2e-5, help='weight decay (%(default)s)')
    plan.add_argument('--momentum', metavar='M', type=float, default=0.9, help='momentum of SGD (%(default)s)')
    plan.add_argument('--sched', choices=('cosine', 'step', 'none'), default='cosine', help='schedule (%(default)s)')
    plan.add_argument('--warmup-epochs', metavar='N', type=int, default=5, help='epochs of warm-up (%(default)s)')
    plan.add_argument('--decay-epochs', metavar='N', type=float, default=90, help='of a step schedule (%(default)s)')
    plan.add_argument('--json', action='store_true', help='print JSON in place of a table')
    plan.add_argument('--plot', metavar='PICTURE', type=Path, help='picture; its suffix names the format')
    _add_traceback(plan)
    plan.set_defaults(command=_plan)


def _add_traceback(command: argparse.ArgumentParser) -> None:
    command.add_argument('--traceback', action='store_true', help='show where an error comes from')


@contextlib.contextmanager
def _interrupt_exits() -> Iterator[None]:
    """Lets Ctrl-C end the process at once, where there is nothing to put away.

    The exception would not do: where torch imports NumPy it is lost, or comes back as another one.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a job in the background ignores the signal, and goes on doing so
        signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(signum: int, frame: types.FrameType | None) -> None:
    os.write(2, f'{_INTERRUPTED}\n'.encode())  # sys.stderr may be in the middle of a write
    os._exit(130)


def _in_one_line(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Makes a command report what went wrong in one line on stderr: exit code 1, or 130 if it was interrupted."""

    def reporting(options: argparse.Namespace) -> None:
        try:
            return command(options)
        except KeyboardInterrupt:
            line, code = _INTERRUPTED, 130
        except Exception as error:
            if options.traceback:
                raise
            message = ' '.join(str(error).split())
            if not isinstance(error, (ValueError, RuntimeError, OSError, ImportError)):
                message = f'{type(error).__name__}: {message} (--traceback shows where)'  # says little on its own
            if getattr(error, 'name', '') == 'matplotlib':
                message = 'pictures need matplotlib: pip install matplotlib'
            line, code = f'timm-aws: {message}', 1
        with _interrupt_exits():
            gc.collect()  # the error is gone, and with it the frames that it held: a progress bar in them ends its line
            print(line, file=sys.stderr)
        sys.exit(code)

    return reporting


@_in_one_line
def _export(options: argparse.Namespace) -> None:
    with _interrupt_exits():
        from timm_aws.checkpoint.export import export

    for name in {'SIGTERM', 'SIGHUP'} & set(dir(signal)):  # which leave no hidden folder behind
        signum = getattr(signal, name)
        if signal.getsignal(signum) is not signal.SIG_IGN:  # by nohup
            signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    results = export(
        options.source, options.out, dataset=options.dataset, license=options.license, ema=options.ema,
        labels=options.labels, img_size=options.img_size, data_dir=options.data_dir, validate_py=options.validate,
        full_precision=options.full_precision)
    found = f'{results["metrics"]["top1"]} % top-1' if 'metrics' in results else 'not validated'
    print(f'{options.out}: {found}, {results["weights"]["bytes"] / 2**20:.1f} MiB')


@_in_one_line
def _publish(options: argparse.Namespace) -> None:
    with _interrupt_exits():
        from timm_aws.checkpoint.publish import publish

    done = publish(
        options.folder, options.repo_id, private=options.private, revision=options.revision,
        dry_run=options.dry_run)
    for name in done.upload:
        size = (options.folder / name).stat().st_size
        print(f'{"would upload" if options.dry_run else "uploaded"} {name}, {size} bytes')
    for name in done.remove:
        print(f'{"would remove" if options.dry_run else "removed"} {name}, which {options.folder} does not have')
    if not (done.upload or done.remove):
        print('everything is there already')
    print(done.url)


@_in_one_line
def _plot(options: argparse.Namespace) -> None:
    with _interrupt_exits():
        from timm_aws.plot import plot_effective_lr

    if not options.record.is_file():
        raise ValueError(f'{options.record} is not a file: give the CSV file of a record.')
    out = options.out or options.record
    out = out.with_suffix('.png') if out == options.record or not out.suffix else out
    if out == options.record:
        raise ValueError(f'{out} is the record itself: name the picture otherwise.')
    plot_effective_lr(options.record, out)
    print(out)


@_in_one_line
def _plan(options: argparse.Namespace) -> None:
    with _interrupt_exits():
        from timm_aws.plan import plan_run

    kept = {'command', 'json', 'plot', 'traceback'}
    plan = plan_run(**{name: value for name, value in vars(options).items() if name not in kept})
    print(plan.to_json() if options.json else plan.to_text())
    if options.plot:
        from timm_aws.plot import draw_effective_lr  # here, as only a picture needs matplotlib

        draw_effective_lr(plan.epochs, options.plot)


def _run(script: str, args: Sequence[str]) -> None:
    """Runs a script that finds argv, path, `__main__`, exit code and traceback as if python had started it."""
    path = os.path.abspath(script)
    try:
        with open(path, 'rb') as file:
            source = file.read()
    except OSError as error:
        print(f"timm-aws: can't open file {path!r}: {error}", file=sys.stderr)
        sys.exit(2)
    with _interrupt_exits():
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
