"""Fills the numbers of the findings into README.md and scripts/results/README.md.

    python scripts/findings.py

They come from the trainings of reproduce.py, its tables (those of `lifetime` too), and the trainings of init_scale.py,
recalibration.py and centering.py.
"""
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from outputs import RESULTS, fill_in
from reproduce import read_lines
from reproduction.grid import PRESETS, SGD_LR, SUITES, Cell, cells_of
from reproduction.report import final_accuracy

LINES = RESULTS / 'reproduce_cpu.jsonl'
LIFETIME = RESULTS / 'lifetime_cpu.md'
RULES = RESULTS / 'rules_cpu.md'
# Rows of `lifetime` by the names of their numbers, first those of the table in the findings.
LIFETIME_ROWS = {
    'l2': 'WS, L2, SGD, λ = 0.01', 'published': 'WS as published, L2, SGD, λ = 0.01',
    'plain': 'no WS, L2, SGD, λ = 0.01', 'aws': 'WS, AWS, coupled, α = 0.25',
    'plain_aws': 'no WS, AWS, coupled, α = 0.01', 'l2_weak': 'WS, L2, SGD, λ = 0.001',
    'aws_weak': 'WS, AWS, coupled, α = 0.025', 'none': 'WS, no decay'}
LIFETIME_OTHERS = {
    'req': 'WS, fixed angle (REQ), λ = 0.001',
    **{f'{name}_far': f'{LIFETIME_ROWS[name]}, from filters 100 times as long'
       for name in ('l2_weak', 'aws_weak', 'none')},
    **{f'{name}_rest_{word}': f'{LIFETIME_ROWS[name]}, decay of the rest {decay}'
       for name, word, decay in (('l2', 'none', 0), ('l2', 'strong', 0.01), ('aws', 'strong', 0.01))},
    'l2_least': 'WS, L2, SGD, λ = 1e-05', 'l2_less': 'WS, L2, SGD, λ = 0.0001', 'l2_most': 'WS, L2, SGD, λ = 0.1',
    'aws_least': 'WS, AWS, coupled, α = 0.00025', 'aws_less': 'WS, AWS, coupled, α = 0.0025',
    'aws_most': 'WS, AWS, coupled, α = 2.5', 'published_most': 'WS as published, L2, SGD, λ = 0.1',
    'l2_until': 'WS, L2, SGD, λ = 0.01, no decay after 20 % of the steps',
    'l2_then_aws': 'WS, L2, SGD, λ = 0.01, AWS, α = 0.25, after 20 % of the steps',
    'wn': 'WN, L2, SGD, λ = 0.01', 'wn_aws': 'WN, AWS, coupled, α = 0.01', 'adam': 'WS, L2, Adam, λ = 0.01',
    'adamw': 'WS, AdamW, λ = 10', 'aws_adam': 'WS, AWS, Adam, decoupled, α = 250'}
Table = dict[str, dict[str, str]]


def tables(path: Path) -> dict[str, Table]:
    """Reads the tables of reproduce.py: title, then first cell of the row, then column, to cell."""
    found = {}
    for part in path.read_text().split('## ')[1:]:
        title, *lines = part.splitlines()
        head, _, *rows = [line[2:-2].split(' | ') for line in lines if line.startswith('|')]
        found[title] = {row[0]: dict(zip(head, row)) for row in rows}
    return found


def span(numbers: Iterable[float | str], digits: int = 0) -> str:
    """Returns the lowest and the highest number as text, one where they are the same."""
    found = [float(number) for number in numbers]
    return ' to '.join(dict.fromkeys(f'{end(found):.{digits}f}' for end in (min, max)))


def of_duration() -> dict[str, str]:
    """Returns how many hours all of the trainings take, two at a time: those to come as long as those that are done."""
    seconds = 0.
    for suite, experiments in SUITES.items():
        lines = read_lines(RESULTS / f'{suite}_cpu.jsonl')
        accuracy = {cell: final_accuracy(line) for cell, line in lines.items()}
        planned = {cell for name in experiments for cell in cells_of(name, PRESETS['cpu'], accuracy)}
        seconds += len(planned) * statistics.mean(lines[cell]['seconds'] for cell in planned & lines.keys())
    return {'hours': f'{seconds / 2 / 3600:.0f}'}


def of_underfitting() -> dict[str, str]:
    """Returns the numbers on Figure 1, and how many trainings the paper's tables and figures are made of."""
    lines = read_lines(LINES)
    without, with_decay = (
        lines[Cell('resnet10', 'ws', 'l2', SGD_LR, decay)]['train_accuracy'][-1] for decay in (0., 0.01))
    return {'trainings': f'{len(lines)}', 'train_without': f'{without:.1f}', 'train_with': f'{with_decay:.1f}'}


def of_strengths() -> dict[str, str]:
    """Returns how far each rule gets from every initialization, with the strength that suits all of them best."""
    rows = tables(RULES)['Strength and initialization, at lr 0.1']
    forms = {'l2': 'L2, SGD, λ = [^,]*', 'aws': 'AWS, coupled, α = [^,]*', 'decoupled': 'AWS, decoupled, α = [^,]*',
             'plain_l2': 'L2, SGD, λ = .*, no WS', 'plain_aws': 'AWS, coupled, α = .*, no WS'}
    found = {}
    for name, form in forms.items():
        means = [row['lowest mean'] for key, row in rows.items() if re.fullmatch(form, key)]
        found[f'robust_{name}'] = max(means, key=float)
    return found


def of_decay_and_alpha(decays: Table, alphas: Table) -> dict[str, str]:
    """Returns the numbers on Tables 1 and 2."""
    finite = {column: [row[column] for row in alphas.values() if re.fullmatch(r'[\d.]+', row[column])]
              for column in alphas['1']}
    return {
        'decay_best': decays['0.01']['WS, SGD'],
        'decay_larger': ', '.join(decays[strength]['WS, SGD'] for strength in ('0.1', '1', '10')),
        'decay_plain': ', '.join(decays[strength]['SGD, no WS'] for strength in ('0.01', '0.1', '1', '10')),
        'adam_100': decays['100']['WS, Adam (L2)'],
        'coupled': span(finite['WS, SGD coupled']), 'decoupled': span(finite['WS, SGD decoupled']),
        'adam_decoupled': span(finite['WS, Adam decoupled'] + finite['WN, Adam decoupled']),
        'ws_coupled_100': f'{float(alphas["100"]["WS, Adam coupled"]):.0f}',
        'wn_coupled_100': f'{float(alphas["100"]["WN, Adam coupled"]):.0f}',
    }


def of_networks(networks: Table, differences: Table, tuned: Table) -> dict[str, str]:
    """Returns the numbers on Table 3; what is `behind` is so without a sign."""
    less = {'tuned_less': re.search(r'networks: (.*) points', LINES.with_suffix('.md').read_text())[1]}
    less |= {name: differences[f'{ours} less WS + WD']['points'] for name, ours in (
        ('less_wide', 'WS + AWS'), ('less_narrow', 'WS + AWS, α = 0.075'), ('less_by_layer', 'WS + AWS, α by layer'))}
    return {
        **less, 'behind_wide': less['less_wide'].lstrip('-'), 'behind_fit': less['less_narrow'].lstrip('-'),
        'std': span((row['median std at the start'] for row in networks.values()), 2),
        'best_alpha': str([row['best α'] for row in tuned.values()].count('0.075')), 'networks': str(len(tuned)),
    }


def of_layers(layers: Table, scales: Table) -> dict[str, str]:
    """Returns the numbers on Figures 2, 4, 5 and 6."""
    found = {}
    for name, rule in (('l2', 'L2, SGD, λ = 0.01'), ('aws', 'AWS, coupled, α = 0.25')):
        _, start, later, growth, _ = layers[rule].values()
        found |= {f'apart_start_{name}': start, f'apart_{name}': later, f'growth_{name}': growth,
                  f'spread_{name}': scales[rule]['spread, points'],
                  f'far_{name}': f'{float(scales[rule]["100"].split()[0]):.0f}'}
    return {**found, 'deviation': span(re.findall(r'± ([\d.]+)', str(scales)), 1)}


def of_init_scale() -> dict[str, str]:
    """Returns how many times the filter lengths of init_scale.py are apart at the start and at the end."""
    lines = [json.loads(line) for line in (RESULTS / 'init_scale.jsonl').read_text().splitlines()]

    def apart(rule: str, step: int) -> str:
        stds = [line['median_std'][step] for line in lines if line['rule'] == rule]
        return f'{max(stds) / min(stds):,.0f}'

    return {'init_start': apart('AWS', 0), 'init_l2': apart('weight decay', -1), 'init_aws': apart('AWS', -1)}


def of_recalibration() -> dict[str, str]:
    """Returns the accuracies of recalibration.py, in percent, the mean over its seeds."""
    runs = [json.loads(line) for line in (RESULTS / 'recalibration.jsonl').read_text().splitlines()]
    found = {f'{normalization}_{stage}': [run[normalization][stage] for run in runs]
             for normalization in ('wn', 'cwn', 'ws') for stage in runs[0][normalization]}
    found |= {name: [run[name] for run in runs] for name in ('plain', 'plain_tuned')}
    return {name: f'{sum(accuracies) / len(accuracies):.0f}' for name, accuracies in found.items()}


def of_small_filters() -> dict[str, str]:
    """Returns the accuracies of centering.py, in percent, the mean over its seeds."""
    names = {'plain, SGD with decay': 'plain', 'wn': 'wn', 'ws': 'ws', 'ws, small wn': 'ws_but_small',
             'ws, grouped wn': 'ws_but_grouped', 'wn, grouped ws': 'wn_but_grouped'}
    found: dict[str, list[float]] = defaultdict(list)
    for text in (RESULTS / 'centering.jsonl').read_text().splitlines():
        run = json.loads(text)
        found[f'{run["model"].partition("_")[0]}_{names[run["variant"]]}'].append(run['accuracy'])
    return {name: f'{sum(accuracies) / len(accuracies):.0f}' for name, accuracies in found.items()}


def of_rules() -> dict[str, str]:
    """Returns the numbers on every rule, tuned, at other initializations and learning rates."""
    found = tables(RULES)
    rows = found['Initialization times, at lr 0.1']
    maps = found['Mean accuracy at each learning rate and initialization']
    over_l2, over_aws, over_lrs = (
        found[f'Less {base}: points with 95 % intervals over seeds'] for base in (
            'L2, SGD, at lr 0.1', 'AWS, decoupled, at lr 0.1', 'L2, SGD, mean over the learning rates'))

    def means(column: str, rules: Iterable[str]) -> str:
        return span(rows[rule][column].split()[0] for rule in rules)

    lengths = ('forced length (EDM2)', 'fixed length (Hyperball)')
    return {
        **{f'{name}_{scale}': rows[rule][column].partition(' (')[0]
           for name, rule in (('one_alpha', 'AWS, coupled'), ('by_layer', 'AWS, coupled, alpha by layer'),
                              ('decoupled', 'AWS, decoupled'), ('req', 'fixed angle (REQ)'),
                              ('plain_aws', 'AWS, coupled, no WS'), ('plain_l2', 'L2, SGD, no WS'))
           for scale, column in (('usual', '1'), ('far', '100'))},
        'rules_usual': means('1', rows.keys() - {'fixed angle (REQ)'}),
        'rules_far': means('100', [rule for rule in rows if not rule.startswith(('AWS', 'fixed', 'forced'))]),
        'lengths_far': means('100', lengths),
        **{name: table[rule]['mean of the initializations'].lstrip('+') for name, table, rule in (
            ('ahead_decoupled', over_l2, 'AWS, decoupled'), ('ahead_req', over_aws, 'fixed angle (REQ)'),
            ('ahead_hyperball', over_aws, 'fixed length (Hyperball)'), ('lrs_coupled', over_lrs, 'AWS, coupled'),
            ('lrs_decoupled', over_lrs, 'AWS, decoupled'), ('lrs_req', over_lrs, 'fixed angle (REQ)'),
            ('lrs_hyperball', over_lrs, 'fixed length (Hyperball)'))},
        'fast': str(max(int(re.sub(r'\D', '', text.split()[0])) for row in maps.values()
                        for column, text in row.items() if column.startswith('lr 1 '))),
        **{f'slow_{name}': maps[rule]['lr 0.01 × 1'] for name, rule in (('l2', 'L2, SGD'), ('aws', 'AWS, coupled'))},
    }


def of_lifetime() -> dict[str, str]:
    """Returns the table and the numbers on fixed decay and AWS over 15,000 steps."""
    ends, deaths, returns, differences, spreads = tables(LIFETIME).values()
    rows = [('rule', 'dead filters', 'filters without a gradient', 'shortest std', 'validation accuracy, %'),
            ('---',) * 5]
    rows += [(rule, deaths[rule]['dead'], deaths[rule]['without gradient'], ends[rule]['shortest std'],
              ends[rule]['validation accuracy']) for rule in LIFETIME_ROWS.values()]
    found = {'life_table': '\n' + ''.join(f'| {" | ".join(row)} |\n' for row in rows)}
    titles = {**LIFETIME_ROWS, **LIFETIME_OTHERS}
    for name, rule in titles.items():
        found |= {f'life_dead_{name}': deaths[rule]['dead'], f'life_still_{name}': deaths[rule]['without gradient'],
                  f'life_norms_{name}': deaths[rule]['norm weights below 1e-6'],
                  f'life_acc_{name}': ends[rule]['validation accuracy'].partition(' (')[0],
                  f'life_train_{name}': ends[rule]['train accuracy, last epoch'],
                  f'life_angles_{name}': spreads[rule]['angle of a step, filters with a gradient']}
    for name, ours, base in (('ws', 'aws', 'l2'), ('plain', 'plain_aws', 'plain'), ('req', 'req', 'aws_weak'),
                             ('far', 'aws_weak_far', 'l2_weak_far'), ('wn', 'wn_aws', 'wn'),
                             ('adam', 'aws_adam', 'adamw')):
        points = differences[f'{titles[ours]} less {titles[base]}']['points']
        found[f'life_gain_{name}'] = points.lstrip('+')
    fitting = ('l2_least', 'l2_less', 'l2_weak', 'aws_least', 'aws_less', 'aws_weak')
    found['life_fitting'] = span((found[f'life_acc_{name}'].split()[0] for name in fitting), 1)
    for name in ('l2_until', 'l2_then_aws'):
        found[f'life_ended_{name}'] = returns[titles[name]]['dead when it ends']
    return found


def values() -> dict[str, str]:
    """Returns the numbers that the READMEs mark a place for."""
    table1, table2, networks, differences, layers, scales, tuned = tables(LINES.with_suffix('.md')).values()
    return {
        **of_duration(), **of_underfitting(), **of_strengths(), **of_decay_and_alpha(table1, table2),
        **of_networks(networks, differences, tuned), **of_layers(layers, scales), **of_init_scale(),
        **of_recalibration(), **of_small_filters(), **of_rules(), **of_lifetime()}


if __name__ == '__main__':
    fill_in(values())
