"Tables, .h5ad files, panels and names as they come from other programs: the right value, or a line that says what is wrong"
import gzip, os, shutil, time
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd, pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse
from conftest import needs_images
from histogene_nb.crossval import cross_validate
from histogene_nb.expression import common_genes, normalize, read_panel
from histogene_nb.files import InputError, look_for
from histogene_nb.her2st import write_her2st
from histogene_nb.readers import read_section
from histogene_nb.sections import leave_one_out, new_section, place, section_name
from histogene_nb.tables import array_positions

PX, GENES = 480, [f'G{i}' for i in range(12)]
ARRAY = ['array_col', 'array_row']

def refused(match, f, *args, **kwargs):
    with pytest.raises(InputError, match=match) as e: f(*args, **kwargs)
    return str(e.value)

def photograph(rng):
    "Rough tissue in the left two thirds, of which no two places look the same; the rest is glass"
    y, x = np.mgrid[:PX, :PX]/PX
    tissue = np.stack([150 + 60*x, 60 + 80*y, 150 + 50*np.sin(9*x*y)], -1) + rng.normal(0, 25, (PX, PX, 1))
    return np.where((x < .66 + .05*np.sin(12*y))[..., None], tissue, 244).clip(0, 255).astype(np.uint8)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a photograph; the spots of a hexagonal array as a table, in_tissue among its columns; and their counts"
    folder, rng = tmp_path_factory.mktemp('made'), np.random.default_rng(0)
    Image.fromarray(photograph(rng)).save(folder/'he.png')
    row, k = (a.ravel() for a in np.mgrid[:11, :10])
    col = 2*k + row % 2
    x, y = 26 + 22.*col, 30 + 22*3**.5*row
    spots = pd.DataFrame(dict(in_tissue=(x < .6*PX).astype(int), array_row=row, array_col=col, pixel_x=x, pixel_y=y),
                         pd.Index([f'SPOT{i:03}-1' for i in range(110)], name='barcode'))
    return folder, spots, pd.DataFrame(rng.poisson(5, (110, 12)) + 1, spots.index, GENES)

def tables(made, folder, spots=None, counts=None, names=('counts.csv', 'coordinates.csv'), image=True, **kw):
    folder.mkdir(exist_ok=True)
    for name,table in zip(names, (made[2] if counts is None else counts, made[1] if spots is None else spots)):
        table.to_csv(folder/name, sep='\t' if '.tsv' in name else ',', **kw)
    if image: shutil.copy(made[0]/'he.png', folder)
    return folder

def h5ad(made, path, edit=None, image='hires', **kw):
    "A file as scanpy writes it, with one thing changed"
    _, spots, counts = made
    pixels = np.asarray(Image.open(made[0]/'he.png'))
    factors = dict(spot_diameter_fullres=24., tissue_hires_scalef=1., fiducial_diameter_fullres=30.)
    s = AnnData(sparse.csr_matrix(counts.to_numpy(np.float32)), spots[['in_tissue', *ARRAY]].copy(), pd.DataFrame(index=GENES),
                obsm=dict(spatial=spots[['pixel_x', 'pixel_y']].to_numpy()), uns=dict(spatial=dict(S1=dict(images={image: pixels} if image else {}, scalefactors=factors, metadata={}))))
    if edit: s = edit(s) or s
    path.parent.mkdir(parents=True, exist_ok=True)
    s.write_h5ad(path, **kw)
    return path

def info(s): return s.uns['spatial']['S1']

def right(made, s, n=None, origin=False):
    "That a section is the one that was written: its spots in tissue, their counts, places and pixels"
    spots, counts = made[1][made[1].in_tissue == 1], made[2][made[1].in_tissue == 1]
    assert len(s) == (len(spots) if n is None else n)
    at = [int(name.removeprefix('SPOT')[:3]) for name in s.obs_names]
    found, known = s.obs[ARRAY].to_numpy(), made[1].iloc[at][ARRAY].to_numpy()
    assert np.array_equal(s.X.toarray() if sparse.issparse(s.X) else s.X, made[2].iloc[at].to_numpy())
    assert np.allclose(s.obsm['spatial'], made[1].iloc[at][['pixel_x', 'pixel_y']])
    assert np.array_equal(found, known) if not origin else (np.ptp(found - known, axis=0) == 0).all()
    return s

# --- 1: which section is meant

@pytest.fixture
def published(made, tmp_path, monkeypatch):
    "A section that is called A1, as one of the HER2+ data is, in their layout; and an empty working folder"
    xy = np.stack([a.ravel() for a in np.mgrid[2:9, 3:9]], 1)
    s = new_section(np.ones((42, 3)), list('abc'), [f'{x}x{y}' for x,y in xy], xy*50., *xy.T, 'A1', 'A', made[0]/'he.png')
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    return write_her2st(s, tmp_path/'her2st')

@pytest.mark.parametrize('given', ['A1', './A1', Path('A1')])
def test_what_is_on_the_disk_wins(made, tmp_path, published, given):
    tables(made, tmp_path/'here'/'A1')
    right(made, read_section(given, root=tmp_path/'nothing'))

def test_both_are_there(made, tmp_path, published):
    tables(made, tmp_path/'here'/'A1')
    said = refused('Say which', read_section, 'A1', root=published)
    assert './A1' in said and str(published/'A1') in said
    right(made, read_section('./A1', root=published))
    right(made, read_section(tmp_path/'here'/'A1', root=published))
    assert read_section(published/'A1').n_obs == read_section(str(published/'A1'), root='elsewhere').n_obs == 42
    shutil.rmtree(tmp_path/'here'/'A1')
    assert read_section('A1', root=published).n_obs == 42 and read_section(published).n_obs == 42

@pytest.mark.parametrize('given', ['./A1', 'mine/A1', 'mein', 'A1.h5ad'])
def test_a_mistyped_path_is_no_download(tmp_path, published, given):
    (tmp_path/'here'/'mine').mkdir()
    for f in look_for, read_section: assert 'ownload' not in refused('there is no such', f, given)
    if given == 'mein': assert 'Did you mean mine?' in refused('no such section', look_for, given)

def test_a_published_name_is_fetched(tmp_path, published):
    refused('B4: no such section in .* histogene_download', read_section, 'B4', root=published)
    refused('this is a path, not|section already', read_section, AnnData(np.ones((2, 2))))

def several(made, tmp_path, keys=('A', 'B'), column='library_id', **kw):
    "Two sections in one file, as ad.concat leaves them"
    parts = [ad.read_h5ad(h5ad(made, tmp_path/'part.h5ad', lambda s: s.uns.update(spatial={k: info(s)}) if keys else None)) for k in keys or 'AB']
    return ad.concat(parts, label=column, keys=keys or ['A', 'B'], index_unique='-', **kw)

def written(s, path): s.write_h5ad(path); return path

@pytest.mark.parametrize('column', ['library_id', 'where_from'])
def test_a_file_of_several_sections(made, tmp_path, column):
    from histogene_nb.commands import _given
    s = several(made, tmp_path, column=column, uns_merge='unique')
    both = written(s, tmp_path/'both.h5ad')
    assert f'Give one: {both}/A, {both}/B.' in refused('there are 2 sections in it', read_section, both)
    (tmp_path/'s.csv').write_text('path\nboth.h5ad/B\n')
    for path in both/'A', f'{both}/B', _given([], tmp_path/'s.csv', None)[0]['path'], written(s[s.obs[column] == 'B'].copy(), tmp_path/'one.h5ad'):
        found = read_section(path)
        assert section_name(found) == ('A' if str(path).endswith('A') else 'B')
        found.obs_names = found.obs_names.str[:-2]
        right(made, found)
    refused('there is no section C in it, only A, B', read_section, both/'C')
    for astray in tmp_path/'s.csv'/'A', tmp_path/'none.h5ad'/'A': refused('there is no such folder', read_section, astray)

def test_spots_of_several_sections_with_the_picture_of_one(made, tmp_path):
    s = several(made, tmp_path, keys=None, uns_merge='first')
    some = np.r_[:110:2, 111:220:2]                                           # no two of them at one place
    for part in s, s[some].copy(), several(made, tmp_path):
        refused(r"obs\['library_id'\] names 2 sections, such as A, and uns\['spatial'\] has no entry for each", read_section, written(part, tmp_path/'s.h5ad'))
    s = several(made, tmp_path, uns_merge='unique')
    del s.uns['spatial']['B']
    both = written(s, tmp_path/'both.h5ad')
    found = read_section(both/'A')
    assert set(found.obs.library_id) == {'A'}
    found.obs_names = found.obs_names.str[:-2]
    right(made, found)
    for given in both, both/'B': refused('has no entry for each', read_section, given)
    s = several(made, tmp_path, uns_merge='unique')
    del s.obs['library_id']
    refused('has 2 sections, A, B, and no column of obs says', read_section, written(s, tmp_path/'s.h5ad'))

@pytest.mark.parametrize('column', ['batch', 'sample'])
def test_one_section_may_have_several_batches(made, tmp_path, column):
    right(made, read_section(h5ad(made, tmp_path/'s.h5ad', lambda s: s.obs.__setitem__(column, ['x', 'y']*55))))

def test_what_is_no_section_is_answered_with_what_to_give(made, tmp_path):
    (tmp_path/'cohort').mkdir()
    for n in 'AB': h5ad(made, tmp_path/'cohort'/f'{n}.h5ad')
    tables(made, tmp_path/'cohort'/'C')
    assert f"Give one: {tmp_path/'cohort'/'A.h5ad'}, {tmp_path/'cohort'/'B.h5ad'}, {tmp_path/'cohort'/'C'}." in refused('what is in this folder are sections', read_section, tmp_path/'cohort')
    for name,match in {'spatial.tar.gz': 'packed. Unpack it', 'x.zip': 'packed. Unpack it', 'x.rds': '.rds is not read', 'x.cloupe': '.cloupe is not read', 'x.h5seurat': 'not read. Write an .h5ad file'}.items():
        (tmp_path/name).mkdir(); (tmp_path/name/name).touch()
        for given in tmp_path/name/name, tmp_path/name: refused(f'{name}/{name}: .*{match}', read_section, given)
    (tmp_path/'x.h5').touch(); (tmp_path/'m').mkdir(); (tmp_path/'m'/'matrix.mtx.gz').touch(); (tmp_path/'m'/'features.tsv.gz').touch()
    refused('if AnnData wrote this, call it .h5ad', read_section, tmp_path/'x.h5')
    refused('these are counts without positions', read_section, tmp_path/'m')
    (tmp_path/'cohort'/'C'/'counts.csv').rename(tmp_path/'cohort'/'C'/'counts.xlsx')
    for name in 'counts.tsv.gz', 'matrix.mtx.gz': (tmp_path/'m'/name).touch(); refused('give the folder that this file is in', read_section, tmp_path/'m'/name)
    refused('counts.xlsx: .* but .xlsx is not read. Save them as .csv', read_section, tmp_path/'cohort'/'C')

@pytest.mark.parametrize('kind,text', [('.zattrs', '[]'), ('.zattrs', '"anndata"'), ('zarr.json', '{"attributes": 3}'), ('zarr.json', '7')])
def test_a_store_whose_attributes_are_none(tmp_path, kind, text):
    store = tmp_path/'s.zarr'
    store.mkdir(); (store/kind).write_text(text)
    refused('s.zarr: cannot be read as a store', read_section, store)

def test_shadows_and_packed_twins_are_no_sections(published):
    "What macOS leaves beside a file, and the same counts unpacked"
    counts = published/'ST-cnts'/'A1.tsv.gz'
    (published/'ST-cnts'/'._A1.tsv.gz').write_bytes(b'Mac OS X'); (published/'ST-cnts'/'._X1.tsv.gz').write_bytes(b'Mac OS X')
    counts.with_suffix('').write_bytes(gzip.decompress(counts.read_bytes()))
    assert section_name(read_section(published)) == 'A1'

def test_categories_that_are_arrays(made, tmp_path):
    "As a damaged file can have them: one axis more"
    import h5py
    path = h5ad(made, tmp_path/'s.h5ad', lambda s: s.obs.__setitem__('annotation', pd.Categorical(['a', 'b']*55)))
    with h5py.File(path, 'r+') as f:
        held, attrs = f['obs/annotation/categories'][()], dict(f['obs/annotation/categories'].attrs)
        del f['obs/annotation/categories']
        f['obs/annotation/categories'] = held[:, None]
        f['obs/annotation/categories'].attrs.update(attrs)
    refused("s.h5ad: .*annotation", read_section, path)

# --- how wide a spot is

def test_how_wide_a_spot_is(made, published, tmp_path):
    "In micrometres, where the array is of a known make: by how far apart its columns are"
    from histogene_nb.position import spot_um
    assert spot_um(read_section('A1', root=published)) == pytest.approx(112/50*200, rel=1e-3)
    assert spot_um(read_section(tables(made, tmp_path/'t'))) is None and spot_um(read_section(h5ad(made, tmp_path/'s.h5ad'))) is None
    def visium(s): s.uns['spatial']['S1']['metadata'] = dict(chemistry_description="Spatial 3' v1")
    def cellxgene(s): s.obs['assay'] = 'Visium Spatial Gene Expression'
    for edit in visium, cellxgene: assert spot_um(read_section(h5ad(made, tmp_path/'s.h5ad', edit))) == pytest.approx(24/44*100, rel=1e-3)

# --- 4: which spots count

@pytest.mark.parametrize('column', ['in_tissue', 'selected', 'tissue'])
@pytest.mark.parametrize('yes,no', [(1, 0), ('True', 'False'), ('TRUE', 'FALSE'), (1., 0.)])
def test_tables_heed_what_is_in_tissue(made, tmp_path, capsys, column, yes, no):
    spots = made[1].rename(columns=dict(in_tissue=column))
    spots[column] = np.where(spots[column] == 1, yes, no)
    if column == 'tissue': spots = spots.rename(columns=dict(pixel_x='imagecol', pixel_y='imagerow'))      # Seurat's
    s = right(made, read_section(tables(made, tmp_path/'t', spots)))
    assert s.uns['histogene']['not_in_tissue'] == 110 - len(s) > 20 and f'{len(s)} of 110 on tissue by {column}' in capsys.readouterr().out

def test_spots_on_glass_are_left_out_by_the_picture(made, tmp_path, capsys):
    bare = made[1].drop(columns='in_tissue')
    for path in tables(made, tmp_path/'t', bare), h5ad(made, tmp_path/'s.h5ad', lambda s: s.obs.drop(columns='in_tissue', inplace=True)):
        s = read_section(path)
        at = made[1].loc[s.obs_names]
        assert at.pixel_x.max() < .72*PX and set(made[1].index[made[1].in_tissue == 1]) <= set(s.obs_names)
        assert s.uns['histogene']['on_glass'] == 110 - len(s) > 20 and f'{110 - len(s)} on glass in the picture, left out' in capsys.readouterr().out

@pytest.mark.parametrize('word', ['breast', np.nan, 0])
def test_a_column_tissue_may_be_something_else(made, tmp_path, word):
    right(made, read_section(h5ad(made, tmp_path/'s.h5ad', lambda s: s.obs.__setitem__('tissue', word))))
    s = read_section(tables(made, tmp_path/'t', made[1].drop(columns='in_tissue').assign(tissue=word), image=False))
    assert len(s) == 110 and 'tissue_by' not in s.uns['histogene']

def test_numbers_in_a_column_tissue_are_flags_beside_those_of_seurat_alone(made, tmp_path):
    bare = made[1].drop(columns='in_tissue').assign(tissue=[0, 1]*55)
    assert len(read_section(tables(made, tmp_path/'t', bare, image=False))) == 110

@pytest.mark.parametrize('first,kept', [(.27, True), (.45, False)])
def test_spots_on_glass_beside_tissue_off_the_centre(made, tmp_path, first, kept):
    "More of the grid would be tissue in the mirror: glass is left out all the same, unless most spots lie on it"
    part = made[1][made[1].pixel_x > first*PX]
    bare = tables(made, tmp_path/'t', part.drop(columns='in_tissue'))
    if kept: assert read_section(bare).uns['histogene']['on_glass'] > 20
    else: refused('if it were .* in a column in_tissue which spots', read_section, bare)
    right(made, read_section(tables(made, tmp_path/'t', part)), part.in_tissue.sum())

def test_odd_flags_are_refused(made, tmp_path):
    for value,match in (('maybe', "in_tissue of a spot is 'maybe'"), (0, 'none of its 110 spots is in tissue')):
        refused(f'coordinates.csv: .*{match}', read_section, tables(made, tmp_path/'t', made[1].assign(in_tissue=value)))

def test_selected_in_the_layout_of_her2st(published, capsys):
    file = published/'ST-spotfiles'/'A1_selection.tsv'
    table = pd.read_csv(file, sep='\t')
    table.assign(selected=(table.x > 4).astype(int)).to_csv(file, sep='\t', index=False)
    s = read_section('A1', root=published)
    assert s.n_obs == 24 and s.obs.array_col.min() == 5 and '24 of 42 on tissue by selected; 18 with counts but not in tissue' in capsys.readouterr().out

def test_small_pictures_do_not_tell_glass(made, tmp_path, capsys):
    "Too few pixels to see how rough they are: all spots are kept, and nothing is said of tissue"
    bare = made[1].drop(columns='in_tissue')
    def small(s):
        s.obs.drop(columns='in_tissue', inplace=True)
        s.uns['spatial']['S1'].update(images=dict(hires=np.asarray(Image.open(made[0]/'he.png').resize((190, 190)))), scalefactors=dict(spot_diameter_fullres=24., tissue_hires_scalef=190/PX))
    s = read_section(h5ad(made, tmp_path/'s.h5ad', small))
    assert len(s) == len(bare) and 'on_glass' not in s.uns['histogene'] and 'on tissue in the image' not in capsys.readouterr().out

def test_spots_off_the_image_are_said(made, published, tmp_path, capsys):
    "In every format: how many, and that they are left out"
    from histogene_nb.cscc import write_cscc
    moved = made[1].copy()
    moved.iloc[0, list(moved).index('pixel_x')] = -40
    for path in tables(made, tmp_path/'t', moved), h5ad(made, tmp_path/'s.h5ad', lambda s: s.obsm['spatial'].__setitem__((0, 0), -40)):
        assert read_section(path).uns['histogene']['off_image'] == 1 and '1 off the image, left out' in capsys.readouterr().out
    cscc = write_cscc(read_section('A1', root=published, verbose=False), tmp_path/'cscc', 'P2_ST_rep1', background=3)
    for file in published/'ST-spotfiles'/'A1_selection.tsv', cscc/'GSM4284316_spot_data-selection-P2_ST_rep1.tsv':
        table = pd.read_csv(file, sep='\t')
        table.loc[0, 'pixel_x'] = PX + 9
        if 'GSM' in file.name: table['selected'] = [1]*40 + [0]*2
        table.to_csv(file, sep='\t', index=False)
    capsys.readouterr()
    assert read_section('A1', root=published).n_obs == 41 and '1 off the image, left out' in capsys.readouterr().out
    assert read_section('P2_ST_rep1', root=cscc).n_obs == 39 and 'P2_ST_rep1: 39 spots under tissue, 5 beside it; 0 selected without counts; 1 off the image, left out' in capsys.readouterr().out

def test_reduced_image_of_the_skin_series(made, published, tmp_path, capsys):
    "Found by its name, which says its scale; or given"
    from histogene_nb.cscc import write_cscc
    root = write_cscc(read_section('A1', root=published, verbose=False), tmp_path/'cscc', 'P2_ST_rep1')
    whole = read_section('P2_ST_rep1', root=root, verbose=False)
    Image.open(made[0]/'he.png').resize((240, 240)).save(root/'P2_1_0.5.jpg')
    assert place(read_section('P2_ST_rep1', root=root)).path == place(whole).path
    (root/'GSM4284316_P2_ST_rep1.jpg').unlink()
    for image in None, root/'P2_1_0.5.jpg':
        s = read_section('P2_ST_rep1', root=root, image=image)
        assert place(s).path.endswith('P2_1_0.5.jpg') and np.allclose(s.obsm['spatial'], whole.obsm['spatial']/2) and place(s).diameter == place(whole).diameter/2
        assert s.uns['histogene']['spot_um'] == whole.uns['histogene']['spot_um'] and f'of {len(s)} spots on tissue in the image' in capsys.readouterr().out

@needs_images
def test_the_real_skin_images(tmp_path):
    "Spots of three sections lie on the tissue of their reduced photographs"
    shared = Path(os.environ['HISTOGENE_DATA'])/'cscc'
    for rep in 1, 2, 3:
        at = pd.read_csv(shared/f'P2_{rep}_spatial_locs.csv')
        x, y = at.cell_ID.str.split('x', expand=True).astype(int).to_numpy().T
        name, sample = f'P2_ST_rep{rep}', f'GSM{4284315 + rep}'
        pd.DataFrame(1, at.cell_ID.rename(None), ['A', 'B']).to_csv(tmp_path/f'{sample}_{name}_stdata.tsv', sep='\t')
        pd.DataFrame(dict(x=x, y=y, pixel_x=at.pixel_x.abs(), pixel_y=at.pixel_y.abs())).to_csv(tmp_path/f'{sample}_spot_data-selection-{name}.tsv', sep='\t', index=False)
        shutil.copy(shared/f'P2_{rep}_0.0625.jpg', tmp_path)
        s = read_section(name, root=tmp_path, verbose=False)
        assert s.uns['histogene']['image_scale'] == .0625 and s.uns['histogene']['on_tissue'] > .95*len(s)

# --- 5: which way round

def named(made, form): return made[2].set_axis([form.format(col=c, row=r) for c,r in made[1][ARRAY].to_numpy()])

@pytest.mark.parametrize('form', ['{col}x{row}', '{row}x{col}', 'X{col}x{row}'])
@pytest.mark.parametrize('turned', [False, True])
def test_names_of_positions(made, tmp_path, form, turned):
    counts = named(made, form)
    s = read_section(tables(made, tmp_path/'t', made[1].reset_index(drop=True), counts.T if turned else counts))
    s.obs_names = [made[1].index[(made[1].array_col == c) & (made[1].array_row == r)][0] for c,r in s.obs[ARRAY].to_numpy()]
    right(made, s)

def test_names_that_fit_both_ways_are_asked_about(tmp_path):
    row, col = (a.ravel() for a in np.mgrid[:6, :6])
    spots = pd.DataFrame(dict(x=col, y=row, pixel_x=50.*col, pixel_y=50.*row))
    counts = pd.DataFrame(np.arange(72).reshape(36, 2), [f'{c}x{r}' for c,r in zip(col, row)], list('ab'))
    folder = tables(None, tmp_path/'t', spots, counts, image=False)
    assert 'fit as x x y and as well as y x x' in refused('Say which', read_section, folder)
    s = read_section(tables(None, folder, spots.assign(name=counts.index), counts, image=False))
    assert np.array_equal(s.X.toarray(), counts)

def test_names_from_r(made, tmp_path):
    counts = made[2].T.rename(columns=lambda n: n.replace('-', '.'))
    s = read_section(tables(made, tmp_path/'t', counts=counts))
    s.obs_names = s.obs_names.str.replace('.', '-')
    right(made, s)

def test_tables_that_match_by_accident(made, tmp_path):
    counts = made[2].set_axis([str(i) if i < 10 else f's{i}' for i in range(110)])
    spots = made[1].reset_index(drop=True).assign(number=range(110))
    assert '10 of its 110 spots' in refused('Nine in ten must match', read_section, tables(made, tmp_path/'t', spots, counts))

def test_rows_for_columns(made, tmp_path):
    swapped = made[1].rename(columns=dict(array_row='array_col', array_col='array_row'))
    refused(r'coordinates.csv: pixel_x follows array_row .* columns=dict', read_section, tables(made, tmp_path/'t', swapped))
    for edit in (lambda s: s.obsm.update(spatial=s.obsm['spatial'][:, ::-1].copy()), lambda s: s.obs.rename(columns=dict(zip(ARRAY, ARRAY[::-1])), inplace=True)):
        refused('follows array_row', read_section, h5ad(made, tmp_path/'s.h5ad', edit))
    turned = made[1].assign(pixel_x=PX - made[1].pixel_y, pixel_y=made[1].pixel_x)   # the whole slide by a quarter turn: as it may be
    assert read_section(tables(made, tmp_path/'q', turned, image=False)).n_obs == (made[1].in_tissue == 1).sum()

@pytest.mark.parametrize('degrees', [0, 90, 3, -4, 87, 93, 14, 16])
def test_one_pixel_of_noise_decides_nothing(degrees):
    row, k = (a.ravel() for a in np.mgrid[:40, :24])
    col, a = 2*k + row % 2, np.deg2rad(degrees)
    there = np.random.default_rng(5).random(len(row)) < .8
    xy = np.stack([col*50, row*100*3**.5/2], 1) @ [[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]
    for seed in range(6):
        found = array_positions((xy + np.random.default_rng(seed).normal(0, 1, xy.shape))[there])[0]
        off = found - np.stack([col, row], 1)[there]
        assert (np.ptp(off, axis=0) == 0).all(), (degrees, seed)

def test_y_that_counts_upwards(made, tmp_path):
    "As R and Giotto draw it"
    for path in tables(made, tmp_path/'t', made[1].assign(pixel_y=-made[1].pixel_y)), h5ad(made, tmp_path/'s.h5ad', lambda s: s.obsm.update(spatial=s.obsm['spatial']*[1, -1])):
        refused('Their y counts upwards, as R draws it: give -y', read_section, path)

def test_a_list_with_a_line_a_count(made, tmp_path):
    folder = tables(made, tmp_path/'t')
    made[2].stack().rename_axis(['barcode', 'gene']).rename('count').reset_index().to_csv(folder/'counts.csv', index=False)
    refused('Is this a list with a line a count', read_section, folder)

def test_positions_in_micrometres(made, tmp_path, capsys):
    read_section(h5ad(made, tmp_path/'s.h5ad', lambda s: s.obsm.update(spatial=s.obsm['spatial']/2)))
    assert 'spots are 24 pixels wide and lie 22 apart' in capsys.readouterr().out

def test_a_slide_beside_tables(made, tmp_path, capsys):
    import tifffile
    folder = tables(made, tmp_path/'t', image=False)
    (folder/'he.czi').touch()
    right(made, read_section(folder)); assert 'no image (he.czi is not read: export it as a TIFF)' in capsys.readouterr().out
    tifffile.imwrite(folder/'he.svs', np.asarray(Image.open(made[0]/'he.png')), tile=(128, 128), photometric='rgb')
    assert place(right(made, read_section(folder))).path == str(folder/'he.svs')

def test_a_mirrored_array_is_said(made, tmp_path, capsys):
    read_section(h5ad(made, tmp_path/'s.h5ad', lambda s: s.obsm.update(spatial=s.obsm['spatial']*[1, -1] + [0, PX])))
    assert 'LOOK at the image: against the array it is mirrored' in capsys.readouterr().out
    read_section(tables(made, tmp_path/'t'))
    assert 'mirrored' not in capsys.readouterr().out

# --- 7: whose patient

def test_patients(made, tmp_path):
    own = read_section(tables(made, tmp_path/'t'), verbose=False)
    assert own.uns['histogene']['patient'] == ''
    assert read_section(tmp_path/'t', patient='P7', verbose=False).uns['histogene']['patient'] == 'P7'
    assert read_section(tables(made, tmp_path/'u', made[1].assign(patient='P7'))).uns['histogene']['patient'] == 'P7'
    assert read_section(tables(made, tmp_path/'v', made[1].assign(Patient=7.))).uns['histogene']['patient'] == '7'
    for edit in (lambda s: s.obs.__setitem__('patient', 'P7'), lambda s: s.obs.__setitem__('donor_id', pd.Categorical(['P7']*110)), lambda s: s.uns.update(patient='P7')):
        s = read_section(h5ad(made, tmp_path/'s.h5ad', edit))
        assert s.uns['histogene']['patient'] == 'P7'
        s.write_h5ad(tmp_path/'again.h5ad')
        assert read_section(tmp_path/'again.h5ad').uns['histogene']['patient'] == 'P7'

@pytest.mark.parametrize('unknown', ['', None, np.nan])
def test_patients_unknown(tmp_path, unknown):
    catalogue = pd.DataFrame(dict(patient=['P1', unknown, 'P1']), ['a', 'b', 'c'])
    assert len(leave_one_out(catalogue, 'section')) == 3
    refused(r'Whose tissue b is, is not known \(1 of 3 sections\).*patient=', leave_one_out, catalogue, 'patient')
    refused('Whose tissue b is', cross_validate, None, catalogue, {}, tmp_path/'run', by='patient')
    assert not (tmp_path/'run').exists()

# --- files that are intact

SYMBOL = {f'ENSG{i:011}': g for i,g in enumerate(GENES)}

def cellxgene(s):
    "As CELLxGENE requires: Ensembl ids, normalised X and counts in raw, is_single, the photograph at full resolution"
    s.var_names = list(SYMBOL)
    s.var['feature_name'] = pd.Categorical(GENES)
    s.raw = s.copy()
    s.X = sparse.csr_matrix(np.log1p(s.X.toarray()))
    s.uns['spatial']['is_single'] = True
    small = np.asarray(Image.fromarray(info(s)['images']['hires']).reduce(2))
    info(s).update(images=dict(fullres=info(s)['images']['hires'], hires=small), scalefactors=dict(spot_diameter_fullres=24., tissue_hires_scalef=.5))
    s.obs['donor_id'] = 'D1'

def key(old, new, scale=None):
    def edit(s):
        info(s)['images'][new] = info(s)['images'].pop(old)
        if scale: info(s)['scalefactors'][scale] = info(s)['scalefactors'].pop('tissue_hires_scalef')
    return edit

def frame(columns, order=(0, 1)):
    def edit(s): s.obsm['spatial'] = pd.DataFrame(s.obsm['spatial'][:, list(order)], s.obs_names, columns)
    return edit

INTACT = dict(
    as_it_is=lambda s: None, cellxgene=cellxgene,
    is_single=lambda s: s.uns['spatial'].update(is_single=np.True_),
    text=lambda s: s.obsm.update(spatial=s.obsm['spatial'].astype(str).astype(object)),
    data_frame=frame(['x', 'y']), data_frame_rows_first=frame(['pxl_row_in_fullres', 'pxl_col_in_fullres'], (1, 0)),
    r_rows_first=frame(['imagerow', 'imagecol'], (1, 0)), unnamed=frame(['0', '1']),
    three_columns=lambda s: s.obsm.update(spatial=np.c_[s.obsm['spatial'], np.zeros(110)]),
    whole_pixels=lambda s: s.obsm.update(spatial=s.obsm['spatial'].astype(np.float32).astype(float)),
    categorical=lambda s: [s.obs.__setitem__(k, pd.Categorical(s.obs[k].astype(str))) for k in ARRAY] and None,
    Int64=lambda s: [s.obs.__setitem__(k, s.obs[k].astype('Int64')) for k in ARRAY] and None,
    whole_floats=lambda s: [s.obs.__setitem__(k, s.obs[k].astype(float)) for k in ARRAY] and None,
    TRUE=lambda s: s.obs.__setitem__('in_tissue', np.where(s.obs.in_tissue == 1, 'TRUE', 'FALSE')),
    flags=lambda s: s.obs.__setitem__('in_tissue', (s.obs.in_tissue == 1)),
    categorical_flags=lambda s: s.obs.__setitem__('in_tissue', pd.Categorical(s.obs.in_tissue.astype(str))),
    nearly_whole=lambda s: setattr(s, 'X', (s.X/3*np.float32(.7)/np.float32(.7)*3).astype(np.float64)*(1 - 3e-8)),
    colours_first=lambda s: info(s)['images'].update(hires=np.moveaxis(info(s)['images']['hires'], -1, 0)),
    floats=lambda s: info(s)['images'].update(hires=(info(s)['images']['hires']/255).astype('float32')),
    arrays_of_one=lambda s: info(s)['scalefactors'].update({k: np.array([v]) for k,v in info(s)['scalefactors'].items()}),
    a_text_factor=lambda s: info(s)['scalefactors'].update(crop_scalef='none', note_fullres='text'),
    downscaled_fullres=key('hires', 'downscaled_fullres', 'tissue_downscaled_fullres_scalef'),
    hires_image=key('hires', 'hires_image'), image_hires=key('hires', 'image_hires'), fullres=key('hires', 'fullres'),
    slash_in_the_name=lambda s: s.uns.update(spatial={'TCGA/A1': info(s)}),
    slash_in_layers=lambda s: [s.layers.update({'log/n': s.X.copy()}), s.obsm.update({'X/pca': np.zeros((110, 3))}), setattr(s, 'raw', s.copy())] and None,
    counts_in_a_layer_of_another_name=lambda s: [s.layers.update(Raw_counts=s.X.copy()), setattr(s, 'X', np.log1p(s.X))] and None,
    pixels_in_obs=lambda s: s.obs.__setitem__(['pxl_col_in_fullres', 'pxl_row_in_fullres'], s.obsm.pop('spatial')),
    pixels_of_seurat=lambda s: s.obs.__setitem__(['imagecol', 'imagerow'], s.obsm.pop('spatial')),
    part_of_the_picture_as_well=lambda s: [info(s)['images'].update({'0.5_mpp_150_buffer': np.repeat(info(s)['images']['hires'], 2, 0)[90:]}), info(s)['scalefactors'].update({'tissue_0.5_mpp_150_buffer_scalef': 1.})] and None,
    numbers_for_genes=lambda s: [s.var.__setitem__('SYMBOL', GENES), setattr(s, 'var_names', [str(i) for i in range(12)])] and None,
    X_spatial=lambda s: s.obsm.update(X_spatial=s.obsm.pop('spatial')), bytes=lambda s: s.obsm.update(spatial=s.obsm['spatial'].astype('S')), sparse=lambda s: s.obsm.update(spatial=sparse.csr_matrix(s.obsm['spatial'])),
    slash_elsewhere=lambda s: [s.obs.__setitem__('n/a', 1.), s.uns.update({'T/NK_colors': np.array(['#ff0000'])})] and None,
    raw_of_symbols=lambda s: [setattr(s, 'raw', s.copy()), setattr(s, 'X', np.log1p(s.X))] and None)

@pytest.mark.parametrize('case', INTACT)
@pytest.mark.filterwarnings('ignore')
def test_intact_h5ad(made, tmp_path, case):
    s = right(made, read_section(h5ad(made, tmp_path/'s.h5ad', INTACT[case])))
    assert place(s).images['hires'].shape == (PX, PX, 3) and list(s.var_names) == GENES and place(s).diameter == 24
    s.write_h5ad(tmp_path/'again.h5ad')                                       # what was put right can be written, and read again
    right(made, read_section(tmp_path/'again.h5ad'))

def test_a_file_that_says_nothing_of_a_picture(made, tmp_path, capsys):
    "As R's converters leave it: a spot is half as wide as the distance to the next; an image can be given"
    file = h5ad(made, tmp_path/'r.h5ad', lambda s: s.uns.clear())
    s = right(made, read_section(file, image=made[0]/'he.png'))
    assert section_name(s) == 'r' and place(s).diameter == pytest.approx(22) and 'taken as half of the distance' in capsys.readouterr().out
    right(made, read_section(file)); assert 'no image' in capsys.readouterr().out
    right(made, read_section(h5ad(made, tmp_path/'r.h5ad', lambda s: info(s)['images'].update(hires='/scans/he.png'))))
    assert 'no image (hires holds text, not pixels' in capsys.readouterr().out

@pytest.mark.filterwarnings('ignore')
def test_grey_picture(made, tmp_path):
    s = right(made, read_section(h5ad(made, tmp_path/'s.h5ad', lambda s: info(s)['images'].update(hires=info(s)['images']['hires'][..., :1]))))
    assert place(s).images['hires'].shape == (PX, PX, 3)

def test_positions_from_pixels(made, tmp_path):
    for edit in (lambda s: s.obs.drop(columns=ARRAY, inplace=True), lambda s: s.obs.pop('array_col') is None, lambda s: s.obs.__setitem__(ARRAY, np.nan)):
        right(made, read_section(h5ad(made, tmp_path/'s.h5ad', lambda s: (edit(s), None)[1])), origin=True)

def nowhere(s): s.obsm['spatial'][[1, 5]] = np.nan
def off(n): return lambda s: s.obsm['spatial'].__setitem__(np.flatnonzero(s.obs.in_tissue == 1)[:n], [PX + 50., 3.])

def test_spots_nowhere_and_off_the_image(made, tmp_path, capsys):
    n = int(made[1].in_tissue.sum())
    right(made, read_section(h5ad(made, tmp_path/'s.h5ad', nowhere)), n - 2)
    assert '2 with counts but without a position, left out' in capsys.readouterr().out
    right(made, read_section(h5ad(made, tmp_path/'s.h5ad', off(2))), n - 2)
    assert '2 off the image, left out' in capsys.readouterr().out
    refused(r'is outside the image in the file of 480 x 480 pixels; 20 such', read_section, h5ad(made, tmp_path/'s.h5ad', off(20)))
    spots = made[1].copy()
    spots.iloc[:2, 3] = PX + 50
    right(made, read_section(tables(made, tmp_path/'t', spots)), n - 2)
    assert '2 off the image, left out' in capsys.readouterr().out

ODD = dict(
    no_number=(lambda s: s.obsm.update(spatial=np.where(np.eye(110, 2) == 1, 'left', s.obsm['spatial'].astype(str)).astype(object)), "holds 'left', which is not a number; 2 such"),
    height=(lambda s: s.obsm.update(spatial=np.c_[s.obsm['spatial'], np.arange(110.)]), 'has 3 columns'),
    scattered=(lambda s: [s.obs.drop(columns=ARRAY, inplace=True), s.obsm.update(spatial=np.random.default_rng(0).uniform(9, 300, (110, 2)))] and None, 'not on one square or hexagonal grid'),
    normalised=(lambda s: setattr(s, 'X', s.X/3), 'is fractional'),
    large_normalised=(lambda s: setattr(s, 'X', s.X*12345.678), 'is fractional'),
    a_column_missing=(lambda s: s.obs.__setitem__('array_col', s.obs.array_col.astype(float).replace(4, np.nan)), 'other than whole numbers'),
    no_scale=(lambda s: info(s)['scalefactors'].pop('spot_diameter_fullres') and None, 'spot_diameter_fullres'))

@pytest.mark.parametrize('case', ODD)
@pytest.mark.filterwarnings('ignore')
def test_h5ad_refused(made, tmp_path, case):
    edit, match = ODD[case]
    assert 'damaged' not in refused(f's.h5ad: .*{match}', read_section, h5ad(made, tmp_path/'s.h5ad', edit))

def test_a_picture_of_unknown_scale_is_said(made, tmp_path, capsys):
    read_section(h5ad(made, tmp_path/'s.h5ad', lambda s: info(s)['scalefactors'].pop('tissue_hires_scalef') and None))
    assert 'no image (the scale of hires is not known' in capsys.readouterr().out

# --- which image an .h5ad means

def beside(made, where, edit=lambda im: im):
    where.parent.mkdir(parents=True, exist_ok=True)
    edit(Image.open(made[0]/'he.png')).save(where)
    return where

def naming(path, image='hires'):
    def edit(s): info(s)['metadata']['source_image_path'] = path
    return edit

@pytest.mark.parametrize('path', ['C:\\scans\\he.png', '/home/somebody/he.png', 'he.png', '\\\\server\\scans\\he.png'])
def test_image_named_on_another_system(made, tmp_path, path):
    beside(made, tmp_path/'he.png')
    s = right(made, read_section(h5ad(made, tmp_path/'s.h5ad', naming(path))))
    assert place(s).path == str(tmp_path/'he.png')

def test_image_named_is_compared(made, tmp_path):
    file = h5ad(made, tmp_path/'s.h5ad', naming('he.png'))
    for edit in (lambda im: im.rotate(180), lambda im: Image.fromarray(photograph(np.random.default_rng(9))).transpose(Image.Transpose.FLIP_TOP_BOTTOM), lambda im: im.crop((0, 0, PX, 400))):
        beside(made, tmp_path/'he.png', edit)
        refused('he.png: this image', read_section, file)
    beside(made, tmp_path/'he.png', lambda im: im.resize((2*PX, 2*PX)))
    s = read_section(file)
    assert s.uns['histogene']['image_scale'] == 2 and np.allclose(s.obsm['spatial'], 2*made[1].loc[s.obs_names, ['pixel_x', 'pixel_y']])

def test_hest_pairs(made, tmp_path):
    def hest(s):
        small = np.asarray(Image.fromarray(info(s)['images']['hires']).reduce(2))
        s.uns['spatial'] = dict(ST=dict(images=dict(downscaled_fullres=small), scalefactors=dict(spot_diameter_fullres=24., tissue_downscaled_fullres_scalef=.5)))
    file = h5ad(made, tmp_path/'st'/'TENX95.h5ad', hest)
    alone = read_section(file)
    assert section_name(alone) == 'TENX95' and alone.uns['histogene']['image_scale'] == .5 and place(alone).images['hires'].shape == (PX//2, PX//2, 3)
    wsi = beside(made, tmp_path/'wsis'/'TENX95.tif')
    s = right(made, read_section(file))
    assert place(s).path == str(wsi) and section_name(s) == 'TENX95'

def test_zarr_and_gz(made, tmp_path):
    file = h5ad(made, tmp_path/'s.h5ad')
    (tmp_path/'s.h5ad.gz').write_bytes(gzip.compress(file.read_bytes(), 1))
    right(made, read_section(tmp_path/'s.h5ad.gz'))
    ad.read_h5ad(file).write_zarr(tmp_path/'s.zarr')
    right(made, read_section(tmp_path/'s.zarr'))
    (tmp_path/'cut.h5ad.gz').write_bytes((tmp_path/'s.h5ad.gz').read_bytes()[:5000])
    refused('cut.h5ad.gz: cannot be read as an .h5ad file', read_section, tmp_path/'cut.h5ad.gz')

# --- names of files, panels and genes

@pytest.mark.parametrize('names', [('MOB1_stdata.tsv', 'MOB1_selection.tsv'), ('GSM4284316_P2_stdata.tsv.gz', 'GSM4284316_spot_data-selection-P2.tsv.gz'), ('MOB1.tsv', 'MOB1_selection.tsv'),
                                   ('MOB1.tsv', 'spot_data-selection-MOB1.tsv'), ('Counts.csv', 'Coordinates.csv'), ('spot_counts.csv', 'spots.csv'), ('expression.csv', 'tissue_positions.csv')])
def test_names_of_tables(made, tmp_path, names): right(made, read_section(tables(made, tmp_path/'t', names=names)))

@pytest.mark.parametrize('beside,names', [('spots.png', ('counts.csv', 'C3_selection.tsv')), ('coordinate_systems.json', ('counts.csv', 'tissue_positions.csv')),
                                          ('tissue_positions.csv.bak', ('counts.csv', 'tissue_positions_list.csv'))])
def test_names_of_other_files_beside_tables(made, tmp_path, beside, names):
    folder = tables(made, tmp_path/'t', names=names, image=False)
    shutil.copy(made[0]/'he.png', folder/beside)
    right(made, read_section(folder))

def test_tables_that_are_missing(made, tmp_path):
    folder = tables(made, tmp_path/'t', names=('a.csv', 'coordinates.csv'))
    (folder/'b.csv').write_text('x\n1\n')
    refused(r'the counts are missing: no file here fits \*count\* or \*stdata\*', read_section, folder)

def test_nearly_whole_counts_in_tables(made, tmp_path):
    right(made, read_section(tables(made, tmp_path/'t', counts=made[2]*(1 - 3e-8))))

def test_a_wide_table_without_names_takes_no_longer(tmp_path):
    "A parquet table that has lost its column of names: pandas cut 16,000 columns of one block apart, one by one"
    pytest.importorskip('pyarrow')
    from histogene_nb.tables import _counts_table
    table, took = pd.DataFrame(np.ones((60, 16000), 'int32'), columns=[f'g{i}' for i in range(16000)]), {}
    for lost,given in ((True, table), (False, table.set_axis([f's{i}' for i in range(60)]).rename_axis('spot').reset_index())):
        given.to_parquet(tmp_path/f'{lost}.parquet')
        _counts_table(tmp_path/f'{lost}.parquet')
        start = time.process_time()
        found = _counts_table(tmp_path/f'{lost}.parquet')
        took[lost] = time.process_time() - start
        assert found.shape == (60, 16000 - lost)
    assert took[True] < 1.5*took[False] + .2

PANELS = ['gene\nA\nB\n', 'A\nB\n', 'A\tx\nB\ty\n', '"","x"\n"1","A"\n"2","B"\n', '"x"\n"1" "A"\n"2" "B"\n', 'x\n1 A\n2 B\n', 'name;gene\nq;A\nr;B\n', 'index,gene\n0,A\n1,B\n', '\ufeffGene\nA\nB\n', 'gene_ids\tsymbol\nENSG1\tA\nENSG2\tB\n',
          '"gene" "n"\n"1" "A" "3"\n"2" "B" "4"\n', 'rank;gene\n1;A\n2;B', 'A, B\n', 'A;B', 'A\r\n\r\nB\r\n', '0,A\n1,B\n', 'gene\tn\n1\tA\t3\n2\tB\t4\n']
@pytest.mark.parametrize('text', PANELS)
def test_panels(tmp_path, text):
    (tmp_path/'panel.csv').write_text(text, encoding='utf-8', newline='')
    assert read_panel(tmp_path/'panel.csv') == ['A', 'B']

@pytest.fixture
def section(made): return new_section(np.ones((4, 3)), ['Actb', 'Mbp', 'Gapdh'], list('abcd'), np.eye(4, 2), range(4), range(4), 'S', '')

def test_genes_that_are_named_otherwise(section):
    assert 'in another case, such as Actb for ACTB' in refused('ACTB', normalize, section, ['ACTB', 'Mbp'])
    assert 'The nearest names are Mbp' in refused('Mbpx', normalize, section, ['Mbpx', 'Actb'])
    assert 'The panel has Ensembl ids, the section symbols, such as Actb' in refused('none of', normalize, section, ['ENSMUSG00000029580', 'ENSMUSG00000041607'])
    section.var_names = [f'ENSMUSG{i:011}' for i in range(3)]
    assert 'The panel has symbols, the section Ensembl ids' in refused('none of', normalize, section, ['Actb', 'Mbp'])
    section.var['gene_ids'] = section.var_names                                  # that are no symbols
    assert refused('none of', normalize, section, ['Actb', 'Mbp']).endswith('Give the panel as Ensembl ids.')
    section.var['feature_name'] = [f'S{i}' for i in range(section.n_vars)]
    assert refused('none of', normalize, section, ['Actb', 'Mbp']).endswith("Its symbols are in section.var['feature_name']: make them its names (section.var_names).")
    section.var['feature_name'] = ['Actb', 'Mbp', 'Gapdh']
    assert "section.var['feature_name']" in refused('none of', normalize, section, ['Actb', 'Mbp'])

def test_text_and_sections_in_the_place_of_lists(section):
    assert list(normalize(section, 'Actb').var_names) == ['Actb'] and common_genes(section) == ['Actb', 'Mbp', 'Gapdh']
    refused('gene Actb is in the panel twice', normalize, section, ['Actb', 'Mbp', 'Actb'])
    refused('panel.csv: this is a path, not a list', normalize, section, Path('panel.csv'))
    refused('this is a path, not a list', common_genes, Path('s.h5ad'))

# --- the real sections, as they stand

SHARED = Path(os.environ.get('HISTOGENE_DATA', '.'))

@needs_images
@pytest.mark.parametrize('name,where,image,spots,genes,wide', [
    ('MOB_Rep1', 'mob', None, 267, 16573, 29), ('MOB_Rep2', 'mob', None, 280, 15981, 29),
    ('A1', 'her2st', 'reduced/A1_HE_image_dark.png', 346, 15045, 32), ('A2', 'her2st', 'reduced/A2_HE_image_dark.png', 325, 15526, 32)])
def test_real_sections(name, where, image, spots, genes, wide):
    from histogene_nb.matching import count_on_tissue
    s = count_on_tissue(read_section(SHARED/where/name, image=image and SHARED/where/image))
    assert s.shape == (spots, genes) and abs(place(s).diameter - wide) < 1.5
    assert s.uns['histogene']['on_tissue'] == spots and 'image_doubt' not in s.uns['histogene']
