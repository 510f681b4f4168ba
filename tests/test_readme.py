"""The README's examples do what they show, and its numbers, tables and lists are those of the code and the results."""
import re

import bench_report
import comparison
import findings
import fine_tuning
import pytest
import tested_table
import timm
import torch
import zoo_table
from outputs import READMES, RESULTS, ROOT, filled_in, save_figure

import timm_aws

README = (ROOT / 'README.md').read_text()
EXAMPLES = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def number_before(word):
    """Returns the number that stands before a word of the README."""
    return float(re.search(rf'([\d.]+) {word}', README)[1])


def takes_a_step(model, optimizer, **_):
    shrunk = [param for group in optimizer.param_groups if group['alpha'] for param in group['params']]
    decays = {group['weight_decay'] for group in optimizer.param_groups if not group['alpha']}
    assert type(optimizer) is timm_aws.AwsSGD
    assert len(shrunk) == len(timm_aws.normalized_weights(model)) == number_before('convolutions')
    assert decays == {0., 1e-4}
    weight = model.conv1.weight.detach()
    rate = timm_aws.effective_lr(optimizer)['conv1.weight'].flatten()
    torch.testing.assert_close(rate, 0.1 / weight.std((1, 2, 3), correction=0))
    assert all('momentum_buffer' in optimizer.state[param] for param in shrunk)


def keeps_outputs_and_chooses_alpha(model, optimizer, plain, **_):
    images, outputs = model.expected
    torch.testing.assert_close(model(images), outputs, rtol=1e-4, atol=1e-4 * outputs.abs().max().item())
    names = set(timm_aws.normalized_weights(model))
    convolutions = {f'{name}.weight' for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert {name for name in convolutions if '.se.' in name} == convolutions - names
    shrunk, = (group for group in optimizer.param_groups if group['alpha'])
    assert len(shrunk['params']) == len(names)
    assert shrunk['alpha'] == timm_aws.alpha_like_decay(model, 1e-4)
    of_plain, = (group for group in plain.param_groups if group['alpha'])
    assert (len(of_plain['params']), of_plain['normalization']) == (number_before('convolutions'), 'wn')


def loads_weights(model, mine, **_):
    assert not model.training
    assert (model.num_classes, mine.num_classes) == (200, 10)
    assert torch.equal(model.conv1.weight, mine.conv1.weight)


@pytest.fixture
def _without_a_download(monkeypatch):
    """Gives a network that has seen an image in place of pretrained weights that are not in the package."""
    create_model = timm.create_model

    def create(name, pretrained=False, **options):
        if not pretrained or name in timm_aws.list_models():
            return create_model(name, pretrained=pretrained, **options)
        model, images = create_model(name, **options), torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            model(images)
            model.expected = images, model.eval()(images)
        return model

    monkeypatch.setattr(timm, 'create_model', create)


@pytest.mark.usefixtures('_without_a_download')
@pytest.mark.parametrize('code, fact', list(zip(
    EXAMPLES, (takes_a_step, keeps_outputs_and_chooses_alpha, loads_weights), strict=True)))
def test_example(code, fact):
    made = {}
    exec(code, made)
    fact(**made)


def test_every_model_is_listed_and_every_listed_one_exists():
    listed = set(re.findall(r'`((?:test_)?(?:ws_|wn_|cwn_)?(?:se)?resne(?:t|xt)\w*)`', README))
    assert set(timm_aws.list_models()) <= listed
    assert [name for name in listed if not timm.is_model(name)] == []


def test_oldest_versions_are_those_of_the_package():
    required = (ROOT / 'pyproject.toml').read_text()
    for name in ('torch', 'timm'):
        assert re.search(rf'"{name}>=([\d.]+)"', required)[1] in re.findall(rf'{name} ([\d.]*\d)', README)
    assert re.search(r'requires-python = ">=([\d.]+)"', required)[1] == re.search(r'Python ([\d.]*\d)', README)[1]


def test_default_alpha_is_that_of_the_optimizer():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    assert timm_aws.AwsSGD([weight], lr=0.1).param_groups[0]['alpha'] == float(
        re.search(r'alpha is ([\d.e-]+)', README)[1])


def test_readme_is_short_and_starts_with_the_two_commands():
    assert len(README) <= 9000
    assert {'scripts/quickstart.sh', 'scripts/test.sh'} <= set(' '.join(README.splitlines()[:30]).split())


@pytest.mark.parametrize('path', [*READMES, RESULTS / 'COSTS.md', RESULTS / 'TESTS.md'], ids=lambda path: path.name)
def test_links_lead_to_files(path):
    links = [link for link in re.findall(r'\]\(([^)]+)\)', path.read_text()) if '://' not in link]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize('path', READMES, ids=('top', 'results'))
def test_marked_numbers_and_tables_are_what_the_scripts_give(path):
    values = {}
    for script in (zoo_table, comparison, bench_report, tested_table, findings, fine_tuning):
        assert values.keys().isdisjoint(script.values())
        values |= script.values()
    text = path.read_text()
    assert set(re.findall(r'<!--(\w+)-->', text)) <= values.keys()
    assert filled_in(text, values) == text
    # A comment that starts a line of text ends the paragraph on GitHub; a table has lines of its own for its marks.
    of_tables = {'<!--zoo-->', '<!--comparison-->', '<!--life_table-->', '<!--/-->'}
    assert set(re.findall(r'^ {0,3}<!--.*', text, re.MULTILINE)) <= of_tables


@pytest.mark.parametrize('script, name', [(bench_report, 'COSTS.md'), (tested_table, 'TESTS.md')])
def test_whole_files_are_what_the_scripts_make(script, name):
    assert script.text() == (RESULTS / name).read_text()


def test_filling_in_changes_marked_values_alone():
    text = 'a <!--one-->1<!--/--> b <!--two-->2<!--/--> <!--three-->\n|x|\n<!--/-->\n'
    assert filled_in(text, {'one': '11', 'three': '\n|y|\n'}) == text.replace('>1<', '>11<').replace('x', 'y')


def test_a_figure_is_saved_the_same_each_time(tmp_path):
    from matplotlib.figure import Figure

    for folder in ('first', 'second'):
        figure = Figure()
        figure.subplots().plot([1, 2], label='line')
        (tmp_path / folder).mkdir()
        files = save_figure(figure, tmp_path / folder / 'name')
    assert [path.name for path in files] == ['name.png', 'name.svg']
    assert all(path.read_bytes() == (tmp_path / 'first' / path.name).read_bytes() for path in files)


def test_costs_list_the_rows_that_are_measured_and_known(monkeypatch):
    rows = {'torch SGD, fused': {'ratio': 1., 'ms': 10.}, 'a row of an older version': {'ratio': 2., 'ms': 20.}}
    monkeypatch.setattr(bench_report, 'load', lambda name: {'threads': {'2': rows}})
    assert bench_report.steps() == {'torch SGD, fused': {'ratio': 1., 'ms': 10.}}


def test_the_table_of_checkpoints_lists_exactly_what_loads():
    names = re.findall(r'^\| \[`([\w.]+)`\]', zoo_table.table(), re.MULTILINE)
    assert sorted(names) == sorted(name for name in timm.list_pretrained('*aws*') if '.' in name)
