"""What the rule costs, beside what people use: a step, a training, inference, start-up, and how the step grows.

    python scripts/bench.py step [--model ws_resnet50]
    python scripts/bench.py train | infer | startup | scale
    python scripts/bench.py gpu

Variants take turns, round by round, so that a drift of the machine meets them all; figures are medians over the rounds
with the lowest and the highest, and ratios to a base of the same round. Each prints a table and writes
scripts/results/bench_<name>.json. What is timed is described in benchmarks/<name>.py. `gpu` is all of it for a GPU.
"""
import argparse

from benchmarks.gpu import gpu
from benchmarks.infer import infer
from benchmarks.scale import scale
from benchmarks.startup import startup
from benchmarks.step import step
from benchmarks.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    options = {
        step: {'--model': 'ws_resnet50'},
        train: {'--batch-size': 64, '--img-size': 128},
        infer: {'--img-size': 224},
        startup: {},
        scale: {},
        gpu: {},
    }
    for command, defaults in options.items():
        command_parser = commands.add_parser(command.__name__)
        command_parser.set_defaults(command=command)
        for option, default in defaults.items():
            command_parser.add_argument(option, type=type(default), default=default, help=f'default: {default}')
    arguments = vars(parser.parse_args())
    arguments.pop('command')(**arguments)


if __name__ == '__main__':
    main()
