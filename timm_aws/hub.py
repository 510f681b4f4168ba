"""From a checkpoint folder to its repository on the Hugging Face Hub.

All files go up in one commit, which the Hub applies whole or not at all. What of them is there already, from this or an
earlier try, is not sent again: huggingface_hub's client asks before it sends.
"""
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from . import checkpoints

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

# The base class of all errors of the HTTP library, which is another one in other releases of the client.
_TRANSPORT_ERROR: Any = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Publication:
    """What was published, or what would be.

    Attributes:
        url: Address of the repository, or of its branch.
        upload: Files, in order, that are not yet there as they are here.
        commit: Commit that holds the folder; None in a dry run.
    """
    url: str
    upload: tuple[str, ...]
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
        repo_id: Repository, `owner/name`. It is made where there is none.
        private: Make it a private one; one that exists stays what it is.
        revision: Branch to publish on, made where there is none. None is the main branch.
        dry_run: Only check the folder and ask the Hub what it has already.

    Returns:
        Its address, what was uploaded and the commit.

    Raises:
        ValueError: If the folder or the name is not in order.
        RuntimeError: If there is no token, if the Hub refuses or fails, or if it gives back other files.
    """
    checkpoints.check_folder(folder)
    try:
        expected = _logits(folder)
    except Exception as error:  # timm and torch raise whatever is wrong with config or weights leads to
        raise ValueError(f'{folder} cannot be loaded: {error}') from error
    api = HfApi(library_name='timm_aws')
    url = f'{api.endpoint}/{repo_id}' + (f'/tree/{revision}' if revision else '')
    if not get_token() and not dry_run:
        raise RuntimeError('There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.')
    with _plain_errors(repo_id, 'was not published'):
        upload = _missing(api, folder, repo_id, revision)
        if dry_run:
            return Publication(url, upload, None)
        commit = _upload(api, folder, repo_id, upload, private, revision)
    with _plain_errors(repo_id, 'was published, but could not be fetched back to be compared'):
        _compare(api, folder, repo_id, commit, expected)
    return Publication(url, upload, commit)


def _upload(
        api: HfApi,
        folder: Path,
        repo_id: str,
        names: tuple[str, ...],
        private: bool,
        revision: str | None,
) -> str:
    """Makes repository and branch where there are none, commits the files, and returns the commit that has them all."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not names:
        return str(api.model_info(repo_id, revision=revision).sha)
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    message = f'{folder.name}: {", ".join(names)}'
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid


def _missing(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> tuple[str, ...]:
    """Returns the names of the files that the repository does not have as they are."""
    names = sorted(path.name for path in folder.iterdir())
    try:
        there = {file.path: file for file in api.get_paths_info(repo_id, names, revision=revision)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return tuple(names)
    return tuple(name for name in names if name not in there or not _same(folder / name, there[name]))


def _same(path: Path, remote) -> bool:
    if remote.lfs is not None:
        return remote.lfs.sha256 == checkpoints.sha256(path)
    return remote.blob_id == checkpoints.git_blob_id(path)


def _compare(api: HfApi, folder: Path, repo_id: str, commit: str, logits: torch.Tensor) -> None:
    """Fetches a commit from the Hub; raises RuntimeError where it is not the folder."""
    with tempfile.TemporaryDirectory() as empty_cache:
        fetched = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=empty_cache))
        for path in sorted(folder.iterdir()):
            copy = fetched / path.name
            if not copy.is_file() or checkpoints.sha256(copy) != checkpoints.sha256(path):
                raise RuntimeError(f'{path.name} as fetched from {repo_id} is not the file in {folder}.')
        if not torch.equal(logits, _logits(fetched)):
            raise RuntimeError(f'{repo_id} as fetched from the Hub gives other logits than {folder}.')


def _logits(folder: Path) -> torch.Tensor:
    """Computes the logits for one image of noise, always the same."""
    model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    image = torch.randn(1, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(image)


@contextlib.contextmanager
def _plain_errors(repo_id: str, outcome: str) -> Iterator[None]:
    """Says in one line what the Hub's client reports in many."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f'repo_id {repo_id!r} is not of the form owner/name: {str(error).splitlines()[0]}') from error
    except (_TRANSPORT_ERROR, RuntimeError) as error:
        # The client reports a failed upload of a large file by a RuntimeError that the Hub's answer caused.
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(error, RuntimeError) and answer is None:
            raise
        reason = 'the connection to the Hub broke, run the command again'
        if isinstance(answer, HfHubHTTPError):
            status = answer.response.status_code
            words = (answer.server_message or '').splitlines()
            reason = _REASONS.get(status, f'the Hub failed with status {status}, run the command again later')
            reason += f' (it says: {words[0]})' if words else ''
        raise RuntimeError(f'{repo_id} {outcome}: {reason}.') from error
