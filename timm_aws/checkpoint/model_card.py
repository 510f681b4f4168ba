"""The card of a checkpoint folder, its README.md: how to use the network, and what it was trained and measured on."""
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..ws_resnet import list_models
from .folder import ARGS, CONFIG, PICTURE, RESULTS, read_json

__all__ = ['model_card']

_CITATION = """\
@inproceedings{li2020understanding,
  title     = {Understanding the Disharmony between Weight Normalization Family and Weight Decay},
  author    = {Li, Xiang and Chen, Shuo and Yang, Jian},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2020},
  doi       = {10.1609/aaai.v34i04.5904}
}"""

# How the example prints a class: without and with names in the config.
_PRINT = (
    "print(f'{probabilities[index]:.1%}', index)",
    "label = model.pretrained_cfg['label_names'][index]\n"
    "    print(f'{probabilities[index]:.1%}', label, model.pretrained_cfg['label_descriptions'][label])",
)

# What the example says before, installs, imports and says after, of a network of the plugin and of one of timm's own.
_OURS = (
    """\
The plugin defines the network. The Hub's own snippet imports timm alone and fails with
`Unknown model ({0})`: import `timm_aws` first.

""",
    './timm_aws    # a clone of timm_aws, or the file of a wheel',
    'import timm_aws  # registers {0} with timm\n',
    """
`timm.utils.reparameterize_model(model)` folds the weight normalization, and the batch norms with it, into plain
convolutions. The outputs stay the same, and the network is as fast as the ordinary one.
""",
)
_TIMMS = ('', 'timm', '', '')


def model_card(folder: Path) -> str:
    """Writes the card from the config.json, results.json and args.yaml of a checkpoint folder.

    Returns:
        Markdown with the Hub's metadata in front. A model-index is part of it if the accuracy was measured.
    """
    config, results = read_json(folder / CONFIG), read_json(folder / RESULTS)
    args = yaml.safe_load((folder / ARGS).read_text(encoding='utf-8'))
    sections = [
        _introduction(config, results),
        _usage(config, results),
        _results(results),
        _training(args, results, folder),
        _limits(config, results),
        f'## Licence and citation\n\nThe weights: {config["pretrained_cfg"]["license"]}.\n\n'
        f'```bibtex\n{_CITATION}\n```\n',
    ]
    return f'---\n{_metadata(config, results).to_yaml()}\n---\n' + '\n'.join(sections)


def _metadata(config: dict[str, Any], results: dict[str, Any]) -> ModelCardData:
    dataset = {'dataset_name': results['dataset'], 'dataset_type': results['dataset'].lower().replace(' ', '-')}
    evaluation = [
        EvalResult(
            task_type='image-classification', metric_type='accuracy', metric_name=name,
            metric_value=results['metrics'][key], dataset_split='validation', **dataset)
        for key, name in (('top1', 'top-1 (%)'), ('top5', 'top-5 (%)')) if 'metrics' in results
    ]
    return ModelCardData(
        license=config['pretrained_cfg']['license'],
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_aws', *(['weight-standardization'] if _is_ours(config) else [])],
        model_name=results['name'],
        eval_results=evaluation or None,
    )


def _is_ours(config: dict[str, Any]) -> bool:
    """Whether the plugin defines the network, or timm."""
    return config['architecture'] in list_models()


def _introduction(config: dict[str, Any], results: dict[str, Any]) -> str:
    height, width = config['pretrained_cfg']['input_size'][1:]
    start = results.get('start')
    trained = f'trained further from {_origin(start)}' if start else 'trained from scratch'
    timm = '[timm](https://github.com/huggingface/pytorch-image-models)'
    source = f'the {timm} plugin timm_aws' if _is_ours(config) else timm
    besides = f', with {" and ".join(map(_escaped, results["besides"]))}' if results['besides'] else ''
    text = _filled(
        f'`{config["architecture"]}` of {source}, {trained} on {_escaped(results["dataset"])}{besides}: '
        f'{config["num_classes"]} classes, images of '
        f'{height} × {width} pixels, {results["weights"]["parameters"] / 1e6:.1f} million parameters.')
    return f'# {results["name"]}\n\n{text}\n'


def _usage(config: dict[str, Any], results: dict[str, Any]) -> str:
    warning, install, plugin, fold = _OURS if _is_ours(config) else _TIMMS
    name = config['architecture']
    channels = config['pretrained_cfg']['input_size'][0]
    image = f'torch.rand({channels}, 300, 400)  # in place of an image with {channels} channels'
    if channels in (1, 3):
        image = f"Image.open('image.jpg').convert({'L' if channels == 1 else 'RGB'!r})"
    return f'''## Use

{warning.format(name)}```bash
pip install {install}
```

```python
import timm
{plugin.format(name)}
# OWNER stands in the address of this page. 'local-dir:PATH' loads a folder with these files.
name = {"hf-hub:OWNER/" + results["name"]!r}
model = timm.create_model(name, pretrained=True).eval()
```

Classify an image:

```python
import torch
from PIL import Image

transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = {image}
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0]
for index in probabilities.topk({min(5, config["num_classes"])}).indices.tolist():
    {_PRINT[bool(config.get("label_names"))]}
```

Compute feature maps of every stage, and one embedding per image:

```python
stages = timm.create_model(name, pretrained=True, features_only=True).eval()
maps = stages(transform(image).unsqueeze(0))  # one tensor a stage, (1, channels, height, width)

encoder = timm.create_model(name, pretrained=True, num_classes=0).eval()
embedding = encoder(transform(image).unsqueeze(0))  # {tuple(results["embedding"])}
```
{fold}'''


def _results(results: dict[str, Any]) -> str:
    if 'metrics' not in results:
        return '## Results\n\nNot validated.\n'
    metrics, full = results['metrics'], results.get('metrics_in_full_precision')
    precision = '' if full is None else (
        f'\nThe filters are stored in half precision. In full precision top-1 is {full["top1"]:.2f} %.\n')
    images = f'{metrics["images"]:,} ' if 'images' in metrics else ''
    others = results.get('comparison')  # scripts/comparison.py adds it
    comparison = f'\n{_filled(others["about"])}\n\n{others["table"]}\n' if others else ''
    return f'''## Results

On the {images}validation images of {_escaped(results["dataset"])}, measured on these files by \
{metrics["by"]}:

| top-1 | top-5 | image size | crop | interpolation |
|---|---|---|---|---|
| {metrics["top1"]:.2f} % | {metrics["top5"]:.2f} % | {metrics["img_size"]} px | {metrics["crop_pct"]} | \
{metrics["interpolation"]} |
{precision}{comparison}'''


def _training(args: dict[str, Any], results: dict[str, Any], folder: Path) -> str:
    stages = results['training']
    total = {key: sum(stage[key] for stage in stages) for key in ('hours', 'images') if all(key in s for s in stages)}
    chosen = {'alpha': f'{results["alpha"]:.4g}'} if results.get('alpha') else {}  # by like_decay, or the default
    options = ', '.join(_escaped(f'{key} {value}') for key, value in {**(args['opt_kwargs'] or {}), **chosen}.items())
    hours = f'{total["hours"]:.1f} hours on ' if 'hours' in total else ''
    seen = f', {total["images"] / 1e6:.1f} million images seen' if 'images' in total else ''
    picture = '' if not (folder / PICTURE).is_file() else '''
![Effective learning rate of each layer](effective_lr.png)

Learning rate divided by filter length after each epoch, the median over each layer's filters
([data](effective_lr.csv)).
'''
    kind = 'averaged weights (EMA)' if results['weights']['ema'] else 'weights'
    momentum = f', momentum {results["momentum"]}' if results['momentum'] is not None else ''  # Adam has none
    size = f', on images of {args["img_size"]} px' if args.get('img_size') else ''  # else the network's own
    text = _filled(
        f'{_escaped(args["opt"])}{f" ({options})" if options else ""}{momentum}, batch size '
        f'{results["batch_size"]}, {sum(stage["epochs"] for stage in stages)} epochs{seen}, '
        f'{hours}{results["hardware"]}, seed {results["seed"]}. These are the {kind} after epoch '
        f'{results["train_py"]["epoch"]} of the last run{size}. [args.yaml](args.yaml) holds every option of timm\'s '
        f'unmodified train.py:')
    return f'''## Training

{text}

```bash
{chr(10).join(stage["command"] for stage in stages)}
```

Versions: {", ".join(f"{name} {version}" for name, version in results["versions"].items())}.
{picture}'''


def _limits(config: dict[str, Any], results: dict[str, Any]) -> str:
    height, width = config['pretrained_cfg']['input_size'][1:]
    start = results.get('start')
    seen = _escaped(results['dataset'])
    others = [*([_origin(start)] if start else []), *map(_escaped, results['besides'])]
    seen += f', and learned from {" and ".join(others)}, whose images and terms count too' if others else ' only'
    text = (
        f'The network was trained on {seen}. It knows {config["num_classes"]} classes, assigns one '
        f'of them to every image, and expects photographs of {height} × {width} pixels. This is no ImageNet-1k model: '
        f'its accuracy cannot be compared with ImageNet-1k accuracies. The terms of the training images apply beside '
        f'the licence of the weights.')
    return f'## Limits\n\n{_filled(text)}\n'


def _origin(start: dict[str, Any]) -> str:
    """Names the weights that training started from, and what is known of them."""
    known = [f'{word} {_escaped(start[key])}' for key, word in (('dataset', 'trained on'), ('license', 'licence'))
             if start.get(key)]
    return f'the weights {_escaped(start["name"])}' + (f' ({", ".join(known)})' if known else '')


def _escaped(text: str) -> str:
    """Returns text as Markdown shows it: in one line, without markup or HTML."""
    return re.sub(r'([\\`*_\[\]<>#|~&$])', r'\\\1', ' '.join(text.split()))


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
