"""Fine-tunes the networks that come with the package on photographs of flowers: which learning rate, which alpha.

    python scripts/fine_tuning.py ~/Downloads/17flowers.tgz     # runs what is not in the results yet
    python scripts/fine_tuning.py ~/Downloads/17flowers.tgz --model ws_resnet18_aws

The photographs are Oxford's 17 Category Flower Dataset (Nilsback and Zisserman, 2006,
https://www.robots.ox.ac.uk/~vgg/data/flowers/17/): 80 of each flower, sorted by class, image_0001.jpg to
image_1360.jpg. Give the archive, or a folder of the images. The networks were trained on Tiny-ImageNet-200, which has
no flowers. Of each of the first ten classes, each seed draws 20 photographs to train on and 20 others to validate on:
what a user with few images of their own has.

aws_sgd with the default alpha, aws_sgd with a hundred times that, and SGD with weight decay run at each learning rate,
with momentum 0.9 and a cosine schedule. The same network from scratch gets ten times the epochs, at the two highest
learning rates. Writes scripts/results/fine_tuning.json after each run, and the README's numbers in the end. The 42 runs
of ws_resnet50_aws at 64 px took about an hour on one core. Where a network's weights are not those of its results, all
of its runs start anew.
"""
import argparse
import itertools
import json
import statistics
import tarfile
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from outputs import RESULTS, ROOT, fill_in, write
from PIL import Image
from provenance import hardware, versions
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

import timm_aws  # noqa: F401  registers the model and the optimizer

MODELS = ('ws_resnet50_aws', 'ws_resnet18_aws', 'ws_seresnet50_aws')
CLASSES, PER_CLASS = 10, 80
TRAINED, VALIDATED = 20, 20  # photographs of a class
LRS = (0.003, 0.01, 0.03, 0.1)
SCRATCH = 'from scratch, 30 epochs, aws_sgd'
# Rows of the table: is the network pretrained, epochs, learning rates, options of the optimizer.
ROWS = {
    'aws_sgd': (True, 3, LRS, {'opt': 'aws_sgd', 'alpha': 2.5e-3}),
    'SGD': (True, 3, LRS, {'opt': 'momentum'}),
    'aws_sgd, alpha times 100': (True, 3, LRS, {'opt': 'aws_sgd', 'alpha': 0.25}),
    SCRATCH: (False, 30, LRS[2:], {'opt': 'aws_sgd', 'alpha': 2.5e-3}),
}
SEEDS = (0, 1, 2)
BATCH_SIZE = 16
WEIGHT_DECAY = 1e-4
MARGIN = 1.14  # the stored photographs are so much larger than the input, for random crops
RESULT = RESULTS / 'fine_tuning.json'


def make_folders(images: list[Path], root: Path, seed: int, side: int) -> None:
    """Makes `root/train/CLASS` and `root/validation/CLASS`, of images whose shorter side is `side` pixels."""
    generator = torch.Generator().manual_seed(seed)
    for label in range(CLASSES):
        order = torch.randperm(PER_CLASS, generator=generator).tolist()
        for split, chosen in (('train', order[:TRAINED]), ('validation', order[TRAINED:TRAINED + VALIDATED])):
            folder = root / split / f'{label:02}'
            folder.mkdir(parents=True)
            for index in chosen:
                image = Image.open(images[label * PER_CLASS + index]).convert('RGB')
                scale = side / min(image.size)
                image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC)
                image.save(folder / f'{index:02}.png')


@torch.inference_mode()
def accuracy(model: torch.nn.Module, loader) -> float:
    """Returns the share of images that are classified right, in percent."""
    model.eval()
    right = [(model(images).argmax(1) == labels) for images, labels in loader]
    return 100 * torch.cat(right).float().mean().item()


def fine_tune(name: str, root: Path, rule: str, lr: float, seed: int, progress: tqdm) -> float:
    """Fine-tunes a network and returns its accuracy on the images held out, in percent."""
    random_seed(seed)
    pretrained, epochs, _, options = ROWS[rule]
    model = timm.create_model(name, pretrained=pretrained, num_classes=CLASSES)
    config = resolve_model_data_config(model)
    train, held_out = (
        create_loader(
            create_dataset('', root, split=split, is_training=split == 'train'), config['input_size'], BATCH_SIZE,
            is_training=split == 'train', scale=(0.35, 1.), color_jitter=0., mean=config['mean'], std=config['std'],
            interpolation='bicubic', crop_pct=config['crop_pct'], num_workers=0, persistent_workers=False,
            use_prefetcher=False, device=torch.device('cpu'))
        for split in ('train', 'validation'))
    optimizer = create_optimizer_v2(model, lr=lr, momentum=0.9, weight_decay=WEIGHT_DECAY, **options)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, step_on_epochs=False, updates_per_epoch=len(train))
    model.train()
    for step, (images, labels) in enumerate(itertools.chain.from_iterable(train for _ in range(epochs)), 1):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step)
        progress.set_postfix(model=name, rule=rule, lr=lr, seed=seed, step=step, loss=f'{loss.item():.2f}')
    return accuracy(model, held_out)


def table(runs: list[dict]) -> str:
    """Returns mean and standard deviation of the accuracy over seeds, a row a rule and a column a learning rate."""
    rows = ['| top-1, % | ' + ' | '.join(f'lr {lr:g}' for lr in LRS) + ' |', '|---' * (1 + len(LRS)) + '|']
    for rule in ROWS:
        cells = []
        for lr in LRS:
            found = [run['top1'] for run in runs if (run['rule'], run['lr']) == (rule, lr)]
            spread = f' ± {statistics.stdev(found):.1f}' if len(found) > 1 else ''
            cells.append(f'{statistics.mean(found):.1f}{spread}' if found else '-')
        rows.append(f'| {rule} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def text(record: dict) -> str:
    """Returns the whole of fine_tuning.md."""
    parts = [
        f'# Fine-tuning on a small data set\n\n    {record["command"]}\n\nOxford 17 Category Flower Dataset: of each '
        f'of the first {CLASSES} classes {TRAINED} photographs to train on and {VALIDATED} others to validate on, '
        f'drawn by each seed. 3 epochs, where nothing else is said; mean and standard deviation of {len(SEEDS)} seeds. '
        f'Each cell of a seed is {CLASSES * VALIDATED} photographs: differences under 5 points are noise.\n']
    for name, network in record['networks'].items():
        weights = network['weights']
        parts.append(
            f'## {name}\n\nPretrained on Tiny-ImageNet-200 (weights of {weights["date"]}, {weights["top1"]} % top-1 '
            f'there), photographs at {network["img_size"]} px. {network["hardware"]}.\n\n{table(network["runs"])}\n')
    return '\n'.join(parts)


def values() -> dict[str, str]:
    """Returns the numbers that the README marks a place for: top-1 in percent."""
    found = {}
    for name, network in json.loads(RESULT.read_text())['networks'].items():
        mean = {(rule, lr): statistics.mean(run['top1'] for run in network['runs']
                                            if (run['rule'], run['lr']) == (rule, lr))
                for rule, row in ROWS.items() for lr in row[2]}
        short = name.removeprefix('ws_').removesuffix('_aws').replace('resnet', '')
        found[f'tune{short}_best'] = f'{mean["aws_sgd", 0.03]:.1f}'
        found[f'tune{short}_usual'] = f'{mean["aws_sgd", 0.1]:.1f}'
        found[f'tune{short}_scratch'] = f'{max(mean[SCRATCH, lr] for lr in ROWS[SCRATCH][2]):.1f}'
    return found


def network_record(record: dict, name: str) -> dict:
    """Returns the record of the network's runs: what was recorded, or an empty one where the weights are others."""
    folder = ROOT / 'weights' / f'{name.removesuffix("_aws")}.aws_tin200'
    results = json.loads((folder / 'results.json').read_text())
    weights = {'date': results['date'], 'top1': results['metrics']['top1']}
    if record['networks'].get(name, {}).get('weights') != weights:
        size = json.loads((folder / 'config.json').read_text())['pretrained_cfg']['input_size'][-1]
        record['networks'][name] = {
            'weights': weights, 'img_size': size, 'versions': versions(), 'hardware': hardware('cpu'),
            'threads': torch.get_num_threads(), 'runs': []}
    return record['networks'][name]


def run_missing(images: list[Path], name: str, record: dict, scratch: Path) -> None:
    """Fine-tunes one network in every way that its record lacks, and writes the results after each."""
    network = network_record(record, name)
    done = {(run['rule'], run['lr'], run['seed']) for run in network['runs']}
    missing = [key for key in ((rule, lr, seed) for seed in SEEDS for rule, row in ROWS.items() for lr in row[2])
               if key not in done]
    for seed in sorted({seed for *_, seed in missing}):
        make_folders(images, scratch / name / str(seed), seed, round(network['img_size'] * MARGIN))
    with tqdm(missing, unit='run') as progress:
        for rule, lr, seed in progress:
            top1 = fine_tune(name, scratch / name / str(seed), rule, lr, seed, progress)
            network['runs'].append({'rule': rule, 'lr': lr, 'seed': seed, 'top1': round(top1, 2)})
            write(RESULT, json.dumps(record, indent=1) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help='17flowers.tgz, or a folder of its images')
    parser.add_argument('--model', choices=MODELS, nargs='+', default=MODELS, help='which networks; default: all')
    options = parser.parse_args()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {
        'command': 'python scripts/fine_tuning.py 17flowers', 'networks': {}}
    record['settings'] = {
        'batch_size': BATCH_SIZE, 'momentum': 0.9, 'weight_decay': WEIGHT_DECAY, 'sched': 'cosine, by step',
        'rows': ROWS}
    with tempfile.TemporaryDirectory() as folder:
        if options.source.is_file():
            with tarfile.open(options.source) as archive:
                archive.extractall(folder, filter='data')
        images = sorted((Path(folder) if options.source.is_file() else options.source).rglob('image_*.jpg'))
        if len(images) != 1360:
            parser.error(f'{options.source} holds {len(images)} of 1,360 images: give 17flowers.tgz.')
        for name in options.model:
            run_missing(images, name, record, Path(folder))
    write(RESULT.with_suffix('.md'), text(record))
    fill_in(values())


if __name__ == '__main__':
    main()
