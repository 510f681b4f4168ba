"""The README's examples run, and its numbers are those of the files that the scripts wrote."""
import importlib.util
import json
import re
from pathlib import Path

import pytest
import timm

import timm_aws

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('code', re.findall(r'```python\n(.*?)```', README, re.DOTALL))
def test_examples_run(code):
    exec(code, {})


def test_expression_in_the_text_runs():
    code = re.search(r'`(create_optimizer_v2\(timm\.create_model\(.nfnet_l0.*?)`', README)[1]
    optimizer = eval(code, {'create_optimizer_v2': timm.optim.create_optimizer_v2, 'timm': timm})
    assert type(optimizer) is timm_aws.AwsSGD


def test_every_model_is_listed_and_nothing_else():
    table = README[README.index('## Models'):README.index('## Optimizers')]
    listed = set(re.findall(r'`(\w+)`', table)) - {'weights'}
    ours = set(timm.list_models(module='ws_resnet'))
    assert ours <= listed
    assert all(timm.is_model(name) for name in listed)


def test_spreads_over_the_initializations_are_those_of_the_data():
    lines = [json.loads(line) for line in (ROOT / 'scripts/results/init_scale.jsonl').read_text().splitlines()]
    ends = [[line['median_std'][-1] for line in lines if line['rule'] == rule] for rule in ('weight decay', 'AWS')]
    decay, aws = (max(stds) / min(stds) for stds in ends)
    assert [len(stds) for stds in ends] == [4, 4]
    assert f'end {decay:.0f} times apart under weight decay and {aws:.0f} times under AWS' in README.replace('\n', ' ')


@pytest.mark.parametrize('file', ['README.md', 'scripts/results/README.md'])
def test_spreads_under_decay_and_aws_are_those_of_the_report(file):
    report = (ROOT / 'scripts/results/reproduce_cpu.md').read_text()
    decay, aws = (re.search(rf'\| {rule}.* ([\d.]+) \|\n', report[report.index('## Figures 5 and 6'):])[1]
                  for rule in ('L2, SGD', 'AWS, coupled'))
    text = ' '.join((ROOT / file).read_text().split())
    assert re.search(f'three seeds are {decay} points apart under decay(,| and) {aws} under AWS', text)


def test_what_a_step_grows_by_is_what_was_measured():
    results = ROOT / 'scripts' / 'results'
    scale, train = (json.loads((results / f'bench_{name}.json').read_text()) for name in ('scale', 'train'))
    times = {sweep: {point['name']: point['rows']['AwsSGD, fused']['ms'] for point in scale[sweep]}
             for sweep in ('tensors', 'fan_in')}
    share = [1e6 * point['rows']['AwsSGD, fused']['ms'] / point['parameters']
             for point in scale['network'] if point['parameters'] > 25e6]
    text = ' '.join(README.split())
    assert f'parameters, {min(share):.1f} to {max(share):.1f} ns each from 25 to 287 million' in text
    assert f'parameters: {times["tensors"]["1024"] / times["tensors"]["64"]:.0f} times the time' in text
    assert f'or more: {times["fan_in"]["4"] / times["fan_in"]["64"]:.0f} times' in text
    assert f'prolongs training by {100 * train["share_of_the_recorder"]:.2f} %' in text
    assert all(point['peak_in_largest_parameters'] == 0 for sweep in ('network', 'tensors') for point in scale[sweep])


def test_a_compiled_step_costs_what_that_of_torch_costs_within_a_tenth():
    rows = json.loads((ROOT / 'scripts/results/bench_step.json').read_text())['threads']['2']
    assert rows['AwsSGD, compiled, after a forward']['ratio'] < 1.1 * rows['torch SGD, compiled']['ratio']


def test_soak_is_what_was_measured():
    result = json.loads((ROOT / 'scripts/results/soak.json').read_text())
    rows = result['rows'].values()
    memory, time = (100 * (max(row[key] for row in rows) - 1) for key in ('memory_ratio', 'time_ratio'))
    text = ' '.join(README.split())
    assert result['rows']['AwsSGD, fused']['steps'] == 20_000
    assert f"memory grew by {memory:.2f} % at most, the time of a step by {time:.0f} % against torch's" in text
    assert all(row['new_graphs'] == 0 for row in rows)


def test_findings_are_those_of_the_report():
    report = (ROOT / 'scripts/results/reproduce_cpu.md').read_text()
    text = ' '.join((ROOT / 'scripts/results/README.md').read_text().split())
    gain, loss, behind, matched = re.findall(r'\| WS \+ .*? less .*? \| [+-]([\d.]+ ± [\d.]+) \|', report)
    tuned = re.search(r'tuned, over 6 networks: -([\d.]+ ± [\d.]+) points', report)[1]
    assert f'WS with decay {gain} points (standard error) above the baseline, WS with AWS {loss} below it' in text
    assert f'no, behind by {behind}; with one that fits, behind by {matched}' in text
    assert f'is {matched} points behind decay instead of {behind}' in text
    assert f'AWS is again {tuned} points behind' in text
    rows = [line.split(' | ') for line in report[report.index('## Table 3, tuned'):].splitlines()[4:10]]
    stds = [line.split(' | ')[5] for line in report[report.index('## Table 3: networks'):].splitlines()[4:10]]
    assert f'start at a std of {min(stds)} to {max(stds)}' in text
    assert [row[6] for row in rows].count('0.01') == 5
    assert [row[13] for row in rows].count('0.075') == 4
    ours = ' '.join(README.split())
    assert f'AWS is {tuned} points behind' in ours
    assert f'it is {behind} points behind' in ours
    layers = report[report.index('## Figures 2 and 4'):report.index('## Figures 5')]
    decay, aws = (re.search(rf'\| {rule}.*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+ to [\d.]+) \| ([\d.]+) \|', layers)
                  for rule in ('L2, SGD, λ = 0.01', 'AWS'))
    assert f'{aws[1]} times apart at the start; after two epochs {aws[2]} times under AWS, {decay[2]} times' in text
    assert f'{decay[3]} times in every layer but the first under decay, {aws[3]} times under AWS' in text
    assert f'median over the layers {aws[4]}, under decay {decay[4]}' in text


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scripts' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', ['zoo_table', 'tested_table', 'bench_report'])
def test_tables_are_what_the_scripts_make(name):
    module = script(name)
    assert module.BEGIN + module.table() + module.END in README, f'run python scripts/{name}.py'


def test_every_checkpoint_is_in_the_table():
    assert script('zoo_table').table().count('\n') == 2 + len(list((ROOT / 'weights').iterdir()))
