"""Turns a download of Tiny-ImageNet-200 into the folder that timm trains from.

Tiny-ImageNet-200 was made for Stanford's course CS231N: ImageNet photographs at 64x64 in 200 classes, 500 a class
for training and 50 for validation. Like ImageNet, it is for non-commercial research. Its test split has no labels,
and timm reads no bounding boxes, so both are left out.

    python scripts/prepare_tiny_imagenet.py ~/Downloads/tiny-imagenet-200.zip ~/data/tiny-imagenet

The source is one of
  * the official tiny-imagenet-200.zip,
  * a folder in which that file was unpacked,
  * a folder that holds tiny-imagenet-200-{train-0,train-1,train-2,train-3,val}.tar.gz and
    tiny-imagenet-200-classes.tsv, the same images in parts.

Each gives the same folder, to be named as --data-dir to timm's scripts (splits `train` and `validation`):

    train/WNID/*.JPEG    100,000 images
    val/WNID/*.JPEG      10,000 images
    classes.tsv          wnid and words, sorted by wnid: the order of the class indices

The images are collected in a hidden folder next to the target (.NAME.partial), which gets its final name once all are
counted. A run that was interrupted is resumed by the same command. Run only one at a time for each target.
"""
import argparse
import hashlib
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

OFFICIAL_ROOT = 'tiny-imagenet-200/'
OFFICIAL_TABLES = ('wnids.txt', 'words.txt', 'val/val_annotations.txt')
PARTS_CLASSES_FILE = 'tiny-imagenet-200-classes.tsv'
CLASSES_FILE = 'classes.tsv'
CLASSES_HEADER = ['wnid', 'words']

WNID = re.compile(r'n[0-9]{8}')
IMAGE = re.compile(r'\w+\.JPEG', re.ASCII)
IMAGE_PATH = re.compile(rf'(train|val)/{WNID.pattern}/{IMAGE.pattern}', re.ASCII)
OFFICIAL_TRAIN_PATH = re.compile(rf'train/({WNID.pattern})/images/({IMAGE.pattern})', re.ASCII)
OFFICIAL_VAL_PATH = re.compile(rf'val/images/({IMAGE.pattern})', re.ASCII)


@dataclass(frozen=True)
class Expected:
    """What a complete data set consists of.

    Args:
        parts: The sha256 of each tar.gz part by its file name.
        num_classes: The number of classes.
        per_class: The number of images in each class by split.
    """
    parts: dict[str, str]
    num_classes: int
    per_class: dict[str, int]

    @property
    def num_images(self) -> int:
        return self.num_classes * sum(self.per_class.values())


TINY_IMAGENET = Expected(
    parts={
        'tiny-imagenet-200-train-0.tar.gz': '46b7bd28f4763e877d2d7e6b8cc1fcc2e68ca84e1e08517d272c7c2f3e56ca38',
        'tiny-imagenet-200-train-1.tar.gz': '27e63d86a94290fde6e42fdd47e2e385dc1916ef4577df3e2874aa23353a73fa',
        'tiny-imagenet-200-train-2.tar.gz': 'ecc6089e55d327a7da0935f0af5059f22e3955384c157889e7c37c844be9bcb0',
        'tiny-imagenet-200-train-3.tar.gz': '55d6a672ecf3285de817fbe46afd8479ebf665ac90bcfeefe7580a34a46e816b',
        'tiny-imagenet-200-val.tar.gz': '055780d63c57c9435399f46716ae973e93c757a565422a007674c1723b1c8839',
    },
    num_classes=200,
    per_class={'train': 500, 'val': 50},
)


class PrepareError(Exception):
    """The source or the target is not what it has to be; the message says what to do."""


def prepare(source: Path, out: Path, expected: Expected = TINY_IMAGENET) -> bool:
    """Makes `out` an ImageFolder of the images in `source`.

    Args:
        source: The official zip file, a folder in which it was unpacked, or a folder that holds the tar.gz parts.
        out: The folder to make. It may exist only if it is complete already.
        expected: What the data set consists of.

    Returns:
        True if `out` was made, False if it was complete already.

    Raises:
        PrepareError: If the source is damaged or incomplete, or `out` is occupied by something else.
        OSError: If a file cannot be read or written.
    """
    out = out.resolve()  # a link to another disk: the partial folder has to be on that disk
    if out.exists():
        _check_occupied(out, expected)
        return False

    partial = out.with_name(f'.{out.name}.partial')
    files = _read_source(source, expected)
    with tqdm(total=expected.num_images, desc=out.name, unit='img', disable=None) as progress:
        for name, data in files:
            _write_file(partial / name, data)
            progress.update(name != CLASSES_FILE)
    try:
        check_folder(partial, expected)
    except (PrepareError, OSError) as error:
        raise PrepareError(f'{error}; remove {partial} and run again with a complete {source}') from None
    if hasattr(os, 'sync'):  # not on Windows
        os.sync()  # else a power failure could keep the name and lose the contents
    partial.rename(out)
    return True


def check_folder(folder: Path, expected: Expected = TINY_IMAGENET) -> None:
    """Checks that a folder holds the table of classes and all the images of each class, and no others.

    Args:
        folder: The folder that holds train, val and classes.tsv.
        expected: What the data set consists of.

    Raises:
        PrepareError: If something is missing or too much.
        OSError: If the folder cannot be read.
    """
    table = folder / CLASSES_FILE
    header, *rows = _parse_table(table, table.read_bytes()) or [[]]
    wnids = [row[0] for row in rows]
    if header != CLASSES_HEADER or wnids != sorted(set(wnids)) or len(wnids) != expected.num_classes:
        raise PrepareError(
            f'{table} is not a table of wnid and words of {expected.num_classes} classes, sorted by wnid'
        )
    for split, per_class in expected.per_class.items():
        unlike = sorted(set(os.listdir(folder / split)).symmetric_difference(wnids))
        if unlike:
            raise PrepareError(f'{folder / split} and {table} differ in {len(unlike)} classes, first {unlike[0]!r}')
        for wnid in wnids:
            _check_class(folder / split / wnid, per_class)


def _check_class(folder: Path, num_images: int) -> None:
    names = os.listdir(folder)
    strange = sorted(name for name in names if not IMAGE.fullmatch(name))
    if strange:
        raise PrepareError(f'{folder} holds {strange[0]!r}, which is not an image of the data set')
    if len(names) != num_images:
        raise PrepareError(f'{folder} holds {len(names)} images, expected {num_images}')


def _check_occupied(out: Path, expected: Expected) -> None:
    try:
        check_folder(out, expected)
    except (PrepareError, OSError) as error:
        raise PrepareError(
            f'{out} exists and is not a complete Tiny-ImageNet-200 ({error}); it is left as it is: '
            f'name a folder that does not exist yet'
        ) from None


def _write_file(path: Path, data: bytes) -> None:
    """Writes a file unless it is there already.

    The comparison is all that resuming takes: a file that was cut off differs from its source and is written again.
    """
    try:
        if path.read_bytes() == data:
            return
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _read_source(source: Path, expected: Expected) -> Iterator[tuple[str, bytes]]:
    """Finds out which of the three layouts the source has; gives the path in the target and the bytes of each file."""
    if source.is_file():
        return _read_zip(source)
    if not source.is_dir():
        raise PrepareError(f'{source} does not exist: name the official tiny-imagenet-200.zip or a folder')
    for folder in (source, source / OFFICIAL_ROOT):
        if (folder / 'wnids.txt').exists():
            return _read_unpacked(folder)
    missing = [name for name in (*expected.parts, PARTS_CLASSES_FILE) if not (source / name).is_file()]
    if missing:
        raise PrepareError(
            f'{source} lacks {", ".join(missing)}: name a folder that holds all parts, '
            f'the official tiny-imagenet-200.zip, or a folder in which it was unpacked'
        )
    return _read_parts(source, expected.parts)


def _read_parts(source: Path, parts: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    for name, sha256 in parts.items():
        _check_sha256(source / name, sha256)
    yield CLASSES_FILE, (source / PARTS_CLASSES_FILE).read_bytes()
    for name in parts:
        with tarfile.open(source / name, 'r:gz') as archive:
            for member in archive:
                if not member.isfile() or not IMAGE_PATH.fullmatch(member.name):
                    raise PrepareError(f'{source / name} holds {member.name!r}, which is not an image of the data set')
                yield member.name, _check_jpeg(source / name, member.name, archive.extractfile(member).read())


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise PrepareError(
            f'{path} has sha256 {digest.hexdigest()}, expected {expected}: it is damaged or not whole, get it again'
        )


def _read_zip(source: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name.removeprefix(OFFICIAL_ROOT) for name in archive.namelist() if name.startswith(OFFICIAL_ROOT)]
            yield from _read_official(source, names, lambda name: archive.read(OFFICIAL_ROOT + name))
    # damaged headers may ask for a negative offset (OSError), a password or an unknown compression (RuntimeError)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise PrepareError(
            f'{source} cannot be read ({error}): if it is not the whole official tiny-imagenet-200.zip, get it again'
        ) from None


def _read_unpacked(folder: Path) -> Iterator[tuple[str, bytes]]:
    patterns = ('*.txt', 'val/*.txt', 'val/images/*.JPEG', 'train/*/images/*.JPEG')
    names = [path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)]
    return _read_official(folder, names, lambda name: (folder / name).read_bytes())


def _read_official(source: Path, names: list[str], read: Callable[[str], bytes]) -> Iterator[tuple[str, bytes]]:
    """Maps the official layout to that of an ImageFolder; what is not an image to train or validate on is skipped."""
    missing = [name for name in OFFICIAL_TABLES if name not in names]
    if missing:
        raise PrepareError(f'{source} lacks {OFFICIAL_ROOT}{missing[0]}: get the official tiny-imagenet-200.zip again')
    wnids, words, annotations = (_parse_table(f'{name} in {source}', read(name)) for name in OFFICIAL_TABLES)
    yield CLASSES_FILE, _make_classes(source, wnids, words)
    val_wnids = {row[0]: row[1] for row in annotations if len(row) > 1}
    for name in names:
        if match := OFFICIAL_TRAIN_PATH.fullmatch(name):
            path = f'train/{match[1]}/{match[2]}'
        elif match := OFFICIAL_VAL_PATH.fullmatch(name):
            path = f'val/{val_wnids.get(match[1])}/{match[1]}'
            if not IMAGE_PATH.fullmatch(path):
                raise PrepareError(f'{source}: val_annotations.txt names no class for {match[1]}, get it again')
        else:
            continue
        yield path, _check_jpeg(source, name, read(name))


def _make_classes(source: Path, wnids: list[list[str]], words: list[list[str]]) -> bytes:
    words_of = {row[0]: row[-1] for row in words}
    rows = [CLASSES_HEADER]
    for wnid in sorted(row[0] for row in wnids):
        if wnid not in words_of:
            raise PrepareError(f'{source}: words.txt has no line for {wnid} of wnids.txt, get it again')
        rows.append([wnid, words_of[wnid]])
    return ''.join('\t'.join(row) + '\n' for row in rows).encode()


def _parse_table(name: str | Path, data: bytes) -> list[list[str]]:
    try:
        return [line.split('\t') for line in data.decode().splitlines() if line]
    except UnicodeDecodeError as error:
        raise PrepareError(f'{name} is not UTF-8 text ({error}): get it again') from None


def _check_jpeg(source: Path, name: str, data: bytes) -> bytes:
    """Returns the bytes of an image; an unpacked folder has no checksums, and this is how a cut-off file shows."""
    if not (data.startswith(b'\xff\xd8') and data.endswith(b'\xff\xd9')):
        raise PrepareError(f'{source}: {name} is not a whole JPEG file ({len(data)} bytes), get it again')
    return data


def main(argv: list[str] | None = None, expected: Expected = TINY_IMAGENET) -> int:
    """Runs the command.

    Args:
        argv: The arguments; those of the process if None.
        expected: What the data set consists of.

    Returns:
        The exit code: 0 on success, 1 on an error, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(description='Make an ImageFolder of Tiny-ImageNet-200 for timm.')
    parser.add_argument(
        'source', type=Path, help='tiny-imagenet-200.zip, a folder with it unpacked, or one with the tar.gz parts',
    )
    parser.add_argument('out', type=Path, help='the folder to make')
    args = parser.parse_args(argv)
    try:
        made = prepare(args.source, args.out, expected)
    except (PrepareError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('interrupted: run the same command again to resume', file=sys.stderr)
        return 130
    what = f'{expected.num_images} images of {expected.num_classes} classes'
    print(f'{args.out}: {what}' if made else f'{args.out} is complete ({what}), nothing to do')
    return 0


if __name__ == '__main__':
    sys.exit(main())
