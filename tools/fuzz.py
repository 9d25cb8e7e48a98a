"""Damaged files of every kind that the package reads: each is refused with the package's own error, or read correctly. The table goes into the package.

    python tools/fuzz.py 2000 [seed] [folder]       some ten minutes on one core

A case is one input (a folder of files that the package made of synthetic tissue) of which one file is damaged, then read in a process that is watched.
It counts as refused where `InputError` is raised and every file is as it was; as read where what is read is sound and, in all that the damaged file
does not say, equal to what the whole input says; else as failed: another exception, a crash, 20 s of computing, 2 GB of memory, 20 lines of
warnings, a file left behind or changed. Failures are printed, and their files kept in `folder`.
"""
import gzip, io, json, multiprocessing, os, pickle, resource, runpy, shutil, struct, sys, tempfile, time, traceback, zlib
from contextlib import redirect_stdout, suppress
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
import anndata as ad, h5py, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, tifffile, torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import sparse
from scipy.io import mmwrite
import histogene_nb
from histogene_nb.commands import _TABLE, histogene_predict, histogene_reproduce, histogene_train
from histogene_nb.fold_tables import read_tables
from histogene_nb.folds import provenance, write_h5ad
from histogene_nb.cscc import read_cscc, write_cscc
from histogene_nb.ranking import enrich_pathways
from histogene_nb.expression import read_panel
from histogene_nb.interface import from_pretrained, save_pretrained, predict
from histogene_nb.patches import cut_patches, extract_patches
from histogene_nb.readers import read_section
from histogene_nb.files import InputError, whole_file
from histogene_nb.her2st import read_her2st, write_her2st
from histogene_nb.images import decoding, open_image
from histogene_nb.sections import add_hires, section_name, small_copy
from histogene_nb.texture import TextureModel
from histogene_nb.tissue import synthetic_section
from histogene_nb.model import HisToGene

TINY = dict(dim=16, depth=1, heads=2)
SETTING = [f'{k}={v}' for k,v in TINY.items()]                                   # the same, for the command
GENES = 30

# --- inputs: how each is made in a folder, and how it is read from there

def tissue(folder, name='X1', genes=None):
    "A small section with few genes, its image in `folder`"
    section = synthetic_section(folder, name, px=800, pitch=80, spot_diameter=40)
    section.uns['histogene'].pop('truth')
    return section[:, np.asarray(section.X.sum(0)).ravel().argsort()[-GENES:] if genes is None else genes].copy()

def picture(section): return Path(section.uns['spatial'][section_name(section)]['metadata']['source_image_path'])

def place(section, x='pixel_x', y='pixel_y', col='array_col', row='array_row', spot='spot'):
    "A table of a section's places"
    return pd.DataFrame({spot: section.obs_names, row: section.obs.array_row.values, col: section.obs.array_col.values, y: section.obsm['spatial'][:, 1], x: section.obsm['spatial'][:, 0]})

def her2(home, section, packed):
    write_her2st(section, home)
    file = home/'ST-cnts'/'X1.tsv.gz'
    if not packed: file.with_suffix('').write_bytes(gzip.decompress(file.read_bytes())); file.unlink()

def visium(home, section, counts, positions):
    "What spaceranger writes, as far as it is read"
    home, spatial, ids = home/'V1', home/'V1'/'spatial', [f'ENSG{i:011}' for i in range(section.n_vars)]
    spatial.mkdir(parents=True)
    (spatial/'scalefactors_json.json').write_text(json.dumps(dict(spot_diameter_fullres=40., tissue_hires_scalef=.5, fiducial_diameter_fullres=60., tissue_lowres_scalef=.2)))
    with Image.open(picture(section)) as im: im.resize((400, 400)).save(spatial/'tissue_hires_image.png')
    shutil.copy(picture(section), home)
    places = place(section, 'pxl_col_in_fullres', 'pxl_row_in_fullres', spot='barcode')
    places.insert(1, 'in_tissue', 1)
    if positions == 'parquet': places.to_parquet(spatial/'tissue_positions.parquet', index=False)
    else: places.to_csv(spatial/('tissue_positions_list.csv' if positions == 'old' else 'tissue_positions.csv'), header=positions != 'old', index=False)
    if counts == 'mtx':
        folder = home/'filtered_feature_bc_matrix'
        folder.mkdir()
        for name,table in dict(barcodes=pd.DataFrame(section.obs_names), features=pd.DataFrame(dict(i=ids, g=section.var_names, t='Gene Expression'))).items(): table.to_csv(folder/f'{name}.tsv.gz', sep='\t', header=False, index=False)
        with gzip.open(folder/'matrix.mtx.gz', 'wb') as f: mmwrite(f, sparse.coo_matrix(section.X.T.astype(int)))
        return
    X = sparse.csr_matrix(section.X)
    with h5py.File(home/'filtered_feature_bc_matrix.h5', 'w') as f:
        for k,v in {'barcodes': section.obs_names, 'data': X.data.astype('i4'), 'indices': X.indices.astype('i8'), 'indptr': X.indptr.astype('i8'), 'shape': np.array(X.shape[::-1], 'i4'), 'features/id': ids,
                    'features/name': section.var_names, 'features/feature_type': ['Gene Expression']*X.shape[1], 'features/genome': ['GRCh38']*X.shape[1]}.items():
            v = np.asarray(v)
            f.create_dataset(f'matrix/{k}', data=v.astype('S') if v.dtype.kind in 'OUT' else v, compression='gzip')

def tables(home, section, kind):
    home = home/'T1'
    home.mkdir()
    shutil.copy(picture(section), home)
    for name,table in dict(counts=section.to_df().astype(int).rename_axis('spot').reset_index(), coordinates=place(section)).items():
        if kind == 'parquet': table.to_parquet(home/f'{name}.parquet', index=False)
        else: table.to_csv(home/f'{name}.{kind}', sep=',' if kind == 'csv' else '\t', index=False)

def h5ad(home, section, kind):
    section, name = section.copy(), section_name(section)
    if kind == 'csr': section.layers['again'] = section.X.copy()
    if kind == 'dense': section.X = section.X.toarray()
    if kind == 'image': add_hires(section, 200); section.uns['spatial'][name]['metadata'] = {}
    else:
        if picture(section).parent != home: shutil.copy(picture(section), home)
        section.uns['spatial'][name]['metadata']['source_image_path'] = picture(section).name
    write_h5ad(section, home/f'{name}.h5ad')

def picture_name(kind): return f'image.{dict(ome="ome.tif", tiled="tif", pyramid="tif").get(kind, kind)}'

def image(home, section, kind):
    with Image.open(picture(section)) as im:
        if kind in ('jpg', 'png', 'tif'): return im.crop((200, 200, 600, 560)).save(home/picture_name(kind))
        pixels = np.asarray(im)[200:560, 200:600]
    with tifffile.TiffWriter(home/picture_name(kind), ome=kind == 'ome') as f:
        f.write(pixels, photometric='rgb', tile=(128, 128), compression='jpeg' if kind == 'pyramid' else 'deflate', subifds=1 if kind == 'pyramid' else 0, **dict(metadata=dict(axes='YXS')) if kind == 'ome' else {})
        if kind == 'pyramid': f.write(pixels[::2, ::2], photometric='rgb', tile=(128, 128), compression='jpeg', subfiletype=1)

def model_of(section, kind='HisToGene'):
    "A trained or, for texture, an unfitted model of this section's genes"
    if kind == 'HisToGene': return HisToGene.train_on([section], list(section.var_names), epochs=1, device='cpu', **TINY)[0]
    model = TextureModel(section.n_vars, 2, (1.,), 32, members=1, dim=16, depth=1, heads=2)
    model.about = dict(genes=list(section.var_names), normalization='paper', grid=[[.01, 0.], [0., .01], [0., 0.]], training={})
    return model

def training(section, file, epochs): # losses of a small model, trained from the checkpoint on
    return HisToGene.train_on([section], list(section.var_names), epochs=epochs, every=0, device='cpu', checkpoint=file, **TINY)[1]

def run_of(home, section):
    "A cross-validation of three sections, of which one fold is then taken out"
    for s in (section, *(tissue(home, n, section.var_names) for n in ('Y1', 'Z1'))): h5ad(home, s, 'csr')
    panel(home, section)
    reproduce(home)
    shutil.rmtree(home/'run'/'baselines-Z1-seed0')

@cache
def undamaged(): return read_section('made/section/X1.h5ad', verbose=False)     # in a process that is at home in the folder of all inputs

def panel(home, section): pd.DataFrame(dict(gene=section.var_names)).to_csv(home/'panel.csv', index=False)

def reproduce(home):
    with redirect_stdout(io.StringIO()): histogene_reproduce([str(home/f'{n}.h5ad') for n in ('X1', 'Y1', 'Z1')], out=str(home/'run'), methods='baselines', panel=str(home/'panel.csv'), device='cpu')

def gmt(home, section):
    genes = list(section.var_names)
    (home/'sets.gmt').write_text(''.join('\t'.join([f'SET_{i}', 'about it', *genes[i::3]]) + '\n' for i in range(3)))

# what is read, as parts: a table or an array each

def seen(section):
    "A section's parts, once they are sound"
    X, name = section.to_df(), section_name(section)
    assert len(X) and np.isfinite(X).all(axis=None) and (X >= 0).all(axis=None) and (X % 1 == 0).all(axis=None), 'counts are not whole numbers from 0'
    assert section.obs_names.is_unique and section.var_names.is_unique and not section.obs.duplicated(['array_col', 'array_row']).any(), 'something is there twice'
    places, path = section.obs[['array_col', 'array_row']].assign(x=section.obsm['spatial'][:, 0], y=section.obsm['spatial'][:, 1]).astype(float), section.uns['spatial'][name]['metadata'].get('source_image_path')
    assert np.isfinite(places).all(axis=None), 'spots without a place'
    parts = dict(counts=X, places=places)
    if 'annotation' in section.obs: parts['labels'] = section.obs[['annotation']].astype(str)
    if path:
        with open_image(path) as im: assert (places[['x', 'y']] >= 0).all(axis=None) and (places[['x', 'y']] < im.size).all(axis=None), 'spots beside the image'
        patches = extract_patches(section, 32)
        assert patches.shape == (len(X), 3, 32, 32)
        parts['patches'] = pd.DataFrame(patches.flatten(1).numpy(), index=X.index)
    return parts

def see_image(path):
    "An image's size, once as many pixels are decoded as it claims"
    with open_image(path) as im, decoding(path): (w, h), small = im.size, small_copy(im, 100)
    assert max(small.shape) <= 100 and small.dtype == np.uint8 and small.shape[2] == 3, 'the small copy is of another shape'
    side, places = 128, np.stack(np.meshgrid(np.arange(64, w + 64, 128), np.arange(64, h + 64, 128)), -1).reshape(-1, 2)
    if len(places) > 10_000: raise AssertionError(f'a file of {path.stat().st_size} bytes has {w} x {h} pixels')
    with open_image(path) as im, decoding(path): patches, _ = cut_patches(im, places, side)
    assert patches.shape == (len(places), 3, side, side)
    return {}

def see_cached(home, make):
    "Patches of which an earlier copy is in a cache"
    section = read_section(home/'X1.h5ad', verbose=False)
    return dict(patches=make(section, cache=home/'cache'))

def see_model(home, section):
    "What a saved model predicts"
    model = from_pretrained(home/'model')
    if model.name == 'HisToGene': predicted = predict(model, section, 'cpu').to_df()
    else:
        with torch.no_grad(): predicted = pd.DataFrame(model(torch.linspace(-1, 1, 3*160*len(model.config['windows'])).reshape(3, -1), torch.zeros(3, 2, dtype=torch.long)).numpy(), columns=model.about['genes'])
    return dict(predicted=predicted)

def earlier_prediction(file):
    "What histogene_predict may have written there at another time"
    file.parent.mkdir()
    ad.AnnData(np.zeros((1, 1), np.float32), uns=dict(histogene=dict(predicted_by='HisToGene'))).write_h5ad(file)
    file.with_suffix('.csv').write_text(_TABLE + '\n')
    file.with_suffix('.json').write_text(json.dumps(dict(command='histogene_predict of another time')))

def see_predicted(home, **kwargs):
    out = home/'out'/'predicted.h5ad'
    typed('histogene_predict', str(home/'model'), out=str(out), device='cpu', **kwargs)
    predicted = ad.read_h5ad(out)
    assert set(json.loads(out.with_suffix('.json').read_text())) > {'results', 'command'} and np.isfinite(predicted.X).all()
    if 'section' in kwargs: assert len(pd.read_csv(out.with_suffix('.csv'))) == predicted.n_vars
    return dict(predicted=predicted.to_df())

def see_trained(home, **kwargs):
    typed('histogene_train', [str(home/'X1.h5ad')], out=str(home/'out'/'model'), panel=str(home/'panel.csv'), epochs=1, device='cpu', setting=SETTING, **kwargs)
    model = from_pretrained(home/'out'/'model')
    assert model.about['genes'] == read_panel(home/'panel.csv')
    return {}

def see_run(home):
    reproduce(home)
    r = read_tables(home/'run'/'tables')['r'].T
    r.index = ['+'.join(map(str, i)) for i in r.index]
    return dict(r=r.replace(np.inf, np.nan))

def see_pathways(home, section):
    ranking = pd.DataFrame(dict(mean_neg_log10_p=np.linspace(9, 1, section.n_vars)), index=section.var_names)
    found = enrich_pathways(ranking, home/'sets.gmt', GENES//2, 20, 2)
    assert len(found) and found.p.between(0, 1).all()
    return {}

def typed(name, *args, shell=False, **kwargs):
    "A command, called or typed in a shell; one that refuses there says so in one line"
    if not shell:
        with redirect_stdout(io.StringIO()): return dict(histogene_predict=histogene_predict, histogene_train=histogene_train)[name](*args, **kwargs)
    words = [w for a in args for w in (a if isinstance(a, list) else [a])] + ([kwargs.pop('section')] if 'section' in kwargs else [])
    code, said = script(Path(sys.executable).parent/name, [*words, *(f'--{k}={v}' for k,vs in kwargs.items() for v in (vs if isinstance(vs, list) else [vs]))])
    if not code: return
    assert code == 1 and len(said.splitlines()) == 1 and said.startswith(f'{name}: '), f'exit code {code}: {said[-2000:]}'
    raise InputError(said)

def script(file, words):
    "Exit code and stderr of a console script, in a process forked from this one, where PyTorch is imported already"
    with tempfile.TemporaryFile('w+', errors='replace') as said:
        pid = os.fork()
        if not pid:
            code, sys.argv = 0, [str(file), *words]
            for n in (1, 2): os.dup2(said.fileno() if n == 2 else os.open(os.devnull, os.O_WRONLY), n)
            del sys.modules['histogene_nb.commands']                          # it looks at sys.argv when it is imported
            try: runpy.run_path(str(file), run_name='__main__')
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else int(bool(e.code))
                if isinstance(e.code, str): os.write(2, f'{e.code}\n'.encode(errors='replace'))
            except BaseException: code = 1; os.write(2, traceback.format_exc().encode(errors='replace'))
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (said.seek(0), said.read())[1]

def inputs():
    "Name -> how it is made in a folder, how it is read from there, and which parts the files of a name say (all others must stay as they are)"
    def with_model(make, kind='HisToGene', out=True):
        def f(home, section):
            make(home, section)
            save_pretrained(model_of(section, kind), home/'model')
            if out: earlier_prediction(home/'out'/'predicted.h5ad')
        return f
    both = lambda home, section: (h5ad(home, section, 'csr'), panel(home, section))
    cached = lambda make: lambda home, section: (h5ad(home, section, 'csr'), see_cached(home, make))
    spatial = {'*counts*': 'counts', '*coordinates*': 'places patches', '*.jpg': 'patches', 'V1/*.jpg': 'places patches', '*ST-cnts*': 'counts', '*selection*': 'places patches', '*lbl*': 'labels', '*stdata*': 'counts',
               '*matrix*': 'counts', '*positions*': 'places patches', '*scalefactors*': 'places patches', '*.png': 'places patches', '*.h5ad': 'counts places patches labels'}
    found = {}
    for packed in (True, False): found[f'HER2+, counts {"packed" if packed else "plain"}'] = partial(her2, packed=packed), lambda home: seen(read_her2st(home, 'X1', 40, verbose=False)), spatial
    found['cSCC'] = lambda home, section: write_cscc(section, home, 'P2_ST_rep1'), lambda home: seen(read_cscc(home, 'P2_ST_rep1', 40, verbose=False)), spatial
    for counts,positions in (('mtx', 'old'), ('h5', 'csv'), ('h5', 'parquet')): found[f'Visium, {counts}, {positions} positions'] = partial(visium, counts=counts, positions=positions), lambda home: seen(read_section(home/'V1', verbose=False)), spatial
    for kind in ('csv', 'tsv', 'parquet'): found[f'tables, {kind}'] = partial(tables, kind=kind), lambda home: seen(read_section(home/'T1', verbose=False)), spatial
    for kind in ('csr', 'dense', 'image'): found[f'h5ad, {dict(image="embedded image").get(kind, kind)}'] = partial(h5ad, kind=kind), lambda home: seen(read_section(home/'X1.h5ad', verbose=False)), spatial
    for kind in ('jpg', 'png', 'tif', 'tiled', 'pyramid', 'ome'): found[f'image, {kind}'] = partial(image, kind=kind), lambda home, kind=kind: see_image(home/picture_name(kind)), {}
    found['panel'] = panel, lambda home: dict(length=len(read_panel(home/'panel.csv'))) and {}, {}
    found['gene sets'] = gmt, lambda home: see_pathways(home, undamaged()), {}
    for kind in ('HisToGene', 'texture'): found[f'model, {kind}'] = with_model(lambda *_: None, kind, False), lambda home: see_model(home, undamaged()), {}
    found['checkpoint'] = lambda home, section: training(section, home/'training.safetensors', 1), lambda home: dict(losses=training(undamaged(), home/'training.safetensors', 2)), {}
    found['cached patches'] = cached(partial(extract_patches, size=32)), lambda home: see_cached(home, partial(extract_patches, size=32)), {'*.h5ad': 'patches', '*.jpg': 'patches'}
    for shell in (False, True):
        where = ' in a shell' if shell else ''
        found[f'histogene_predict{where}'] = with_model(partial(h5ad, kind='csr')), lambda home, shell=shell: see_predicted(home, section=str(home/'X1.h5ad'), shell=shell), {'*X1*': 'predicted'}
        found[f'histogene_predict --image{where}'] = with_model(partial(image, kind='pyramid')), lambda home, shell=shell: see_predicted(home, image=str(home/'image.tif'), spot_diameter=40, shell=shell), {'*image*': 'predicted'}
        found[f'histogene_train{where}'] = both, lambda home, shell=shell: see_trained(home, shell=shell), {}
    found['histogene_reproduce, continued'] = run_of, see_run, {'*.h5ad': 'r', '*panel*': 'r', '*.jpg': 'r', '*scores.csv': 'r'}
    return found

# --- damage: what is done to a file, by kind; each changes the file at `path`, and raises `Unfit` where it is not for such a file

class Unfit(Exception): pass

def some(rng, n): return int(rng.integers(n)) if n > 0 else 0

def flip(b, rng, near=None):
    b = bytearray(b)
    ends = [*range(min(near, len(b))), *range(max(0, len(b) - near), len(b))] if near else range(len(b))
    for _ in range(rng.integers(1, 9)): b[ends[some(rng, len(ends))]] ^= 1 << some(rng, 8)
    return bytes(b)

def block(b, rng, f):
    at = some(rng, len(b))
    end = at + 1 + some(rng, max(1, len(b)//3))
    return b[:at] + f(b[at:end]) + b[end:]

def as_text(f): # damage of text, by its letters
    def g(b, rng):
        try: text = b.decode()
        except UnicodeDecodeError: raise Unfit from None
        return f(text, rng)
    return g

BYTES = {'empty': lambda b, rng: b'', 'cut short': lambda b, rng: b[:some(rng, len(b))], 'last bytes lost': lambda b, rng: b[:-1 - some(rng, 16)], 'bits flipped': flip, 'bits flipped near the ends': partial(flip, near=400),
         'block zeroed': lambda b, rng: block(b, rng, lambda c: bytes(len(c))), 'block twice': lambda b, rng: block(b, rng, lambda c: c + c), 'block lost': lambda b, rng: block(b, rng, lambda c: b''),
         'bytes inserted': lambda b, rng: block(b, rng, lambda c: rng.bytes(1 + some(rng, 50)) + c), 'noise': lambda b, rng: rng.bytes(len(b)), 'NUL bytes': lambda b, rng: block(b, rng, lambda c: bytes(1 + some(rng, 8)) + c),
         'text more at the end': lambda b, rng: b + b'\nmore', 'UTF-16': as_text(lambda t, rng: t.encode('utf-16')), 'Latin-1': as_text(lambda t, rng: block(t, rng, lambda c: '\xe9\xfc' + c).encode('latin-1', 'replace')),
         'byte order mark': as_text(lambda t, rng: b'\xef\xbb\xbf' + t.encode()), 'CRLF': as_text(lambda t, rng: t.replace('\n', '\r\n').encode())}

def on_bytes(f):
    def damage(path, rng, others):
        b = path.read_bytes()
        inside = path.suffix == '.gz' and (rng.random() < .7 or f not in BYTES.values())   # of packed files mostly what is packed
        path.write_bytes(gzip.compress(f(gzip.decompress(b), rng)) if inside else f(b, rng))
    return damage

def cell(value):
    def f(rows, rng):
        i, j = 1 + some(rng, len(rows) - 1), some(rng, len(rows[0]))
        j = min(j, len(rows[i]) - 1)
        rows[i][j] = value(rows[i][j]) if callable(value) else value
        return rows
    return f

def column(f):
    def g(rows, rng):
        order = f(list(range(len(rows[0]))), rng)
        return [[r[j] for j in order if j < len(r)] for r in rows]
    return g

def dropped(x, rng): x = list(x); x.pop(some(rng, len(x))); return x
def doubled(x, rng): return [*x, x[some(rng, len(x))]]
def shuffled(x, rng): return [x[i] for i in rng.permutation(len(x))]
def body(f): return lambda rows, rng: rows[:1] + f(rows[1:], rng)
def renamed(rows, rng): rows[0][some(rng, len(rows[0]))] = 'something'; return rows
def less(text): return f'-{text}'

CELLS = {**{f'cell {k}': cell(v) for k,v in {'negative': less, 'fractional': lambda t: f'{t}.5', 'NaN': 'nan', 'infinite': '-inf', '1e300': '1e300', 'of 400 digits': '9'*400, 'text': 'two', 'empty': '', 'far away': lambda t: f'{t}00000', 'with accents': 'é ü'}.items()},
         'column lost': column(dropped), 'column twice': column(doubled), 'columns shuffled': column(shuffled), 'column renamed': renamed, 'row twice': body(doubled), 'row lost': body(dropped), 'rows shuffled': body(shuffled),
         'no rows': lambda rows, rng: rows[:1], 'header lost': lambda rows, rng: rows[1:], 'row too long': lambda rows, rng: rows[:-1] + [[*rows[-1], *rows[-1]]], 'row too short': lambda rows, rng: rows[:-1] + [rows[-1][:-1]],
         'all of one column lost': lambda rows, rng: [r[:1] for r in rows]}

def on_cells(f):
    def as_rows(text, rng):
        sep = max('\t, ', key=text[:2000].count)
        rows = f([l.split(sep) for l in text.splitlines()], rng)
        return ''.join(sep.join(r) + '\n' for r in rows).encode()
    def damage(path, rng, others):
        if path.suffix != '.parquet': return on_bytes(as_text(as_rows))(path, rng, others)
        table = pd.read_parquet(path)
        head, *rows = f([list(table), *table.astype(str).to_numpy().tolist()], rng) or [[]]
        columns = [pd.Series([r[j] if j < len(r) else None for r in rows], dtype=object) for j in range(len(head))]
        columns = [c if (n := pd.to_numeric(c, errors='coerce')).isna().any() else n for c in columns]
        pq.write_table(pa.Table.from_arrays([pa.array(c, from_pandas=True) for c in columns], names=[str(h) for h in head]), path)
    return damage

def nodes(tree, where=()):
    "Every place in a JSON, its top aside"
    for k,v in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (tree, k)
        yield from nodes(v)

def node(f):
    "Damage at one place of a JSON, half of the time at its top"
    def g(tree, rng):
        places = list(nodes(tree))
        if not places: raise Unfit
        top = [p for p in places if p[0] is tree]
        f(*(top if rng.random() < .5 else places)[some(rng, len(top))])
        return tree
    return g

def put(value): return node(lambda t, k: t.__setitem__(k, value))

JSON = {'a list': lambda t, rng: [t], 'nested in itself': lambda t, rng: {'a': t}, 'null': lambda t, rng: None, 'a text': lambda t, rng: 'text', 'a number': lambda t, rng: 3, 'no keys': lambda t, rng: {},
        'item lost': node(lambda t, k: t.pop(k)), 'item twice': node(lambda t, k: t.append(t[k]) if isinstance(t, list) else t.__setitem__(f'{k} again', t[k])),
        **{f'item {k}': put(v) for k,v in {'null': None, 'a text': 'two', 'a list': [1, 2], 'an object': {'a': 1}, 'true': True, '-1': -1, '0': 0, 'fractional': 2.5, '1e300': 1e300, 'of 30 digits': 10**30, 'NaN': float('nan')}.items()}}

def on_json(f):
    return on_bytes(as_text(lambda text, rng: json.dumps(f(json.loads(text), rng)).encode()))

def items(file):
    found = []
    file.visit(found.append)
    return found

def on_hdf5(f, arrays=True):
    def damage(path, rng, others):
        with h5py.File(path, 'r+') as file:
            names = [n for n in items(file) if isinstance(file[n], h5py.Dataset) or not arrays]
            f(file, names[some(rng, len(names))], rng)
    return damage

def again(f): # the array put back with `f`'s numbers and the attributes that it had
    def g(file, name, rng):
        d = file[name]
        attrs = dict(d.attrs)
        try: value = f(np.asarray(d[()]), rng)
        except (TypeError, ValueError, IndexError): raise Unfit from None
        del file[name]
        file.create_dataset(name, data=value, **{'dtype': h5py.string_dtype()} if np.asarray(value).dtype.kind == 'O' else {}).attrs.update(attrs)
    return g

def number(value): # one number changed
    def f(v, rng):
        if v.dtype.kind not in 'iuf' or not v.size: raise Unfit
        v = np.array(v, dtype=float if np.asarray(value).dtype.kind == 'f' else np.int64)
        v.reshape(-1)[some(rng, v.size)] = value
        return v
    return again(f)

def lose(file, name, rng): del file[name]
def attribute(file, name, rng):
    if not len(file[name].attrs): raise Unfit
    k = list(file[name].attrs)[some(rng, len(file[name].attrs))]
    if rng.random() < .5: del file[name].attrs[k]
    else: file[name].attrs[k] = ['array', 'dict', 'awkward-array', '', 'csc_matrix', 5][some(rng, 6)]

def link(target):
    def f(file, name, rng):
        del file[name]
        file[name] = target(name)
    return f

def huge(file, name, rng):
    attrs, dtype = dict(file[name].attrs), file[name].dtype
    del file[name]
    file.create_dataset(name, (10**11,), dtype if dtype.kind != 'O' else 'f4', chunks=(10**6,)).attrs.update(attrs)

def pickled(file, name, rng):
    attrs = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, data=np.void(pickle.dumps(dict(a=1)))).attrs.update(attrs)

HDF5 = {'item lost': on_hdf5(lose, False), 'attribute lost or changed': on_hdf5(attribute, False), 'link to itself': on_hdf5(link(lambda n: h5py.SoftLink(f'/{n}')), False), 'link to nothing': on_hdf5(link(lambda n: h5py.SoftLink('/nowhere')), False),
        'link to another file': on_hdf5(link(lambda n: h5py.ExternalLink('nowhere.h5', '/X')), False), 'link in a circle': on_hdf5(link(lambda n: h5py.SoftLink('/')), False),
        'array of 10^11': on_hdf5(huge), 'pickled object': on_hdf5(pickled), **{f'array {k}': on_hdf5(again(f)) for k,f in {'shorter': lambda v, rng: v[:some(rng, len(v))], 'longer': lambda v, rng: np.concatenate([v, v]), 'of one axis more': lambda v, rng: v[..., None],
        'flat': lambda v, rng: v.ravel() if v.ndim > 1 else v[0], 'of texts': lambda v, rng: np.full(v.shape, 'two', dtype=object), 'of numbers': lambda v, rng: np.arange(v.size).reshape(v.shape), 'fractional': lambda v, rng: v + .5, 'reversed': lambda v, rng: v[::-1], 'for a group': lambda v, rng: 5}.items()},
        **{f'number {k}': on_hdf5(number(v)) for k,v in {'-1': -1, '10^9': 10**9, '2^62': 2**62, 'NaN': np.nan, '1e300': 1e300, '2.5': 2.5, 'infinite': np.inf}.items()}}

def on_tensors(f, metadata=False):
    def damage(path, rng, others):
        with safe_open(path, 'pt') as t: about, tensors = t.metadata() or {}, {k: t.get_tensor(k) for k in t.keys()}
        if metadata: about = f(about, rng)
        else: f(tensors, sorted(tensors)[some(rng, len(tensors))])
        save_file(tensors, path, about)
    return damage

def header(f):
    def damage(path, rng, others):
        b = path.read_bytes()
        n, = struct.unpack('<Q', b[:8])
        h = json.dumps(f(json.loads(b[8:8 + n]), rng)).encode()
        path.write_bytes(struct.pack('<Q', len(h)) + h + b[8 + n:])
    return damage

def state(f):
    "A change of what a training's checkpoint says of itself"
    def g(about, rng):
        if 'state' not in about: raise Unfit
        return {**about, 'state': json.dumps(f(json.loads(about['state']), rng))}
    return g

TENSORS = {'tensor lost': on_tensors(lambda t, k: t.pop(k)), 'tensor renamed': on_tensors(lambda t, k: t.update(other=t.pop(k))), 'tensor flat': on_tensors(lambda t, k: t.update({k: t[k].reshape(-1)})), 'tensor of NaN': on_tensors(lambda t, k: t.update({k: t[k]*float('nan')})),
           'tensor of whole numbers': on_tensors(lambda t, k: t.update({k: t[k].long()})), 'tensor empty': on_tensors(lambda t, k: t.update({k: t[k].reshape(-1)[:0].clone()})), 'metadata lost': on_tensors(lambda m, rng: {}, True),
           'checksum lost': on_tensors(lambda m, rng: {k: v for k,v in m.items() if k != 'checksum'}, True), **{f'header: {k}': header(f) for k,f in JSON.items()}}
CHECKPOINT = {f'safetensors: state: {k}': on_tensors(state(f), True) for k,f in JSON.items()}

def on_array(f):
    def damage(path, rng, others): np.save(path, f(np.load(path)), allow_pickle=True)
    return damage

ARRAY = {'array of objects': on_array(lambda v: v.astype(object)[:1]), 'array shorter': on_array(lambda v: v[:-1]), 'array of numbers': on_array(lambda v: v.astype(float)), 'array of columns': on_array(np.asfortranarray)}

def on_pixels(f):
    def damage(path, rng, others):
        with Image.open(path) as im: form, im = im.format, f(im.convert('RGB'))
        with suppress(OSError): im.save(path, form); return
        raise Unfit
    return damage

def claim(path, rng, others):
    "Another size in an image's header"
    b, size = bytearray(path.read_bytes()), [(1, 1), (65_000, 65_000), (20_000, 20_000), (401, 7), (0, 0)][some(rng, 5)]
    if b[:4] == b'\x89PNG': b[16:24] = struct.pack('>II', *size); b[29:33] = struct.pack('>I', zlib.crc32(b[12:29]))
    elif b[:2] == b'\xff\xd8': at = max(b.find(b'\xff\xc0'), b.find(b'\xff\xc2')); b[at + 5:at + 9] = struct.pack('>HH', *size[::-1])
    else: raise Unfit
    path.write_bytes(b)

def tag(path, rng, others):
    "Another number in one of a TIFF's tags"
    with tifffile.TiffFile(path, mode='r+') as f:
        tags = [t for p in f.pages for t in p.tags if t.dtype in (3, 4) and t.count == 1] or [None]
        tags[some(rng, len(tags))].overwrite([0, 1, 2, 3, 7, 255, 400, 65_535][some(rng, 8)])

IMAGE = {**{f'image {k}': on_pixels(f) for k,f in {'smaller': lambda im: im.resize((300, 200)), 'of one pixel': lambda im: im.resize((1, 1)), 'of one row': lambda im: im.resize((400, 1)), 'grey': lambda im: im.convert('L'), 'transparent': lambda im: im.convert('RGBA'),
         'of a palette': lambda im: im.convert('P'), 'in CMYK': lambda im: im.convert('CMYK'), 'of 16 bits': lambda im: Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*256), 'turned': lambda im: im.transpose(Image.Transpose.ROTATE_90)}.items()}}

def other_format(path, rng, others):
    with Image.open(path) as im: im = im.convert('RGB')
    im.save(path, ['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP'][some(rng, 6)])
IMAGE['another format'] = other_format

def another(path, rng, others):
    if not others: raise Unfit
    shutil.copy(others[some(rng, len(others))], path)
def sibling(path, rng, others): another(path, rng, [o for o in others if o.suffix == path.suffix])
def lost(path, rng, others): path.unlink()
def a_folder(path, rng, others): path.unlink(); path.mkdir()
def circle(path, rng, others): path.unlink(); path.symlink_to(path.name)
def nowhere(path, rng, others): path.unlink(); path.symlink_to('nowhere')
def pipe(path, rng, others): path.unlink(); os.mkfifo(path)
def endless(path, rng, others): path.unlink(); path.symlink_to('/dev/zero')
def forbidden(path, rng, others):
    if os.geteuid() == 0: raise Unfit                                         # who may read everything
    path.chmod(0)

FILES = {'another file of this name': another, 'another file of this kind': sibling, 'file lost': lost, 'a folder': a_folder, 'link to itself': circle, 'link to nothing': nowhere, 'a pipe': pipe, 'a device': endless, 'not permitted': forbidden}
ODD_NAME = 'name with spaces, ü and 文'

def damages(path):
    "The kinds of damage that a file can have"
    suffix = Path(path.name.removesuffix('.gz')).suffix
    found = {**{k: on_bytes(f) for k,f in BYTES.items()}, **FILES, ODD_NAME: None}
    if suffix in ('.csv', '.tsv', '.gmt', '.mtx', '.parquet'): found |= {k: on_cells(f) for k,f in CELLS.items()}
    if suffix == '.json': found |= {f'JSON: {k}': on_json(f) for k,f in JSON.items()}
    if suffix in ('.h5', '.h5ad'): found |= {f'HDF5: {k}': f for k,f in HDF5.items()}
    if suffix == '.safetensors': found |= {f'safetensors: {k}': f for k,f in TENSORS.items()}
    if path.name == 'training.safetensors': found |= CHECKPOINT
    if suffix == '.npy': found |= ARRAY
    if suffix in ('.jpg', '.png', '.tif'): found |= IMAGE
    if suffix in ('.jpg', '.png'): found['header of another size'] = claim
    if suffix == '.tif': found['TIFF tag changed'] = tag
    return found

# --- one case

def files_of(folder): return sorted(p for p in folder.rglob('*') if p.is_symlink() or not p.is_dir())

def given(home): # the files of an input that are read, not those that were written at another time
    return [p for p in files_of(home) if not {'out', 'tables', 'patches', '.lock'} & set(p.relative_to(home).parts)]

def contents(folder):
    "Every file below a folder with what is in it"
    return {p.relative_to(folder).as_posix(): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else 'a pipe' for p in files_of(folder)}

def differs(found, whole, may):
    "Which part differs from the whole input's though the damaged file does not say it; None where none does"
    for k,v in whole.items():
        if k in may: continue
        if k not in found: return k
        a, b = found[k], v
        if isinstance(b, pd.DataFrame):
            rows, columns = a.index.intersection(b.index), a.columns.intersection(b.columns)
            if may: a, b = a.loc[rows, columns], b.loc[rows, columns]
            if a.shape != b.shape or list(a.columns) != list(b.columns) or list(a.index) != list(b.index): return k
            if b.dtypes.eq(object).any() or (b.dtypes == 'str').any(): same = (a.to_numpy() == b.to_numpy()).all()
            else: same = np.allclose(a.to_numpy(float), b.to_numpy(float), rtol=1e-5, atol=1e-6, equal_nan=True)
        else: same = np.allclose(a, b, rtol=1e-5)
        if not same: return k

@cache
def whole(name):
    "What the undamaged input says"
    home = Path('whole')/f'{os.getpid()} {name}'
    shutil.copytree(Path('made')/name, home, symlinks=True)
    found = inputs()[name][1](home)
    shutil.rmtree(home)
    return found

def case(name, damage, seed):
    "What becomes of one damaged input: refused, read or failed; why; and its folder"
    rng, home = np.random.default_rng(seed), Path('cases')/f'{seed}'
    make, read, parts = inputs()[name]
    expected, made = whole(name), Path('made')/name
    choice = [p for p in given(made) if damage in damages(p)]
    for _ in range(20):
        if home.exists(): shutil.rmtree(home)
        shutil.copytree(made, home, symlinks=True)
        path = home/choice[some(rng, len(choice))].relative_to(made)
        was = contents(home)
        if damage == ODD_NAME: home = home.rename(home.with_name(f'{ODD_NAME} {seed}')); break
        try: damages(path)[damage](path, rng, [p for p in files_of(Path('made')) if p.name != path.name])
        except Unfit: continue
        if contents(home) != was: break
    else: shutil.rmtree(home); return 'not possible', '', ''
    where, was = path.relative_to(Path('cases')/f'{seed}').as_posix(), contents(home)
    may = {w for pattern,words in parts.items() if damage != ODD_NAME and fnmatch(where, pattern) for w in words.split()}
    cpu, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try: found, outcome, why = read(home), 'read', ''
    except InputError as e: outcome, why = 'refused', str(e)
    except BaseException as e: outcome, why = 'failed', traceback.format_exc()
    cpu, memory, now = time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory, contents(home)
    if outcome == 'read' and (part := differs(found, expected, may)): outcome, why = 'failed', f'read, but {part} differ'
    if outcome == 'refused' and not why.strip(): outcome, why = 'failed', 'an empty message'
    if outcome != 'failed':
        if cpu > 20: outcome, why = 'failed', f'{cpu:.0f} s of computing, then {outcome}: {why}'
        if memory > 2e6: outcome, why = 'failed', f'{memory/1e6:.1f} GB of memory, then {outcome}: {why}'
        if half := [p for p in now if '.part' in p and not p.startswith('run/')]: outcome, why = 'failed', f'half-written {half} left behind, then {outcome}: {why}'
        if outcome == 'refused' and (other := [p for p in now.keys() | was.keys() if now.get(p) != was.get(p) and not (p not in was and p.startswith('run/') and 'tables' not in p)]): outcome, why = 'failed', f'{other} changed though refused: {why}'
        if outcome == 'read' and now.get(where) != was.get(where) and not name.startswith(('cached', 'checkpoint', 'histogene_reproduce')): outcome, why = 'failed', f'{where} was changed by reading'
    return outcome, f'{where}: {why}', str(home)

# --- all cases, in processes that are watched

def work(pipe, folder):
    "Read cases as they come, until None; what libraries print goes into a file and is counted"
    os.chdir(folder)
    torch.set_num_threads(1)
    heard = open(f'stderr-{os.getpid()}', 'wb+')
    os.dup2(heard.fileno(), 2); os.dup2(heard.fileno(), 1)
    while task := pipe.recv():
        heard.seek(0); heard.truncate()
        outcome, why, home = case(*task)
        sys.stderr.flush(); heard.seek(0)
        lines = [l for l in heard.read().decode(errors='replace').splitlines() if 'epoch' not in l]
        if outcome in ('read', 'refused') and len(lines) > 20: outcome, why = 'failed', f'{len(lines)} lines printed, the first {lines[:3]}; then {outcome}: {why}'
        if outcome != 'failed' and home: shutil.rmtree(home)
        pipe.send((outcome, why, home))

def started(folder):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context('spawn').Process(target=work, args=(there, folder), daemon=True)
    process.start(); there.close()
    return process, here

def make_inputs(folder):
    "All inputs, whole"
    (section := folder/'made'/'section').mkdir(parents=True)
    source = tissue(section)
    h5ad(section, source, 'csr')
    for name,(make,_,_) in inputs().items():
        home = folder/'made'/name
        home.mkdir(parents=True)
        make(home, source)

def cases(n, seed, folder):
    "`n` cases, spread evenly over inputs and damages; one in twenty of them in a shell"
    rng, every = np.random.default_rng(seed), {}
    for name in inputs():
        every[name] = sorted({d for p in given(folder/'made'/name) for d in damages(p)})
    pairs = [(name, d) for name in every for d in every[name]]
    typed, called = ([p for p in pairs if ('in a shell' in p[0]) == t] for t in (True, False))
    pick = lambda pairs, n: [pairs[i] for _ in range(-(-n//len(pairs))) for i in rng.permutation(len(pairs))][:n]
    found = pick(typed, n//20) + pick(called, n - n//20)                     # those first: a process that has trained cannot be forked to train
    return [(*p, int(s)) for p,s in zip(found, rng.integers(2**31, size=n))]

def run(folder, tasks, progress=lambda *a: None, patience=120):
    "Each case's outcome, and why"
    found, process = [], None
    for task in tasks:
        if process is None: process, pipe = started(folder)
        try:
            pipe.send(task)
            if not pipe.poll(patience): raise TimeoutError
            outcome = pipe.recv()
        except (EOFError, TimeoutError, ConnectionError) as e:
            process.kill(); process.join()
            outcome = 'failed', 'no end in sight' if isinstance(e, TimeoutError) else f'the process died ({process.exitcode})', f'cases/{task[2]}'
            process = None
        found.append((*task, *outcome))
        progress(found[-1])
    if process: pipe.send(None); process.join(10)
    return pd.DataFrame(found, columns=['input', 'damage', 'seed', 'outcome', 'why', 'kept'])

def table(found):
    "A row for each input and damage"
    found = found[found.outcome != 'not possible']
    return pd.crosstab([found.input, found.damage], found.outcome).reindex(columns=['read', 'refused', 'failed'], fill_value=0).assign(tried=lambda t: t.sum(axis=1))[['tried', 'read', 'refused', 'failed']].reset_index()

def main(n=2000, seed=0, folder='fuzz'):
    start, folder = time.perf_counter(), Path(folder).resolve()
    n, seed = int(n), int(seed)
    for d in ('made', 'cases', 'whole'): shutil.rmtree(folder/d, ignore_errors=True)
    (folder/'cases').mkdir(parents=True)
    make_inputs(folder)
    show = lambda row: row[3] == 'failed' and print(f'{row[0]}, {row[1]}, seed {row[2]}, kept in {row[5]}\n    {row[4]}', flush=True)
    found = run(folder, cases(n, seed, folder), show)
    made = provenance(f'tools/fuzz.py {n} {seed}', start, 'cpu')
    file = Path(histogene_nb.__file__).parent/'results'/'robustness'/'fuzz.csv'
    with whole_file(file) as part: part.write_text(table(found).to_csv(index=False) + f'# {json.dumps({k: made[k] for k in ("command", "histogene_nb", "date", "seconds")})}\n')
    print(found.outcome.value_counts().to_string())
    sys.exit(int((found.outcome == 'failed').any()))

if __name__ == '__main__': main(*sys.argv[1:])
