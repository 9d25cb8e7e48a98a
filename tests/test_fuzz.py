"A fixed sample of tools/fuzz.py: damaged files of every kind are refused with the package's own error, or read correctly"
import itertools
import fuzz, pytest
from histogene_nb.files import InputError

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz')
    (folder/'cases').mkdir()
    fuzz.make_inputs(folder)
    return folder

def test_damaged_files(folder):
    found = fuzz.run(folder, fuzz.cases(160, 0, folder))
    failed = found[found.outcome == 'failed']
    assert failed.empty, '\n'.join(f'{f.input}, {f.damage}, seed {f.seed}: {f.why}' for f in failed.itertuples())
    counts = fuzz.table(found)
    assert counts.tried.sum() >= 140 and counts.read.sum() > 20 and counts.refused.sum() > 60

def crash(home): raise KeyError('no such key')
def dirty(home): (home/'half').write_text('half'); raise InputError('refused, but something is left')
def change(home): (home/'panel.csv').write_text('gene'); return {}
def other(home, n=itertools.count()): return dict(length=[next(n)])

@pytest.mark.parametrize('read,why', [(crash, 'KeyError'), (dirty, "['half'] changed though refused"), (change, 'changed by reading'), (other, 'length differ')])
def test_the_judge_sees(folder, monkeypatch, read, why):
    monkeypatch.chdir(folder)
    make = fuzz.inputs()['panel'][0]
    whole = {} if read is not other else read(None)
    monkeypatch.setattr(fuzz, 'inputs', lambda: {'panel': (make, read, {})}); monkeypatch.setattr(fuzz, 'whole', lambda name: whole)
    outcome, said, _ = fuzz.case('panel', 'bits flipped', 0)
    assert outcome == 'failed' and why in said

@pytest.mark.parametrize('name,patience,why', [('no such input', 60, 'the process died'), ('panel', .001, 'no end in sight')])
def test_a_process_that_dies_or_hangs(folder, name, patience, why):
    found = fuzz.run(folder, [(name, 'empty', 0)], patience=patience)
    assert list(found.outcome) == ['failed'] and why in found.why[0]
