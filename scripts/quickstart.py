"""Classifies photographs with the trained ws_resnet50, then trains one on handwritten digits, in about a minute.

    python scripts/quickstart.py

The photographs come with scikit-image, the digits with scikit-learn (1,797 images of 8 by 8,
https://doi.org/10.24432/C50P49), the weights with this package: nothing is downloaded. The network knows the 200
classes of Tiny-ImageNet and sees 128 by 128 pixels of each photograph.

A fifth of the digits is held out. Each epoch prints the loss, the accuracy on the held-out images, and the median
effective learning rate, lr / std of the filter.
"""
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

import timm_aws

EPOCHS = 6
BATCH_SIZE = 64


@torch.inference_mode()
def classify() -> None:
    """Prints the five likeliest classes of three photographs."""
    from skimage import data  # init_scale.py uses this file without scikit-image

    model = timm.create_model('ws_resnet50_aws', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    names, words = model.pretrained_cfg['label_names'], model.pretrained_cfg['label_descriptions']
    photographs = {'a cat': data.chelsea(), 'a cup of coffee': data.coffee(), 'a rocket': data.rocket()}
    for title, pixels in photographs.items():
        probabilities = model(transform(Image.fromarray(pixels)).unsqueeze(0)).softmax(-1)[0]
        likeliest = probabilities.topk(5).indices.tolist()
        print(f'{title}: ' + ', '.join(
            f'{words[names[index]].split(",")[0]} {probabilities[index]:.0%}' for index in likeliest))


def load_images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns images (n, 1, 32, 32) and labels (n,) to train on, then those held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, scale_factor=4, mode='bilinear')
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    held_out, rest = order[:360], order[360:]
    return images[rest], labels[rest], images[held_out], labels[held_out]


def train_epoch(model, optimizer, images: torch.Tensor, labels: torch.Tensor, progress: tqdm) -> float:
    """Trains on every image once; returns the mean loss."""
    model.train()
    losses = []
    for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress.update()
        progress.set_postfix(loss=f'{losses[-1]:.3f}')
    return sum(losses) / len(losses)


@torch.inference_mode()
def accuracy(model, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of images that are classified right, in percent."""
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def median_effective_lr(optimizer) -> float:
    """Returns the median over all filters of all layers."""
    return torch.cat(list(timm_aws.effective_lr(optimizer).values())).median().item()


def train() -> None:
    """Trains a ws_resnet50 on the digits and prints how it goes."""
    images, labels, held_out_images, held_out_labels = load_images()
    model = timm.create_model('ws_resnet50', num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, 'aws_sgd', lr=0.05, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=EPOCHS)
    count = sum(len(group['params']) for group in optimizer.param_groups if group['alpha'])
    print(f'ws_resnet50 with aws_sgd: {count} weights are shrunk, {len(labels)} digits to train on')
    print('epoch     loss   accuracy   median effective lr')
    with tqdm(total=EPOCHS * -(-len(labels) // BATCH_SIZE), unit='batch', leave=False) as progress:
        for epoch in range(EPOCHS):
            rate = median_effective_lr(optimizer)
            loss = train_epoch(model, optimizer, images, labels, progress)
            percent = accuracy(model, held_out_images, held_out_labels)
            progress.write(f'{epoch + 1:5d} {loss:8.3f} {percent:8.1f} % {rate:21.3f}')
            scheduler.step(epoch + 1)


def main() -> None:
    torch.manual_seed(0)
    print("What ws_resnet50_aws, trained on Tiny-ImageNet-200, takes scikit-image's photographs for:")
    classify()
    print()
    train()


if __name__ == '__main__':
    main()
