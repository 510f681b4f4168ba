"""Writes the README's table of what is tested from the reports of the last test runs.

    scripts/test.sh; .venv/bin/python scripts/tested_table.py newest
    scripts/test_lowest.sh; .venv-lowest/bin/python scripts/tested_table.py lowest

Each call counts the cases of one run in build/*.xml, notes them with the versions that it finds installed in
scripts/results/tests.json, and writes the table anew. tests/test_readme.py fails where the README holds another table.
"""
import argparse
import ast
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from provenance import hardware, versions

ROOT = Path(__file__).parent.parent
README = ROOT / 'README.md'
RESULTS = ROOT / 'scripts' / 'results' / 'tests.json'
BEGIN, END = '<!-- tests: written by scripts/tested_table.py -->\n', '<!-- end of tests -->\n'
REPORTS = {'newest': ('tests.xml', 'timm.xml'), 'lowest': ('tests-lowest.xml', 'timm-lowest.xml')}
BY_NAME = {'test_models': 'models', 'test_optim': 'optimizers'}


def count(report: Path) -> dict[str, Counter]:
    """Counts the cases of each test file in a report of pytest, by how they ended."""
    counts: dict[str, Counter] = {}
    for case in ElementTree.parse(report).iter('testcase'):
        module = next(part for part in case.attrib['classname'].split('.') if part.startswith('test_'))
        ended = next((child.tag for child in case if child.tag in ('failure', 'error', 'skipped')), 'passed')
        counts.setdefault(module, Counter())[ended] += 1
    return counts


def rows(ours: dict[str, Counter], of_timm: dict[str, Counter]) -> list[dict[str, Any]]:
    """Returns what is told of a run: each of our files, timm's tests of our names, and the rest of timm's."""
    told = [_row(_subject(module), f'`scripts/test.sh tests/{module}.py`', [counts])
            for module, counts in sorted(ours.items())]
    command = '`python scripts/timm_conformance.py`'
    told += [_row(f"timm's own `{module}.py` on our {kind}", command, [of_timm[module]])
             for module, kind in BY_NAME.items()]
    rest = [counts for module, counts in of_timm.items() if module not in BY_NAME]
    return [*told, _row("timm's own tests of its factory, hub, layers, tasks and utilities, with the plugin imported",
                        command, rest)]


def _row(what: str, command: str, counts: list[Counter]) -> dict[str, Any]:
    total = sum(counts, Counter())
    return {'what': what, 'command': command, 'cases': total['passed'] + total['failure'] + total['error'],
            'failures': total['failure'] + total['error'], 'skipped': total['skipped']}


def _subject(module: str) -> str:
    """Returns the first sentence of a test file's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / 'tests' / f'{module}.py').read_text())) or module
    return ' '.join(text.split('\n\n')[0].split()).split('. ')[0].removesuffix('.')


def table() -> str:
    """Returns the whole table with what it was made on."""
    runs = json.loads(RESULTS.read_text())
    head = ['what', 'command', *(f'{_heading(run["versions"])}: cases, failures' for run in runs.values())]
    lines = [head, ['---'] * len(head)]
    for row in runs['newest']['rows']:
        same = [[found for found in run['rows'] if found['what'] == row['what']] for run in runs.values()]
        lines.append([row['what'], row['command'], *map(_told, same)])
    lines.append(['together', '`scripts/test.sh`, `scripts/test_lowest.sh`',
                  *(_told(run['rows']) for run in runs.values())])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _heading(versions: dict[str, str]) -> str:
    return f'timm {versions["timm"]}, torch {versions["torch"].partition("+")[0]}'


def _told(rows: list[dict[str, Any]]) -> str:
    return f'{sum(row["cases"] for row in rows):,}, **{sum(row["failures"] for row in rows)}**' if rows else ''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', choices=REPORTS, help='which run the installed timm and torch are of')
    run = parser.parse_args().run
    ours, of_timm = (count(ROOT / 'build' / name) for name in REPORTS[run])
    runs = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    runs[run] = {
        'versions': {'python': platform.python_version(), **versions()}, 'hardware': hardware('cpu'),
        'rows': rows(ours, of_timm),
    }
    RESULTS.write_text(json.dumps({name: runs[name] for name in REPORTS if name in runs}, indent=2) + '\n')
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == '__main__':
    main()
