"Cross-validation on a Ray cluster, and what can go wrong in a run"
import json, os, signal, subprocess, sys, textwrap, time
import filelock, pandas as pd, psutil, pytest
from functools import partial
from histogene_nb.crossval import baselines, correlations, cross_validate, fold_names, histogene, read_tables, seconds_left, write_tables
from histogene_nb.sections import InputError
from histogene_nb.tissue import synthetic_section

os.environ['RAY_raylet_start_wait_time_s'] = '180'             # a busy machine takes longer than Ray's 30 s to start it

NAMES = ['X1', 'X2', 'Y1']
RULE = dict(n_top=30, min_spots=30)
SMALL = partial(histogene, epochs=15, lr=1e-3, every=1, dim=32, depth=1, heads=2)
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

def at_work(process):
    "Whether this is a Ray worker in the middle of a fold"
    try: return process.name().startswith('ray::run_fold')
    except psutil.NoSuchProcess: return False                       # it has ended meanwhile

def test_ray_with_a_worker_killed(tissue, sequential, tmp_path):
    "Two workers, one killed in the middle of its fold: the run completes, and equals the sequential one"
    script, out = tmp_path/'on_ray.py', tmp_path/'ray'
    script.write_text(textwrap.dedent(f'''
        import ray
        from functools import partial
        from pathlib import Path
        import pandas as pd
        from histogene_nb.crossval import cross_validate, histogene
        from histogene_nb.tissue import synthetic_section
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        names = {NAMES}
        small = partial(histogene, **{SMALL.keywords})
        read = partial(synthetic_section, {str(tissue[0])!r}, px=2000)
        cross_validate(lambda name: read(name=name), pd.DataFrame(dict(patient=[n[0] for n in names]), index=pd.Index(names, name='section')), dict(HisToGene=small), {str(out)!r}, panel={RULE}, ray='local', cores=1)
    '''))
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    killed, deadline = None, time.time() + 240
    while killed is None:
        assert run.poll() is None and time.time() < deadline, run.communicate()[0]
        workers = [p for p in psutil.Process(run.pid).children(recursive=True) if at_work(p)]
        if list(out.glob('.*.part/training.safetensors')) and workers:
            killed = workers[0]
            killed.send_signal(signal.SIGKILL)
        time.sleep(.02)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert '3 of 3 done' in said
    same(out, sequential)
    for f in out.glob('*/fold.json'):                                # each line tells of the fold that it names
        found = json.loads(f.read_text())
        assert f"HisToGene, {found['test'][0]} left out, seed 0: mean r HisToGene {found['mean_r'][0]['mean']:.3f}" in said

def test_ray_without_enough_cores(tissue, tmp_path):
    ray = pytest.importorskip('ray')
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(InputError, match='has 1 cores .* with 8 cores .* does not fit'):
            cross_validate(tissue[1].__getitem__, CATALOGUE, dict(baselines=baselines), tmp_path/'run', panel=RULE, ray='local', cores=8)
    finally: ray.shutdown()

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
    assert seconds_left([('a', 200), ('b', 100)], done) != seconds_left([('a', 200), ('b', 100)], done)          # NaN: b has not been timed

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

def test_tables_of_a_run_without_folds(tmp_path):
    with pytest.raises(InputError, match='no fold is finished'): write_tables(tmp_path, tmp_path/'tables', None)

def test_patient_folds_share_names():
    assert fold_names(dict(B4='B', C2='C', C3='C'), 'patient') == ['B4', 'C2+C3'] and fold_names(dict(B4='B', C2='C'), 'section') == ['B4', 'C2']
