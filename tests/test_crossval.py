"Cross-validation on a Ray cluster, and what can go wrong in a run"
import json, os, re, shutil, subprocess, sys, tempfile, threading
import filelock, numpy as np, pandas as pd, psutil, pytest
from functools import partial
from histogene_nb.crossval import cross_validate, seconds_left
from histogene_nb.fold_tables import correlations, read_tables, tables_made, write_tables
from histogene_nb.folds import Fold, fold_names, read_fold, read_prediction, read_scores, run_fold
from histogene_nb.methods import as_method, baselines, histogene, spot_model
from histogene_nb.files import InputError
from histogene_nb.tissue import synthetic_section
from conftest import root

pytestmark = pytest.mark.xdist_group('ray')                          # one cluster for all

NAMES = ['X1', 'X2', 'Y1']
RULE = dict(n_top=30, min_spots=30)
SMALL = partial(histogene, epochs=15, lr=1e-3, every=0, dim=32, depth=1, heads=2)
CATALOGUE = pd.DataFrame(dict(patient=[n[0] for n in NAMES]), index=pd.Index(NAMES, name='section'))

@pytest.fixture(scope='module')
def tissue(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tissue')
    return folder, {n: synthetic_section(folder, n, px=2000) for n in NAMES}

@pytest.fixture(scope='module')
def sequential(tissue, tmp_path_factory):
    "The run that others are compared with, one thread a fold"
    out = tmp_path_factory.mktemp('run')/'sequential'
    cross_validate(tissue[1].__getitem__, CATALOGUE, dict(HisToGene=SMALL), out, panel=RULE, cores=1)
    return out

def same(a, b):
    "The same folds with the same scores and losses"
    names = [sorted(f.parent.name for f in run.glob('*/fold.json')) for run in (a, b)]
    assert names[0] == names[1] and len(names[0]) == len(NAMES)
    for n in names[0]:
        assert (a/n/'scores.csv').read_text() == (b/n/'scores.csv').read_text()
        assert json.loads((a/n/'fold.json').read_text())['losses'] == json.loads((b/n/'fold.json').read_text())['losses']

def end(temp):
    "End this cluster's processes, and those of no other; `ray stop` would end all"
    own = [p for p in psutil.process_iter() if p.pid != os.getpid() and happened(lambda: any(temp in word for word in p.cmdline()))]
    for p in own + [c for p in own for c in happened(lambda: p.children(recursive=True)) or ()]: happened(p.kill)
    shutil.rmtree(temp, ignore_errors=True)

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "Two workers on this machine, started once; a start that fails for want of time is tried again"
    pytest.importorskip('ray')
    temp = tempfile.mkdtemp(prefix='ray', dir='/tmp' if os.name == 'posix' else None)                       # a short path: sockets lie in it
    head = [sys.executable, '-m', 'ray.scripts.scripts', 'start', '--head', '--node-ip-address=127.0.0.1', '--num-cpus=2', '--include-dashboard=false', '--disable-usage-stats', f'--object-store-memory={2*10**8}', '--port=0', f'--temp-dir={temp}']
    patient = {f'RAY_{k}': '1800' for k in ('raylet_start_wait_time_s', 'worker_register_timeout_seconds', 'gcs_rpc_server_reconnect_timeout_s', 'gcs_server_request_timeout_seconds')}
    patient |= dict(RAY_AUTH_MODE='disabled', RAY_health_check_timeout_ms='600000', RAY_health_check_period_ms='60000', OMP_NUM_THREADS='1', COLUMNS='200', PYTHONPATH=os.pathsep.join([str(root/'tests'), str(root/'tools')]))
    for _ in range(3):
        started = subprocess.run(head, env={**os.environ, **patient}, capture_output=True, text=True)
        if started.returncode == 0: break
        end(temp); os.makedirs(temp)
    else: pytest.fail(f'Ray does not start: {started.stdout}{started.stderr}', pytrace=False)
    yield re.search(r"--address='([\d.:]+)'", started.stdout)[1], temp
    import ray as client
    client.shutdown()
    end(temp)

def at_work(temp, out):
    "The cluster's workers in the middle of a fold of the run in the folder `out`"
    raylets = [p for p in psutil.process_iter() if happened(lambda: p.name() == 'raylet' and any(temp in word for word in p.cmdline()))]
    workers = [p for r in raylets for p in happened(r.children) or () if happened(lambda: p.name().startswith('ray::run_fold'))]
    return workers if list(out.glob('.*.part/training.safetensors')) else []

def happened(what):
    "What is asked of a process that may have ended meanwhile"
    try: return what()
    except psutil.Error: return False

def test_ray_with_a_worker_killed(tissue, sequential, cluster, tmp_path, capsys):
    "Two workers, one killed in the middle of its fold: the run completes, and equals the sequential one"
    (address, temp), out, killed = cluster, tmp_path/'ray', threading.Event()
    def kill():
        while not killed.wait(.02):
            for p in at_work(temp, out)[:1]:
                if happened(p.kill) is None: killed.set()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try: cross_validate(tissue[1].__getitem__, CATALOGUE, dict(HisToGene=SMALL), out, panel=RULE, ray=address, cores=1)
    finally: early = not killed.is_set(); killed.set(); killer.join()
    said = capsys.readouterr().out
    assert not early, 'the run ended before a worker was killed'
    assert '3 of 3 done' in said
    same(out, sequential)
    for f in out.glob('*/fold.json'):                                # each line tells of the fold that it names
        found = json.loads(f.read_text())
        assert f"HisToGene, {found['test'][0]} left out, seed 0: mean r HisToGene {found['mean_r'][0]['mean']:.3f}" in said

def test_ray_without_enough_cores(tissue, cluster, tmp_path):
    with pytest.raises(InputError, match='has 2 cores .* with 8 cores .* does not fit'):
        cross_validate(tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run', panel=RULE, ray=cluster[0], cores=8)

def test_ray_is_optional(tissue, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(InputError, match=r"pip install 'histogene_nb\[ray\]'"):
        cross_validate(tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run', panel=RULE, ray='local')

def test_two_runs_in_one_folder(tissue, tmp_path):
    (tmp_path/'run').mkdir()
    with filelock.FileLock(tmp_path/'run'/'.lock'), pytest.raises(InputError, match='another run is at work'):
        cross_validate(tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run', panel=RULE)

def test_budget(tissue, tmp_path, capsys):
    "With no time at all nothing is begun, and the same call goes on later"
    args = (tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run')
    assert cross_validate(*args, panel=RULE, budget=0) == []
    assert '3 folds did not fit into the budget' in capsys.readouterr().out
    assert len(cross_validate(*args, panel=RULE, budget=1)) == 3

def test_failed_fold_leaves_the_others(tissue, tmp_path):
    "A method that fails in one fold: finished folds stay, and a later run does only what is missing"
    def fails(training, test, *args, **kwargs):
        if broken and test[0].uns['histogene']['section'] == 'X2': raise RuntimeError('out of memory')
        done.append(test[0].uns['histogene']['section'])
        return baselines(training, test, *args, **kwargs)
    args, done, broken = (tissue[1].__getitem__, CATALOGUE, dict(own=fails), tmp_path/'run'), [], True
    with pytest.raises(RuntimeError): cross_validate(*args, panel=RULE)
    assert done == ['X1']
    broken = False
    assert len(cross_validate(*args, panel=RULE)) == 3 and done == ['X1', 'X2', 'Y1']

def test_time_left():
    done = [dict(method='a', seconds=10, n_training_spots=100, resumed=False), dict(method='a', seconds=1, n_training_spots=100, resumed=True)]
    assert seconds_left([('a', 200), ('a', 100)], done) == pytest.approx(30)
    assert np.isnan(seconds_left([('a', 200), ('b', 100)], done))                                               # b has not been timed

def test_only_some_folds(tissue, tmp_path):
    args = (tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run')
    assert [f['test'] for f in cross_validate(*args, panel=RULE, only=['X2'])] == [['X2']]
    with pytest.raises(InputError, match='There is no fold Z9; there are X1, X2, Y1'): cross_validate(*args, panel=RULE, only=['Z9'])

def test_tables_of_a_patient_alone(tissue, tmp_path):
    "No fold leaves out a single section: correlations, but no maps and no clusters"
    cross_validate(tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run', by=('patient',), panel=RULE, only=['X1+X2'])
    write_tables(tmp_path/'run', tmp_path/'tables', tissue[1].__getitem__, {'a': ['KRT8']})
    tables = read_tables(tmp_path/'tables')
    assert sorted(correlations(tables, 'patient')['position only']) == ['X1', 'X2'] and tables['maps'].empty and tables['clusters'].empty

def test_no_r_and_not_in_the_panel_are_told_apart(tissue, tmp_path):
    "The training mean has no r at the genes of its panel, and no entry at the others"
    cross_validate(tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run', panel=RULE)
    write_tables(tmp_path/'run', tmp_path/'tables', tissue[1].__getitem__)
    tables = read_tables(tmp_path/'tables')
    folds = {f['test'][0]: f['genes'] for f in (json.loads(p.read_text()) for p in (tmp_path/'run').glob('*/fold.json'))}
    assert len({tuple(g) for g in folds.values()}) > 1, 'the panels of the folds should differ, or this tests nothing'
    for section,c in correlations(tables)['training mean'].items():
        assert sorted(c.index) == sorted(folds[section]) and c.r.isna().all()

def test_tables_are_written_again_only_where_something_changed(tissue, tmp_path):
    "Not of the same folds, gene sets and version, older than what they are of, lost or damaged: each is noticed"
    run, tables, read = tmp_path/'run', tmp_path/'tables', tissue[1].__getitem__
    def fold(name, method='baselines'): return cross_validate(read, CATALOGUE, {method: baselines}, run, panel=RULE, only=[name])[0]
    def made_after(change, sets=None):
        write_tables(run, tables, read, sets)
        assert tables_made(run, tables, sets)
        change()
        return tables_made(run, tables, sets)
    genes = fold('X1')['genes']
    assert not tables_made(run, tables)
    assert made_after(lambda: fold('X1')) and not made_after(lambda: fold('X2'))                   # found done; added
    assert not made_after((run/'baselines-X1-seed0'/'scores.csv').touch) and not made_after(lambda: fold('X1', 'another'))
    (gmt := tmp_path/'sets.gmt').write_text('\t'.join(['a', '', *genes]))
    assert not made_after(lambda: shutil.rmtree(run/'another-X1-seed0')) and not tables_made(run, tables, str(gmt))
    assert not made_after(gmt.touch, str(gmt)) and not tables_made(run, tables)
    write_tables(run, tables, read)
    about = json.loads((tables/'run.json').read_text())
    damaged = [(f, None) for f in tables.glob('*.csv') if f.stem != 'pathways'] + [(tables/'run.json', t) for t in (None, '{', '[]', *map(json.dumps, (
        {k: v for k,v in about.items() if k != 'made_from'}, about | dict(made_from=None), about | dict(normalization='released'), about | dict(made_from=about['made_from'] | dict(histogene_nb='0')))))]
    for file,text in damaged:
        before = file.read_bytes()
        file.unlink() if text is None else file.write_text(text)
        assert not tables_made(run, tables), (file.name, text)
        file.write_bytes(before)
        assert tables_made(run, tables)

@pytest.mark.parametrize('to', [None, 'nowhere'])
def test_a_link_that_leads_nowhere_in_a_run(tissue, tmp_path, to):
    cross_validate(tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run', panel=RULE, only=['X1'])
    write_tables(tmp_path/'run', tmp_path/'tables', tissue[1].__getitem__)
    file = next((tmp_path/'run'/'baselines-X1-seed0').glob('*.h5ad'))
    file.unlink(); file.symlink_to(to or file.name)
    assert not tables_made(tmp_path/'run', tmp_path/'tables')
    with pytest.raises(InputError, match=file.name): write_tables(tmp_path/'run', tmp_path/'tables', tissue[1].__getitem__)

def test_tables_of_a_run_without_folds(tmp_path):
    with pytest.raises(InputError, match='no fold is finished'): write_tables(tmp_path, tmp_path/'tables', None)

def test_patient_folds_share_names():
    assert fold_names(dict(B4='B', C2='C', C3='C'), 'patient') == ['B4', 'C2+C3'] and fold_names(dict(B4='B', C2='C'), 'section') == ['B4', 'C2']

def test_methods_are_checked_before_a_run():
    "What is no method, a setting that the model does not have, an argument that no fold takes"
    with pytest.raises(InputError, match='Method mine: give a class of a model or a function, not 3'): as_method('mine', 3)
    with pytest.raises(InputError, match='HisToGene has no setting epoch; it has .*epochs'): as_method('mine', partial(spot_model, epoch=3))
    assert as_method('mine', baselines) is baselines
    with pytest.raises(TypeError, match='epochs'): cross_validate(None, CATALOGUE, {}, 'run', epochs=3)

def test_a_damaged_fold_is_named(tissue, tmp_path):
    "Its facts, its scores and its predictions"
    fold = Fold('baselines', ['X1', 'X2'], ['Y1'])
    run_fold(fold, baselines, tissue[1].__getitem__, tmp_path, panel=RULE)
    folder = tmp_path/fold.folder
    prediction = next(folder.glob('*.h5ad'))
    with pytest.raises(InputError, match='belongs to another section'): read_prediction(prediction, 'X1')
    scores = (folder/'scores.csv').read_text()
    (folder/'scores.csv').write_text(scores + scores.splitlines()[1])
    with pytest.raises(InputError, match='a gene occurs twice.*Delete the folder baselines-Y1-seed0'): read_scores(folder)
    about = (folder/'fold.json').read_text()
    for old,new,said in (('"paper"', '"other"', 'numbers are impossible'), ('"seed": 0', '"seed": 1', 'another fold'), ('"genes"', '"names"', "KeyError: 'genes'")):
        (folder/'fold.json').write_text(about.replace(old, new, 1))
        with pytest.raises(InputError, match=said): read_fold(folder)
