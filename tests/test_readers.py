"Readers beyond their pages: what they refuse, Visium HD, every set of pictures, .h5ad files of other programs, SpatialData stores of every shape"
import gzip, json, shutil, sys
from pathlib import Path
import anndata as ad, h5py, numpy as np, pandas as pd, pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite
from histogene_nb.commands import histogene_predict, histogene_train
from histogene_nb.files import InputError
from histogene_nb.readers import read_section
from histogene_nb.sections import place, section_name
from histogene_nb.spatialdata import read_spatialdata
from histogene_nb.tables import IMAGES, TABLES, array_positions, load_table, one_file, read_st
from histogene_nb.matching import image_scale
from histogene_nb.visium import read_visium, synthetic_visium, write_visium

PX, SIDE = 400, 8                                                             # of the full image, and of the smallest bin: pixels of 1 µm
GENES = [f'G{i}' for i in range(30)]
SMALL = dict(hires=.5, lowres=.125)

def refused(match, f, *args, **kwargs):
    with pytest.raises(InputError, match=match) as e: f(*args, **kwargs)
    return str(e.value)

@pytest.fixture(scope='module')
def photograph():
    "A round piece of tissue, of which no two places look the same"
    y, x = np.mgrid[:PX, :PX]/PX
    inside = (x - .5)**2 + (y - .5)**2 < .2
    return np.where(inside[..., None], np.stack([120 + 100*x, 60 + 80*y, 150 + 60*np.sin(9*x*y)], -1), 250).astype(np.uint8)

def grid_of(photograph, side):
    "Bins of this many pixels: positions as spaceranger has them, and counts that follow the colours"
    n = PX//side
    row, col = (a.ravel() for a in np.mgrid[:n, :n])
    means = photograph.reshape(n, side, n, side, 3).mean((1, 3)).reshape(-1, 3)
    counts = np.random.default_rng(0).poisson(np.tile((255 - means)/80, 10))
    places = pd.DataFrame(dict(in_tissue=(means[:, 0] < 245).astype(int), array_row=row, array_col=col, pxl_row_in_fullres=(row + .5)*side, pxl_col_in_fullres=(col + .5)*side),
                          pd.Index([f's_{side:03}um_{r:05}_{c:05}-1' for r,c in zip(row, col)], name='barcode'))
    return places, counts

def write_counts(path, counts, spots):
    X = sparse.csc_matrix(counts.T)                                           # genes x spots
    with h5py.File(path, 'w') as f:
        for k,v in dict(data=X.data.astype('int32'), indices=X.indices, indptr=X.indptr, shape=X.shape, barcodes=spots.to_numpy().astype('S')).items(): f[f'matrix/{k}'] = v
        for k,v in dict(id=[f'ENSG{g}' for g in GENES], name=GENES, feature_type=['Gene Expression']*len(GENES), genome=['GRCh38']*len(GENES)).items(): f[f'matrix/features/{k}'] = np.array(v, 'S')

def small(photograph, scale): return np.asarray(Image.fromarray(photograph).resize((round(PX*scale),)*2))

def write_outs(folder, photograph, side=SIDE, kinds=('hires', 'lowres'), parquet=True):
    "A folder of spaceranger's: of a Visium HD bin size, or with positions as text"
    (folder/'spatial').mkdir(parents=True)
    places, counts = grid_of(photograph, side)
    known = places.sum(1).gt(0) & counts.any(1)
    write_counts(folder/'filtered_feature_bc_matrix.h5', counts[known], places.index[known])
    places.reset_index().to_parquet(folder/'spatial'/'tissue_positions.parquet') if parquet else places.to_csv(folder/'spatial'/'tissue_positions.csv')
    factors = dict(spot_diameter_fullres=float(side), bin_size_um=float(side), microns_per_pixel=1., regist_target_img_scalef=.5, fiducial_diameter_fullres=100., **{f'tissue_{k}_scalef': f for k,f in SMALL.items()})
    (folder/'spatial'/'scalefactors_json.json').write_text(json.dumps(factors))
    for k in kinds: Image.fromarray(small(photograph, SMALL[k])).save(folder/'spatial'/f'tissue_{k}_image.png')
    return folder

# --- what is refused: one section as a Visium folder, as tables and as .h5ad, each with one thing changed

POSITIONS, FACTORS = 'spatial/tissue_positions.csv', 'spatial/scalefactors_json.json'
COUNTS, HIRES = 'filtered_feature_bc_matrix.h5', 'spatial/tissue_hires_image.png'
NAMED = dict(pixel_x='X', pixel_y='Y')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The folder of all, and the section in it"
    folder = tmp_path_factory.mktemp('made')
    whole = synthetic_visium(folder)
    section = whole[whole.obs.in_tissue == 1].copy()
    photo = place(section).path
    write_visium(whole, folder/'outs')
    (folder/'tables').mkdir()
    section.to_df().T.to_csv(folder/'tables'/'raw_counts.tsv', sep='\t')
    (x, y), array = section.obsm['spatial'].T, section.obs[['array_row', 'array_col']]
    array.assign(X=x, Y=y).to_csv(folder/'tables'/'spots.csv')
    with Image.open(photo) as im:
        im.crop((0, 0, 1600, 1500)).save(folder/'cropped.png')
        im.resize((1000, 1000)).save(folder/'smaller.png')
    (folder/'empty.csv').touch()
    return folder, read_visium(folder/'outs', 'H1', photo, verbose=False)

def changed(made, tmp_path, kind, path, edit):
    "A copy of a folder in which the text of one file is edited, its content another, or the file gone"
    copy = Path(shutil.copytree(made[0]/kind, tmp_path/'copy'))
    file = copy/path
    if callable(edit): file.write_text(edit(file.read_text()))
    elif edit is None: file.unlink()
    else: file.write_bytes(edit if isinstance(edit, bytes) else file.read_bytes()[:edit])
    return copy

def replace(*words):
    "An edit: each word in a text by the next"
    def edit(text):
        for a,b in words: text = text.replace(a, b)
        return text
    return edit

def last_twice(text): return text + text.splitlines()[-1]

@pytest.mark.parametrize('path,edit,match,options', [
    (POSITIONS, replace(('array_row', 'row')), 'no column array_row among barcode, in_tissue, row', {}),
    (POSITIONS, replace(('-1,', ',')), 'none of the 174 spots with counts, such as SPOT000-1', {}),
    (POSITIONS, last_twice, 'spot SPOT223-1 occurs twice', {}),
    (POSITIONS, replace((',100.0', ',here')), "pxl_col_in_fullres of row 1 is 'here'", {}),
    (POSITIONS, replace(('SPOT000-1,1,0', 'SPOT000-1,1,0.5')), 'spot SPOT000-1 has no whole array_row', {}),
    (POSITIONS, lambda t: t.splitlines()[0], 'it holds no spots', {}),
    (POSITIONS, None, 'the positions are missing', {}),
    (FACTORS, lambda t: t[:20], 'cannot be read as JSON', {}),
    (FACTORS, replace(('55.0', '-1')), 'spot_diameter_fullres is -1;', {}),
    (FACTORS, replace(('0.5', '1.5')), 'its scale is 0.5, and the scale factors say 1.5', dict(name='H1')),
    (POSITIONS, str, 'cropped.png: .* does not have the shape', dict(image='cropped.png')),
    (POSITIONS, str, 'empty.csv: cannot be read as an image', dict(image='empty.csv')),
    (COUNTS, None, 'the counts are missing: neither', {}),
    (COUNTS, 9000, "cannot be read as spaceranger's counts .*truncated", {}),
    (HIRES, b'no image', 'tissue_hires_image.png: cannot be read as an image', {})])
def test_visium_refused(made, tmp_path, path, edit, match, options):
    if 'image' in options: options = dict(options, image=made[0]/options['image'])
    refused(match, read_visium, changed(made, tmp_path, 'outs', path, edit), **options)

def test_visium_counts_astray(made, tmp_path):
    copy = changed(made, tmp_path, 'outs', POSITIONS, str)
    with h5py.File(copy/COUNTS, 'a') as f: f['matrix/indices'][5] = 10**6
    refused('its sparse matrix is damaged', read_visium, copy)

def test_visium_left_out(made, tmp_path, capsys):
    "A spot that is not in tissue, one without a position, genes of one name"
    edits = dict(off=('SPOT000-1,1', 'SPOT000-1,0'), gone=('SPOT000-1', 'X'))
    off, gone = (read_visium(changed(made, tmp_path/name, 'outs', POSITIONS, replace(words)))
                 for name,words in edits.items())
    assert off.n_obs == gone.n_obs == made[1].n_obs - 1
    assert off.uns['histogene']['not_in_tissue'] == gone.uns['histogene']['counts_without_position'] == 1
    assert '1 with counts but not in tissue, left out' in capsys.readouterr().out
    names = [*made[1].var_names[:-1], made[1].var_names[0]]
    twice = made[1].copy()
    twice.var_names, twice.var['gene_ids'] = names, [f'ENSG{i}' for i in range(len(names))]
    s = read_visium(write_visium(twice, tmp_path/'twice'))
    assert s.uns['histogene']['genes_renamed'] == 1 and s.var_names[-1] == f'{names[0]}-1'
    assert list(s.var.gene_ids) == list(twice.var.gene_ids)

def as_old(made, copy):
    "The folder as spaceranger wrote it before version 2: counts as three files, positions without a header"
    shutil.copytree(made[0]/'outs', copy)
    table = pd.read_csv(copy/POSITIONS)
    table.to_csv(copy/'spatial'/'tissue_positions_list.csv', header=False, index=False)
    (copy/POSITIONS).unlink()
    (copy/COUNTS).unlink()
    (matrix := copy/'filtered_feature_bc_matrix').mkdir()
    genes, spots, counts = made[1].var_names, made[1].obs_names, made[1].X.T.astype(int)
    with gzip.open(matrix/'matrix.mtx.gz', 'wb') as f: mmwrite(f, sparse.coo_matrix(counts))
    features = ''.join(f'ENSG{i}\t{g}\tGene Expression\n' for i,g in enumerate(genes))
    (matrix/'features.tsv.gz').write_bytes(gzip.compress(features.encode()))
    (matrix/'barcodes.tsv.gz').write_bytes(gzip.compress(''.join(f'{s}\n' for s in spots).encode()))
    return copy

def test_old_visium(made, tmp_path):
    old, new = read_section(as_old(made, tmp_path/'old'/'outs')), read_section(made[0]/'outs')
    assert section_name(old) == 'old' and old.to_df().equals(new.to_df()) and old.obs.equals(new.obs)
    assert np.array_equal(old.obsm['spatial'], new.obsm['spatial'])

def test_write_visium_needs_an_image(made, tmp_path):
    section = made[1].copy()
    section.uns['spatial']['H1']['metadata'].clear()
    refused('H1: this layout has pictures', write_visium, section, tmp_path/'outs')

def test_image_scale_refused(made):
    refused('neither turned nor cropped', image_scale, made[0]/'cropped.png', np.zeros((200, 200)), .125)

def test_files_of_a_folder(made, tmp_path):
    for name in ('a.csv', 'b.tsv.gz', 'c.txt'): (tmp_path/name).touch()
    assert one_file(tmp_path, 'coordinates', TABLES, '*position*', '*.txt').name == 'c.txt'
    assert one_file(tmp_path, 'image', IMAGES, '*', needed=False) is None
    refused(r'the coordinates are missing: no file here fits \*position\*', one_file,
            tmp_path, 'coordinates', TABLES, '*position*')
    refused('3 files could be the coordinates: a.csv, b.tsv.gz, c.txt', one_file,
            tmp_path, 'coordinates', TABLES, '*')

def test_tables_that_cannot_be_read(made, tmp_path):
    whole = gzip.compress(b'a\tb\n1\t2\n'*1000)
    (tmp_path/'cut.csv.gz').write_bytes(whole[:40])
    refused('cut.csv.gz: cannot be read as a table', load_table, tmp_path/'cut.csv.gz')
    refused('empty.csv: cannot be read as a table', load_table, made[0]/'empty.csv')
    refused('none.csv: there is no such file', load_table, tmp_path/'none.csv')

ARRAYS = (('array_row,array_col', 'y,x'),)

def first_zero(to):
    "An edit: the first count of zero of the first gene is something else"
    def edit(text):
        head, line, rest = text.split('\n', 2)
        return '\n'.join([head, line.replace('\t0.0', f'\t{to}', 1), rest])
    return edit

@pytest.mark.parametrize('path,edit,match,options', [
    ('spots.csv', str, 'no columns of pixels among Unnamed: 0, array_row, array_col, X, Y', dict(columns=None)),
    ('spots.csv', replace(('SPOT', 'spot')), 'none of its spots is in the counts', {}),
    ('spots.csv', replace(('SPOT000-1,0,0,', 'SPOT000-1,0,0.5,')), 'whole numbers, but one is 0.5', {}),
    ('spots.csv', replace(('SPOT000-1,0,0,', 'SPOT000-1,0,here,')), "array_col of row 1 is 'here'", {}),
    ('spots.csv', replace(*ARRAYS), 'by x and y spots lie 1.41 pixels apart', dict(columns=None)),
    ('spots.csv', lambda t: t.splitlines()[0] + '\nSPOT000-1,0,0,,\n', 'no spot has a position', {}),
    ('raw_counts.tsv', first_zero('0.5'), r'H1: the count of gene ERBB2 .* is fractional \(0.5\); 1 such', {}),
    ('raw_counts.tsv', first_zero('-1'), 'H1: the count of gene ERBB2 .* is negative', {}),
    ('raw_counts.tsv', first_zero('many'), "of row ERBB2 is 'many', which is not a number", {}),
    ('raw_counts.tsv', lambda t: '', 'raw_counts.tsv: cannot be read as a table', {}),
    ('raw_counts.tsv', lambda t: t.splitlines()[0], '0 rows and 175 columns', {}),
    ('raw_counts.tsv', str, 'counts.csv: there is no such file', dict(counts='counts.csv')),
    ('spots.csv', str, 'empty.csv: cannot be read as an image', dict(image='empty.csv')),
    ('spots.csv', str, 'none.tif: there is no such image', dict(image='none.tif')),
    ('spots.csv', str, 'outside the image smaller.png of 1000 x 1000', dict(image='smaller.png')),
    ('spots.csv', str, 'the spot diameter is a number of pixels above 0, not 0', dict(spot_diameter=0)),
    ('spots.csv', str, "no column 'Z' among Unnamed: 0", dict(columns=NAMED | dict(pixel_x='Z'))),
    ('spots.csv', str, "not 'patient'", dict(columns=NAMED | dict(patient='X')))])
def test_tables_refused(made, tmp_path, path, edit, match, options):
    options = dict(image='X1.jpg', columns=NAMED, name='H1') | options
    options['image'] = made[0]/options['image']
    refused(match, read_st, changed(made, tmp_path, 'tables', path, edit), **options)

def test_no_grid(made):
    scattered = np.random.default_rng(0).uniform(0, 1000, (300, 2))
    refused('The 300 spots are not on one square or hexagonal grid', array_positions, scattered)
    refused('The 2 spots are not', array_positions, made[1].obsm['spatial'][:2])

def spatial(s): return s.uns['spatial']['H1']

def factors(s, **new): spatial(s)['scalefactors'].update(new)

H5AD = dict(
    no_spatial=(lambda s: s.obsm.pop('spatial'), r"obsm\['spatial'\] is missing"),
    half_column=(lambda s: s.obs.__setitem__('array_col', s.obs.array_col + .5), 'other than whole numbers'),
    halved=(lambda s: setattr(s, 'X', s.X/2), r'gene ERBB2 at spot SPOT000-1 is fractional \(7.5\)'),
    outside=(lambda s: s.obsm.update(spatial=s.obsm['spatial']*2), 'is outside the image X1.jpg'),
    one_place=(lambda s: s.obs.update(dict(array_col=s.obs.array_col*0)), 'array position 0x0 occurs twice'),
    no_file=(lambda s: spatial(s)['metadata'].update(source_image_path='gone.tif'), 'there is no such image'),
    two_names=(lambda s: s.uns['spatial'].update(H2=spatial(s)), 'has 2 sections, H1, H2, and no column of obs'),
    text=(lambda s: s.uns['spatial'].update(H1='text'), r"\['H1'\] does not hold images"),
    no_factors=(lambda s: spatial(s).pop('scalefactors'), 'spot_diameter_fullres.* is missing'),
    no_width=(lambda s: factors(s, spot_diameter_fullres=0.), 'a spot diameter of 0.0 pixels'))

@pytest.mark.parametrize('case', H5AD)
def test_h5ad_refused(made, tmp_path, case):
    wrong, (edit, match) = made[1].copy(), H5AD[case]
    edit(wrong)
    wrong.write_h5ad(tmp_path/'wrong.h5ad')
    refused(f'wrong.h5ad: .*{match}', read_section, tmp_path/'wrong.h5ad')

def test_h5ad_picture_refused(made, tmp_path):
    "An embedded picture of another scale or with other values; an image that is none; a file cut short"
    wrong, hires = made[1].copy(), np.asarray(Image.open(made[0]/'outs'/HIRES))
    spatial(wrong).update(images=dict(hires=hires), metadata={})
    factors(wrong, tissue_hires_scalef=2.5)
    wrong.write_h5ad(tmp_path/'wrong.h5ad')
    refused('H1: spot SPOT003-1 .* is outside the image in the file of 800 x 800 pixels; 166 such', read_section, tmp_path/'wrong.h5ad')
    refused('empty.csv: cannot be read as an image', read_section, tmp_path/'wrong.h5ad', made[0]/'empty.csv')
    spatial(wrong)['images']['hires'] = hires.astype('int16') - 300
    wrong.write_h5ad(tmp_path/'wrong.h5ad')
    refused('the embedded image: its pixels hold values from -', read_section, tmp_path/'wrong.h5ad')
    (tmp_path/'cut.h5ad').write_bytes((tmp_path/'wrong.h5ad').read_bytes()[:5000])
    refused('cut.h5ad: cannot be read as an .h5ad file', read_section, tmp_path/'cut.h5ad')

def test_paths_refused(made, tmp_path):
    refused('none.h5ad: there is no such file', read_section, tmp_path/'none.h5ad')
    refused('give the folder that this file is in', read_section, made[0]/'tables'/'spots.csv')
    refused('nowhere: there is no such folder', read_section, tmp_path/'nowhere')
    refused('the counts are missing: .* calls outs', read_section, made[0]/'outs'/'spatial')
    refused('nowhere: there is no such folder', read_visium, tmp_path/'nowhere')
    refused('spatial: there is no such folder', read_visium, made[0]/'tables')

def test_damaged_old_visium(made, tmp_path):
    "As on the page of all formats: a file at random with a fault at random is refused, or read"
    old, rng, came = as_old(made, tmp_path/'old'), np.random.default_rng(0), []
    files = sorted(f.relative_to(old) for f in old.rglob('*') if f.is_file())
    for n in range(25):
        copy = Path(shutil.copytree(old, tmp_path/f'{n}'))
        file = copy/files[rng.integers(len(files))]
        data, (i,j) = file.read_bytes(), np.sort(rng.integers(file.stat().st_size, size=2))
        faults = [data[:i], data[:i] + data[j:], data[:i] + rng.bytes(20) + data[i+20:]]
        file.write_bytes(faults[rng.integers(3)])
        try: read_section(copy, image=made[0]/'X1.jpg', verbose=False)
        except InputError: came.append('refused')
        else: came.append('read')
    assert came.count('refused') > 3

# --- Visium HD

def write_hd(sample, photograph, sides=(SIDE, 2*SIDE)):
    for s in sides: write_outs(sample/'outs'/'binned_outputs'/f'square_{s:03}um', photograph, s)
    (sample/'outs'/'spatial').mkdir()                                         # the pictures once more, but no positions
    Image.fromarray(small(photograph, .5)).save(sample/'outs'/'spatial'/'tissue_hires_image.png')
    return sample

def test_visium_hd(tmp_path, photograph):
    pytest.importorskip('pyarrow')
    sample = write_hd(tmp_path/'HD 1', photograph)
    for side,n in ((SIDE, 50), (2*SIDE, 25)):
        s = read_section(sample/'outs'/'binned_outputs'/f'square_{side:03}um')
        places, counts = grid_of(photograph, side)
        inside = (places.in_tissue == 1).to_numpy() & counts.any(1)
        assert section_name(s) == f'HD 1_square_{side:03}um' and s.n_obs == inside.sum() > n*n/3
        assert np.array_equal(s.X.toarray(), counts[inside]) and np.array_equal(s.obs, places.loc[inside, ['array_row', 'array_col']])
        assert np.allclose(s.obsm['spatial'], places.loc[inside, ['pxl_col_in_fullres', 'pxl_row_in_fullres']]/2)
        assert s.uns['spatial'][section_name(s)]['scalefactors']['spot_diameter_fullres'] == side/2

@pytest.mark.parametrize('times', [1, 2, 5])
def test_coarser_bins(tmp_path, photograph, times):
    "Where spaceranger's larger bins lie, with all counts of those in them; and the same after it was written"
    from histogene_nb.readers import coarser
    s = read_section(write_outs(tmp_path/'binned_outputs'/f'square_{SIDE:03}um', photograph), verbose=False)
    wider, known = coarser(s, times), grid_of(photograph, SIDE*times)[0].set_index(['array_col', 'array_row'])
    wider.write_h5ad(tmp_path/'wider.h5ad')
    for found in wider, read_section(tmp_path/'wider.h5ad', verbose=False):
        at = known.loc[list(map(tuple, found.obs[['array_col', 'array_row']].to_numpy()))]
        assert np.allclose(found.obsm['spatial'], at[['pxl_col_in_fullres', 'pxl_row_in_fullres']]*s.uns['histogene']['image_scale']) and (found.X.sum(0) == s.X.sum(0)).all()
        assert place(found).diameter == times*place(s).diameter and found.uns['histogene']['spot_um'] == times*SIDE and len(found) <= len(s)
    for wrong,match in ((0, '1 or more, not 0'), (-2, 'not -2')): refused(match, coarser, s, wrong)

def test_visium_hd_bins_are_chosen_by_the_user(tmp_path, photograph):
    pytest.importorskip('pyarrow')
    sample = write_hd(tmp_path/'HD1', photograph)
    bins = sample/'outs'/'binned_outputs'
    for given in (sample, sample/'outs', bins):
        said = refused('bins of 2 sizes', read_section, given)
        assert all(str(bins/f'square_{s:03}um') in said for s in (SIDE, 2*SIDE))
    refused('bins of 2 sizes', read_visium, sample/'outs')
    shutil.rmtree(bins/f'square_{SIDE:03}um')
    for given in (sample, sample/'outs', bins, bins/f'square_{2*SIDE:03}um'): assert section_name(read_section(given, verbose=False)) == f'HD1_square_{2*SIDE:03}um'

def test_visium_hd_by_the_commands(tmp_path, photograph):
    pytest.importorskip('pyarrow')
    bin = str(write_hd(tmp_path/'HD1', photograph)/'outs'/'binned_outputs'/f'square_{SIDE:03}um')
    histogene_train([bin], out=str(tmp_path/'model'), epochs=1, n_top=20, min_spots=5, setting=['dim=16', 'depth=1', 'heads=2'], lr=1e-3, device='cpu')
    histogene_predict(str(tmp_path/'model'), bin, out=str(tmp_path/'p.h5ad'), device='cpu')
    p, s = ad.read_h5ad(tmp_path/'p.h5ad'), read_section(bin, verbose=False)
    assert p.n_obs == s.n_obs > 1000 and p.n_vars == 20 and np.isfinite(p.X).all() and np.allclose(p.obsm['spatial'], s.obsm['spatial'])

def test_parquet_needs_pyarrow(tmp_path, photograph, monkeypatch):
    pytest.importorskip('pyarrow')
    folder = write_outs(tmp_path/'HD', photograph)
    monkeypatch.setattr(pd, 'read_parquet', lambda p: pd.io.parquet.get_engine('fastparquet'))
    refused(r"tissue_positions.parquet: reading it needs a package .* pip install 'histogene_nb\[parquet\]'", read_section, folder)

# --- pictures of a Visium folder

@pytest.mark.parametrize('kinds,beside,scale', [(('hires', 'lowres'), False, .5), (('hires',), False, .5), (('lowres',), False, .125), (('hires',), True, 1), (('lowres',), True, 1), ((), True, 1), ((), False, None)])
def test_pictures_of_a_visium_folder(tmp_path, photograph, kinds, beside, scale):
    folder = write_outs(tmp_path/'V1'/'outs', photograph, 2*SIDE, kinds, parquet=False)
    if beside: Image.fromarray(photograph).save(folder/'slide.tif')
    s = read_section(folder)
    places, info = grid_of(photograph, 2*SIDE)[0].loc[s.obs_names], s.uns['spatial']['V1']
    assert np.allclose(s.obsm['spatial'], places[['pxl_col_in_fullres', 'pxl_row_in_fullres']]*(scale or 1))
    assert info['scalefactors']['spot_diameter_fullres'] == 2*SIDE*(scale or 1)
    path = info['metadata'].get('source_image_path')
    assert path is None if scale is None else Path(path).name == {1: 'slide.tif', .5: 'tissue_hires_image.png', .125: 'tissue_lowres_image.png'}[scale]

# --- .h5ad files as scanpy and squidpy write them

def as_scanpy(photograph, library='V1', kinds=('hires', 'lowres'), dtype=np.int64):
    "What scanpy.read_visium makes of a folder: names of genes not unique, positions whole, pictures from 0 to 1, all spots"
    places, counts = grid_of(photograph, 2*SIDE)
    var = pd.DataFrame(dict(gene_ids=[f'ENSG{g}' for g in GENES]), pd.Index([*GENES[:-1], GENES[0]]))
    info = dict(images={k: (small(photograph, SMALL[k])/255).astype('float32') for k in kinds}, scalefactors=dict(spot_diameter_fullres=2.*SIDE, fiducial_diameter_fullres=100., **{f'tissue_{k}_scalef': f for k,f in SMALL.items()}),
                metadata=dict(chemistry_description="Spatial 3' v1", software_version='spaceranger-1.0.0'))
    return AnnData(sparse.csr_matrix(counts, dtype=np.float32), places.iloc[:, :3].copy(), var, obsm=dict(spatial=places[['pxl_col_in_fullres', 'pxl_row_in_fullres']].to_numpy(dtype)), uns=dict(spatial={library: info}))

@pytest.mark.parametrize('library', ['V1', 'V1_Breast Cancer: Block A (1.2), Sektion größer', '10-05.h5'])
@pytest.mark.filterwarnings('ignore:Variable names are not unique')
def test_h5ad_of_scanpy(tmp_path, photograph, library):
    theirs = as_scanpy(photograph, library)
    theirs.write_h5ad(tmp_path/'theirs.h5ad')
    s = read_section(tmp_path/'theirs.h5ad')
    inside = theirs.obs.in_tissue.to_numpy() == 1
    assert section_name(s) == library and s.n_obs == inside.sum() and s.uns['histogene']['not_in_tissue'] == (~inside).sum()
    assert list(s.var_names) == [*GENES[:-1], 'G0-1'] and s.uns['histogene']['genes_renamed'] == 1 and (s.X != theirs.X[inside]).nnz == 0
    assert s.obsm['spatial'].dtype == float and np.allclose(s.obsm['spatial'], theirs.obsm['spatial'][inside]/2)
    assert np.array_equal(s.uns['spatial'][library]['images']['hires'], small(photograph, .5)) and s.uns['spatial'][library]['scalefactors']['spot_diameter_fullres'] == SIDE
    Image.fromarray(photograph).save(tmp_path/'full.png')
    full = read_section(tmp_path/'theirs.h5ad', image=tmp_path/'full.png', verbose=False)
    assert full.obsm['spatial'].dtype == float and np.array_equal(full.obsm['spatial'], theirs.obsm['spatial'][inside])

def test_h5ad_with_the_small_picture_alone(tmp_path, photograph):
    theirs = as_scanpy(photograph, kinds=('lowres',))
    theirs.var_names_make_unique(); theirs.write_h5ad(tmp_path/'theirs.h5ad')
    s = read_section(tmp_path/'theirs.h5ad')
    assert np.allclose(s.obsm['spatial'], theirs.obsm['spatial'][theirs.obs.in_tissue == 1]/8)
    assert s.uns['spatial']['V1']['scalefactors']['spot_diameter_fullres'] == 2*SIDE/8

# --- SpatialData stores

@pytest.fixture(scope='module')
def sd(): return pytest.importorskip('spatialdata')

def shapes_of(sd, places, side, systems, square=False):
    "Circles, or squares as spatialdata-io makes them of a Visium HD bin"
    circles = sd.models.ShapesModel.parse(places[['pxl_col_in_fullres', 'pxl_row_in_fullres']].to_numpy(), geometry=0, radius=side/2, index=pd.Index(np.arange(len(places))[::-1]), transformations=systems)
    if not square: return circles
    return sd.models.ShapesModel.parse(type(circles)(geometry=circles.buffer(side/2, cap_style='square')), transformations=systems)

def table_of(sd, photograph, side, region, array=True):
    places, counts = grid_of(photograph, side)
    obs = places.iloc[:, :3 if array else 1].assign(region=pd.Categorical([region]*len(places)), spot_id=np.arange(len(places))[::-1])                # not the rows' order
    return places, sd.models.TableModel.parse(AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs, pd.DataFrame(index=GENES)), region=region, region_key='region', instance_key='spot_id')

def picture_of(sd, pixels, transformations, **kw):
    return sd.models.Image2DModel.parse(pixels.transpose(2, 0, 1), dims=('c', 'y', 'x'), transformations=transformations, **kw)

def visium_elements(sd, photograph, name='V1', kinds=('full', 'hires'), own=True, square=False, array=True, side=2*SIDE):
    "Images, shapes and table of one sample, in coordinate systems of its own, or in those of all as in older stores"
    Scale, Identity = sd.transformations.Scale, sd.transformations.Identity
    system = {k: f'{name}_downscaled_{k}' if own else f'downscaled_{k}' for k in SMALL} | dict(full=name if own else 'global')
    systems = {system['full']: Identity(), **{system[k]: Scale([f, f], axes=('y', 'x')) for k,f in SMALL.items()}}
    region = f'{name}_square_{side:03}um' if square else name
    places, table = table_of(sd, photograph, side, region, array)
    images = {f'{name}_{k}_image': picture_of(sd, photograph if k == 'full' else small(photograph, SMALL[k]), {system[k]: Identity()}, **(dict(scale_factors=[2, 2]) if k == 'full' else {})) for k in kinds}
    return images, {region: shapes_of(sd, places, side, systems, square)}, {f'square_{side:03}um' if square else f'table_{name}': table}

def write_store(sd, path, *elements, **options):
    "A store of one or several samples"
    images, shapes, tables = ({k: v for e in elements for k,v in e[i].items()} for i in range(3))
    sd.SpatialData(images=images, shapes=shapes, tables=tables).write(path, **options)
    return path

pytestmark = pytest.mark.filterwarnings('ignore')                             # spatialdata's, while it writes

def expected(s, photograph, side, scale, pixels):
    places, counts = grid_of(photograph, side)
    inside = (places.in_tissue == 1).to_numpy()
    info = s.uns['spatial'][section_name(s)]
    assert list(s.obs_names) == list(places.index[inside]) and np.array_equal(s.X.toarray(), counts[inside])
    assert np.allclose(s.obsm['spatial'], places.loc[inside, ['pxl_col_in_fullres', 'pxl_row_in_fullres']]*scale)
    assert np.isclose(info['scalefactors']['spot_diameter_fullres'], side*scale) and info['scalefactors']['tissue_hires_scalef'] == 1
    assert np.array_equal(info['images']['hires'], pixels) and 'source_image_path' not in info['metadata']
    return s

@pytest.mark.parametrize('own', [True, False])
@pytest.mark.parametrize('kinds,scale', [(('full', 'hires', 'lowres'), 1), (('hires', 'lowres'), .5), (('lowres',), .125)])
def test_store_of_visium(sd, tmp_path, photograph, own, kinds, scale):
    store = write_store(sd, tmp_path/'V1.zarr', visium_elements(sd, photograph, kinds=kinds, own=own))
    s = expected(read_section(store), photograph, 2*SIDE, scale, small(photograph, scale))
    assert section_name(s) == 'V1' and np.array_equal(s.obs[['array_row', 'array_col']], grid_of(photograph, 2*SIDE)[0].loc[s.obs_names, ['array_row', 'array_col']])
    s.write_h5ad(tmp_path/'V1.h5ad')
    expected(read_section(tmp_path/'V1.h5ad'), photograph, 2*SIDE, scale, small(photograph, scale))

def test_store_by_the_commands(sd, tmp_path, photograph):
    "Trained on and predicted from a store alone, whose image is in it; the model is that of the same pixels in a file"
    store, losses = str(write_store(sd, tmp_path/'V1.zarr', visium_elements(sd, photograph, kinds=('full',)))), []
    Image.fromarray(photograph).save(tmp_path/'full.png')
    theirs = as_scanpy(photograph, kinds=())
    theirs.var_names = GENES; theirs.uns['spatial']['V1']['metadata']['source_image_path'] = str(tmp_path/'full.png'); theirs.write_h5ad(tmp_path/'file.h5ad')
    for n,given in enumerate((store, str(tmp_path/'file.h5ad'))):
        histogene_train([given], out=str(tmp_path/f'model{n}'), epochs=2, n_top=20, min_spots=5, setting=['dim=16', 'depth=1', 'heads=2'], lr=1e-3, device='cpu')
        losses.append(json.loads((tmp_path/f'model{n}'/'config.json').read_text())['about']['training']['losses'])
        histogene_predict(str(tmp_path/f'model{n}'), given, out=str(tmp_path/f'{n}.h5ad'), device='cpu')
    p, q = (ad.read_h5ad(tmp_path/f'{n}.h5ad') for n in (0, 1))
    assert losses[0] == losses[1] and p.n_vars == 20 and list(p.obs_names) == list(q.obs_names) and np.allclose(p.X, q.X, atol=1e-5)

def test_store_of_visium_hd(sd, tmp_path, photograph):
    store = write_store(sd, tmp_path/'hd.zarr', *(visium_elements(sd, photograph, 'HD1', ('full', 'hires'), square=True, side=s) for s in (SIDE, 2*SIDE)))
    said = refused('counts of 2 sets of spots', read_section, store)
    for side in (SIDE, 2*SIDE):
        one = store/'shapes'/f'HD1_square_{side:03}um'
        assert str(one) in said
        expected(read_section(one, verbose=False), photograph, side, 1, photograph)
    assert section_name(read_spatialdata(one, name='mine', verbose=False)) == 'mine'
    for wrong in (store/'shapes'/'HD2', store/'tables'/'square_008um'): assert str(one) in refused('no counts of such spots', read_section, wrong)

def test_store_of_several_samples(sd, tmp_path, photograph):
    turned = photograph[::-1, ::-1]
    for own in (True, False):                                                 # in older stores they lie on top of each other; the images' names tell whose they are
        store = write_store(sd, tmp_path/f'{own}.zarr', visium_elements(sd, photograph, 'A', ('hires',), own), visium_elements(sd, turned, 'B', ('hires',), own))
        expected(read_section(store/'shapes'/'A', verbose=False), photograph, 2*SIDE, .5, small(photograph, .5))
        expected(read_section(store/'shapes'/'B', verbose=False), turned, 2*SIDE, .5, small(turned, .5))
    images, shapes, tables = zip(*(visium_elements(sd, p, n, ('hires',), False) for n,p in (('A', photograph), ('B', turned))))
    renamed = {f'photo{i}': v for i,v in enumerate(v for i in images for v in i.values())}
    store = write_store(sd, tmp_path/'named.zarr', (renamed, shapes[0] | shapes[1], tables[0] | tables[1]))
    refused('2 images lie where these spots do: photo0, photo1. Begin the name of theirs with A_', read_section, store/'shapes'/'A')

def test_store_whose_image_is_turned_and_moved(sd, tmp_path, photograph):
    "An affine transformation of the image; positions on the array and widths come out as they were"
    matrix = np.array([[0, -2, 900], [2, 0, -70], [0, 0, 1.]])               # a quarter turn, and a pixel of the image is two of the spots'
    places, table = table_of(sd, photograph, 2*SIDE, 'V1', array=False)
    xy = (np.c_[places[['pxl_col_in_fullres', 'pxl_row_in_fullres']], np.ones(len(places))] @ matrix.T)[:, :2]
    moved = places.assign(pxl_col_in_fullres=xy[:, 0], pxl_row_in_fullres=xy[:, 1])
    shapes = {'V1': shapes_of(sd, moved, 4*SIDE, {'global': sd.transformations.Identity()})}
    image = {'photo': picture_of(sd, photograph, {'global': sd.transformations.Affine(matrix, ('x', 'y'), ('x', 'y'))})}
    s = expected(read_section(write_store(sd, tmp_path/'V1.zarr', (image, shapes, {'table': table}))), photograph, 2*SIDE, 1, photograph)
    known = places.loc[s.obs_names, ['array_col', 'array_row']].to_numpy()
    found = s.obs[['array_col', 'array_row']].to_numpy()
    assert (np.ptp(found - known, axis=0) == 0).all() and not (found - known > 0).any()

def test_store_image_on_disk_and_none(sd, tmp_path, photograph):
    store = write_store(sd, tmp_path/'V1.zarr', visium_elements(sd, photograph, kinds=('hires',)))
    Image.fromarray(photograph).save(tmp_path/'full.png')
    s, places = read_section(store, image=tmp_path/'full.png'), grid_of(photograph, 2*SIDE)[0]
    assert np.allclose(s.obsm['spatial'], places.loc[s.obs_names, ['pxl_col_in_fullres', 'pxl_row_in_fullres']])
    assert s.uns['spatial']['V1']['metadata']['source_image_path'] == str(tmp_path/'full.png')
    s = read_section(write_store(sd, tmp_path/'none.zarr', visium_elements(sd, photograph, kinds=())))
    assert s.uns['spatial']['V1']['images'] == {} and np.allclose(s.obsm['spatial'], places.loc[s.obs_names, ['pxl_col_in_fullres', 'pxl_row_in_fullres']])

def test_store_limit_of_pixels(sd, tmp_path, photograph, monkeypatch):
    store = write_store(sd, tmp_path/'V1.zarr', visium_elements(sd, photograph, kinds=('full', 'lowres')))
    monkeypatch.setenv('HISTOGENE_MAX_PIXELS', str(PX*PX - 1))
    s = read_section(store)
    assert s.uns['spatial']['V1']['images']['hires'].shape == (PX//2, PX//2, 3) and s.uns['histogene']['image_scale'] == .5
    monkeypatch.setenv('HISTOGENE_MAX_PIXELS', '10')
    refused('HISTOGENE_MAX_PIXELS', read_section, store)

@pytest.mark.parametrize('kind', ['RGBA', 'grey', 'float', '16 bits', '5 channels'])
def test_store_kinds_of_pixels(sd, tmp_path, photograph, kind):
    pixels = {'RGBA': np.dstack([photograph, np.full((PX, PX), 255, np.uint8)]), 'grey': photograph[..., :1], 'float': (photograph/255).astype('float32'),
              '16 bits': photograph.astype('uint16')*257, '5 channels': np.repeat(photograph[..., :1], 5, 2)}[kind]
    _, shapes, tables = visium_elements(sd, photograph)
    store = write_store(sd, tmp_path/'V1.zarr', ({'V1_full_image': picture_of(sd, pixels, {'V1': sd.transformations.Identity()})}, shapes, tables))
    s = read_section(store)
    if kind == '5 channels': assert s.uns['spatial']['V1']['images'] == {}    # fluorescence: not what a patch is cut from
    else: assert np.array_equal(s.uns['spatial']['V1']['images']['hires'], np.repeat(pixels, 3, 2) if kind == 'grey' else photograph)

def test_store_refused(sd, tmp_path, photograph):
    images, shapes, tables = visium_elements(sd, photograph, kinds=('hires',))
    table, other = tables['table_V1'], tables['table_V1'].copy()
    refused('there is no such file', read_section, tmp_path/'none.zarr')
    (tmp_path/'empty.zarr').mkdir()
    refused('empty.zarr: cannot be read as a SpatialData store', read_section, tmp_path/'empty.zarr')
    refused('no table in it has counts of shapes', read_section, write_store(sd, tmp_path/'a.zarr', (images, shapes, {})))
    refused('2 tables have counts of these spots', read_section, write_store(sd, tmp_path/'b.zarr', (images, shapes, dict(one=table, two=other))))
    halved = table.copy(); halved.X = halved.X/2
    refused('c.zarr: .* is fractional', read_section, write_store(sd, tmp_path/'c.zarr', (images, shapes, dict(table=halved))))
    halved.layers['counts'] = table.X.copy()
    kept = read_section(write_store(sd, tmp_path/'kept.zarr', (images, shapes, dict(table=halved))))
    assert (kept.X != table[kept.obs_names].X).nnz == 0 and kept.uns['histogene']['counts_from'] == "layers['counts']"
    halved.layers['counts'].indices[0] = 10**6
    refused('damaged.zarr: its sparse matrix is damaged', read_section, write_store(sd, tmp_path/'damaged.zarr', (images, shapes, dict(table=halved))))
    elsewhere = table.copy(); elsewhere.obs['spot_id'] += 10_000
    refused('none of the 625 rows of counts is at one of these 625 spots', read_section, write_store(sd, tmp_path/'d.zarr', (images, shapes, dict(table=elsewhere))))
    cells = table_of(sd, photograph, 2*SIDE, 'V1', array=False)[1]
    scattered = grid_of(photograph, 2*SIDE)[0]
    scattered[['pxl_col_in_fullres', 'pxl_row_in_fullres']] = np.random.default_rng(0).uniform(20, 380, (len(scattered), 2))
    refused('e.zarr: .* not on one square or hexagonal grid', read_section, write_store(sd, tmp_path/'e.zarr', ({}, {'V1': shapes_of(sd, scattered, SIDE, {'global': sd.transformations.Identity()})}, dict(table=cells))))

def test_store_some_rows_without_a_shape(sd, tmp_path, photograph):
    images, shapes, tables = visium_elements(sd, photograph, kinds=('hires',))
    gone = shapes['V1'].index[grid_of(photograph, 2*SIDE)[0].in_tissue.to_numpy() == 1][:3]
    s = read_section(write_store(sd, tmp_path/'V1.zarr', (images, {'V1': shapes['V1'].drop(gone)}, tables)))
    assert s.uns['histogene']['counts_without_position'] == 3 and s.n_obs == (grid_of(photograph, 2*SIDE)[0].in_tissue == 1).sum() - 3

def test_store_needs_spatialdata(tmp_path, monkeypatch):
    (tmp_path/'a.zarr').mkdir()
    monkeypatch.setitem(sys.modules, 'spatialdata', None)
    refused(r"pip install 'histogene_nb\[spatialdata\]'", read_section, tmp_path/'a.zarr')

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def test_store_is_not_unpickled(sd, tmp_path, photograph, monkeypatch):
    "An array whose codec is pickle, in a store of the older format, as the file's maker may write it; with a numcodecs that would unpickle it"
    import numcodecs.pickles
    monkeypatch.setattr(numcodecs.pickles, 'ALLOW_UNSAFE_PICKLE_DECODE', True, raising=False)
    from spatialdata._io.format import SpatialDataContainerFormatV01
    store = write_store(sd, tmp_path/'V1.zarr', visium_elements(sd, photograph, kinds=('hires',)), sdata_formats=SpatialDataContainerFormatV01())
    expected(read_section(store, verbose=False), photograph, 2*SIDE, .5, small(photograph, .5))
    ran, array = tmp_path/'ran', store/'tables'/'table_V1'/'uns'/'evil'
    array.mkdir()
    (array/'.zarray').write_text(json.dumps(dict(chunks=[1], compressor=None, dtype='|O', fill_value=None, filters=[dict(id='vlen-utf8'), dict(id='pickle', protocol=5)], order='C', shape=[1], zarr_format=2)))
    (array/'.zattrs').write_text(json.dumps({'encoding-type': 'array', 'encoding-version': '0.2.0'}))
    (array/'0').write_bytes(numcodecs.Pickle().encode(np.array([Bomb(ran)], dtype=object)))
    for f in store.rglob('.zmetadata'): f.unlink()
    refused('pickled', read_section, store)
    assert not ran.exists()
    with pytest.raises(Exception): sd.read_zarr(store)                        # what it would have done: the codec is back
    assert ran.exists()

def test_damaged_stores(sd, tmp_path, photograph):
    "A file of a store cut short, without a piece or with other bytes in it: refused, or read"
    store, rng, came = write_store(sd, tmp_path/'V1.zarr', visium_elements(sd, photograph, kinds=('hires',))), np.random.default_rng(0), []
    files = sorted(f.relative_to(store) for f in store.rglob('*') if f.is_file())
    for n in range(24):
        copy = Path(shutil.copytree(store, tmp_path/f'{n}.zarr'))
        file = copy/files[rng.integers(len(files))]
        data, (i,j) = file.read_bytes(), np.sort(rng.integers(file.stat().st_size, size=2))
        file.write_bytes([data[:i], data[:i] + data[j:], data[:i] + rng.bytes(20) + data[i+20:], b''][rng.integers(4)])
        try: read_section(copy, verbose=False); came.append('read')
        except InputError as e: came.append('refused'); assert str(copy) in str(e)
        shutil.rmtree(copy)
    assert came.count('refused') > 3
