"Commands that are killed at any moment and given again end as if they had not been; tools/kills.py kills them more often"
import os, platform
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from anndata import AnnData
from scipy import sparse
if os.name != 'posix': pytest.skip('there is no SIGKILL here', allow_module_level=True)
import kills
from histogene_nb.measures import morans_i
from histogene_nb.interface import from_pretrained, save_pretrained
from histogene_nb.tensors import read_tensors, save_tensors
from histogene_nb.files import InputError

pytestmark = pytest.mark.xdist_group('kills')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "What the commands need, and the commands by name"
    with kills.commands(folder := tmp_path_factory.mktemp('made').resolve()) as them: yield folder, {c[0]: c for c in them}

def trial(command, kind, n, folder): return kills.trial(command, kind, n, folder.resolve(), np.random.default_rng(n))

@pytest.mark.parametrize('name,kind,n', [('train', 'time', 1), ('train', 'change', 1), ('predict 4x', 'change', 1), ('cross-validate', 'change', 1), ('download', 'time', 2)])
def test_killed_and_given_again(made, tmp_path, name, kind, n):
    row = trial(made[1][name], kind, n, tmp_path)
    assert row['kills'] == n and row['equal'] == row['ended'] and not (row['left_over'] or row['damaged'] or row['repeated']), row

def careless():
    with open('table.csv', 'w') as f:
        print('half', file=f, flush=True)
        with open('more.part', 'w'): print('the rest', file=f)
    os.remove('more.part')
    Path('done.npy').write_bytes(b'again')

def test_a_command_that_writes_carelessly_is_found_out(tmp_path):
    row = trial(('careless', 1, careless, '*.npy', None), 'change', 8, tmp_path)
    assert row['damaged'] > 0 and row['equal'] == row['ended'] > 1, row

def test_training_killed_when_its_model_is_whole_but_not_its_work(made, tmp_path):
    "The last change of a training removes its checkpoint"
    work, whole, out = made[1]['train'][2], tmp_path.resolve()/'whole', tmp_path.resolve()/'out'
    whole.mkdir(); out.mkdir()
    changes = kills.run(work, whole)[2]
    assert kills.run(work, out, change=changes)[0] and {p.name for p in (out/'model').iterdir()} == {'config.json', 'model.safetensors', 'training.safetensors'}
    assert not kills.run(work, out)[0] and kills.contents(out) == kills.contents(whole)

def smoothness():
    torch.set_num_threads(threads := os.cpu_count() + 1)
    morans_i(AnnData(np.eye(4)), sparse.csr_matrix(np.ones((4, 4)) - np.eye(4)))
    assert torch.get_num_threads() == threads

def test_scoring_a_fold_leaves_the_threads_of_the_next_as_they_were(tmp_path):
    "Or a fold after another differs in the last digits from the same fold computed first, as after a kill"
    kills.run(smoothness, tmp_path.resolve())

def save_over(model): save_pretrained(from_pretrained(model), 'model')

def test_a_model_killed_while_saved_over_another_is_never_half_of_each(made, tmp_path):
    "The other has its genes in another order, which the weights' shapes do not tell"
    folder, other, seen = made[0], from_pretrained(made[0]/'older'), set()
    genes = from_pretrained(folder/'model').about['genes']
    other.about['genes'] = genes[::-1]
    for change in range(1, 100):
        out = tmp_path.resolve()/str(change)
        save_pretrained(other, out/'model')
        killed = kills.run(partial(save_over, folder/'model'), out, change=change)[0]
        try: found = from_pretrained(out/'model')
        except InputError as e: seen.add('refused'); assert 'belong to two different models' in str(e)
        else:
            which = 'old' if found.about['genes'] != genes else 'new'
            seen.add(which)
            wanted = other if which == 'old' else from_pretrained(folder/'model')
            assert all((w == found.state_dict()[k]).all() for k,w in wanted.state_dict().items())
        if not killed: break
    assert not killed and seen == {'old', 'new', 'refused'}

def test_what_a_kill_within_a_saving_left_is_cleared(tmp_path):
    "safetensors writes to a file of its own first"
    (left := tmp_path/f'.model.safetensors.{platform.node()}.{2**22 + 1}.part.folder').mkdir()             # no Linux has a process of this number
    (left/'.tmpA1b2C3').write_bytes(b'half')
    save_tensors({'w': torch.ones(3)}, tmp_path/'model.safetensors', {})
    assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors'] and read_tensors(tmp_path/'model.safetensors')[0]['w'].tolist() == [1, 1, 1]
