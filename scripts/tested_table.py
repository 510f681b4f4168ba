"""Writes scripts/results/TESTS.md and the README's numbers on tests from the reports of the last test runs.

    scripts/test.sh; .venv/bin/python scripts/tested_table.py newest
    scripts/test_lowest.sh; .venv-lowest/bin/python scripts/tested_table.py lowest

Each call counts the cases of one run in build/*.xml and saves the counts in scripts/results/tests.json, with the
versions that are installed. Then it writes TESTS.md from that file.
"""
import argparse
import ast
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from outputs import RESULTS, ROOT, fill_in, write
from provenance import hardware, versions

COUNTS = RESULTS / 'tests.json'
REPORTS = {'newest': ('tests.xml', 'timm.xml'), 'lowest': ('tests-lowest.xml', 'timm-lowest.xml')}
BY_NAME = {'test_models': 'models', 'test_optim': 'optimizers'}

TEXT = """\
# What is tested

Cases and failures of the last runs. [tests.json](tests.json) holds hardware and skips. `scripts/test_lowest.sh` runs
the same tests on the oldest supported timm and torch. Tests that run timm's train.py are skipped unless `TIMM_SCRIPTS`
names the folder of timm's scripts.

    scripts/test.sh; .venv/bin/python scripts/tested_table.py newest
    scripts/test_lowest.sh; .venv-lowest/bin/python scripts/tested_table.py lowest

"""


def count(report: Path) -> dict[str, Counter]:
    """Counts the cases of each test file in a report of pytest, by outcome."""
    counts: dict[str, Counter] = {}
    for case in ElementTree.parse(report).iter('testcase'):
        module = next(part for part in case.attrib['classname'].split('.') if part.startswith('test_'))
        outcome = next((child.tag for child in case if child.tag in ('failure', 'error', 'skipped')), 'passed')
        counts.setdefault(module, Counter())[outcome] += 1
    return counts


def rows(ours: dict[str, Counter], of_timm: dict[str, Counter]) -> list[dict[str, Any]]:
    """Returns a row for each of our files, for each of timm's files that test our names, and for the rest of timm's."""
    command = '`python scripts/timm_conformance.py`'
    rest = [counts for module, counts in of_timm.items() if module not in BY_NAME]
    return [
        *(row(subject(module), f'`scripts/test.sh tests/{module}.py`', [counts])
          for module, counts in sorted(ours.items())),
        *(row(f"timm's own `{module}.py` on our {kind}", command, [of_timm[module]])
          for module, kind in BY_NAME.items()),
        row("timm's own tests of its factory, hub, layers, tasks and utilities, with the plugin imported",
            command, rest),
    ]


def row(what: str, command: str, counts: list[Counter]) -> dict[str, Any]:
    """Returns the sums over some files."""
    total = sum(counts, Counter())
    return {'what': what, 'command': command, 'cases': total['passed'] + total['failure'] + total['error'],
            'failures': total['failure'] + total['error'], 'skipped': total['skipped']}


def subject(module: str) -> str:
    """Returns the first sentence of a test file's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / 'tests' / f'{module}.py').read_text())) or module
    return ' '.join(text.split('\n\n')[0].split()).split('. ')[0].removesuffix('.')


def text() -> str:
    """Returns the whole of TESTS.md."""
    runs = json.loads(COUNTS.read_text())
    head = ['what', 'command', *(f'{_heading(run["versions"])}: cases, failures' for run in runs.values())]
    lines = [head, ['---'] * len(head)]
    for row in runs['newest']['rows']:
        same = [[found for found in run['rows'] if found['what'] == row['what']] for run in runs.values()]
        lines.append([row['what'], row['command'], *map(_cell, same)])
    lines.append(['all', '`scripts/test.sh`, `scripts/test_lowest.sh`', *(_cell(run['rows']) for run in runs.values())])
    return TEXT + ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _heading(versions: dict[str, str]) -> str:
    return f'timm {versions["timm"]}, torch {versions["torch"].partition("+")[0]}'


def _cell(rows: list[dict[str, Any]]) -> str:
    return f'{_sum(rows, "cases")}, **{_sum(rows, "failures")}**' if rows else ''


def _sum(rows: list[dict[str, Any]], key: str) -> str:
    return f'{sum(row[key] for row in rows):,}'


def values() -> dict[str, str]:
    """Returns the numbers that the README marks a place for."""
    runs = json.loads(COUNTS.read_text())
    return {name: f'{_sum(run["rows"], "failures")} of {_sum(run["rows"], "cases")} cases fail with '
            + _heading(run['versions']) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', choices=REPORTS, help='the run of the installed timm and torch')
    run = parser.parse_args().run
    ours, of_timm = (count(ROOT / 'build' / name) for name in REPORTS[run])
    runs = json.loads(COUNTS.read_text()) if COUNTS.is_file() else {}
    runs[run] = {
        'versions': {'python': platform.python_version(), **versions()}, 'hardware': hardware('cpu'),
        'rows': rows(ours, of_timm),
    }
    write(COUNTS, json.dumps({name: runs[name] for name in REPORTS if name in runs}, indent=2) + '\n')
    write(RESULTS / 'TESTS.md', text())
    fill_in(values())


if __name__ == '__main__':
    main()
