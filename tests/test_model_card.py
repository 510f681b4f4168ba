"""The card: its figures, and its code, which is run whatever names the user has typed."""
import re

import pytest
import torch
from checkpoint_files import NAME, SETTINGS, best, run_code_of_card
from huggingface_hub import ModelCard

from timm_aws.checkpoint.export import export


def test_card_has_the_measured_accuracy_in_words_and_in_the_model_index(train_run, tmp_path, measured):
    export(train_run(), tmp_path / NAME, **SETTINGS, **measured(model=50.03, half=50.0))
    card = ModelCard.load(tmp_path / NAME / 'README.md')
    found = {result.metric_name: (result.metric_value, result.dataset_name) for result in card.data.eval_results}
    assert found == {'top-1 (%)': (50.0, 'noise'), 'top-5 (%)': (90.0, 'noise')}
    assert '| 50.00 % | 90.00 % | 48 px |' in card.text
    assert 'no ImageNet-1k model' in card.text


def test_card_says_the_size_of_use_and_that_of_the_training(train_run, tmp_path):
    export(train_run(img_size=32), tmp_path / NAME, **SETTINGS, img_size=40)
    text = (tmp_path / NAME / 'README.md').read_text().replace('\n', ' ')
    assert 'after epoch 2 of the last run, on images of 32 px.' in text
    assert 'expects photographs of 40 × 40 pixels' in text


def test_card_of_an_unnamed_network_prints_indices(train_run, tmp_path):
    export(train_run(), tmp_path / NAME, **SETTINGS)
    assert "print(f'{probabilities[index]:.1%}', index)" in (tmp_path / NAME / 'README.md').read_text()


def test_code_of_the_card_runs_whatever_the_user_has_typed(train_run, tmp_path, capsys):
    """With fewer classes than five, and names that would be a heading, HTML, a picture and code."""
    hostile = 'x\n# Heading\n<script>alert(1)</script> ![p](http://evil) `code`'
    labels = ["'+__import__('os').getcwd()+'", '{1/0}', '"""\\', '```']
    (tmp_path / 'labels.tsv').write_text('name\twords\n' + ''.join(f'{name}\t<b>{name}\n' for name in labels))
    export(train_run(opt=hostile, opt_kwargs={hostile: hostile}), tmp_path / NAME, license='mit', dataset=hostile,
           labels=tmp_path / 'labels.tsv')
    card = ModelCard.load(tmp_path / NAME / 'README.md')
    assert '\n# Heading' not in card.text
    assert not re.search(r'(?<!\\)(<script|\[p\]|`code)', card.text)
    names = run_code_of_card(tmp_path / NAME)
    assert names['probabilities'].shape == (4,)
    assert names['embedding'].shape == (1, 96)
    assert '  # (1, 96)\n' in card.text
    printed = capsys.readouterr().out.splitlines()
    assert {line.partition('% ')[2] for line in printed} == {f'{name} <b>{name}' for name in labels}


@pytest.mark.parametrize('network, embedding, stages', [
    ('test_efficientnet', 256, 5), ('mobilenetv3_small_050', 1024, 5), ('test_nfnet', 192, 5)])
def test_card_of_a_network_of_timm_needs_no_plugin(train_run, tmp_path, network, embedding, stages):
    folder = tmp_path / f'{network}.aws_noise'
    export(train_run(network=network, epochs=1), folder, **SETTINGS)
    card = ModelCard.load(folder / 'README.md')
    assert card.data.tags == ['image-classification', 'timm', 'timm_aws']
    assert f'`{network}` of [timm](https://github.com/huggingface/pytorch-image-models), trained' in card.text
    assert 'pip install timm\n' in card.text
    assert not re.search('import timm_aws|plugin|Unknown model|folds', card.text)
    names = run_code_of_card(folder)
    assert (names['embedding'].shape, len(names['maps'])) == ((1, embedding), stages)
    assert f'  # (1, {embedding})\n' in card.text


def test_code_of_the_card_runs_with_any_number_of_channels(train_run, tmp_path):
    export(train_run(in_chans=4, epochs=1), tmp_path / NAME, **SETTINGS)
    assert run_code_of_card(tmp_path / NAME)['probabilities'].shape == (4,)


def test_card_tells_no_momentum_of_adam(train_run, tmp_path):
    run = train_run(opt='aws_adam')
    checkpoint = best(run)
    for group in checkpoint['optimizer']['param_groups']:
        del group['momentum']
    torch.save(checkpoint, run / 'model_best.pth.tar')
    export(run, tmp_path / NAME, **SETTINGS)
    assert r'aws\_adam (alpha 0.0025), batch size 8' in (tmp_path / NAME / 'README.md').read_text()
