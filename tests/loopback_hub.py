"""A Hugging Face Hub on 127.0.0.1, as much of it as huggingface_hub's client needs to publish and load models.

Written from the requests that the client sends and the answers that it parses. Strict where the real one is: who may
read and write, names, size and SHA-256 of what is uploaded, files that a commit speaks of but nobody sent, a parent
commit that is no longer the last one. Git LFS stands in for Xet (HF_HUB_DISABLE_XET=1).

Faults are queued with `fail`; every request is kept in `requests`.
"""
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_NAME = re.compile(r'[\w.-]+/[\w.-]+')


@dataclass(frozen=True)
class User:
    """Somebody with a token. May write under these owners."""
    name: str
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)


@dataclass
class Fault:
    """What to do instead of, or with, an answer: a status, or call something, or one of these words.

    'drop' does and answers nothing, 'lose' does it and answers nothing, 'truncate' and 'corrupt' spoil the answer,
    'html' answers as the login page of a network does.
    """
    path: str
    action: int | str | Callable[[], None]
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Answer(Exception):
    def __init__(self, status: int, content=None, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.body = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        self.headers = headers or {}


def refuse(status: int, message: str, code: str | None = None) -> Answer:
    headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
    return Answer(status, {'error': message}, headers)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(('.safetensors', '.bin', '.pt'))


class LoopbackHub:
    """The server: `hub = LoopbackHub().start()` runs it at `hub.endpoint`."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'
        self.storage = f'http://localhost:{self.server.server_port}'  # another host: large files come from a CDN
        self.reset()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.uploads: list[str] = []
        self.users = {'hf_writer': User('alice', ('alice', 'lab')), 'hf_reader': User('alice'),
                      'hf_other': User('bob', ('bob',))}

    def start(self) -> 'LoopbackHub':
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def fail(self, path: str, action: int | str | Callable[[], None], times: int = 1, **headers: str) -> None:
        """Queues a fault for requests whose `METHOD /path` matches a regular expression."""
        self.faults.append(Fault(path, action, times, {k.replace('_', '-'): v for k, v in headers.items()}))

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.path, request):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo_id: str, branch: str = 'main') -> dict[str, bytes]:
        return self.repositories[repo_id].branches[branch][-1].files

    def published(self, repo_id: str, branch: str = 'main') -> dict[str, bytes]:
        """Returns the files of a branch without .gitattributes, which each repository starts with."""
        return {path: content for path, content in self.files(repo_id, branch).items() if path != '.gitattributes'}

    # What follows answers the requests.

    def create(self, user: User | None, body: dict) -> Answer:
        if user is None:
            raise refuse(401, 'Invalid username or password.')
        repo_id = f"{body.get('organization') or user.name}/{body['name']}"
        if not _NAME.fullmatch(repo_id) or '--' in repo_id or '..' in repo_id:
            raise refuse(400, f'Invalid repo name: {repo_id}')
        if repo_id.split('/')[0] not in user.writes:
            raise refuse(403, f"You don't have the rights to create a model under the namespace "
                              f'"{repo_id.split("/")[0]}"')
        if repo_id in self.repositories:
            message = 'You already created this model repo'
            raise Answer(409, {'error': message, 'url': f'{self.endpoint}/{repo_id}'}, {'X-Error-Message': message})
        first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), 'initial commit',
                       {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        private = body.get('private') or body.get('visibility') == 'private'
        self.repositories[repo_id] = Repository(bool(private), {'main': [first]})
        return Answer(200, {'url': f'{self.endpoint}/{repo_id}', 'name': repo_id, 'id': repo_id})

    def readable(self, user: User | None, repo_id: str) -> Repository:
        repository = self.repositories.get(repo_id)
        owners = (user.name, *user.writes) if user else ()
        if repository is None or (repository.private and repo_id.split('/')[0] not in owners):
            raise refuse(404 if user else 401, 'Repository not found', 'RepoNotFound')
        return repository

    def writable(self, user: User | None, repo_id: str) -> Repository:
        if user is None:
            raise refuse(401, 'Invalid username or password.')
        repository = self.readable(user, repo_id)
        if repo_id.split('/')[0] not in user.writes:
            raise refuse(403, 'Forbidden: you must have write access to upload to a repository')
        return repository

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commits = repository.branches.get(revision)
        if commits:
            return commits[-1]
        for branch in repository.branches.values():
            for commit in branch:
                if commit.oid == revision:
                    return commit
        raise refuse(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def info(self, user: User | None, repo_id: str, revision: str) -> Answer:
        repository = self.readable(user, repo_id)
        commit = self.commit_of(repository, revision)
        return Answer(200, {
            '_id': repo_id, 'id': repo_id, 'modelId': repo_id, 'sha': commit.oid, 'private': repository.private,
            'disabled': False, 'gated': False, 'downloads': 0, 'likes': 0, 'tags': [],
            'siblings': [{'rfilename': path} for path in sorted(commit.files)],
        })

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        if not is_lfs(path):
            return {'type': 'file', 'oid': git_oid(content), 'size': len(content), 'path': path}
        oid = hashlib.sha256(content).hexdigest()
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n'.encode()
        return {'type': 'file', 'oid': git_oid(pointer), 'size': len(content), 'path': path,
                'lfs': {'oid': oid, 'size': len(content), 'pointerSize': len(pointer)}}

    def tree(self, user: User | None, repo_id: str, revision: str, paths: list[str] | None = None) -> Answer:
        files = self.commit_of(self.readable(user, repo_id), revision).files
        return Answer(200, [self.entry(path, files[path]) for path in sorted(files) if paths is None or path in paths])

    def preupload(self, user: User | None, repo_id: str, revision: str, body: dict) -> Answer:
        files = self.commit_of(self.writable(user, repo_id), revision).files
        answer = []
        for file in body['files']:
            path = file['path']
            oid = None if path not in files else (
                hashlib.sha256(files[path]).hexdigest() if is_lfs(path) else git_oid(files[path]))
            answer.append({'path': path, 'uploadMode': 'lfs' if is_lfs(path) else 'regular', 'shouldIgnore': False,
                           'oid': oid})
        return Answer(200, {'files': answer})

    def lfs_batch(self, user: User | None, repo_id: str, body: dict) -> Answer:
        self.writable(user, repo_id)
        if body['operation'] != 'upload' or body.get('hash_algo') != 'sha256' or 'basic' not in body['transfers']:
            raise refuse(422, 'Unsupported LFS request')
        objects = []
        for wanted in body['objects']:
            answer = {'oid': wanted['oid'], 'size': wanted['size']}
            if wanted['oid'] not in self.objects:
                answer['actions'] = {
                    'upload': {'href': f"{self.storage}/lfs/{wanted['oid']}?size={wanted['size']}"},
                    'verify': {'href': f'{self.endpoint}/{repo_id}.git/info/lfs/verify'},
                }
            objects.append(answer)
        return Answer(200, {'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid: str, size: int, content: bytes) -> Answer:
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise refuse(400, 'BadDigest: the SHA-256 or the size is not what was announced')
        self.objects[oid] = content
        self.uploads.append(oid)
        return Answer(200)

    def lfs_verify(self, user: User | None, repo_id: str, body: dict) -> Answer:
        self.writable(user, repo_id)
        if len(self.objects.get(body['oid'], b'')) != body['size']:
            raise refuse(404, 'LFS object not found')
        return Answer(200)

    def branch(self, user: User | None, repo_id: str, name: str) -> Answer:
        repository = self.writable(user, repo_id)
        if name in repository.branches:
            raise refuse(409, f'Reference already exists: {name}')
        repository.branches[name] = list(repository.branches['main'])
        return Answer(200)

    def commit(self, user: User | None, repo_id: str, revision: str, body: bytes) -> Answer:
        repository = self.writable(user, repo_id)
        parent = self.commit_of(repository, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        if not lines or lines[0]['key'] != 'header' or not lines[0]['value'].get('summary'):
            raise refuse(400, 'A commit begins with a header that has a summary')
        if lines[0]['value'].get('parentCommit', parent.oid) != parent.oid:
            raise refuse(412, 'The branch has moved since the parent commit')
        files = dict(parent.files)
        for key, value in ((line['key'], line['value']) for line in lines[1:]):
            if key == 'file' and value['encoding'] == 'base64' and not is_lfs(value['path']):
                files[value['path']] = base64.b64decode(value['content'], validate=True)
            elif key == 'lfsFile' and value['algo'] == 'sha256':
                if len(self.objects.get(value['oid'], b'')) != value['size']:
                    raise refuse(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value['path']] = self.objects[value['oid']]
            elif key == 'deletedFile' and value['path'] in files:
                del files[value['path']]
            else:
                raise refuse(400, f'Cannot apply {key} {value.get("path")}')
        self.check_card(files.get('README.md', b'').decode())
        oid = hashlib.sha1((parent.oid + repr(sorted(files.items()))).encode()).hexdigest()
        repository.branches[revision].append(Commit(oid, lines[0]['value']['summary'], files))
        return Answer(200, {'success': True, 'commitOid': oid, 'commitUrl': f'{self.endpoint}/{repo_id}/commit/{oid}'})

    @staticmethod
    def check_card(card: str) -> Answer:
        if card.startswith('---\n'):
            try:
                yaml.safe_load(card.split('---\n', 2)[1])
            except yaml.YAMLError as error:
                raise Answer(400, {'errors': [{'message': str(error)}], 'warnings': []}) from error
        return Answer(200, {'errors': [], 'warnings': []})

    def resolve(self, user: User | None, repo_id: str, revision: str, path: str) -> Answer:
        commit = self.commit_of(self.readable(user, repo_id), revision)
        headers = {'X-Repo-Commit': commit.oid}
        if path not in commit.files:
            raise Answer(404, {'error': 'Entry not found'}, {**headers, 'X-Error-Code': 'EntryNotFound',
                                                             'X-Error-Message': 'Entry not found'})
        content = commit.files[path]
        if not is_lfs(path):
            return Answer(200, content, {**headers, 'ETag': f'"{git_oid(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        return Answer(302, b'', {**headers, 'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': str(len(content)),
                                 'ETag': f'"{oid}"', 'Location': f'{self.storage}/lfs/{oid}'})


class _Handler(BaseHTTPRequestHandler):
    """Takes requests apart and sends answers; what they say is the hub's matter."""
    hub: LoopbackHub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        request = f'{self.command} {unquote(self.path)}'
        self.hub.requests.append(request)
        fault = self.hub.take_fault(request)
        if fault and callable(fault.action):
            fault.action()
        body = self.read_body()
        if body is None or (fault and fault.action == 'drop'):
            self.close_connection = True
            return
        try:
            if fault and isinstance(fault.action, int):
                raise Answer(fault.action, {'error': f'fault {fault.action}'}, fault.headers)
            if fault and fault.action == 'html':
                raise Answer(200, b'<html>Log in</html>', {'Content-Type': 'text/html'})
            with self.hub.lock:
                answer = self.route(body)
        except Answer as refusal:
            answer = refusal
        if fault and fault.action == 'lose':
            self.close_connection = True
            return
        self.send(answer, fault)

    def read_body(self) -> bytes | None:
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline() or b'0', 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        length = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(length)
        return body if len(body) == length else None  # None: the client died on the way

    def user(self) -> User | None:
        scheme, _, token = self.headers.get('Authorization', '').partition(' ')
        if scheme and (scheme != 'Bearer' or token not in self.hub.users):
            raise refuse(401, 'Invalid credentials in Authorization header')
        return self.hub.users.get(token)

    def route(self, body: bytes) -> Answer:
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path)

        def content() -> dict:
            return json.loads(body)

        if match := re.fullmatch(r'/lfs/([0-9a-f]{64})', path):
            if self.command == 'PUT':  # signed addresses: no token is asked for
                return hub.lfs_put(match[1], int(parse_qs(url.query)['size'][0]), body)
            return Answer(200, hub.objects[match[1]], {'ETag': f'"{match[1]}"'})
        user = self.user()
        name = r'([^/]+/[^/]+)'
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ('POST', r'/api/repos/create', lambda: hub.create(user, content())),
            ('POST', r'/api/validate-yaml', lambda: hub.check_card(content()['content'])),
            ('GET', r'/api/whoami-v2', lambda: Answer(200, {'name': user.name})),
            ('POST', rf'/api/models/{name}/preupload/(.+)', lambda *where: hub.preupload(user, *where, content())),
            ('POST', rf'/api/models/{name}/commit/(.+)', lambda repo, rev: hub.commit(user, repo, rev, body)),
            ('POST', rf'/api/models/{name}/branch/(.+)', lambda repo, branch: hub.branch(user, repo, branch)),
            ('POST', rf'/api/models/{name}/paths-info/(.+)', lambda repo, rev: hub.tree(
                user, repo, rev, parse_qs(body.decode())['paths'])),
            ('GET', rf'/api/models/{name}/tree/([^/]+)', lambda repo, rev: hub.tree(user, repo, rev)),
            ('GET', rf'/api/models/{name}/revision/(.+)', lambda repo, rev: hub.info(user, repo, rev)),
            ('GET', rf'/api/models/{name}', lambda repo: hub.info(user, repo, 'main')),
            ('POST', rf'/{name}\.git/info/lfs/objects/batch', lambda repo: hub.lfs_batch(user, repo, content())),
            ('POST', rf'/{name}\.git/info/lfs/verify', lambda repo: hub.lfs_verify(user, repo, content())),
            ('GET', rf'/{name}/resolve/([^/]+)/(.+)', lambda *where: hub.resolve(user, *where)),
        ]
        for method, pattern, answer in routes:
            if method == self.command.replace('HEAD', 'GET') and (match := re.fullmatch(pattern, path)):
                return answer(*match.groups())
        raise refuse(404, f'The loopback Hub knows nothing of {self.command} {path}')

    def send(self, answer: Answer, fault: Fault | None) -> None:
        body = answer.body
        start = 0
        if answer.status == 200 and (match := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))):
            start = int(match[1])
        self.send_response(206 if start else answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        body = body[start:]
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if fault and fault.action == 'corrupt':
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault and fault.action == 'truncate':
            body, self.close_connection = body[:len(body) // 2], True
        if self.command != 'HEAD':
            self.wfile.write(body)
