"""Which trainings each table and figure is made of.

The networks are those of the paper at a small scale: resnet10 has one basic block a stage and half the width, narrow10
a quarter of it at most, the others have the depth of their namesakes and an eighth of the width.
"""
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck

__all__ = [
    'EXPERIMENTS', 'LIFETIME', 'NETWORKS', 'NETWORK_BUDGET', 'PRECISIONS', 'PRECISION_LAYERS', 'PRESETS', 'RULE_LRS',
    'RULE_SCALES', 'STRENGTH_RULES', 'SUITES', 'TABLE3', 'Cell', 'Preset', 'Task', 'cells_of', 'compared_rules',
    'rule_map', 'strength_map', 'task_of', 'tuned_on_network', 'tuned_rule',
]

_DEEP: dict[str, Any] = {'block': Bottleneck, 'channels': (8, 16, 32, 64), 'stem_width': 32}
_NEXT: dict[str, Any] = {**_DEEP, 'cardinality': 8, 'base_width': 16}
_SE: dict[str, Any] = {**_DEEP, 'block_args': {'attn_layer': 'se'}}
NETWORKS: dict[str, dict[str, Any]] = {
    'resnet10': {'block': BasicBlock, 'layers': (1, 1, 1, 1), 'channels': (32, 64, 128, 256)},
    'narrow10': {'block': BasicBlock, 'layers': (1, 1, 1, 1), 'channels': (16, 32, 64, 64)},
    'resnet50': {**_DEEP, 'layers': (3, 4, 6, 3)},
    'resnet101': {**_DEEP, 'layers': (3, 4, 23, 3)},
    'resnext50': {**_NEXT, 'layers': (3, 4, 6, 3)},
    'resnext101': {**_NEXT, 'layers': (3, 4, 23, 3)},
    'seresnet50': {**_SE, 'layers': (3, 4, 6, 3)},
    'seresnet101': {**_SE, 'layers': (3, 4, 23, 3)},
}


@dataclass(frozen=True)
class Task:
    """What is trained on, and for how long.

    Attributes:
        image_size: Height and width, pixels.
        every: Every so many-th class of Tiny-ImageNet-200; 0 for made-up patterns.
        batch_size: Images a step.
        epochs: How often a training is looked at; the learning rate is divided by 10 after 30, 60 and 90 % of them.
        epoch_steps: Steps of an epoch; None for one pass over the images.
    """
    image_size: int
    every: int
    batch_size: int
    epochs: int
    epoch_steps: int | None = None


@dataclass(frozen=True)
class Preset:
    """How large everything is.

    Attributes:
        short: Task of the paper's tables and figures.
        long: Task of `lifetime`.
        brief: Task of `precision`, `rules` and `strengths`.
        thin: Take every so many-th value of each sweep, ends included.
        backbones: Networks of table 3.
        seeds: Seeds of each network in table 3.
        scale_seeds: Seeds of each initialization in figures 5 and 6, and of each cell of `rules` and `strengths`.
        fresh_seeds: Seeds that the tuned strengths of table 3 are measured with, beside the one they were tuned on.
        life_seeds: Seeds of each row of `lifetime`.
        life_blocks: Blocks of rows of `lifetime`; None for all.
        compared: How many of the rules of `rules`; None for all.
    """
    short: Task
    long: Task
    brief: Task
    thin: int
    backbones: tuple[str, ...]
    seeds: int
    scale_seeds: int
    fresh_seeds: int
    life_seeds: int
    life_blocks: int | None = None
    compared: int | None = None


_ALL_BACKBONES = tuple(name for name in NETWORKS if name not in ('resnet10', 'narrow10'))
_LONG = Task(16, every=20, batch_size=32, epochs=25, epoch_steps=600)
_BRIEF = Task(16, every=20, batch_size=32, epochs=5, epoch_steps=120)
PRESETS = {
    'smoke': Preset(
        Task(16, every=0, batch_size=32, epochs=2, epoch_steps=4),
        Task(16, every=0, batch_size=32, epochs=4, epoch_steps=6),
        Task(16, every=0, batch_size=32, epochs=1, epoch_steps=4), thin=6, backbones=('resnet50',), seeds=1,
        scale_seeds=1, fresh_seeds=1, life_seeds=1, life_blocks=1, compared=2),
    'cpu': Preset(
        Task(32, every=10, batch_size=128, epochs=10), _LONG, _BRIEF, thin=1, backbones=_ALL_BACKBONES, seeds=3,
        scale_seeds=3, fresh_seeds=2, life_seeds=3),
    'gpu': Preset(
        Task(32, every=5, batch_size=128, epochs=10), _LONG, _BRIEF, thin=1, backbones=_ALL_BACKBONES, seeds=3,
        scale_seeds=3, fresh_seeds=3, life_seeds=3),
}


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        network: Key of NETWORKS.
        normalization: 'none', 'ws', 'wn', or 'ws_published', the layer that the authors of WS have published.
        rule: Key of rules.RULES.
        lr: Learning rate at the start.
        strength: Weight decay or alpha.
        scale: What the convolutions' initialization is multiplied by.
        seed: Seed of initialization, order and augmentation.
        other_decay: Weight decay of norm weights and classifier.
        decay_until: Share of the epochs after which nothing decays or shrinks any more, under L2, sgdw and AWS.
        then_alpha: Alpha of AWS from then on, under l2_then_aws.
        precision: 'float32', or the type of autocast: 'bfloat16', or 'float16' with a GradScaler.
    """
    network: str
    normalization: str
    rule: str
    lr: float
    strength: float
    scale: float = 1.
    seed: int = 0
    other_decay: float = 1e-4
    decay_until: float = 1.
    then_alpha: float = 0.
    precision: str = 'float32'

    def settings(self) -> dict[str, Any]:
        return asdict(self)


SGD_LR, ADAM_LR = 0.1, 1e-3
DECAYS = (0., 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1., 10., 100.)
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1., 10., 100.)
SCALES = (0.01, 1., 20., 100.)
# Five for each network of table 3, half a decade apart; the two rules are equal at a std of 0.04.
NETWORK_BUDGET = {'l2': (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 'aws': (0.025, 0.075, 0.25, 0.75, 2.5)}
# Where the paper has weight decay 1e-4 over ImageNet's 450,000 steps; the same share of decay over this many steps.
TYPICAL_DECAY, TYPICAL_ALPHA = 1e-2, 0.25
# The same decay at the std of 0.13 that the filters of table 3's narrow networks start with.
NARROW_ALPHA = 0.075
# The columns of table 3: the paper's three, and two alphas that fit these networks.
TABLE3 = {
    'baseline': ('none', 'l2', SGD_LR, TYPICAL_DECAY),
    'WS + WD': ('ws', 'l2', SGD_LR, TYPICAL_DECAY),
    'WS + AWS': ('ws', 'aws', SGD_LR, TYPICAL_ALPHA),
    f'WS + AWS, α = {NARROW_ALPHA:g}': ('ws', 'aws', SGD_LR, NARROW_ALPHA),
    'WS + AWS, α by layer': ('ws', 'aws_by_layer', SGD_LR, TYPICAL_DECAY),
}
LIFETIME_OTHER_DECAY = 1e-3
# Table 1 again: at which decay exponent what fails, with whose layer and in which precision.
PRECISIONS = ('float32', 'bfloat16', 'float16')
PRECISION_LAYERS = ('ws', 'ws_published', 'none')
PRECISION_DECAYS = (1e-2, 1e-1, 1., 10., 100.)
# Every rule, with WS and two without: five strengths each, a decade apart or half of one where it is a length. An
# exponent of 20 is L2 0.1 here; decoupled decay takes ten times that.
RULE_BUDGETS = {
    ('ws', 'l2'): (1e-4, 1e-3, 1e-2, 1e-1, 1.),
    ('ws', 'aws'): (1e-3, 1e-2, 1e-1, 1., 10.),
    ('ws', 'none'): (0.,),
    ('ws', 'aws_decoupled'): (1e-2, 1e-1, 1., 10., 100.),
    ('ws', 'aws_by_layer'): (1e-4, 1e-3, 1e-2, 1e-1, 1.),
    ('ws', 'sgdw'): (1e-3, 1e-2, 1e-1, 1., 10.),
    ('ws', 'shifted'): (1e-4, 1e-3, 1e-2, 1e-1, 1.),
    ('ws', 'sgdp'): (1e-4, 1e-3, 1e-2, 1e-1, 1.),
    ('ws', 'sgdc'): (1e-3, 1e-2, 1e-1, 1., 10.),
    ('ws', 'cautious'): (1e-3, 1e-2, 1e-1, 1., 10.),
    ('ws', 'target'): (1e-3, 1e-2, 1e-1, 1., 10.),
    ('ws', 'forced'): (0.01, 0.03, 0.1, 0.3, 1.),
    ('ws', 'hyperball'): (0.01, 0.03, 0.1, 0.3, 1.),
    ('ws', 'req'): (1e-4, 1e-3, 1e-2, 1e-1, 1.),
    ('none', 'l2'): (1e-4, 1e-3, 1e-2, 1e-1, 1.),
    ('none', 'aws'): (1e-4, 1e-3, 1e-2, 1e-1, 1.),
}
RULE_LRS = (0.01, 0.03, 0.1, 0.3, 1.)
RULE_SCALES = (0.01, 1., 100.)
# What `strengths` compares at every strength and initialization.
STRENGTH_RULES = (('ws', 'l2'), ('ws', 'aws'), ('ws', 'aws_decoupled'), ('none', 'l2'), ('none', 'aws'))


def _long(normalization: str, rule: str, *strengths: float, lr: float = SGD_LR, **options: float) -> list[Cell]:
    options = {'other_decay': LIFETIME_OTHER_DECAY, **options}
    return [Cell('narrow10', normalization, rule, lr, strength, **options) for strength in strengths]


# Over 15,000 steps the decay exponent is 50 at L2 1e-2; AWS with alpha 0.25 is equal to it at a std of 0.04, and at a
# norm of 1 with alpha 1e-2. In the order of their use, as a part is worth something too; each with every seed.
LIFETIME = (
    # What kills filters and what does not.
    [*_long('ws', 'l2', 1e-2), *_long('ws', 'aws', 0.25), *_long('none', 'l2', 1e-2), *_long('ws', 'l2', 1e-3),
     *_long('ws_published', 'l2', 1e-2), *_long('ws', 'aws', 0.025), *_long('ws', 'none', 0.),
     *_long('none', 'aws', 1e-2)],
    # The rules that do best in `rules`, and decoupled AWS, equal to the coupled one with a tenth of its alpha.
    [*_long('ws', 'req', 1e-3), *_long('ws', 'aws_decoupled', 0.25), *_long('ws', 'hyperball', 0.1)],
    # The same time from filters that start 100 times too long.
    [*_long('ws', 'l2', 1e-3, scale=100.), *_long('ws', 'aws', 0.025, scale=100.),
     *_long('ws', 'none', 0., scale=100.)],
    # Decay of norm weights and classifier: none, and as strong as that of the filters. What comes back without
    # decay, or under AWS.
    [*_long('ws', 'l2', 1e-2, other_decay=0.), *_long('ws', 'l2', 1e-2, other_decay=1e-2),
     *_long('ws', 'aws', 0.25, other_decay=1e-2), *_long('ws', 'l2', 1e-2, decay_until=0.2),
     *_long('ws', 'l2_then_aws', 1e-2, decay_until=0.2, then_alpha=0.25)],
    # Strengths over five decades.
    [*_long('ws', 'l2', 1e-1, 1e-4, 1e-5), *_long('ws', 'aws', 2.5, 2.5e-3, 2.5e-4),
     *_long('none', 'aws', 1e-3), *_long('ws_published', 'l2', 1e-1)],
    # WN, and Adam, whose exponent is 50 at a decoupled decay of 10.
    [*_long('wn', 'l2', 1e-2), *_long('wn', 'aws', 1e-2),
     *_long('ws', 'adam', 1e-2, lr=ADAM_LR), *_long('ws', 'adamw', 10., lr=ADAM_LR),
     *_long('ws', 'aws_adam', 250., lr=ADAM_LR)],
)


def _thin(values: tuple[float, ...], step: int) -> tuple[float, ...]:
    return tuple(sorted({*values[::step], values[-1]}))


def _table1(preset: Preset) -> Iterable[Cell]:
    for decay in _thin(DECAYS, preset.thin):
        yield Cell('resnet10', 'ws', 'l2', SGD_LR, decay)
        yield Cell('resnet10', 'none', 'l2', SGD_LR, decay)
        yield Cell('resnet10', 'ws', 'adam', ADAM_LR, decay)
        yield Cell('resnet10', 'ws', 'adamw', ADAM_LR, decay)


def _table2(preset: Preset) -> Iterable[Cell]:
    for alpha in _thin(ALPHAS, preset.thin):
        for normalization in ('ws', 'wn'):
            for rule in ('aws', 'aws_decoupled'):
                yield Cell('resnet10', normalization, rule, SGD_LR, alpha)
            for rule in ('aws_adam', 'aws_adam_coupled'):
                yield Cell('resnet10', normalization, rule, ADAM_LR, alpha)


def _table3(preset: Preset) -> Iterable[Cell]:
    for network in preset.backbones:
        for seed in range(preset.seeds):
            yield from (Cell(network, *column, seed=seed) for column in TABLE3.values())


def _network_tuning(network: str, rule: str, preset: Preset) -> list[Cell]:
    return [Cell(network, 'ws', rule, SGD_LR, strength) for strength in _thin(NETWORK_BUDGET[rule], preset.thin)]


def tuned_on_network(network: str, rule: str, preset: Preset, accuracy: dict[Cell, float]) -> Cell | None:
    """Returns the training with a network's best strength of a rule; None before all of its tuning is known."""
    return _best(_network_tuning(network, rule, preset), accuracy)


def _best(cells: list[Cell], accuracy: dict[Cell, float]) -> Cell | None:
    return max(cells, key=lambda cell: accuracy[cell]) if all(cell in accuracy for cell in cells) else None


def _table3_tuned(preset: Preset, accuracy: dict[Cell, float]) -> Iterable[Cell]:
    for network in preset.backbones:
        for rule in NETWORK_BUDGET:
            yield from _network_tuning(network, rule, preset)
            best = tuned_on_network(network, rule, preset, accuracy)
            if best is not None:
                yield from (replace(best, seed=seed) for seed in range(1, 1 + preset.fresh_seeds))


def _decay_or_none() -> Iterable[Cell]:
    yield Cell('resnet10', 'ws', 'l2', SGD_LR, 0.)
    yield Cell('resnet10', 'ws', 'l2', SGD_LR, TYPICAL_DECAY)


def _aws() -> Iterable[Cell]:
    yield Cell('resnet10', 'ws', 'aws', SGD_LR, TYPICAL_ALPHA)


def _initializations(preset: Preset, rule: str, strength: float) -> Iterable[Cell]:
    for scale in SCALES:
        for seed in range(preset.scale_seeds):
            yield Cell('resnet10', 'ws', rule, SGD_LR, strength, scale, seed)


def _lifetime(preset: Preset) -> Iterable[Cell]:
    for block in LIFETIME[:preset.life_blocks]:
        for seed in range(preset.life_seeds):
            yield from (replace(cell, seed=seed) for cell in block)


def _precision(preset: Preset) -> Iterable[Cell]:
    for decay in _thin(PRECISION_DECAYS, preset.thin):
        for normalization in PRECISION_LAYERS:
            for precision in PRECISIONS:
                yield Cell('narrow10', normalization, 'l2', SGD_LR, decay, precision=precision)


def _rule_tuning(normalization: str, rule: str, preset: Preset) -> list[Cell]:
    return [Cell('narrow10', normalization, rule, SGD_LR, strength)
            for strength in _thin(RULE_BUDGETS[normalization, rule], preset.thin)]


def compared_rules(preset: Preset) -> list[tuple[str, str]]:
    """Lists normalization and rule of each row of `rules`."""
    return list(RULE_BUDGETS)[:preset.compared]


def tuned_rule(normalization: str, rule: str, preset: Preset, accuracy: dict[Cell, float]) -> Cell | None:
    """Returns the training with the best strength of a rule in `rules`; None before all of its tuning is known."""
    return _best(_rule_tuning(normalization, rule, preset), accuracy)


def rule_map(best: Cell, preset: Preset, seed: int) -> list[Cell]:
    """Lists the trainings of a tuned rule at every learning rate, and of each at every initialization."""
    return [replace(best, lr=lr, scale=scale, seed=seed)
            for lr in _thin(RULE_LRS, preset.thin) for scale in _thin(RULE_SCALES, preset.thin)]


def _rules(preset: Preset, accuracy: dict[Cell, float]) -> Iterable[Cell]:
    for normalization, rule in compared_rules(preset):
        yield from _rule_tuning(normalization, rule, preset)
    best = [tuned_rule(*compared, preset, accuracy) for compared in compared_rules(preset)]
    maps = [cell for seed in range(preset.scale_seeds) for one in best if one for cell in rule_map(one, preset, seed)]
    yield from sorted(maps, key=lambda cell: cell.lr != SGD_LR)  # a part is worth something too


def strength_map(normalization: str, rule: str, preset: Preset, seed: int) -> list[Cell]:
    """Lists the trainings of a rule with every strength of its tuning, and of each from every initialization."""
    return [replace(cell, scale=scale, seed=seed)
            for cell in _rule_tuning(normalization, rule, preset) for scale in _thin(RULE_SCALES, preset.thin)]


def _strengths(preset: Preset) -> Iterable[Cell]:
    for seed in range(preset.scale_seeds):
        for compared in STRENGTH_RULES:
            yield from strength_map(*compared, preset, seed)


# The experiments, by the file that their trainings are in.
SUITES = {
    'reproduce': ('table1', 'table2', 'table3', 'table3_tuned', 'fig1', 'fig2', 'fig4', 'fig5', 'fig6'),
    'lifetime': ('lifetime',),
    'precision': ('precision',),
    'rules': ('strengths', 'rules'),
}
EXPERIMENTS = tuple(name for suite in SUITES.values() for name in suite)


def task_of(suite: str, preset: Preset) -> Task:
    """Returns what the trainings of a suite train on."""
    return {'reproduce': preset.short, 'lifetime': preset.long}.get(suite, preset.brief)


def cells_of(experiment: str, preset: Preset, accuracy: dict[Cell, float]) -> list[Cell]:
    """Lists the trainings of one table or figure, those of others among them where they are the same.

    Args:
        experiment: One of EXPERIMENTS.
        preset: How large everything is.
        accuracy: Validation accuracy of the trainings that are done. Rules, and the networks of table 3, are tuned
            first: what follows from their best strengths is listed once these are known.

    Returns:
        The trainings, each once.
    """
    made = {
        'table1': lambda: _table1(preset),
        'table2': lambda: _table2(preset),
        'table3': lambda: _table3(preset),
        'table3_tuned': lambda: _table3_tuned(preset, accuracy),
        'fig1': _decay_or_none,
        'fig2': _decay_or_none,
        'fig4': _aws,
        'fig5': lambda: _initializations(preset, 'l2', TYPICAL_DECAY),
        'fig6': lambda: _initializations(preset, 'aws', TYPICAL_ALPHA),
        'lifetime': lambda: _lifetime(preset),
        'precision': lambda: _precision(preset),
        'strengths': lambda: _strengths(preset),
        'rules': lambda: _rules(preset, accuracy),
    }[experiment]()
    return list(dict.fromkeys(made))
