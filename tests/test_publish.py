"""Publishing and loading through huggingface_hub's own client, against the Hub on 127.0.0.1."""
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal

import huggingface_hub
import pytest
import timm
import torch
from checkpoint_files import REPO, contents, logits
from huggingface_hub import ModelCard

from timm_aws.checkpoint.publish import publish
from timm_aws_cli import main


def test_repository_holds_the_folder_byte_for_byte_in_one_commit(hub, checkpoint_folder):
    done = publish(checkpoint_folder, REPO)
    assert hub.published(REPO) == contents(checkpoint_folder)
    assert [commit.oid for commit in hub.repositories[REPO].branches['main']][1:] == [done.commit]
    assert done.upload == tuple(sorted(contents(checkpoint_folder)))
    assert done.url == f'{hub.endpoint}/{REPO}'
    assert not hub.repositories[REPO].private


def test_what_was_published_loads_by_its_hub_name(hub, checkpoint_folder):
    publish(checkpoint_folder, REPO)
    assert torch.equal(logits(f'hf-hub:{REPO}'), logits(f'local-dir:{checkpoint_folder}'))
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True, num_classes=7)
    assert model.fc.weight.shape == (7, 96)
    stages = timm.create_model(f'hf-hub:{REPO}', pretrained=True, features_only=True)
    assert len(stages(torch.ones(1, 3, 48, 48))) == 5


def test_publishing_again_makes_no_commit_and_sends_nothing(hub, checkpoint_folder):
    first = publish(checkpoint_folder, REPO)
    again = publish(checkpoint_folder, REPO)
    assert (again.upload, again.commit) == ((), first.commit)
    assert len(hub.repositories[REPO].branches['main']) == 2
    assert len(hub.uploads) == 1


def test_only_what_changed_is_sent(hub, copied):
    publish(copied, REPO)
    with (copied / 'README.md').open('a') as card:
        card.write('\nOne line more.\n')
    assert publish(copied, REPO).upload == ('README.md',)
    assert hub.published(REPO) == contents(copied)
    assert len(hub.uploads) == 1


def test_dry_run_says_what_would_be_uploaded_and_changes_nothing(hub, copied, capsys, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    main(['publish', str(copied), REPO, '--dry-run'])
    sizes = [f'would upload {name}, {len(content)} bytes' for name, content in sorted(contents(copied).items())]
    assert capsys.readouterr().out.splitlines() == [*sizes, f'{hub.endpoint}/{REPO}']
    assert not hub.repositories
    assert {request.split()[0] for request in hub.requests} == {'POST'}
    assert all('/paths-info/' in request for request in hub.requests)
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    publish(copied, REPO)
    (copied / 'args.yaml').write_text('epochs: 3\n')
    main(['publish', str(copied), REPO, '--dry-run'])
    assert capsys.readouterr().out.splitlines()[-2:] == ['would upload args.yaml, 10 bytes', f'{hub.endpoint}/{REPO}']
    assert hub.published(REPO)['args.yaml'] != b'epochs: 3\n'


def test_private_repository_is_seen_by_its_owner_alone(hub, checkpoint_folder, monkeypatch):
    publish(checkpoint_folder, REPO, private=True)
    assert hub.repositories[REPO].private
    monkeypatch.setenv('HF_TOKEN', 'hf_other')
    with pytest.raises(OSError, match='404'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)


def test_private_is_refused_for_a_public_repository_before_anything_is_sent(hub, copied, capsys):
    publish(copied, REPO)
    before = hub.published(REPO)
    (copied / 'args.yaml').write_text('epochs: 3\n')
    assert f'{REPO} exists and is public' in refused(capsys, copied, REPO, '--private')
    assert hub.published(REPO) == before
    assert not hub.repositories[REPO].private


@pytest.mark.parametrize('public', [True, False])
def test_private_is_checked_in_a_dry_run_too(hub, checkpoint_folder, capsys, public):
    if public:
        publish(checkpoint_folder, REPO)
        assert f'{REPO} exists and is public' in refused(capsys, checkpoint_folder, REPO, '--private', '--dry-run')
    else:
        assert len(publish(checkpoint_folder, REPO, private=True, dry_run=True).upload) == 7
        assert not hub.repositories


def test_revision_is_a_branch_of_its_own(hub, checkpoint_folder):
    done = publish(checkpoint_folder, REPO, revision='v2')
    assert done.url.endswith('/tree/v2')
    assert hub.published(REPO, 'v2') == contents(checkpoint_folder)
    assert hub.published(REPO) == {}
    assert publish(checkpoint_folder, REPO, revision='v2').upload == ()
    assert torch.equal(logits(f'hf-hub:{REPO}@v2'), logits(f'local-dir:{checkpoint_folder}'))


def test_organization_of_the_token_may_be_the_owner(hub, checkpoint_folder):
    assert publish(checkpoint_folder, 'lab/name').url == f'{hub.endpoint}/lab/name'


def refused(capsys, folder, repo_id=REPO, *options):
    with pytest.raises(SystemExit) as exit:
        main(['publish', str(folder), repo_id, *options])
    output = capsys.readouterr()
    assert (exit.value.code, output.out) == (1, '')
    (line,) = [line for line in output.err.splitlines() if line.startswith('timm-aws: ')]
    assert 'hf_' not in output.err.replace('hf_hub', '') and 'Traceback' not in output.err
    return line


@pytest.mark.parametrize('token, repo_id, message', [
    ('', REPO, 'There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.'),
    ('hf_wrong', REPO, 'the Hub does not accept the token'),
    ('hf_reader', REPO, 'the token may not write there'),
    ('hf_writer', 'bob/name', 'the name may be somebody else'),
    ('hf_writer', 'no name', 'is not of the form owner/name'),
    ('hf_writer', 'a/b/c', 'is not of the form owner/name'),
    ('hf_writer', 'name', 'is not of the form owner/name'),
])
def test_refusals_are_one_line_and_leave_no_repository(hub, checkpoint_folder, capsys, monkeypatch, token, repo_id,
                                                        message):
    monkeypatch.setenv('HF_TOKEN', token)
    assert message in refused(capsys, checkpoint_folder, repo_id)
    assert not hub.repositories


def test_name_taken_by_somebody_else(hub, checkpoint_folder, capsys, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_other')
    publish(checkpoint_folder, 'bob/name')
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    copied = shutil.copytree(checkpoint_folder, checkpoint_folder.parent / 'mine', dirs_exist_ok=True)
    (copied / 'args.yaml').write_text('epochs: 3\n')
    assert 'the token may not write there' in refused(capsys, copied, 'bob/name')
    assert hub.published('bob/name') == contents(checkpoint_folder)


@pytest.mark.parametrize('request_, status, message', [
    ('POST /api/repos/create', 500, 'the Hub failed with status 500'),
    ('POST /.*/preupload/', 429, 'the Hub is asked too often'),
    ('POST /.*/objects/batch', 402, 'the account has no room left'),
    ('PUT /lfs/', 413, 'the files are too large'),
    ('PUT /lfs/', 'drop', 'the connection to the Hub broke'),
    ('POST /.*/verify', 500, 'the Hub failed with status 500'),
    ('POST /.*/commit/', 500, 'the Hub failed with status 500'),
    ('POST /.*/commit/', 412, 'somebody else has changed it meanwhile'),
    ('POST /.*/commit/', 'drop', 'the connection to the Hub broke'),
])
def test_failure_on_the_way_leaves_nothing_that_looks_whole(hub, checkpoint_folder, capsys, request_, status, message):
    hub.fail(request_, status, times=99)
    assert message in refused(capsys, checkpoint_folder)
    assert all(hub.published(name) == {} for name in hub.repositories)
    hub.faults.clear()
    sent = len(hub.uploads)
    publish(checkpoint_folder, REPO)
    assert hub.published(REPO) == contents(checkpoint_folder)
    assert len(hub.uploads) == 1, 'what the first try had sent is not sent again'
    assert sent <= 1


@pytest.mark.parametrize('request_', ['', '/preupload/', '/objects/batch', '/commit/'])
def test_page_of_html_in_place_of_the_hub_is_told_in_plain_words(hub, checkpoint_folder, capsys, request_):
    hub.fail(request_, 'html', times=99)
    assert f'{REPO} was not published: what answered is not the Hub' in refused(capsys, checkpoint_folder)
    if not request_:
        assert 'what answered is not the Hub' in refused(capsys, checkpoint_folder, REPO, '--dry-run')


@pytest.mark.parametrize('revision', [None, 'v2'])
def test_commit_that_is_taken_while_the_connection_breaks_is_published(hub, checkpoint_folder, revision):
    hub.fail('/commit/', 'lose')
    done = publish(checkpoint_folder, REPO, revision=revision)
    assert hub.published(REPO, revision or 'main') == contents(checkpoint_folder)
    assert done.commit == hub.repositories[REPO].branches[revision or 'main'][-1].oid
    assert len(hub.repositories[REPO].branches[revision or 'main']) == 2


def test_commit_of_which_nothing_is_known_is_not_called_unpublished(hub, checkpoint_folder, capsys):
    """From the upload on the Hub carries out what it is sent, and no answer comes through."""
    hub.fail('/objects/batch', lambda: hub.fail('(/commit/|GET /api/models/)', 'lose', times=99))
    line = refused(capsys, checkpoint_folder)
    assert f'{REPO} may have been published or not: the connection to the Hub broke, run the command again.' in line
    assert hub.published(REPO) == contents(checkpoint_folder)


@pytest.mark.parametrize('request_, action, headers', [
    ('PUT /lfs/', 'drop', {}),
    ('PUT /lfs/', 500, {}),
    ('POST /.*/preupload/', 429, {'Retry_After': '3'}),
    ('POST /.*/objects/batch', 503, {}),
    ('GET /lfs/', 'truncate', {}),
    ('GET /lfs/', 'drop', {}),
])
def test_a_passing_fault_is_overcome(hub, checkpoint_folder, request_, action, headers):
    hub.fail(request_, action, **headers)
    try:
        publish(checkpoint_folder, REPO)
    except RuntimeError as error:
        assert huggingface_hub.__version__.startswith('0.') and 'run the command again' in str(error)
        publish(checkpoint_folder, REPO)  # the client tries most requests again from 1.0 on
    assert hub.faults[0].times == 0
    assert hub.published(REPO) == contents(checkpoint_folder)


def test_file_that_comes_back_changed_is_reported(hub, checkpoint_folder, capsys):
    hub.fail('GET /lfs/', 'corrupt', times=9)
    assert f'model.safetensors as fetched from {REPO} is not the file in' in refused(capsys, checkpoint_folder)


def test_folder_is_checked_before_anything_is_sent(hub, copied, capsys):
    def check(message):
        assert message in refused(capsys, copied)
        assert not hub.requests

    (copied / 'weights.pkl').write_bytes(b'')
    check('holds weights.pkl, which is no part of a checkpoint')
    (copied / 'weights.pkl').unlink()
    (copied / 'args.yaml').rename(copied.parent / 'args.yaml')
    check('lacks args.yaml')
    (copied / 'args.yaml').symlink_to(copied.parent / 'args.yaml')
    check('args.yaml is not a plain file')
    (copied / 'args.yaml').unlink()
    (copied.parent / 'args.yaml').rename(copied / 'args.yaml')
    weights = bytearray((copied / 'model.safetensors').read_bytes())
    weights[-1] ^= 1
    (copied / 'model.safetensors').write_bytes(weights)
    check('model.safetensors is damaged: sha256 is')
    (copied / 'model.safetensors').write_bytes(weights[:-10])
    check('model.safetensors is damaged: bytes is')


@pytest.mark.parametrize('change, message', [
    ({'label_names': ['a'] * 5}, 'must name 4 labels'),
    ({'architecture': None}, 'must name architecture, num_classes and pretrained_cfg'),
    ({'pretrained_cfg': []}, 'must name architecture, num_classes and pretrained_cfg'),
    ({'pretrained_cfg': {'input_size': [3, 48, 48], 'file': '/etc/passwd'}}, 'names another source of weights by file'),
    ({'pretrained_cfg': {'input_size': [3, 48, 10 ** 9]}}, 'must have an input_size of channels, height and width'),
    ({'pretrained_cfg': {'input_size': 'large'}}, 'must have an input_size of channels, height and width'),
    ({'architecture': '../../etc'}, 'Unknown model'),
    ({'num_classes': 5, 'label_names': ['a'] * 5}, 'disagrees with itself on num_classes'),
    ({'architecture': 'ws_resnet18'}, 'cannot be loaded: '),
    ({'label_names': ['a', 1, None, 'd']}, 'must name 4 labels as strings'),
    *(({'pretrained_cfg': {'input_size': [3, 48, 48], **wrong}}, 'cannot be loaded: ') for wrong in (
        {'std': [0, 0, 0]}, {'std': [float('nan')] * 3}, {'mean': 'grey'}, {'mean': [0.5, 0.5]},
        {'interpolation': 'finest'})),
    *(({'pretrained_cfg': {'input_size': [3, 48, 48], 'crop_pct': crop}}, 'must have a crop_pct of 0.1 to 1')
      for crop in (-1, 0, 1e-4, float('nan'), '1')),
])
def test_config_that_is_wrong_or_hostile_is_refused(hub, copied, capsys, change, message):
    config = json.loads((copied / 'config.json').read_text())
    (copied / 'config.json').write_text(json.dumps({**config, **change}))
    assert message in refused(capsys, copied)
    assert not hub.requests


def test_mutated_folders_are_refused_or_published_but_crash_nothing(hub, copied):
    """Two hundred folders with bytes of one file changed, cut off or repeated: a plain error, or a folder like any."""
    random_ = random.Random(0)
    originals = contents(copied)
    outcomes = set()
    for _ in range(200):
        name = random_.choice(['config.json', 'results.json', 'model.safetensors'])
        data = bytearray(originals[name])
        for _ in range(random_.randint(1, 3)):
            start = random_.randrange(len(data))
            end = start + random_.randint(1, 20)
            data[start:end] = random_.choice([b'', bytes(data[start:end]) * 2, random_.randbytes(end - start)])
        (copied / name).write_bytes(data)
        try:
            publish(copied, REPO, dry_run=True)
            outcomes.add('fine')
        except ValueError:
            outcomes.add('refused')
        (copied / name).write_bytes(originals[name])
    assert 'refused' in outcomes
    assert contents(copied) == originals


def test_card_of_a_validated_folder_parses_and_validates(checkpoint_folder):
    card = ModelCard.load(checkpoint_folder / 'README.md')
    assert card.data.library_name == 'timm'
    assert card.data.license == 'apache-2.0'
    code = card.text.split('```python\n')[1].split('```')[0]
    assert code.startswith('import timm\nimport timm_aws')


def _publish_in_child(folder):
    publish(folder, REPO)


def test_killed_at_twenty_moments_and_run_again_it_ends_in_one_state(hub, checkpoint_folder, monkeypatch):
    monkeypatch.undo()  # children wait for real, were they to
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_aws.checkpoint.publish'])
    publish(checkpoint_folder, REPO)
    number = len(hub.requests)
    whole = contents(checkpoint_folder)
    moments = random.Random(0).sample(range(number), min(20, number))
    states, killed = set(), 0
    for moment in moments + [random.Random(1).randrange(number) for _ in range(20 - len(moments))]:
        hub.reset()
        child = context.Process(target=_publish_in_child, args=(checkpoint_folder,))
        seen = iter(range(10 ** 6))

        def kill_at(moment=moment, child=child, seen=seen):
            if next(seen) == moment:
                os.kill(child.pid, signal.SIGKILL)

        hub.fail('', kill_at, times=10 ** 6)
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        killed += 1
        for repository in hub.repositories.values():
            assert set(repository.branches['main'][-1].files) - {'.gitattributes'} in (set(), set(whole))
        hub.faults.clear()
        publish(checkpoint_folder, REPO)
        assert hub.published(REPO) == whole
        branch = hub.repositories[REPO].branches['main']
        states.add((tuple(commit.oid for commit in branch), tuple(hub.uploads)))
    assert killed == 20
    assert len(states) == 1
    (oids, uploads), = states
    assert len(oids) == 2
    assert uploads == (hashlib.sha256(whole['model.safetensors']).hexdigest(),)


def test_results_speak_of_the_file(checkpoint_folder):
    results = json.loads((checkpoint_folder / 'results.json').read_text())
    weights = (checkpoint_folder / 'model.safetensors').read_bytes()
    assert results['weights']['sha256'] == hashlib.sha256(weights).hexdigest()
    assert results['weights']['bytes'] == len(weights)
