"""Publishes a checkpoint folder on the Hugging Face Hub.

All files go up in one commit. The Hub applies it completely or not at all, and only on top of the commit that the files
were compared with: if two people publish different folders at once, the second gets an error. Content that the Hub has
already, from this or an earlier try, is not sent again: huggingface_hub's client asks before it sends.
"""
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from torchvision.transforms.functional import to_pil_image

from .folder import CONFIG, CURVES, PICTURE, WEIGHTS, check_folder, git_blob_id, sha256

__all__ = ['Publication', 'publish']

# What the Hub's status codes mean to somebody who wants to publish; the Hub's own words follow.
_REASONS = {
    401: 'the Hub does not accept the token, log in again with `hf auth login` or set HF_TOKEN',
    402: 'the account has no room left for it',
    403: 'the token may not write there, it needs the right to write and the name may be somebody else\'s',
    404: 'there is no such repository, or the token may not see it',
    409: 'somebody else is changing it, run the command again',
    412: 'somebody else has changed it meanwhile, run the command again',
    413: 'the files are too large for the Hub',
    429: 'the Hub is asked too often, run the command again later',
}

_BROKEN = 'the connection to the Hub broke, run the command again'
_NO_JSON = 'what answered is not the Hub, perhaps the login page of a network: open the Hub in a browser first'

# The base class of all errors of the HTTP library. The client's releases use different libraries.
_TRANSPORT_ERROR: Any = next(cls for cls in reversed(HfHubHTTPError.__mro__) if cls.__module__ != 'builtins')


@dataclass(frozen=True)
class Publication:
    """What was published, or would be in a dry run.

    Attributes:
        url: Address of the repository, or of its branch.
        upload: Files that are new or changed, in order.
        remove: Files of an earlier checkpoint in the repository that this one does not have.
        commit: Commit that holds the folder; None in a dry run.
    """
    url: str
    upload: tuple[str, ...]
    remove: tuple[str, ...]
    commit: str | None


def publish(
        folder: Path,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        dry_run: bool = False,
) -> Publication:
    """Publishes a checkpoint folder, fetches it back and compares: the bytes, and the logits for a fixed input.

    Args:
        folder: A checkpoint folder, see `timm-aws export`.
        repo_id: Repository, `owner/name`. It is created if it does not exist.
        private: Create it as a private one. A public one that exists already is refused.
        revision: Branch to publish on, created if it does not exist. None is the main branch.
        dry_run: Only check the folder and ask the Hub what it has already.

    Returns:
        The address, the files that were uploaded and the commit.

    Raises:
        ValueError: If the folder is incomplete or damaged, if its preprocessing does not work, if repo_id is not a
            valid name, or if it is public and `private` is given.
        RuntimeError: If there is no token, if the Hub refuses or fails, or if it gives back other files.
    """
    if repo_id.count('/') != 1:
        raise ValueError(f'repo_id {repo_id!r} is not of the form owner/name.')
    check_folder(folder)
    try:
        _check_shapes(folder)
        expected = _logits(folder)
    except Exception as error:  # timm and torch raise many types, depending on the fault
        raise ValueError(f'{folder} cannot be loaded: {error}') from error
    if not expected.isfinite().all():
        raise ValueError(f'{folder} gives logits that are not finite.')
    api = HfApi(library_name='timm_aws')
    url = f'{api.endpoint}/{repo_id}' + (f'/tree/{revision}' if revision else '')
    if not get_token() and not dry_run:
        raise RuntimeError('There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.')
    with _plain_errors(repo_id, 'was not published'):
        with contextlib.suppress(RepositoryNotFoundError):
            if private and not api.model_info(repo_id).private:
                raise ValueError(f'{repo_id} exists and is public: make it private on the Hub, or leave private out.')
        head = None if dry_run else _make_branch(api, repo_id, private, revision)
        upload, remove = _difference(api, folder, repo_id, head or revision)
        if head is None:
            return Publication(url, upload, remove, None)
        commit = _commit(api, folder, repo_id, upload, remove, revision, head)
    with _plain_errors(repo_id, 'was published, but could not be fetched back to be compared'):
        _compare(api, folder, repo_id, commit, expected)
    return Publication(url, upload, remove, commit)


def _make_branch(api: HfApi, repo_id: str, private: bool, revision: str | None) -> str:
    """Creates repository and branch if they do not exist; returns the branch's last commit."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return str(api.model_info(repo_id, revision=revision).sha)


def _commit(
        api: HfApi, folder: Path, repo_id: str, upload: tuple[str, ...], remove: tuple[str, ...], revision: str | None,
        head: str,
) -> str:
    """Commits the difference on top of `head` only; returns the commit that holds the folder."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, folder / name) for name in upload),
        *(CommitOperationDelete(name) for name in remove),
    ]
    if not operations:
        return head
    message = f'{folder.resolve().name}: {", ".join(upload + remove)}'
    try:
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=head).oid
    except _TRANSPORT_ERROR:  # the Hub may have taken the commit all the same
        try:
            commit = str(api.model_info(repo_id, revision=revision).sha)
            differs = any(_difference(api, folder, repo_id, commit))
        except _TRANSPORT_ERROR:
            raise RuntimeError(f'{repo_id} may have been published or not: {_BROKEN}.') from None
        if differs:
            raise
        return commit


def _difference(
        api: HfApi, folder: Path, repo_id: str, revision: str | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the files to upload, new or changed, and the files to remove from the repository."""
    names = sorted(path.name for path in folder.iterdir())
    absent = sorted({CURVES, PICTURE} - set(names))  # the optional files
    try:
        found: list[Any] = api.get_paths_info(repo_id, names + absent, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return tuple(names), ()
    there = {file.path: file for file in found}

    def is_same(name: str) -> bool:
        lfs = there[name].lfs
        return lfs.sha256 == sha256(folder / name) if lfs else there[name].blob_id == git_blob_id(folder / name)

    upload = tuple(name for name in names if name not in there or not is_same(name))
    return upload, tuple(name for name in absent if name in there)


def _compare(api: HfApi, folder: Path, repo_id: str, commit: str, logits: torch.Tensor) -> None:
    """Fetches a commit from the Hub; raises RuntimeError if it differs from the folder."""
    with tempfile.TemporaryDirectory() as empty_cache:
        for path in sorted(folder.iterdir()):
            # One by one: after a Ctrl-C the threads of snapshot_download print tracebacks.
            copy = Path(api.hf_hub_download(repo_id, path.name, revision=commit, cache_dir=empty_cache))
            if sha256(copy) != sha256(path):
                raise RuntimeError(f'{path.name} as fetched from {repo_id} is not the file in {folder}.')
        if not torch.equal(logits, _logits(copy.parent)):
            raise RuntimeError(f'{repo_id} as fetched from the Hub gives other logits than {folder}.')


def _check_shapes(folder: Path) -> None:
    """Compares the shapes in config and weights without allocating either: a config can ask for any size."""
    with torch.device('meta'):
        model: Any = timm.create_model(f'local-dir:{folder}')
    with safe_open(folder / WEIGHTS, 'pt') as weights:
        stored = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    built = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(stored.keys() | built.keys()):
        if stored.get(name) != built.get(name):
            raise ValueError(f'{name} is {stored.get(name)} in {WEIGHTS}, and {built.get(name)} by {CONFIG}')


def _logits(folder: Path) -> torch.Tensor:
    """Computes the logits, (1, num_classes), of one fixed image of noise that timm has preprocessed.

    Raises:
        ValueError: If the preprocessing gives something else than finite pixels in the input size.
    """
    model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    channels = data['input_size'][0]
    noise = torch.rand(channels, 300, 400, generator=torch.Generator().manual_seed(0))
    image = to_pil_image(noise) if channels <= 4 else noise  # more channels do not fit in a picture
    batch = timm.data.create_transform(**data, is_training=False)(image).unsqueeze(0)
    if batch.shape[1:] != tuple(data['input_size']) or not batch.isfinite().all():
        raise ValueError(f'the preprocessing in {CONFIG} gives {tuple(batch.shape)}, or pixels that are not finite')
    with torch.inference_mode():
        return model(batch)


@contextlib.contextmanager
def _plain_errors(repo_id: str, outcome: str) -> Iterator[None]:
    """Turns the long errors of the Hub's client into one line."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f'repo_id {repo_id!r} is not of the form owner/name: {str(error).splitlines()[0]}') from error
    except (_TRANSPORT_ERROR, RuntimeError, OSError, json.JSONDecodeError) as error:
        # The client wraps errors of large files in a RuntimeError, and some failures in a FileNotFoundError.
        cause = error if isinstance(error, _TRANSPORT_ERROR) else error.__cause__ or error
        if isinstance(cause, json.JSONDecodeError):
            reason = _NO_JSON
        elif isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            words = (cause.server_message or '').splitlines()
            reason = _REASONS.get(status, f'the Hub failed with status {status}, run the command again later')
            reason += f' (it says: {words[0]})' if words else ''
        elif isinstance(cause, _TRANSPORT_ERROR):
            reason = _BROKEN
        elif isinstance(cause, OSError):  # of the folder or the disk
            reason = str(cause)
        else:
            raise
        raise RuntimeError(f'{repo_id} {outcome}: {reason}.') from error
