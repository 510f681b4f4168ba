"""What the scale of the initialization does to a weight-standardized network, under weight decay and under AWS.

    python scripts/init_scale.py            # runs what is not in the file yet, then draws the picture
    python scripts/init_scale.py --draw     # draws the picture from the file alone

Trains ws_resnet18 on scikit-learn's digits (the task of quickstart.py). The initial weights are the usual ones times
0.01, 1, 20 and 100. A standardized weight gives the same output at every scale, but its effective learning rate is
lr / std. Weight decay takes a fixed share of the length in each step; AWS takes a share that grows with the length.
Both have the same strength at the usual scale: decay 1e-2, and alpha 0.25 at a std of 0.04.

Writes one line of JSON for each run to scripts/results/init_scale.jsonl, and the picture beside it as .svg and .png.
"""
import argparse
import json
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from outputs import BLACK, BLUE, ORANGE, RESULTS, VERMILION, save_figure
from provenance import hardware, versions
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

import timm_aws
from timm_aws.rule import filter_length

SCALES = (0.01, 1., 20., 100.)
RULES = {
    'weight decay': {'opt': 'momentum', 'weight_decay': 1e-2},
    'AWS': {'opt': 'aws_sgd', 'weight_decay': 1e-2, 'alpha': 0.25},  # the decay is that of the classifier
}
EPOCHS = 8
LR = 0.05
SEED = 0


@torch.no_grad()
def median_std(model: torch.nn.Module) -> torch.Tensor:
    """Returns the median standard deviation of the model's standardized filters."""
    weights = dict(model.named_parameters())
    return torch.cat([filter_length(weights[n], 'ws').flatten() for n in timm_aws.normalized_weights(model)]).median()


def run(rule: str, scale: float) -> dict:
    """Trains one network. Returns its settings, and its accuracy and filter length over training."""
    from quickstart import accuracy, load_images, train_epoch  # needs scikit-learn; --draw does not

    torch.manual_seed(SEED)
    images, labels, held_out_images, held_out_labels = load_images()
    model = timm.create_model('ws_resnet18', num_classes=10, in_chans=1)
    with torch.no_grad():
        for name in timm_aws.normalized_weights(model):
            model.get_parameter(name).mul_(scale)
    optimizer = create_optimizer_v2(model, lr=LR, **RULES[rule])
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=EPOCHS)
    stds, accuracies = [median_std(model).item()], []
    optimizer.register_step_post_hook(lambda *_: stds.append(median_std(model).item()))
    with tqdm(total=EPOCHS * 23, desc=f'{rule}, init x {scale:g}', unit='batch', leave=False) as progress:
        for epoch in range(EPOCHS):
            train_epoch(model, optimizer, images, labels, progress)
            accuracies.append(round(accuracy(model, held_out_images, held_out_labels), 2))
            scheduler.step(epoch + 1)
    return {
        'rule': rule, 'scale': scale, 'model': 'ws_resnet18', 'dataset': 'scikit-learn digits, 1437 + 360 images',
        'settings': RULES[rule], 'lr': LR, 'epochs': EPOCHS, 'seed': SEED,
        'versions': versions(), 'command': 'python scripts/init_scale.py', 'hardware': hardware('cpu'),
        'accuracy': accuracies, 'median_std': [float(f'{std:.4g}') for std in stds],
    }


def draw(lines: list[dict], path: Path) -> None:
    """Draws the length of the filters over training, a panel for each rule; the labels give the final accuracy."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(SCALES, (BLUE, BLACK, ORANGE, VERMILION)))
    for panel, rule in zip(panels, RULES):
        for line in sorted((line for line in lines if line['rule'] == rule), key=lambda line: -line['scale']):
            label = f'init × {line["scale"]:g}: {line["accuracy"][-1]:.1f} %'
            panel.plot(line['median_std'], color=colors[line['scale']], label=label)
        panel.set(title=rule, xlabel='training step', yscale='log')
        panel.grid(alpha=0.3)
        panel.legend(title='accuracy at the end', loc='upper center', bbox_to_anchor=(0.5, -0.18), ncols=2)
    panels[0].set_ylabel('median std of the filters')
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--draw', action='store_true', help='only draw the picture')
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / 'init_scale.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line['rule'], line['scale']) for line in lines}
    for rule in () if options.draw else RULES:
        for scale in SCALES:
            if (rule, scale) not in done:
                lines.append(run(rule, scale))
                with path.open('a') as file:
                    file.write(json.dumps(lines[-1]) + '\n')
    draw(lines, path.with_suffix(''))


if __name__ == '__main__':
    main()
