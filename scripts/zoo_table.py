"""Writes the README's table of checkpoints from the folders in weights/ that hold weights.

    python scripts/zoo_table.py

Every number comes from a folder's config.json and results.json, which `timm-aws export` wrote.
"""
import json
from pathlib import Path

from outputs import ROOT, fill_in

HEAD = """\
| checkpoint | parameters (M) | data set, size in use | top-1 | top-5 |
|---|---|---|---|---|
"""


def row(folder: Path) -> str:
    """Returns the line of one checkpoint."""
    config, results = (json.loads((folder / name).read_text()) for name in ('config.json', 'results.json'))
    metrics = results['metrics']
    return (
        f'| [`{results["name"]}`](weights/{results["name"]}) | {results["weights"]["parameters"] / 1e6:.1f} '
        f'| {results["dataset"]}, {config["pretrained_cfg"]["input_size"][-1]} px '
        f'| {metrics["top1"]:.2f} % | {metrics["top5"]:.2f} % |\n'
    )


def table() -> str:
    """Returns the whole table, the best checkpoint first."""
    folders = [path.parent for path in (ROOT / 'weights').glob('*/model.safetensors')]
    accuracy = {folder: json.loads((folder / 'results.json').read_text())['metrics']['top1'] for folder in folders}
    return HEAD + ''.join(row(folder) for folder in sorted(folders, key=lambda folder: -accuracy[folder]))


def values() -> dict[str, str]:
    """Returns what the README marks a place for."""
    return {'zoo': f'\n{table()}'}


if __name__ == '__main__':
    fill_in(values())
