"""The fine-tuning of the package's network: photographs held out are not trained on, and the results are whole."""
import json

import fine_tuning
from PIL import Image


def test_no_photograph_is_trained_and_validated_on(tmp_path):
    images = []
    for index in range(fine_tuning.CLASSES * fine_tuning.PER_CLASS):
        images.append(tmp_path / f'image_{index + 1:04}.jpg')
        Image.new('RGB', (90, 80)).save(images[-1])
    drawn = []
    for seed in (0, 1):
        fine_tuning.make_folders(images, tmp_path / str(seed), seed)
        train, held_out = ({path.relative_to(tmp_path / str(seed) / split) for path in
                            (tmp_path / str(seed) / split).rglob('*.png')} for split in ('train', 'validation'))
        assert (len(train), len(held_out)) == (200, 200)
        assert not train & held_out
        drawn.append(train)
    assert drawn[0] != drawn[1]
    assert Image.open(next((tmp_path / '0').rglob('*.png'))).size == (82, 73)


def test_results_are_of_the_settings_of_the_script():
    record = json.loads(fine_tuning.RESULT.read_text())
    assert record['settings']['rows'] == json.loads(json.dumps(fine_tuning.ROWS))
    keys = [(run['rule'], run['lr'], run['seed']) for run in record['runs']]
    assert sorted(keys) == sorted(
        (rule, lr, seed) for rule, (_, _, lrs, _) in fine_tuning.ROWS.items() for lr in lrs
        for seed in fine_tuning.SEEDS)
    cells = [row.split('|')[2:-1] for row in fine_tuning.table(record['runs']).splitlines()[2:]]
    for rule, row in zip(fine_tuning.ROWS, cells):
        for lr, cell in zip(fine_tuning.LRS, row):
            found = [run['top1'] for run in record['runs'] if (run['rule'], run['lr']) == (rule, lr)]
            assert not found or abs(float(cell.split()[0]) - sum(found) / len(found)) < 0.051
