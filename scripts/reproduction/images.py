"""Images for many short trainings: all of them in memory as uint8, cropped and flipped a batch at a time."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

__all__ = ['Images', 'augment', 'load', 'normalize', 'patterns']

_PADDING = 4


@dataclass(frozen=True)
class Images:
    """A data set.

    Attributes:
        name: What it is, for the records.
        train: Images to train on, uint8, (n, 3, size, size).
        train_labels: Their classes, (n,).
        val: Images to validate on, uint8, (m, 3, size, size).
        val_labels: Their classes, (m,).
    """
    name: str
    train: torch.Tensor
    train_labels: torch.Tensor
    val: torch.Tensor
    val_labels: torch.Tensor

    @property
    def num_classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def to(self, device: str) -> 'Images':
        return Images(self.name, *(getattr(self, key).to(device) for key in (
            'train', 'train_labels', 'val', 'val_labels')))

    def share(self) -> 'Images':
        """Moves the tensors to shared memory, so that processes need no copies of their own."""
        for tensor in (self.train, self.train_labels, self.val, self.val_labels):
            tensor.share_memory_()
        return self


def load(folder: Path, every: int, size: int) -> Images:
    """Reads every so many-th class, in the order of their names, of Tiny-ImageNet-200.

    Args:
        folder: Folder that prepare_tiny_imagenet.py made, with `train` and `val`.
        every: Take the classes 0, every, 2 * every and so on.
        size: Height and width to shrink the images to.

    Returns:
        The images.

    Raises:
        ValueError: If the folder is not such a one.
    """
    if not (folder / 'train').is_dir() or not (folder / 'val').is_dir():
        raise ValueError(f'{folder} has no train and val: make it with scripts/prepare_tiny_imagenet.py.')
    classes = sorted(path.name for path in (folder / 'train').iterdir())[::every]
    splits = [_read(folder / split, classes, size) for split in ('train', 'val')]
    name = f'Tiny-ImageNet-200, {len(classes)} classes (every {every}th), {size} px'
    return Images(name, *(tensor for split in splits for tensor in split))


def _read(folder: Path, classes: list[str], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    paths = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]

    def pixels(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert('RGB').resize((size, size), Image.Resampling.BOX))

    with ThreadPoolExecutor() as pool:
        stack = np.stack(list(pool.map(lambda item: pixels(item[0]), paths)))
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in paths])


def patterns(size: int) -> Images:
    """Makes 512 + 128 images of four classes, a pattern each under noise: for trying the scripts, not for results."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 128, (4, 3, size, size), generator=generator)
    splits = []
    for count in (512, 128):
        labels = torch.arange(count) % 4
        noise = torch.randint(0, 128, (count, 3, size, size), generator=generator)
        splits += [(base[labels] + noise).to(torch.uint8), labels]
    return Images(f'patterns under noise, {size} px', *splits)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Maps uint8 to numbers around zero of about unit size, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(118).div_(66)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifts each image by up to four pixels, mirroring its border, and flips half of them.

    Args:
        images: Batch, uint8, (n, 3, size, size).
        generator: Source of randomness, on the CPU.

    Returns:
        Batch of the same shape, uint8.
    """
    count, channels, size, _ = images.shape
    padded = F.pad(images.float(), [_PADDING] * 4, mode='reflect').to(images.dtype)
    shifts = torch.randint(0, 2 * _PADDING + 1, (2, count, 1), generator=generator).to(images.device)
    flips = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
    offsets = torch.arange(size, device=images.device)
    rows = (shifts[0] + offsets)[:, None, :, None]
    columns = (shifts[1] + torch.where(flips, size - 1 - offsets, offsets))[:, None, None, :]
    batch = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[batch, channel, rows, columns]
