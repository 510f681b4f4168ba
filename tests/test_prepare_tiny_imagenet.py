"""Tests of scripts/prepare_tiny_imagenet.py on small archives of 2 classes, and on the real ones where they are.

The real tar.gz parts are read from the folder that the environment variable TIMM_AWS_TINY_IMAGENET_ARCHIVES names.
"""
import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import prepare_tiny_imagenet as script
import pytest

SCRIPT = Path(script.__file__)
ARCHIVES = os.environ.get('TIMM_AWS_TINY_IMAGENET_ARCHIVES')

WORDS = {'n01443537': 'goldfish, Carassius auratus', 'n12267677': 'acorn'}
PER_CLASS = {'train': 3, 'val': 2}
CLASSES = b'wnid\twords\nn01443537\tgoldfish, Carassius auratus\nn12267677\tacorn\n'
PARTS = {
    'train-0.tar.gz': 'train/n01443537/',
    'train-1.tar.gz': 'train/n12267677/',
    'val.tar.gz': 'val/',
}
LAYOUTS = ('parts', 'zip', 'unpacked', 'unpacked-root')

# Runs the command in a process that kills itself in the middle of the write or rename number argv[2]
KILLED = '''
import os, signal, sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(sys.argv[1]))
import prepare_tiny_imagenet as script

write_bytes, left = Path.write_bytes, int(sys.argv[2])

def count():
    global left
    left -= 1
    return left < 0

def half_write(path, data):
    if count():
        write_bytes(path, data[:len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(path, data)

def no_rename(path, target):
    assert count()
    os.kill(os.getpid(), signal.SIGKILL)

Path.write_bytes, Path.rename = half_write, no_rename
script.main(sys.argv[3:], script.Expected({}, 2, {'train': 3, 'val': 2}))
'''


def make_images() -> dict[str, bytes]:
    images = {}
    for wnid in WORDS:
        for index in range(PER_CLASS['train']):
            images[f'train/{wnid}/{wnid}_{index}.JPEG'] = wnid
        for _ in range(PER_CLASS['val']):
            images[f'val/{wnid}/val_{len(images)}.JPEG'] = wnid
    return {name: b'\xff\xd8' + name.encode() * 9 + b'\xff\xd9' for name in images}


IMAGES = make_images()
FIRST_IMAGE = next(iter(IMAGES))
COMPLETE = {'classes.tsv': CLASSES, **IMAGES}


def make_tar(path: Path, files: dict[str, bytes], links: tuple[tarfile.TarInfo, ...] = ()) -> None:
    with tarfile.open(path, 'w:gz') as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in links:
            archive.addfile(member)


def make_parts(folder: Path) -> script.Expected:
    folder.mkdir(parents=True)
    for part, prefix in PARTS.items():
        make_tar(folder / part, {name: data for name, data in IMAGES.items() if name.startswith(prefix)})
    (folder / 'tiny-imagenet-200-classes.tsv').write_bytes(CLASSES)
    return expect(folder)


def expect(folder: Path) -> script.Expected:
    parts = {part: hashlib.sha256((folder / part).read_bytes()).hexdigest() for part in PARTS}
    return script.Expected(parts=parts, num_classes=len(WORDS), per_class=PER_CLASS)


def official_files() -> dict[str, bytes]:
    """Returns the files of the official zip: wnids unsorted, words of other classes too, boxes and a test split."""
    annotations = ''
    files = {
        'wnids.txt': '\n'.join(sorted(WORDS, reverse=True)).encode(),
        'words.txt': b'n00001740\tentity\n' + ''.join(f'{wnid}\t{WORDS[wnid]}\n' for wnid in WORDS).encode(),
        'test/images/test_0.JPEG': b'\xff\xd8test\xff\xd9',
    }
    for path, data in IMAGES.items():
        split, wnid, name = path.split('/')
        if split == 'train':
            files[f'train/{wnid}/images/{name}'] = data
            files[f'train/{wnid}/{wnid}_boxes.txt'] = b'n_0.JPEG\t0\t10\t63\t58\n'
        else:
            files[f'val/images/{name}'] = data
            annotations += f'{name}\t{wnid}\t0\t32\t44\t62\n'
    files['val/val_annotations.txt'] = annotations.encode()
    return {f'tiny-imagenet-200/{name}': data for name, data in files.items()}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('tiny-imagenet-200/', b'')  # the official file lists its folders too
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_source(layout: str, folder: Path) -> tuple[Path, script.Expected]:
    expected = make_parts(folder / 'parts')
    path = make_zip(folder / 'tiny-imagenet-200.zip', official_files())
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / 'unpacked')
    sources = {
        'parts': folder / 'parts',
        'zip': path,
        'unpacked': folder / 'unpacked',
        'unpacked-root': folder / 'unpacked' / 'tiny-imagenet-200',
    }
    return sources[layout], expected


def read_tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def read_mtimes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in (folder, *folder.rglob('*'))}


def run(source: Path, out: Path, expected: script.Expected) -> int:
    return script.main([str(source), str(out)], expected)


def read_error(capsys: pytest.CaptureFixture) -> str:
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.startswith('error: ')
    assert printed.err.endswith('\n')
    assert printed.err.count('\n') == 1
    return printed.err


def fail_write(monkeypatch: pytest.MonkeyPatch, index: int, error: BaseException) -> None:
    """Lets the write number `index` fail with half of its bytes written."""
    write_bytes, calls = Path.write_bytes, []

    def write(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) <= index:
            return write_bytes(path, data)
        write_bytes(path, data[:len(data) // 2])
        raise error

    monkeypatch.setattr(Path, 'write_bytes', write)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / 'data' / 'tiny'


@pytest.fixture
def partial(out: Path) -> Path:
    return out.parent / '.tiny.partial'


@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_layout_gives_the_same_files(layout, tmp_path, out, capsys):
    source, expected = make_source(layout, tmp_path / 'source')
    before = read_tree(tmp_path / 'source')
    assert run(source, out, expected) == 0
    assert read_tree(out) == COMPLETE
    assert os.listdir(out.parent) == ['tiny']
    assert read_tree(tmp_path / 'source') == before
    printed = capsys.readouterr()
    assert printed.out == f'{out}: 10 images of 2 classes\n'
    assert printed.err == ''


def test_command(tmp_path, out):
    """The real expectations refuse the small archives, so the process ends in an error."""
    source, _ = make_source('zip', tmp_path / 'source')
    done = subprocess.run([sys.executable, SCRIPT, source, out], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ''
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    assert 'is not a table of wnid and words of 200 classes' in done.stderr
    assert not out.exists()


def test_progress_counts_images(tmp_path, out, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    source, expected = make_source('zip', tmp_path / 'source')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert run(source, out, expected) == 0
    assert '| 10/10 [' in sys.stderr.getvalue()


def test_second_run_does_nothing(tmp_path, out, capsys):
    source, expected = make_source('parts', tmp_path / 'source')
    assert script.prepare(source, out, expected)
    before = read_mtimes(out.parent)
    assert run(source, out, expected) == 0
    assert capsys.readouterr().out == f'{out} is complete (10 images of 2 classes), nothing to do\n'
    assert not script.prepare(tmp_path / 'deleted', out, expected)
    assert read_mtimes(out.parent) == before


def test_link_to_another_disk(tmp_path, out):
    source, expected = make_source('zip', tmp_path / 'source')
    disk = tmp_path / 'disk'
    out.parent.mkdir()
    out.symlink_to(disk)
    assert run(source, out, expected) == 0
    assert out.is_symlink()
    assert read_tree(disk) == COMPLETE
    assert os.listdir(out.parent) == ['tiny']


@pytest.mark.parametrize('index', [0, 1, 6, 10, 11])
def test_killed_run_is_resumed(index, tmp_path, out, partial):
    """Killed in the first, second, seventh and last write of 11, and before the rename."""
    source, expected = make_source('zip', tmp_path / 'source')
    killed = subprocess.run([sys.executable, '-c', KILLED, SCRIPT, str(index), source, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(read_tree(partial)) == min(index + 1, 11)
    assert run(source, out, expected) == 0
    assert read_tree(out) == COMPLETE
    assert os.listdir(out.parent) == ['tiny']


@pytest.mark.parametrize('first', LAYOUTS)
@pytest.mark.parametrize('second', LAYOUTS)
def test_interrupted_run_is_resumed_from_any_layout(first, second, tmp_path, out, partial, capsys):
    source, expected = make_source(first, tmp_path / 'first')
    with pytest.MonkeyPatch.context() as patch:
        fail_write(patch, 6, KeyboardInterrupt())
        assert run(source, out, expected) == 130
    assert capsys.readouterr().err == 'interrupted: run the same command again to resume\n'
    assert not out.exists()
    written = read_tree(partial)
    whole = [name for name, data in written.items() if data == COMPLETE[name]]
    assert (len(written), len(whole)) == (7, 6)
    before = read_mtimes(partial)

    source, expected = make_source(second, tmp_path / 'second')
    assert run(source, out, expected) == 0
    assert read_tree(out) == COMPLETE
    after = read_mtimes(out)
    assert [after[name] for name in whole] == [before[name] for name in whole]


@pytest.mark.parametrize('index', [0, 5, 10])
def test_full_disk(index, tmp_path, out, capsys):
    source, expected = make_source('parts', tmp_path / 'source')
    with pytest.MonkeyPatch.context() as patch:
        fail_write(patch, index, OSError(errno.ENOSPC, 'No space left on device', 'somewhere'))
        assert run(source, out, expected) == 1
    assert "No space left on device: 'somewhere'" in read_error(capsys)
    assert not out.exists()
    assert run(source, out, expected) == 0
    assert read_tree(out) == COMPLETE


def test_target_that_cannot_be_written(tmp_path, capsys):
    source, expected = make_source('zip', tmp_path / 'source')
    (tmp_path / 'file').write_text('mine')
    assert run(source, tmp_path / 'file' / 'tiny', expected) == 1
    assert 'Not a directory' in read_error(capsys)
    assert (tmp_path / 'file').read_text() == 'mine'


def make_occupied(out: Path, kind: str) -> None:
    out.parent.mkdir()
    if kind == 'file':
        out.write_text('mine')
        return
    out.mkdir()
    if kind == 'others':
        (out / 'notes.txt').write_text('mine')
    elif kind != 'empty':
        for name, data in COMPLETE.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        if kind == 'one image less':
            (out / FIRST_IMAGE).unlink()
        else:
            (out / FIRST_IMAGE).with_name('notes.txt').write_text('mine')


@pytest.mark.parametrize('kind', ['file', 'empty', 'others', 'one image less', 'a note among the images'])
def test_occupied_target_is_left_alone(kind, tmp_path, out, capsys):
    source, expected = make_source('zip', tmp_path / 'source')
    make_occupied(out, kind)
    before = read_tree(out.parent), read_mtimes(out.parent)
    assert run(source, out, expected) == 1
    assert f'{out} exists and is not a complete Tiny-ImageNet-200' in read_error(capsys)
    assert (read_tree(out.parent), read_mtimes(out.parent)) == before


def test_missing_parts_are_listed(tmp_path, out, capsys):
    source, expected = make_source('parts', tmp_path / 'source')
    for name in ('train-1.tar.gz', 'tiny-imagenet-200-classes.tsv'):
        (source / name).unlink()
    assert run(source, out, expected) == 1
    assert f'{source} lacks train-1.tar.gz, tiny-imagenet-200-classes.tsv: ' in read_error(capsys)
    assert not out.parent.exists()


def test_source_does_not_exist(tmp_path, out, capsys):
    assert run(tmp_path / 'nowhere', out, script.TINY_IMAGENET) == 1
    assert f'{tmp_path / "nowhere"} does not exist' in read_error(capsys)
    assert not out.parent.exists()


@pytest.mark.parametrize('damage', ['truncated', 'changed'])
def test_damaged_part(damage, tmp_path, out, capsys):
    source, expected = make_source('parts', tmp_path / 'source')
    path = source / 'val.tar.gz'
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == 'truncated' else data[:-1] + bytes([data[-1] ^ 1]))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert run(source, out, expected) == 1
    assert f'{path} has sha256 {found}, expected {expected.parts["val.tar.gz"]}' in read_error(capsys)
    assert not out.parent.exists()


@pytest.mark.parametrize('name', [
    '../x.JPEG',
    'train/n01443537/../../../x.JPEG',
    '/train/n01443537/x.JPEG',
    'train/n01443537/x.txt',
    'train/n0144353/x.JPEG',
    'test/n01443537/x.JPEG',
    'train/n01443537/x.JPEG\n',
])
def test_hostile_name_in_a_part(name, tmp_path, out, partial, capsys):
    source, _ = make_source('parts', tmp_path / 'source')
    make_tar(source / 'val.tar.gz', {name: b'\xff\xd8hostile\xff\xd9'})
    assert run(source, out, expect(source)) == 1
    assert f'{source / "val.tar.gz"} holds {name!r}' in read_error(capsys)
    assert os.listdir(out.parent) == [partial.name]
    assert read_tree(partial).keys() <= COMPLETE.keys()


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_link_in_a_part(kind, tmp_path, out, partial, capsys):
    source, _ = make_source('parts', tmp_path / 'source')
    link = tarfile.TarInfo('val/n01443537/x.JPEG')
    link.type, link.linkname = kind, '/etc/passwd'
    make_tar(source / 'val.tar.gz', {}, (link,))
    assert run(source, out, expect(source)) == 1
    assert "holds 'val/n01443537/x.JPEG', which is not an image" in read_error(capsys)
    assert read_tree(partial).keys() <= COMPLETE.keys()


def test_hostile_names_in_the_zip_are_not_taken(tmp_path, out):
    root = 'tiny-imagenet-200/'
    names = ['../x.JPEG', '/x.JPEG', f'{root}train/n01443537/images/../../../../x.JPEG', f'{root}val/images/../x.JPEG']
    source = make_zip(tmp_path / 'hostile.zip', dict.fromkeys(names, b'\xff\xd8hostile\xff\xd9') | official_files())
    assert run(source, out, script.Expected({}, 2, PER_CLASS)) == 0
    assert read_tree(out) == COMPLETE
    assert sorted(os.listdir(tmp_path)) == ['data', 'hostile.zip']


@pytest.mark.parametrize('wnid', ['../../..', '/tmp', 'n1', ''])
def test_hostile_annotation(wnid, tmp_path, out, partial, capsys):
    files = official_files()
    table = 'tiny-imagenet-200/val/val_annotations.txt'
    files[table] = files[table].replace(b'n01443537', wnid.encode())
    source = make_zip(tmp_path / 'hostile.zip', files)
    assert run(source, out, script.Expected({}, 2, PER_CLASS)) == 1
    assert f'{source}: val_annotations.txt names no class for val_3.JPEG' in read_error(capsys)
    assert sorted(os.listdir(tmp_path)) == ['data', 'hostile.zip']
    assert read_tree(partial).keys() <= COMPLETE.keys()


def test_truncated_zip(tmp_path, out, capsys):
    source, expected = make_source('zip', tmp_path / 'source')
    source.write_bytes(source.read_bytes()[:-30])
    assert run(source, out, expected) == 1
    assert f'{source} cannot be read (File is not a zip file)' in read_error(capsys)
    assert not out.parent.exists()


def test_changed_zip(tmp_path, out, capsys):
    source, expected = make_source('zip', tmp_path / 'source')
    data = IMAGES[FIRST_IMAGE]
    source.write_bytes(source.read_bytes().replace(data, data.replace(b'_0.JPEG', b'_9.JPEG')))
    assert run(source, out, expected) == 1
    assert f'{source} cannot be read (Bad CRC-32 for file' in read_error(capsys)
    assert not out.exists()


def test_cut_off_image_in_an_unpacked_folder(tmp_path, out, capsys):
    source, expected = make_source('unpacked', tmp_path / 'source')
    path = source / 'tiny-imagenet-200' / 'val' / 'images' / 'val_3.JPEG'
    path.write_bytes(path.read_bytes()[:-1])
    assert run(source, out, expected) == 1
    assert 'val/images/val_3.JPEG is not a whole JPEG file' in read_error(capsys)
    assert not out.exists()


@pytest.mark.parametrize(('lost', 'message'), [
    ('wnids.txt', 'lacks tiny-imagenet-200/wnids.txt'),
    ('words.txt', 'lacks tiny-imagenet-200/words.txt'),
    ('val/val_annotations.txt', 'lacks tiny-imagenet-200/val/val_annotations.txt'),
    ('train/n01443537/images/n01443537_2.JPEG', 'train/n01443537 holds 2 images, expected 3'),
    ('val/images/val_3.JPEG', 'val/n01443537 holds 1 images, expected 2'),
])
def test_incomplete_zip_then_complete_one(lost, message, tmp_path, out, capsys):
    files = official_files()
    complete = make_zip(tmp_path / 'complete.zip', files)
    del files[f'tiny-imagenet-200/{lost}']
    incomplete = make_zip(tmp_path / 'incomplete.zip', files)
    expected = script.Expected({}, 2, PER_CLASS)
    assert run(incomplete, out, expected) == 1
    assert message in read_error(capsys)
    assert not out.exists()
    assert run(complete, out, expected) == 0
    assert read_tree(out) == COMPLETE


def test_zip_without_a_split(tmp_path, out, partial, capsys):
    files = {name: data for name, data in official_files().items() if '/train/' not in name}
    source = make_zip(tmp_path / 'val.zip', files)
    assert run(source, out, script.Expected({}, 2, PER_CLASS)) == 1
    assert f'remove {partial} and run again with a complete {source}' in read_error(capsys)
    assert not out.exists()


@pytest.mark.parametrize('extra', [
    'train/n01443537/images/n01443537_3.JPEG',
    'train/n99999999/images/n99999999_0.JPEG',
])
def test_too_many_images(extra, tmp_path, out, partial, capsys):
    source = make_zip(
        tmp_path / 'more.zip',
        official_files() | {f'tiny-imagenet-200/{extra}': b'\xff\xd8extra\xff\xd9'},
    )
    assert run(source, out, script.Expected({}, 2, PER_CLASS)) == 1
    assert f'remove {partial} and run again' in read_error(capsys)
    assert not out.exists()


@pytest.mark.parametrize('table', [
    b'',
    CLASSES.split(b'\n', 1)[1],
    CLASSES.replace(b'n01443537', b'n99999999'),
    CLASSES.replace(b'n01443537', b'n00000000'),
    CLASSES + b'n99999999\tmore\n',
    CLASSES + b'\xff\n',
])
def test_wrong_table_of_classes(table, tmp_path, out, capsys):
    source, expected = make_source('parts', tmp_path / 'source')
    (source / 'tiny-imagenet-200-classes.tsv').write_bytes(table)
    assert run(source, out, expected) == 1
    assert 'classes.tsv' in read_error(capsys)
    assert not out.exists()


def test_words_lack_a_class(tmp_path, out, capsys):
    files = official_files()
    files['tiny-imagenet-200/words.txt'] = b'n01443537\tgoldfish, Carassius auratus\n'
    source = make_zip(tmp_path / 'words.zip', files)
    assert run(source, out, script.Expected({}, 2, PER_CLASS)) == 1
    assert 'words.txt has no line for n12267677' in read_error(capsys)
    assert not out.exists()


@pytest.mark.skipif(not ARCHIVES, reason='TIMM_AWS_TINY_IMAGENET_ARCHIVES names no folder')
def test_real_archives(tmp_path):
    out = tmp_path / 'tiny-imagenet'
    assert run(Path(ARCHIVES), out, script.TINY_IMAGENET) == 0
    splits = {split: {path.name: len(os.listdir(path)) for path in (out / split).iterdir()} for split in PER_CLASS}
    assert len(splits['train']) == 200
    assert set(splits['train'].values()) == {500}
    assert splits['val'].keys() == splits['train'].keys()
    assert set(splits['val'].values()) == {50}
    assert (out / 'classes.tsv').read_bytes() == Path(ARCHIVES, 'tiny-imagenet-200-classes.tsv').read_bytes()
    for name in script.TINY_IMAGENET.parts:
        with tarfile.open(Path(ARCHIVES, name)) as archive:
            assert all((out / member.name).read_bytes() == archive.extractfile(member).read() for member in archive)
