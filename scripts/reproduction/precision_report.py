"""Table of `precision`: at which strength of a fixed decay what fails, by layer and precision."""
from typing import Any

from matplotlib.figure import Figure

from .grid import PRECISION_LAYERS, PRECISIONS, Preset, cells_of
from .report import Lines, final_accuracy, has_failed, markdown, versions_of

__all__ = ['figures', 'tables']

_LAYERS = {'ws': 'WS', 'ws_published': 'WS as published', 'none': 'no WS'}


def tables(lines: Lines, preset: Preset) -> str:
    """Writes the table.

    Args:
        lines: The finished trainings.
        preset: Their preset.

    Returns:
        Markdown, the same for the same lines.
    """
    cells = [cell for cell in cells_of('precision', preset, {}) if cell in lines]
    if not cells:
        return 'No training has been run.\n'
    first = lines[cells[0]]
    about = (
        f'SGD with L2 decay, {first["steps"]} steps of {preset.brief.batch_size} images each, on {first["dataset"]}, '
        f'one seed; chance is {100 / first["num_classes"]:.1f} %. Accuracy in percent, and of {sum(first["filters"])} '
        f'filters those whose std is below 1e-6 at the end. {first["hardware"]}; {versions_of(lines)}.\n'
    )
    decays = list(dict.fromkeys(cell.strength for cell in cells))
    exponents = [next(lines[cell]['decay_exponent'] for cell in cells if cell.strength == decay) for decay in decays]
    rows = [
        [_LAYERS[normalization], precision, *(
            _told(next((lines[cell] for cell in cells if (cell.normalization, cell.precision, cell.strength) == (
                normalization, precision, decay)), None)) for decay in decays)]
        for normalization in PRECISION_LAYERS for precision in PRECISIONS]
    heads = [f'λ = {decay:g} (exponent {exponent:.3g})' for decay, exponent in zip(decays, exponents)]
    return '\n'.join([about, markdown('Where fixed decay fails', ('layer', 'precision', *heads), rows)])


def _told(line: dict[str, Any] | None) -> str:
    if line is None:
        return 'not run'
    if line['first_nonfinite_step'] is not None:
        return f'**not finite** (step {line["first_nonfinite_step"]})'
    accuracy = f'{final_accuracy(line):.1f}'
    return f'{f"**{accuracy}**" if has_failed(line) else accuracy}, {sum(line["dead"][-1])} dead'


def figures(lines: Lines, preset: Preset) -> dict[str, Figure | None]:
    """Returns none: the table says it."""
    return {}
