"The commands as they are typed: what they print, what they write, and how they fail"
import json, os, re, shutil, signal, subprocess, sys
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd, pytest, torch
import forks
from PIL import Image
from conftest import needs_images, wait_for
from safetensors.torch import load_file
from histogene_nb import commands
from histogene_nb.commands import histogene_download, histogene_plot, histogene_predict, histogene_reproduce, histogene_train, reader
from histogene_nb.folds import write_h5ad
from histogene_nb.interface import from_pretrained
from histogene_nb.readers import read_section
from histogene_nb.files import InputError
from histogene_nb.her2st import write_her2st
from histogene_nb.sections import place, section_name
from histogene_nb.tissue import synthetic_section

NAMES = ['histogene_demo', 'histogene_download', 'histogene_plot', 'histogene_predict', 'histogene_reproduce', 'histogene_train']
TINY = '--setting dim=16 depth=1 heads=2 --lr 1e-3 --epochs 2 --n-top 40 --min-spots 5'.split()

def command(name):
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None: pytest.skip(f'{name} is not installed beside {sys.executable}')
    return path

def environment(): return {**os.environ, 'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'COLUMNS': '160', 'PYTHONIOENCODING': 'utf-8'}

def start(name, *args, **kwargs):
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)                # a shell starts what it runs in the background deaf to it
    return subprocess.Popen([command(name), *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), preexec_fn=heard if os.name == 'posix' else None, **kwargs)

def finish(process):
    process.out, process.err = process.communicate()
    return process

def run(name, *args):
    process, = run_all([name, *args])
    assert process.returncode == 0, process.err
    return process

def run_all(*typed):
    "Several console scripts, one after the other, each in a process of its own that need not import PyTorch anew"
    return [forks.run(forks.script, command(c[0]), *map(str, c[1:]), environment=environment()) for c in typed]

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Sections as .h5ad, and the same in the HER2+ layout"
    folder = tmp_path_factory.mktemp('sections')
    for n in ('X1', 'X2', 'Y1'):
        section = synthetic_section(folder, n, px=1200)
        write_h5ad(section, folder/f'{n}.h5ad')
        write_her2st(section, folder/'her2st')
    return folder

@pytest.fixture(scope='module')
def model(files):
    "Trained by the command on two .h5ad files"
    process = run('histogene_train', files/'X1.h5ad', files/'X2.h5ad', '--out', files/'model', *TINY)
    assert re.search(r'2 sections, \d+ spots, \d+ genes, on \w+', process.out) and re.search(r'loss [\d.]+ -> [\d.]+ in \d+ s', process.out)
    assert '\r' not in process.err and 'Traceback' not in process.err
    return files/'model'

def section_image(file):
    section = ad.read_h5ad(file)
    return section.uns['spatial'][section_name(section)]['metadata']['source_image_path']

# --- help

def test_help():
    options = dict(histogene_demo='--out --epochs --seed --device', histogene_download='sections --root --no-images',
                   histogene_plot='predictions --genes --section --out --root',
                   histogene_predict='model section --samples --image --spot --superres --out --root --device --cache --tile --precision',
                   histogene_reproduce='sections --samples --out --root --by --methods --panel --n --min --only --seeds',
                   histogene_train='sections --samples --out --root --panel --n --min --normalization --epochs --lr --seed --pixels --device --precision --batch --array --setting --cache --max --trust')
    *helped, unknown, nothing = run_all(*([n, '--help'] for n in NAMES), ['histogene_predict', 'model', '--colour', 'blue'], ['histogene_train'])
    assert unknown.returncode == 2 and unknown.err.startswith('usage:') and 'Traceback' not in unknown.err
    assert nothing.returncode == 1 and nothing.err == 'histogene_train: Give sections, or a table of them (--samples).\n'
    for name,process in zip(NAMES, helped):
        assert process.returncode == 0 and not process.err
        assert process.out.startswith(f'usage: {name} ')
        for option in options[name].split(): assert re.search(rf'^  (-h, )?{option}', process.out, re.M), (name, option)
        for line in re.sub(r'\n {6,}', '  ', process.out.split('show this help message and exit\n')[1]).splitlines():
            if line: assert re.match(r'  --?\w[\w-]*( \S+| \[.*\]){0,2}  +\S', line), f'{name}: nothing said of {line!r}'
        assert not re.search(r'\(default: .*\(default:', process.out)

# --- train

def test_trained_model(model, files):
    assert sorted(p.name for p in model.iterdir()) == ['config.json', 'model.safetensors']
    net = from_pretrained(model)
    about = net.about
    assert about['sections'] == ['X1', 'X2'] and about['normalization'] == 'paper' and about['spot_diameter'] == 112
    assert net.config['dim'] == 16 and net.config['n_genes'] == len(about['genes']) and len(about['training']['losses']) == 2
    made_by = about['provenance']
    assert made_by['command'].startswith('histogene_train ') and {'histogene_nb', 'torch', 'device', 'date', 'seconds'} <= made_by.keys()

def test_trained_again_is_the_same(model, files, tmp_path):
    "From the HER2+ layout, with the panel from a file"
    panel = tmp_path/'panel.csv'
    pd.DataFrame(dict(gene=from_pretrained(model).about['genes'])).to_csv(panel, index=False)
    run('histogene_train', 'X1', 'X2', '--root', files/'her2st', '--panel', panel, '--out', tmp_path/'model', *TINY)
    a, b = (load_file(m/'model.safetensors') for m in (model, tmp_path/'model'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def checkpoint_after(process, file):
    wait_for(lambda: file.exists() or process.poll() is not None)
    assert file.exists(), process.communicate()

def test_texture_model(files, tmp_path):
    "The texture model behind the same commands: at spots, at 4x, from an image alone"
    out, rule = tmp_path/'model', '--n-top 40 --min-spots 5'.split()
    first, small = (write_h5ad(synthetic_section(tmp_path, n, px=800), tmp_path/f'{n}.h5ad') for n in ('X1', 'Y1'))
    run('histogene_train', first, '--model', 'texture', '--array-from', files/'X2.h5ad', '--out', out, *rule, '--setting', 'size=56', 'windows=1,2')
    net, image = from_pretrained(out), section_image(small)
    assert type(net).__name__ == 'TextureModel' and net.about['training']['array_from'] == ['X2'] and net.about['provenance']['command'].startswith('histogene_train ')
    assert not (out/'training.safetensors').exists()
    for kind,args,name in (('spots', [small], 'texture'), ('4x', [small, '--superres', '4'], 'texture_SR'), ('image', ['--image', image, '--spot-diameter', '112'], 'texture_SR')):
        run('histogene_predict', out, *args, '--out', tmp_path/f'{kind}.h5ad')
        a = ad.read_h5ad(tmp_path/f'{kind}.h5ad')
        assert a.uns['histogene']['predicted_by'] == name and list(a.var_names) == net.about['genes'] and np.isfinite(a.X).all() and a.X.std(0).max() > 0
    assert list(json.loads((tmp_path/'4x.json').read_text())['results']) == ['texture*']
    for args,said in ((['--model', 'texture', '--epochs', '3'], '--epochs is no setting of texture'), (['--model', 'resnet'], "There is no model 'resnet'"),
                      (['--array-from', files/'X2.h5ad'], '--array-from is no setting of HisToGene'), (['--model', 'texture', '--array-from', files/'X1.h5ad'], 'X1.h5ad is given to --array-from, and is trained on or given there twice')):
        p, = run_all(['histogene_train', files/'X1.h5ad', '--out', tmp_path/'other', *rule, *args])
        assert p.returncode == 1 and said in p.err and 'Traceback' not in p.err and not (tmp_path/'other').exists()

def test_interrupted_and_continued(files, tmp_path):
    args = [files/'X1.h5ad', '--out', tmp_path/'model', *TINY, '--setting', 'every=0']
    process = start('histogene_train', *args, '--epochs', 100_000)
    file = tmp_path/'model/training.safetensors'
    checkpoint_after(process, file)
    process.send_signal(signal.SIGINT)
    finish(process)
    assert process.returncode == 1 and 'Traceback' not in process.err
    assert process.err.strip().splitlines()[-1] == 'histogene_train: interrupted. Give the same command again to go on from the last checkpoint, where there is one.'
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    from safetensors import safe_open
    with safe_open(file, 'pt') as f: done = len(json.loads(f.metadata()['state'])['losses'])
    run('histogene_train', *args, '--epochs', done + 1)
    assert sorted(p.name for p in file.parent.iterdir()) == ['config.json', 'model.safetensors']
    assert len(from_pretrained(tmp_path/'model').about['training']['losses']) == done + 1

# --- predict

@pytest.fixture(scope='module')
def predictions(model, files):
    "At spots, at 4x, from the image alone and again at 4x: the finished processes and what they wrote"
    typed = dict(spots=[files/'Y1.h5ad'], x4=['Y1', '--root', files/'her2st', '--superres', 4],
                    image=['--image', files/'Y1.jpg', '--spot-diameter', 112], image_x4=['--image', files/'Y1.jpg', '--spot_diameter=112', '--superres', '4'])
    done = run_all(*(['histogene_predict', model, *c, '--out', files/f'{k}.h5ad'] for k,c in typed.items()))
    for p in done: assert p.returncode == 0 and 'Traceback' not in p.err, p.err
    return {k: (p, ad.read_h5ad(files/f'{k}.h5ad'), json.loads((files/f'{k}.json').read_text())) for k,p in zip(typed, done)}

def test_predicted_at_spots(predictions, model, files):
    process, predicted, beside = predictions['spots']
    measured = read_section(files/'Y1.h5ad')
    assert list(predicted.obs_names) == list(measured.obs_names) and (predicted.obsm['spatial'] == measured.obsm['spatial']).all()
    assert list(predicted.var_names) == from_pretrained(model).about['genes'] and predicted.X.dtype == np.float32 and np.isfinite(predicted.X).all()
    assert 'HisToGene at the' in process.out and 'mean r' in process.out and f'{predicted.n_obs} x {predicted.n_vars} (spots x genes)' in process.out
    assert set(beside['results']) == {'HisToGene'} and -1 <= beside['results']['HisToGene']['mean_r'] <= 1

def test_predicted_at_4x(predictions, files):
    process, dense, beside = predictions['x4']
    spots = predictions['spots'][1]
    assert dense.n_obs > 2*spots.n_obs and list(dense.var_names) == list(spots.var_names) and np.isfinite(dense.X).all()
    assert dense.uns['spatial']['Y1']['scalefactors']['spot_diameter_fullres'] == 56
    assert set(beside['results']) == {'HisToGene*'} and beside['superres'] == 4

def test_predicted_from_the_image_alone(predictions):
    (process, whole, beside), (_, dense, _) = predictions['image'], predictions['image_x4']
    assert 'patches x genes' in process.out and beside['results'] == {} and beside['section'].endswith('Y1.jpg')
    assert whole.uns['spatial']['Y1']['scalefactors']['spot_diameter_fullres'] == 112 and 2*whole.n_obs < dense.n_obs < 6*whole.n_obs

@pytest.mark.parametrize('kind', ['spots', 'x4', 'image', 'image_x4'])
def test_provenance(predictions, kind):
    _, predicted, beside = predictions[kind]
    assert beside['command'].startswith('histogene_predict ') and beside['trained_on'] == ['X1', 'X2']
    assert {'histogene_nb', 'torch', 'device', 'threads', 'date', 'seconds', 'training', 'superres'} <= beside.keys()
    assert predicted.uns['histogene']['command'] == beside['command'] and predicted.uns['histogene']['normalization'] == 'paper'

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['spots', 'x4', 'image'])
def test_scanpy_opens_it(files, predictions, kind):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt, scanpy as sc
    a = sc.read_h5ad(files/f'{kind}.h5ad')
    gene = a.var_names[0]
    on_image, = sc.pl.spatial(a, color=gene, show=False)
    plain = sc.pl.embedding(a, basis='spatial', color=gene, show=False)
    assert on_image.images and on_image.get_title() == plain.get_title() == gene
    for ax in (on_image, plain): assert sorted(ax.collections[0].get_array()) == pytest.approx(sorted(a[:, gene].X.ravel()))
    sc.pp.pca(a, n_comps=3)
    assert a.obsm['X_pca'].shape == (len(a), 3) and a.uns['pca']['variance'][0] > 0
    plt.close('all')

# --- from a notebook

def test_called_as_a_function(model, files, tmp_path, predictions):
    histogene_predict(str(model), str(files/'Y1.h5ad'), out=str(tmp_path/'p.h5ad'))
    assert np.allclose(ad.read_h5ad(tmp_path/'p.h5ad').X, predictions['spots'][1].X, atol=1e-5)
    assert json.loads((tmp_path/'p.json').read_text())['command'].startswith("histogene_predict('")
    with pytest.raises(InputError, match='trained model already'): histogene_train([str(files/'X1.h5ad')], out=str(model))

# --- a table of sections

@pytest.fixture
def table(files, tmp_path):
    "A table beside the file of one section, which names no patient, and a way to write it"
    section = ad.read_h5ad(files/'Y1.h5ad')
    del section.uns['histogene']['patient']
    write_h5ad(section, tmp_path/'own.h5ad')
    shutil.copy(files/'Y1.jpg', tmp_path/'photo.jpg')
    def write(*lines):
        (tmp_path/'sections.csv').write_text('\n'.join(lines), encoding='utf-8')
        return str(tmp_path/'sections.csv')
    return write

@pytest.mark.parametrize('lines,said', [((), 'its first line is missing'), (('name,patient', 'a,P'), 'has a column path'), (('path,organ', 'own.h5ad,skin'), 'has a column path.*name, patient, image, spot_width'),
    (('path',), 'no section in this table'), (('path,name', ',a'), 'line 2: there is no path'), (('path,name', '', 'own.h5ad,a,b'), 'line 3: there are more cells'), (('path,image', 'own.h5ad,none.jpg'), 'line 2: there is no image .*none.jpg'),
    (('path,name', 'own.h5ad,a/b'), 'has a slash'), *((('path,spot_width', f'own.h5ad,{w}'), 'spot_width is') for w in ('wide', '-3', '0', 'nan', 'inf')), (('path', 'other.h5ad'), 'other.h5ad: there is no such file')])
def test_table_that_cannot_be_used(table, lines, said):
    with pytest.raises(InputError, match=said): commands._given(None, table(*lines), None)

@pytest.mark.parametrize('between', [',', ';', '\t'])
def test_table_of_sections(table, tmp_path, between, monkeypatch):
    file = table('\ufeffpath,name,image,patient,spot_width'.replace(',', between), 'own.h5ad,mine,photo.jpg,Q,90'.replace(',', between), '', 'own.h5ad'.replace(',', between))
    monkeypatch.chdir('/')
    named, plain = (commands._read(g, None) for g in commands._given(None, file, None))
    assert section_name(named) == 'mine' and named.uns['histogene']['patient'] == 'Q' and named.uns['histogene']['section'] == 'mine'
    assert place(named).diameter == 90 and Path(place(named).path).samefile(tmp_path/'photo.jpg')
    assert (section_name(plain), plain.uns['histogene']['patient'], place(plain).diameter) == ('Y1', '', 112)

def test_a_spot_as_wide_as_the_table_says(table, tmp_path):
    section = ad.read_h5ad(tmp_path/'own.h5ad')
    section.uns['histogene']['spot_um'] = 56.
    write_h5ad(section, tmp_path/'own.h5ad')
    for width,um in ('224', 112), ('', 56): assert commands._read(*commands._given(None, table('path,spot_width', f'own.h5ad,{width}'), None), None).uns['histogene']['spot_um'] == um

def test_paths_in_a_table(files, table, tmp_path, monkeypatch):
    "./Y1 is a folder beside the table, wherever the command is given and whatever is published; Y1 alone may be either"
    monkeypatch.chdir(tmp_path)
    for folder in '.', 'elsewhere': (tmp_path/folder/'Y1').mkdir(parents=True)
    root = files/'her2st'
    def meant(path, file='sections.csv'):
        table('path', path)
        given, = commands._given(None, file, root)
        return Path(given['path']).resolve()
    assert meant('./Y1') == meant('./Y1', tmp_path/'sections.csv') == tmp_path/'Y1'
    with pytest.raises(InputError, match='Say which'): meant('Y1')
    monkeypatch.chdir(tmp_path/'elsewhere')
    assert meant('./Y1', '../sections.csv') == tmp_path/'Y1'
    shutil.rmtree(tmp_path/'Y1')
    with pytest.raises(InputError, match='no such folder'): meant('./Y1', '../sections.csv')

def test_whose_tissue(table, files, tmp_path):
    "A table says it, or the file does; leaving out patients that nobody named is refused, and nothing is written"
    file = table('path,name,patient', 'own.h5ad,mine,Q')
    read, catalogue = reader([files/'X1.h5ad', tmp_path/'own.h5ad'], samples=file)
    assert catalogue.patient.to_dict() == dict(X1='X', Y1='', mine='Q') and section_name(read('mine')) == 'mine'
    section = ad.read_h5ad(tmp_path/'own.h5ad')
    section.obs['patient'] = 'R'
    assert reader([str(write_h5ad(section, tmp_path/'told.h5ad'))])[1].patient.to_dict() == dict(Y1='R')
    for by in ('patient', 'both'):
        with pytest.raises(InputError, match='Whose tissue Y1 is, is not known.*--samples.*--by section'): histogene_reproduce([str(files/'X1.h5ad'), str(tmp_path/'own.h5ad')], by=by, out=str(tmp_path/'run'))
    with pytest.raises(InputError, match='both called Y1'): reader([tmp_path/'own.h5ad'], samples=table('path', 'own.h5ad'))
    assert not (tmp_path/'run').exists()

def test_trained_on_and_predicted_by_a_table(table, model, files, tmp_path, monkeypatch):
    file = table('path,name', 'own.h5ad,one', 'own.h5ad,two')
    for n in range(2): histogene_predict(str(model), samples=file, out=str(tmp_path/'predicted'))         # in the place of its own earlier ones
    assert sorted(p.name for p in (tmp_path/'predicted').iterdir()) == [f'{n}.{kind}' for n in ('one', 'two') for kind in ('csv', 'h5ad', 'json')]
    assert section_name(ad.read_h5ad(tmp_path/'predicted/two.h5ad')) == 'two'
    with pytest.raises(InputError, match='names a folder'): histogene_predict(str(model), samples=file, out='x.h5ad')
    with pytest.raises(InputError, match='2 sections would be written as own.h5ad'): histogene_predict(str(model), samples=table('path', 'own.h5ad', 'own.h5ad'))
    with pytest.raises(InputError, match='Give either'): histogene_predict(str(model), str(files/'Y1.h5ad'), samples=file)
    histogene_train([str(files/'X1.h5ad')], samples=table('path,name', 'own.h5ad,mine'), out=str(tmp_path/'model'), n_top=40, min_spots=5, epochs=1, setting=TINY[1:4])
    about = from_pretrained(tmp_path/'model').about
    assert about['sections'] == ['X1', 'mine'] and 'X1.h5ad' in about['provenance']['command'] and '.csv' in about['provenance']['command']

# --- nothing is lost

def test_one_bad_section_of_many(table, model, files, tmp_path):
    "The others are predicted; which failed and why is said at the end, with exit code 1"
    section = ad.read_h5ad(files/'Y1.h5ad')
    section.var_names = [f'none{i}' for i in range(section.n_vars)]
    write_h5ad(section, tmp_path/'other.h5ad')
    file = table('path,name', 'own.h5ad,one', 'other.h5ad,bad', 'own.h5ad,two')
    done, = run_all(['histogene_predict', model, '--samples', file, '--out', tmp_path/'predicted'])
    assert done.returncode == 1 and 'bad: failed. ' in done.out and re.fullmatch(r"histogene_predict: 1 of 3 sections failed: bad: .*none of the model's \d+ genes.*\n", done.err)
    assert sorted(p.name for p in (tmp_path/'predicted').iterdir()) == [f'{n}.{kind}' for n in ('one', 'two') for kind in ('csv', 'h5ad', 'json')]

def test_model_is_saved_before_which_genes_to_believe(files, tmp_path, monkeypatch):
    "Whatever ends that, the model is there, and the same command goes on"
    how = dict(n_top=40, min_spots=5, epochs=2, setting=TINY[1:4], trust_folds=2)
    def ends(*_, **__): raise InputError('There is no memory.')
    with monkeypatch.context() as m:
        m.setattr('histogene_nb.interface.gene_trust', ends)
        with pytest.raises(InputError, match='There is no memory. The model itself is trained, and in .*model'): histogene_train([str(files/f'{n}.h5ad') for n in ('X1', 'Y1')], out=str(tmp_path/'model'), **how)
    first = from_pretrained(tmp_path/'model')
    assert 'gene_trust' not in first.about
    histogene_train([str(files/f'{n}.h5ad') for n in ('X1', 'Y1')], out=str(tmp_path/'model'), **how)
    second = from_pretrained(tmp_path/'model')
    assert len(second.about['gene_trust']['r']) == len(second.about['genes']) and all(torch.equal(a, b) for a,b in zip(first.parameters(), second.parameters()))
    assert sorted(p.name for p in (tmp_path/'model').iterdir()) == ['config.json', 'model.safetensors']

def test_some_of_the_spots(files, tmp_path, capsys):
    histogene_train([str(files/'X1.h5ad')], out=str(tmp_path/'a'), max_spots=10, n_top=40, min_spots=5, epochs=1, setting=TINY[1:4])
    assert '1 sections, 10 spots' in capsys.readouterr().out
    s = read_section(files/'X1.h5ad', verbose=False)
    some, same, other = (list(commands._some(s, 10, seed).obs_names) for seed in (0, 0, 1))
    assert some == same != other and len(set(some)) == 10 and commands._some(s, 10_000, 0) is s
    with pytest.raises(InputError, match='max_spots'): histogene_train([str(files/'X1.h5ad')], out=str(tmp_path/'b'), max_spots=0)
    assert not (tmp_path/'b').exists()

def test_remembered_or_predicted(files, model, tmp_path, capsys):
    for name,said in (('X1', True), ('Y1', False)):
        histogene_predict(str(model), str(files/f'{name}.h5ad'), out=str(tmp_path/f'{name}.h5ad'))
        assert ('how well it was remembered' in capsys.readouterr().out) == said

def test_sections_that_teach_the_array_twice(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    twice = pytest.raises(InputError, match='is given to --array-from, and is trained on or given there twice')
    for more in ['./X1.h5ad'], ['X2.h5ad', str(files/'X2.h5ad')]:
        with twice: histogene_train([str(files/'X1.h5ad')], model='texture', out=str(tmp_path/'m'), array_from=more)
    (files/'own.csv').write_text('path,name\nX1.h5ad,mine\n')
    with twice: histogene_train(samples=str(files/'own.csv'), model='texture', out=str(tmp_path/'m'), array_from=['X1.h5ad'])
    (files/'own.csv').unlink()

def test_tables_are_alike_on_all_systems(model, files, tmp_path, monkeypatch):
    "Else a prediction could not be written again over its own, where lines end in two characters"
    monkeypatch.setattr(os, 'linesep', '\r\n')
    for _ in range(2): histogene_predict(str(model), str(files/'Y1.h5ad'), out=str(tmp_path/'p.h5ad'))
    assert b'\r' not in (tmp_path/'p.csv').read_bytes()

def test_genes_that_all_predictions_have(predictions, files, tmp_path, capsys):
    "Those are drawn; with none, it is refused"
    import matplotlib
    matplotlib.use('Agg')
    first = predictions['spots'][1]
    best = list(first.var_names[:2])
    write_h5ad(first[:, best].copy(), tmp_path/'few.h5ad'); write_h5ad(first[:, first.var_names[2:5]].copy(), tmp_path/'others.h5ad')
    histogene_plot([str(files/'spots.h5ad'), str(tmp_path/'few.h5ad')], out=str(tmp_path/'maps.png'))
    assert set(capsys.readouterr().out.split(' in ')[0].split(', ')) == set(best)
    with pytest.raises(InputError, match='no gene in common. Draw'): histogene_plot([str(tmp_path/'few.h5ad'), str(tmp_path/'others.h5ad')], out=str(tmp_path/'maps.png'))
    with pytest.raises(InputError, match='is not among the 2 predicted.*Leave it out'): histogene_plot([str(files/'spots.h5ad'), str(tmp_path/'few.h5ad')], genes=[first.var_names[3]], out=str(tmp_path/'maps.png'))

@pytest.mark.parametrize('kind', ['h5ad', 'csv', 'json'])
def test_files_of_others_stay(model, files, tmp_path, kind):
    "What the command did not write is never overwritten; an earlier prediction is"
    mine = tmp_path/f'p.{kind}'
    if kind == 'h5ad': shutil.copy(files/'X1.h5ad', mine)
    else: mine.write_text({'csv': 'gene,r,mine\nA,1,2\n', 'json': '{"command": "histogene_train"}'}[kind])
    before = mine.read_bytes()
    with pytest.raises(InputError, match=f'p.{kind}: this file is there already, and histogene_predict did not write it'): histogene_predict(str(model), str(files/'Y1.h5ad'), out=str(tmp_path/'p.h5ad'))
    assert mine.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [mine.name]

@pytest.mark.parametrize('kind', ['png', 'pdf', 'svg'])
def test_pictures_of_others_stay(predictions, files, tmp_path, kind):
    "A photograph in the place of a plot; an earlier plot is drawn anew"
    import matplotlib
    matplotlib.use('Agg')
    mine = tmp_path/f'he.{kind}'
    mine.write_bytes((files/'Y1.jpg').read_bytes())
    with pytest.raises(InputError, match=f'he.{kind}: this file is there already, and histogene_plot did not write it'): histogene_plot([str(files/'spots.h5ad')], out=str(mine))
    assert mine.read_bytes() == (files/'Y1.jpg').read_bytes()
    for _ in range(2): histogene_plot([str(files/'spots.h5ad')], genes=[predictions['spots'][1].var_names[0]], out=str(tmp_path/f'maps.{kind}'))

def test_models_of_others_stay(files, tmp_path):
    (tmp_path/'m').mkdir(); (tmp_path/'m'/'model.safetensors').write_bytes(b'mine'); (tmp_path/'model').mkdir()
    with pytest.raises(InputError, match='there is model.safetensors of another program'): histogene_train([str(files/'X1.h5ad')], out=str(tmp_path/'m'))
    with pytest.raises(InputError, match='files already, and histogene_demo did not make them'): commands.histogene_demo(out=str(tmp_path))
    assert (tmp_path/'m'/'model.safetensors').read_bytes() == b'mine' and len(list(tmp_path.iterdir())) == 2

def test_images_of_two_scales_and_a_plot_of_two_sections_are_said(model, files, predictions, tmp_path, capsys):
    import matplotlib
    matplotlib.use('Agg')
    low = read_section(files/'X2.h5ad', verbose=False)
    with Image.open(place(low).path) as im: im.resize((300, 300)).save(tmp_path/'small.png')
    low.obsm['spatial'] = low.obsm['spatial']/4
    place(low).scalefactors.update(spot_diameter_fullres=28.); place(low).metadata.update(source_image_path=str(tmp_path/'small.png'))
    for other,said in ((files/'X2.h5ad', False), (write_h5ad(low, tmp_path/'low.h5ad') or tmp_path/'low.h5ad', True)):
        histogene_train([str(files/'X1.h5ad'), str(other)], out=str(tmp_path/f'm{said}'), n_top=40, min_spots=5, epochs=1, setting=TINY[1:4])
        assert ('LOOK at the images: a spot is 28 pixels wide in X2 and 112 pixels wide in X1' in capsys.readouterr().out) == said
    for name,said in (('Y1', False), ('X1', True)):
        histogene_plot([str(files/'spots.h5ad')], section=str(files/f'{name}.h5ad'), out=str(tmp_path/'maps.png'))
        assert ('predicted was Y1, measured is X1' in capsys.readouterr().out) == said

def test_a_plot_beside_its_own_section_under_another_name(model, files, table, tmp_path, capsys):
    histogene_predict(str(model), samples=table('path,name', f'{files/"Y1.h5ad"},mine'), out=str(tmp_path/'p'))
    capsys.readouterr()
    histogene_plot([str(tmp_path/'p'/'mine.h5ad')], section=str(files/'Y1.h5ad'), out=str(tmp_path/'maps.png'))
    assert 'LOOK' not in capsys.readouterr().out

def test_a_model_of_ones_own_that_has_no_precision(files, tmp_path, monkeypatch, capsys):
    (tmp_path/'of_mine.py').write_text("""import torch
from histogene_nb.interface import SpotModel
class Mean(SpotModel):
    def __init__(self, n_genes):
        super().__init__(n_genes=n_genes)
        self.mean = torch.nn.Parameter(torch.zeros(n_genes))
    def look(self, section, cache=None): return torch.zeros(len(section), 1),
    def forward(self, nothing): return nothing + self.mean
    def learn(self, examples, sections, seed=0, device=None, checkpoint=None):
        self.mean.data = torch.cat([y for *_,y in examples]).mean(0)
        return [1., 1.]
""")
    monkeypatch.syspath_prepend(tmp_path)
    histogene_train([str(files/'X1.h5ad')], model='of_mine:Mean', out=str(tmp_path/'m'), n_top=40, min_spots=5)
    assert 'model in' in capsys.readouterr().out and (tmp_path/'m'/'model.safetensors').exists()

def test_a_section_teaches_once(files, tmp_path):
    with pytest.raises(InputError, match='X1.h5ad is given twice'): histogene_train([str(files/'X1.h5ad'), str(files/'..'/files.name/'X1.h5ad')], out=str(tmp_path/'m'))

@pytest.mark.parametrize('text', ['Path,Name\nA.h5ad,mine\n', 'path,name,,\nA.h5ad,mine,,\n,,,\n,,,\n', 'path;NAME\r\n\r\nA.h5ad;mine\r\n;\r\n'])
def test_tables_of_samples_as_excel_leaves_them(tmp_path, text):
    (tmp_path/'s.csv').write_text(text, newline='')
    assert commands._samples(tmp_path/'s.csv') == [dict(path=str(tmp_path/'A.h5ad'), name='mine')]

def test_comparison_that_fails(predictions, model, files, tmp_path, monkeypatch):
    "The prediction is written all the same, in the place of an earlier one and its table"
    for kind in ('h5ad', 'csv', 'json'): shutil.copy(files/f'spots.{kind}', tmp_path/f'p.{kind}')
    def fails(*_): raise InputError('It cannot be compared.')
    monkeypatch.setattr('histogene_nb.evaluation.gene_correlations', fails)
    with pytest.raises(InputError, match='It cannot be compared. The prediction itself is in .*p.h5ad'): histogene_predict(str(model), str(files/'Y1.h5ad'), out=str(tmp_path/'p.h5ad'))
    assert json.loads((tmp_path/'p.json').read_text())['results'] == {} and not (tmp_path/'p.csv').exists()
    assert np.allclose(ad.read_h5ad(tmp_path/'p.h5ad').X, predictions['spots'][1].X, atol=1e-5)

def test_two_predictions_of_one_name(predictions, files, tmp_path, monkeypatch):
    "Each is drawn, under the path that tells them apart"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(plt, 'close', drawn.append)
    for folder in 'ab': Path(folder).mkdir(); shutil.copy(files/'spots.h5ad', f'{folder}/p.h5ad')
    histogene_plot(['a/p.h5ad', 'b/p.h5ad', str(files/'x4.h5ad')], genes=[predictions['spots'][1].var_names[0]])
    assert [ax.get_title() for ax in drawn[0].axes if ax.get_title()] == ['image', 'a/p\nHisToGene', 'b/p\nHisToGene', 'x4\nHisToGene_SR']

# --- errors

def test_errors_are_one_line(model, files, tmp_path):
    (tmp_path/'cut.jpg').write_bytes((files/'Y1.jpg').read_bytes()[:50_000])
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    def out(n): return ['--out', tmp_path/n]
    cases = [(['histogene_train', files/'X1.h5ad', '--out', model, *TINY], 'there is a trained model already'),
             (['histogene_train', 'Q9', '--root', files/'her2st', *out('m1')], 'Q9'),
             (['histogene_train', files/'X1.h5ad', '--device', 'cuda:77', *TINY, *out('m2')], "There is no device 'cuda:77'"),
             (['histogene_train', files/'X1.h5ad', '--min-spots', 99_999, *out('m3')], 'Lower --min-spots.'),
             (['histogene_train', files/'X1.h5ad', '--n-top', 0, *out('m4')], '(--n-top) must be a whole number'),
             (['histogene_train', files/'X1.h5ad', *TINY, '--setting', 'depth=two', *out('m5')], '--setting depth=two: this is int, such as depth=8.'),
             (['histogene_train', files/'X1.h5ad', '--setting', 'colour=blue', *out('m6')], '--setting colour is no setting of HisToGene, which has'),
             (['histogene_train', files/'X1.h5ad', '--setting', 'epochs=2', *out('m7')], '--setting epochs=2: give it as --epochs.'),
             (['histogene_predict', tmp_path/'nothing', files/'Y1.h5ad', *out('p.h5ad')], 'is not a saved model'),
             (['histogene_predict', model, files/'Z9.h5ad', *out('p.h5ad')], 'Z9.h5ad'),
             (['histogene_predict', model, '--image', tmp_path/'cut.jpg', '--spot-diameter', 112, *out('p.h5ad')], 'cut.jpg'),
             (['histogene_predict', model, *out('p.h5ad')], 'Give either a section, --samples FILE or --image'),
             (['histogene_predict', model, files/'Y1.h5ad', '--superres', 3, *out('p.h5ad')], 'is a square'),
             (['histogene_predict', model, files/'Y1.h5ad', '--out', files/'Y1.h5ad'], 'the section itself'),
             (['histogene_download', 'B4', 'J7', '--no-images', '--root', tmp_path/'data'], "no section 'J7'")]
    done = run_all(*(c for c,_ in cases[1:]))
    done.insert(0, finish(start(*cases[0][0])))
    for (args,message),p in zip(cases, done):
        lines = [l for l in p.err.splitlines() if l.strip() and not l.endswith((' so far', ' left'))]
        assert p.returncode == 1 and len(lines) == 1 and lines[0].startswith(f'{args[0]}: ') and message in lines[0], (args, p.returncode, p.err)
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and p.name != 'cut.jpg'], 'something was written'

# --- download and demo

@pytest.mark.parametrize('typed,expected', [([], (None, [], True)), (['--no-images'], (None, [], False)), (['--root', 'r'], ('r', [], True)),
                                            (['B4', 'C2'], (None, ['B4', 'C2'], True))])
def test_download_options(typed, expected):
    from fastcore.script import anno_parser
    args = anno_parser(histogene_download).parse_args(typed)
    assert (args.root, args.sections or [], args.images) == expected

def test_demo(tmp_path):
    process = run('histogene_demo', '--epochs', 2, '--out', tmp_path/'demo')
    assert {p.name for p in (tmp_path/'demo').iterdir()} == {'sections', 'model', 'observed.h5ad', 'predicted.h5ad', 'predicted_4x.h5ad', 'report.html'}
    page = (tmp_path/'demo/report.html').read_text(encoding='utf-8')
    assert page.count('src="data:image/png;base64,') >= 3 and page.count('<img') == page.count('src="data:')
    assert not re.search(r'(?:src|href)="(?!data:|#)|url\((?!data:)|@import|<script|<link', page)
    assert 'Held-out maps' in page and 'Mean r over' in page and 'position on the array alone' in page and 'HisToGene*' in page
    for name in ('HisToGene', 'HisToGene*', 'position only'): assert name in process.out
    a, dense = (ad.read_h5ad(tmp_path/f'demo/{n}.h5ad') for n in ('predicted', 'predicted_4x'))
    assert section_name(a) == section_name(dense) == 'Z2' and dense.n_obs > 2*a.n_obs

# --- the real sections

@needs_images
def test_real_sections(tmp_path):
    panel = Path(os.environ['HISTOGENE_DATA'])/'reference/published_panel_785.csv'
    out, cache = tmp_path/'model', ['--cache', tmp_path/'cache']
    run('histogene_train', 'B4', '--panel', panel, '--out', out, '--setting', 'dim=32', 'depth=1', 'heads=2', '--epochs', 1, '--lr', 1e-3, *cache)
    spots, dense = run_all(['histogene_predict', out, 'C3', '--out', tmp_path/'C3.h5ad', *cache],
                           ['histogene_predict', out, 'C3', '--superres', 4, '--out', tmp_path/'C3_4x.h5ad', *cache])
    assert spots.returncode == dense.returncode == 0, spots.err + dense.err
    a, b = ad.read_h5ad(tmp_path/'C3.h5ad'), ad.read_h5ad(tmp_path/'C3_4x.h5ad')
    assert a.n_vars == b.n_vars == 785 and a.n_obs == read_section('C3').n_obs and b.n_obs > 3*a.n_obs and np.isfinite(b.X).all()
    for name in ('C3', 'C3_4x'): assert json.loads((tmp_path/f'{name}.json').read_text())['results']
