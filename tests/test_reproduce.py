"""scripts/reproduce.py: every experiment at its smallest, resuming, the report, and the rules that are compared."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reproduce import cell_of, pending, read_lines
from reproduction import lifetime_report, paper_report, precision_report, report, rules_report
from reproduction.grid import EXPERIMENTS, PRESETS, SUITES, Cell, cells_of
from reproduction.images import augment, patterns
from reproduction.rules import RULES, make_optimizer
from reproduction.training import train_cell

from timm_aws.ws_resnet import NormalizedResNet

TASK = PRESETS['smoke'].short
SCRIPTS = Path(__file__).parent.parent / 'scripts'


def reproduce(*args):
    return subprocess.run([sys.executable, str(SCRIPTS / 'reproduce.py'), *map(str, args)], capture_output=True,
                          text=True, check=True).stdout


def report_of(folder):
    paths = reproduce('report', '--preset', 'smoke', '--out', folder).split()
    return {Path(path).name: Path(path).read_bytes() for path in paths}


def test_smoke_runs_everything_and_goes_on_where_it_was_cut_off(tmp_path):
    reproduce('run', 'all', '--preset', 'smoke', '--out', tmp_path)
    path = tmp_path / 'reproduce_smoke.jsonl'
    lines = read_lines(path)
    for suite in SUITES:
        assert pending(SUITES[suite], PRESETS['smoke'], read_lines(tmp_path / f'{suite}_smoke.jsonl')) == []
    before = report_of(tmp_path)
    assert set(before) == {'reproduce_smoke.md', 'lifetime_smoke.md', 'precision_smoke.md', 'rules_smoke.md', *(
        f'{name}.{suffix}' for suffix in ('png', 'svg') for name in (
            'fig1', 'fig2', 'fig4', 'fig5', 'fig6', 'dying', 'strengths', 'spreads', 'headline', 'maps',
            'plateaus'))}
    assert report_of(tmp_path) == before, 'the same lines make the same report, byte for byte'
    texts = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(texts[:-2]) + texts[-2][:100])  # two are missing, the first of them was being written
    reproduce('run', 'all', '--preset', 'smoke', '--out', tmp_path)
    again = read_lines(path)
    assert again.keys() == lines.keys()
    for cell, line in again.items():
        assert {**line, 'seconds': 0} == {**lines[cell], 'seconds': 0}


def test_failed_training_is_a_result():
    cell = Cell('resnet10', 'ws', 'l2', 1e4, 1.)
    record = train_cell(cell, TASK, patterns(16))
    assert record['first_nonfinite_step'] is not None
    assert cell_of(json.loads(json.dumps(record))) == cell
    assert len(record['val_accuracy']) < TASK.epochs


def test_same_cell_trains_the_same():
    cell = Cell('resnet10', 'wn', 'aws', 0.1, 0.1)
    first, second = (train_cell(cell, TASK, patterns(16)) for _ in range(2))
    assert {**first, 'seconds': 0} == {**second, 'seconds': 0}
    assert len(first['effective_lr']) == len(first['lengths']) == TASK.epochs


@pytest.mark.parametrize('preset', ['smoke', 'cpu', 'gpu'])
@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_no_cell_is_listed_twice_and_every_rule_is_known(preset, experiment):
    cells = cells_of(experiment, PRESETS[preset], {})
    assert len(cells) == len(set(cells)) > 0
    assert {cell.rule for cell in cells} <= set(RULES)


def test_every_rule_is_tuned_on_one_seed_and_mapped_with_three():
    preset = PRESETS['cpu']
    tuning = cells_of('rules', preset, {})
    assert {(cell.lr, cell.scale, cell.seed) for cell in tuning} == {(0.1, 1., 0)}
    mine = [cell for cell in tuning if (cell.normalization, cell.rule) == ('none', 'aws')]
    accuracy = {cell: 20. if cell.strength == 1e-2 else 10. for cell in mine}
    found = [cell for cell in cells_of('rules', preset, accuracy) if cell not in tuning]
    assert {(cell.normalization, cell.rule, cell.strength) for cell in found} == {('none', 'aws', 1e-2)}
    assert {(cell.lr, cell.scale, cell.seed) for cell in found} == {
        (lr, scale, seed) for lr in (0.01, 0.03, 0.1, 0.3, 1.) for scale in (0.01, 1., 100.) for seed in range(3)
    } - {(0.1, 1., 0)}


def test_networks_are_tuned_on_one_seed_and_measured_with_others():
    preset = PRESETS['cpu']
    tuning = cells_of('table3_tuned', preset, {})
    assert {cell.seed for cell in tuning} == {0}
    assert len(tuning) == 2 * 5 * 6
    mine = [cell for cell in tuning if (cell.network, cell.rule) == ('resnet101', 'aws')]
    accuracy = {cell: 20. if cell.strength == 0.75 else 10. for cell in mine}
    assert {(cell.network, cell.rule, cell.strength, cell.seed)
            for cell in cells_of('table3_tuned', preset, accuracy) if cell not in tuning} == {
                ('resnet101', 'aws', 0.75, 1), ('resnet101', 'aws', 0.75, 2)}


def test_columns_of_table_3_are_compared_on_the_seeds_that_all_have():
    def column(normalization, rule, strength, accuracies):
        return {
            Cell('resnet50', normalization, rule, 0.1, strength, seed=seed): {
                'seed': seed, 'num_classes': 20, 'val_accuracy': [accuracy], 'first_nonfinite_step': None,
                'lengths': [[0.1, 0.3, 0.2]]}
            for seed, accuracy in accuracies.items()}

    lines = {
        **column('none', 'l2', 0.01, {0: 40., 1: 42.}), **column('ws', 'l2', 0.01, {0: 43., 1: 45., 2: 80.}),
        **column('ws', 'aws', 0.25, {0: 41., 1: 42., 3: 90.})}
    accuracies = '41.0 ± 1.4 (2 seeds) | 44.0 ± 1.4 (2 seeds) | 41.5 ± 0.7 (2 seeds) | not run | not run'
    assert f'| resnet50 | {accuracies} | 0.20 |' in paper_report._table3(lines)
    assert '| WS + AWS less WS + WD | -2.5 | 1 |' in paper_report._over_networks(lines)
    alone = paper_report._table3(column('none', 'l2', 0.01, {0: 40., 1: 42.}))
    assert '| resnet50 | 41.0 ± 1.4 (2 seeds) | not run |' in alone


def test_exponent_of_the_decay_is_the_sum_of_its_shares():
    record = train_cell(Cell('resnet10', 'ws', 'l2', 0.1, 0.5), TASK, patterns(16))
    # 8 steps: 2 at 0.1, 3 at 0.01, 2 at 0.001, 1 at 0.0001, over 1 - 0.9.
    assert record['decay_exponent'] == pytest.approx(0.5 * (0.2 + 0.03 + 0.002 + 0.0001) / 0.1, rel=1e-3)
    assert train_cell(Cell('resnet10', 'ws', 'aws', 0.1, 0.5), TASK, patterns(16))['decay_exponent'] is None


def test_augmentation_shifts_and_flips_and_does_nothing_else():
    images = torch.arange(32 * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).view(32, 3, 8, 8)
    out = augment(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images.float(), [4] * 4, mode='reflect').to(torch.uint8)
    for image, border in zip(out, padded):
        crops = [border[:, row:row + 8, column:column + 8] for row in range(9) for column in range(9)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for crop in crops)


def gradientless_step(rule, lr=0.1, strength=0.01):
    torch.manual_seed(0)
    from reproduction.grid import NETWORKS

    model = NormalizedResNet(**NETWORKS['resnet10'], num_classes=4)
    optimizer = make_optimizer(model, rule, lr, strength, 'ws', 1e-4)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return before, dict(model.named_parameters())


@pytest.mark.parametrize('rule', RULES)
def test_rules_spare_biases_and_decay_the_rest_as_the_paper_does(rule):
    before, after = gradientless_step(rule)
    assert torch.equal(before['fc.bias'], after['fc.bias'])
    if not RULES[rule].adam and rule != 'sgdp':
        assert torch.allclose(after['fc.weight'], before['fc.weight'] * (1 - 0.1 * 1e-4), rtol=1e-6, atol=0)
        assert torch.allclose(after['bn1.weight'], before['bn1.weight'] * (1 - 0.1 * 1e-4), rtol=1e-6, atol=0)


def test_rules_shrink_the_filters_as_their_equations_say():
    name = 'layer1.0.conv1.weight'

    def share(rule, strength=0.01):
        before, after = gradientless_step(rule, strength=strength)
        return before[name], after[name]

    before, after = share('none')
    assert torch.equal(before, after)
    for rule in ('l2', 'sgdw'):
        before, after = share(rule)
        assert torch.allclose(after, before * (1 - 0.1 * 0.01), rtol=1e-5, atol=1e-9)
    std = before.std((1, 2, 3), correction=0, keepdim=True)
    mean = before.mean((1, 2, 3), keepdim=True)
    before, after = share('shifted')
    pull = (1 - 1e-3 / std) * (before - mean) + mean
    assert torch.allclose(after, before - 0.1 * 0.01 * pull, rtol=1e-5, atol=1e-8)
    for rule in ('aws', 'aws_decoupled'):
        before, after = share(rule, 0.5)
        assert torch.allclose(after, before * (1 - 0.1 * 0.5 * std), rtol=1e-5, atol=1e-9)


def test_float16_trains_under_autocast_and_a_scaled_loss():
    lines = {precision: train_cell(Cell('narrow10', 'ws', 'l2', 0.1, 1e-2, precision=precision), TASK, patterns(16))
             for precision in ('float32', 'bfloat16', 'float16')}
    assert [line['loss_scale'] for line in lines.values()] == [1., 1., 2. ** 16]
    lengths = [line['lengths'][-1] for line in lines.values()]
    assert lengths[0] != lengths[1] != lengths[2] and lengths[0] == pytest.approx(lengths[2], rel=1e-2)


def test_seeds_of_one_setting_are_told_as_mean_and_deviation_and_a_failed_one_is_shown():
    cell = Cell('resnet10', 'ws', 'l2', 0.1, 1e-2, 20.)

    def lines(*ends):
        return {replace(cell, seed=seed): {
            **cell.settings(), 'seed': seed, 'num_classes': 20, 'val_accuracy': [end],
            'first_nonfinite_step': None if end else 7} for seed, end in enumerate(ends)}

    other = {replace(cell, scale=100.): lines(50.)[cell]}
    assert report.told_seeds(report.seeds_of({**lines(40., 44., 42.), **other}, cell)) == '42.0 ± 2.0 (3 seeds)'
    assert report.told_seeds(report.seeds_of(lines(40., 0.), cell)) == '40.0, **not finite** (step 7)'
    assert report.told_seeds(report.seeds_of(lines(40.), cell)) == '40.0'
    assert report.told_seeds(report.seeds_of(other, cell)) == 'not run'


@pytest.mark.parametrize(('suite', 'reporter'), list(
    zip(SUITES, (paper_report, lifetime_report, precision_report, rules_report))))
def test_committed_tables_are_those_of_the_committed_lines(suite, reporter):
    lines = read_lines(SCRIPTS / 'results' / f'{suite}_cpu.jsonl')
    assert reporter.tables(lines, PRESETS['cpu']) == (SCRIPTS / 'results' / f'{suite}_cpu.md').read_text()
    assert pending(SUITES[suite], PRESETS['cpu'], lines) == [], 'nothing is left to train'


def test_report_says_that_it_is_of_a_part():
    cells = cells_of('lifetime', PRESETS['smoke'], {})
    lines = {cells[0]: train_cell(cells[0], PRESETS['smoke'].long, patterns(16)) | {
        'dataset': 'patterns', 'num_classes': 4, 'hardware': 'a CPU', 'versions': {}}}
    assert lifetime_report.tables(lines, PRESETS['smoke']).startswith(f'1 of {len(cells)} trainings are done: this is')
    assert lifetime_report.tables({}, PRESETS['smoke']) == 'No training has been run.\n'


def test_what_comes_back_is_told_of_the_end_of_decay_and_of_the_run():
    preset = PRESETS['cpu']
    cell = next(cell for cell in cells_of('lifetime', preset, {}) if cell.decay_until == 0.2 and cell.rule == 'l2')
    line = next(iter(read_lines(SCRIPTS / 'results' / 'lifetime_cpu.jsonl').values()))
    epochs = range(preset.long.epochs)
    changed = {'dead': [[epoch, 1] for epoch in epochs], 'still': [[0, 40 - epoch] for epoch in epochs]}
    assert '| WS, L2, SGD, λ = 0.01, no decay after 20 % of the steps | 5 | 25 | 36 | 16 |' in lifetime_report.tables(
        {cell: {**line, **changed}}, preset)


def test_rules_are_compared_with_decay_seed_by_seed():
    preset = PRESETS['cpu']
    accuracy = {cell: 31. if (cell.rule, cell.strength) in (('l2', 1e-2), ('aws', 0.1)) else 20.
                for cell in cells_of('rules', preset, {}) if cell.normalization == 'ws'}
    for cell in cells_of('rules', preset, accuracy):
        if cell.normalization == 'ws' and cell.strength == {'l2': 1e-2, 'aws': 0.1}.get(cell.rule):
            accuracy[cell] = 31. + cell.seed if cell.rule == 'aws' else 30. + (cell.scale == 1)
    lines = {cell: {
        **cell.settings(), 'num_classes': 10, 'val_accuracy': [value], 'first_nonfinite_step': None, 'steps': 600,
        'dataset': 'images', 'hardware': 'a CPU', 'versions': {}} for cell, value in accuracy.items()}
    text = rules_report.tables(lines, preset)
    assert '| L2, SGD | 0.01 | 30.0 ± 0.0 (3 seeds) | 31.0 ± 0.0 (3 seeds) | 30.0 ± 0.0 (3 seeds) |' in text
    assert '| AWS, coupled | 0.1 | 32.0 ± 1.0 (3 seeds) |' in text
    assert text.count('| AWS, coupled | +2.0 ± 2.5 | +1.0 ± 2.5 | +2.0 ± 2.5 | +1.7 ± 2.5 |') == 2, 'at lr 0.1, at all'
    assert '| no decay | 0 | not run | 20.0 | not run |' in text


def test_strengths_are_told_with_the_initialization_that_they_suit_least():
    preset = PRESETS['cpu']
    cells = cells_of('strengths', preset, {})
    assert len(cells) == 5 * 5 * 3 * 3  # rules, strengths, initializations, seeds
    mine = [cell for cell in cells if (cell.normalization, cell.rule, cell.strength) == ('none', 'aws', 0.1)]
    lines = {cell: {
        **cell.settings(), 'num_classes': 10, 'val_accuracy': [20. * (1 + (cell.scale == 1)) + cell.seed], 'steps': 600,
        'first_nonfinite_step': None, 'dataset': 'images', 'hardware': 'a CPU', 'versions': {}} for cell in mine}
    told, least = '21.0 ± 1.0 (3 seeds)', '| 21.0 |'
    assert f'| AWS, coupled, α = 0.1, no WS | {told} | 41.0 ± 1.0 (3 seeds) | {told} {least}' in rules_report.tables(
        lines, preset)


def test_difference_is_told_with_its_interval():
    # Student's t for two degrees of freedom is 4.30, the standard error 1 / sqrt(3).
    assert report.interval([1., 2., 3.]) == '+2.0 ± 2.5'
    assert report.interval([-1.5]) == '-1.5'
    assert report.interval([]) == 'not run'
