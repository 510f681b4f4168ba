"""Fine-tuning of the package's networks: photographs held out are not trained on, and the results are whole."""
import json

import fine_tuning
import pytest
from PIL import Image

RECORD = json.loads(fine_tuning.RESULT.read_text())


def test_no_photograph_is_trained_and_validated_on(tmp_path):
    images = []
    for index in range(fine_tuning.CLASSES * fine_tuning.PER_CLASS):
        images.append(tmp_path / f'image_{index + 1:04}.jpg')
        Image.new('RGB', (90, 80)).save(images[-1])
    drawn = []
    for seed in (0, 1):
        fine_tuning.make_folders(images, tmp_path / str(seed), seed, 73)
        train, held_out = ({path.relative_to(tmp_path / str(seed) / split) for path in
                            (tmp_path / str(seed) / split).rglob('*.png')} for split in ('train', 'validation'))
        assert (len(train), len(held_out)) == (200, 200)
        assert not train & held_out
        drawn.append(train)
    assert drawn[0] != drawn[1]
    assert Image.open(next((tmp_path / '0').rglob('*.png'))).size == (82, 73)


@pytest.mark.parametrize('name', RECORD['networks'])
def test_results_are_of_the_settings_of_the_script(name):
    assert RECORD['settings']['rows'] == json.loads(json.dumps(fine_tuning.ROWS))
    runs = RECORD['networks'][name]['runs']
    assert sorted((run['rule'], run['lr'], run['seed']) for run in runs) == sorted(
        (rule, lr, seed) for rule, (_, _, lrs, _) in fine_tuning.ROWS.items() for lr in lrs
        for seed in fine_tuning.SEEDS)
    cells = [row.split('|')[2:-1] for row in fine_tuning.table(runs).splitlines()[2:]]
    for rule, row in zip(fine_tuning.ROWS, cells):
        for lr, cell in zip(fine_tuning.LRS, row):
            found = [run['top1'] for run in runs if (run['rule'], run['lr']) == (rule, lr)]
            assert not found or abs(float(cell.split()[0]) - sum(found) / len(found)) < 0.051


def test_the_report_is_that_of_the_results():
    assert fine_tuning.RESULT.with_suffix('.md').read_text() == fine_tuning.text(RECORD)


def test_other_weights_start_anew_and_the_same_go_on():
    runs = [{'rule': 'SGD', 'lr': 0.01, 'seed': 0, 'top1': 80.0}]
    record = {'networks': {'ws_resnet18_aws': {'weights': {'date': '2026-01-01', 'top1': 1.0}, 'runs': runs}}}
    network = fine_tuning.network_record(record, 'ws_resnet18_aws')
    assert network['runs'] == [] and network['weights']['top1'] > 1
    network['runs'] = runs
    assert fine_tuning.network_record(record, 'ws_resnet18_aws')['runs'] is runs
