"""What holds for any input: readers, patches, positions, super-resolution, models, scales and measures, on examples that hypothesis finds.

The examples are the same in each run; `HISTOGENE_EXAMPLES=10` looks at ten times as many, and at others each time."""
import errno, gzip, json, os, random, re
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
import anndata as ad, h5py, numpy as np, pandas as pd, pytest, tifffile, torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite
from histogene_nb.evaluation import gene_correlations
from histogene_nb.expression import normalize, select_panel, variable_genes
from histogene_nb.measures import halve_counts, morans_i, neighbour_graph
from histogene_nb.model import HisToGene, attention_maps
from histogene_nb.patches import cut_patches, dense_grid, extract_patches, flatten_patches, in_tissue
from histogene_nb.position import fit_grid, grid_positions, pixel_positions
from histogene_nb.readers import read_section
from histogene_nb.files import InputError, whole_file
from histogene_nb.her2st import read_her2st, write_her2st
from histogene_nb.images import TiledImage, open_image
from histogene_nb.sections import check_counts, leave_one_out, new_section, section_name
from histogene_nb.tables import array_positions, read_st
from histogene_nb.superres import average_patches, predict_dense, recover_spots
from histogene_nb.texture import TextureModel
from histogene_nb.training import turn_patches
from histogene_nb.matching import image_scale
from histogene_nb.visium import read_visium
from histogene_nb.yields import array_yields, at_positions, local_yield

pytestmark = [pytest.mark.filterwarnings(f'ignore:{w}') for w in ('`n_top_genes`', 'Some cells have zero counts', 'invalid value encountered in log')]       # scanpy, of sections as small as these
MORE = int(os.environ.get('HISTOGENE_EXAMPLES', 1))

def examples(n): return settings(max_examples=n*MORE, derandomize=MORE == 1, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

# --- sections of any shape

NAME = st.from_regex(r'[A-Z][a-z0-9_]{0,5}', fullmatch=True)
ODD = 'NA nan None TRUE 1 001 1e5 - x pixel_x MT-CO1 HLA-DRB1* 5\' a,b,c A;B α-SMA a b #N/A'.split(' ')
GENE = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=('C', 'Zl', 'Zp'), exclude_characters='"'), min_size=1, max_size=9).filter(str.strip)

def lattice(at, hexagonal, pitch): return at*(np.array([.5, 3**.5/2]) if hexagonal else 1)*pitch

@st.composite
def grids(draw, least=1, most=8, turn=20, holes=True):
    "Array positions (n, 2), their pixels, the pitch, and whether the grid is hexagonal; turned by some degrees, mirrored, with holes"
    cols, rows, hexagonal, pitch = draw(st.integers(least, most)), draw(st.integers(least, most)), draw(st.booleans()), draw(st.floats(4, 60))
    at = np.array([(2*i + j % 2 if hexagonal else i, j) for j in range(rows) for i in range(cols)])
    if holes: at = at[draw(arrays(bool, len(at), elements=st.booleans(), fill=st.just(True)).filter(np.any))]
    angle, mirror = np.deg2rad(draw(st.floats(-turn, turn))), draw(st.sampled_from([1, -1]))
    xy = lattice(at, hexagonal, pitch) @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]*[mirror, 1]
    return at, xy - xy.min(0) + draw(st.floats(0, 30)), pitch, hexagonal

@st.composite
def sections(draw, n_genes=6, image=None, **kwargs):
    "A section, and a folder for its files: counts up to a million, any names of genes"
    at, xy, pitch, _ = draw(grids(**kwargs))
    genes = draw(st.lists(GENE, min_size=1, max_size=n_genes, unique=True))
    counts = draw(arrays(np.int64, (len(at), len(genes)), elements=st.integers(0, 10**6), fill=st.just(0)))
    name, kind = draw(NAME), draw(st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_matrix]))
    labels = draw(st.none() | st.lists(st.sampled_from(['cancer', 'fat', None]), min_size=len(at), max_size=len(at)))
    return new_section(kind(counts), genes, [f'{x}x{y}' for x,y in at], xy, *at.T, name, name[0], image, pitch/2, annotation=labels)

def with_image(section, folder):
    "The section with a white image that is just large enough; spots are up to 30 pixels wide"
    size = np.maximum(np.floor(section.obsm['spatial'].max(0)).astype(int) + 1, 30)
    Image.new('1', tuple(size), 1).save(folder/'he.png')
    section.uns['spatial'][section_name(section)]['metadata'].update(source_image_path=str(folder/'he.png'), image_width=int(size[0]), image_height=int(size[1]))
    return section

def dense(X): return X.toarray() if sparse.issparse(X) else np.asarray(X)

def same(a, b, spots=None, positions=True):
    "Whether two sections have the same counts, genes and places, in whatever order their spots are"
    spots = a.obs_names if spots is None else spots
    assert len(a) == len(b) and list(a.var_names) == list(b.var_names) and set(spots) == set(b.obs_names)
    b = b[list(spots)]
    assert (dense(a.X) == dense(b.X)).all() and np.allclose(a.obsm['spatial'], b.obsm['spatial'], rtol=1e-12, atol=0)
    if positions: assert (a.obs[['array_col', 'array_row']].to_numpy() == b.obs[['array_col', 'array_row']].to_numpy()).all()

def shuffle(path, seed, header=1):
    "The lines of a file in another order"
    text = (gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()).decode()
    first, rest = (lines := text.rstrip('\n').split('\n'))[:header], lines[header:]
    random.Random(seed).shuffle(rest)
    data = ('\n'.join(first + rest) + '\n').encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)

@examples(60)
@given(sections(), st.booleans(), st.integers(0, 99))
def test_her2st_layout(section, image, seed):
    name = section_name(section)
    with TemporaryDirectory() as folder:
        if image: with_image(section, Path(folder))
        root = write_her2st(section, Path(folder)/'root')
        for path in sorted(root.glob('ST-[cps]*/**/*.tsv*')): shuffle(path, seed)
        back = read_her2st(root, name, spot_diameter=9, verbose=False)
        same(section, back)
        if 'annotation' in section.obs: assert (section.obs.annotation.astype(str) == back.obs.annotation.astype(str)[section.obs_names]).all()
        assert ('source_image_path' in back.uns['spatial'][name]['metadata']) == image

def write_outs(folder, section, inside, positions, h5, seed):
    "A section as spaceranger writes it, with `inside` of its spots in tissue"
    (spatial := folder/'spatial').mkdir(parents=True)
    barcodes, (px, py), obs = [f'{i:016b}-1'.replace('0', 'A').replace('1', 'C') for i in range(len(section))], section.obsm['spatial'].T, section.obs
    table = pd.DataFrame(dict(barcode=barcodes, in_tissue=inside.astype(int), array_row=obs.array_row.to_numpy(), array_col=obs.array_col.to_numpy(), pxl_row_in_fullres=py, pxl_col_in_fullres=px)).sample(frac=1, random_state=seed)
    if positions == 'parquet': table.to_parquet(spatial/'tissue_positions.parquet')
    else: table.to_csv(spatial/('tissue_positions.csv' if positions == 'new' else 'tissue_positions_list.csv'), header=positions == 'new', index=False)
    X, ids = sparse.csc_matrix(dense(section.X).T.astype('int32')), [f'ENSG{i}' for i in range(section.n_vars)]
    if h5:
        with h5py.File(folder/'filtered_feature_bc_matrix.h5', 'w') as f:
            for k,v in dict(data=X.data, indices=X.indices, indptr=X.indptr, shape=X.shape, barcodes=np.array(barcodes, 'S')).items(): f[f'matrix/{k}'] = v
            for k,v in dict(id=ids, name=list(section.var_names), feature_type=['Gene Expression']*len(ids), genome=['GRCh38']*len(ids)).items(): f[f'matrix/features/{k}'] = np.array([s.encode() for s in v])
    else:
        (matrix := folder/'filtered_feature_bc_matrix').mkdir()
        with gzip.open(matrix/'matrix.mtx.gz', 'wb') as f: mmwrite(f, X.tocoo())
        (matrix/'features.tsv.gz').write_bytes(gzip.compress(''.join(f'{i}\t{g}\tGene Expression\n' for i,g in zip(ids, section.var_names)).encode()))
        (matrix/'barcodes.tsv.gz').write_bytes(gzip.compress(''.join(f'{b}\n' for b in barcodes).encode()))
    (spatial/'scalefactors_json.json').write_text(json.dumps(dict(spot_diameter_fullres=7., tissue_hires_scalef=.5, tissue_lowres_scalef=.1)))
    return barcodes

@examples(60)
@given(st.data(), sections(), st.sampled_from(['old', 'new', 'parquet']), st.booleans(), st.integers(0, 99))
def test_visium_folder(data, section, positions, h5, seed):
    section.var_names = [re.sub('[^ -~]', '?', g) + f'.{i}' if h5 else f'{i}.{g}.' for i,g in enumerate(section.var_names)]       # scanpy reads ASCII from .h5, and takes NA or 1 in a table for no name
    inside = data.draw(arrays(bool, len(section)).filter(np.any))
    with TemporaryDirectory() as folder:
        barcodes = write_outs(Path(folder)/'outs', section, inside, positions, h5, seed)
        back = read_visium(Path(folder)/'outs', verbose=False)
    same(section[inside], back, np.array(barcodes)[inside])
    assert back.uns['histogene']['not_in_tissue'] == (~inside).sum()

@examples(80)
@given(st.data(), sections(), st.sampled_from(['.csv', '.tsv', '.tsv.gz', '.parquet', ';']), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_plain_tables(data, section, kind, turned, own_ids, in_r, seed):
    assume(not (kind == ';' and any(',' in g for g in section.var_names)) and len(section) > 1)
    ids = data.draw(st.lists(st.from_regex(r'[0-9]{1,3}|[A-C]{2}-1|[0-9]x[0-9]', fullmatch=True), min_size=len(section), max_size=len(section), unique=True)) if own_ids else list(section.obs_names)
    assume(not set(ids) & set(section.var_names))
    counts = pd.DataFrame(dense(section.X).astype(int), ids, section.var_names)
    (px, py), extra = section.obsm['spatial'].T, data.draw(st.sampled_from(['note', 'in_tissue', 'z']))
    names = data.draw(st.sampled_from([('pixel_x', 'pixel_y'), ('pxl_col_in_fullres', 'pxl_row_in_fullres'), ('imagecol', 'imagerow')]))
    places = pd.DataFrame({extra: 'TRUE' if extra == 'in_tissue' else 'none', names[0]: px, names[1]: py, 'array_row': section.obs.array_row.to_numpy(), 'array_col': section.obs.array_col.to_numpy()}, pd.Index(ids, name='spot'))
    if turned: counts = counts.T
    assume(not (in_r and counts.shape[1] == 1))                                    # a header of one name shows no separator
    suffix, sep = ('.csv', ';') if kind == ';' else (kind, ',' if kind == '.csv' else '\t')
    with TemporaryDirectory() as folder:
        for what,table in dict(counts=counts, coordinates=places).items():
            table, path = table.sample(frac=1, random_state=seed) if what == 'coordinates' or not turned else table, Path(folder)/f'{what}{suffix}'
            if kind == '.parquet': table.to_parquet(path)
            else: table.to_csv(path, sep=sep, index_label=False if in_r else 'name')
        back = read_st(folder, spot_diameter=7, verbose=False)
    same(section, back, ids)

@examples(50)
@given(sections(), st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_matrix]), st.sampled_from(['float32', 'float64', 'int32', 'uint32']), st.booleans())
def test_h5ad(section, kind, dtype, image):
    with TemporaryDirectory() as folder:
        if image: with_image(section, Path(folder))
        other = section.copy()
        other.X = kind(dense(section.X).astype(dtype))
        other.write_h5ad(Path(folder)/'s.h5ad')
        back = read_section(Path(folder)/'s.h5ad', verbose=False)
    same(section, back)
    assert section_name(back) == section_name(section) and back.uns['spatial'][section_name(back)]['scalefactors'] == section.uns['spatial'][section_name(section)]['scalefactors']

@examples(150)
@given(grids(least=3, most=12, turn=12), st.floats(0, .08), st.integers(0, 99))       # beyond 15 degrees a hexagonal grid is nearer to standing upright
def test_array_positions(grid, jitter, seed):
    at, xy, pitch, hexagonal = grid
    assume(len(at) >= 4 and np.ptp(at, axis=0).all() and len(at) >= .6*(np.ptp(at[:, 0])/(1 + hexagonal) + 1)*(np.ptp(at[:, 1]) + 1))
    found, spacing = array_positions(xy + np.random.default_rng(seed).uniform(-jitter, jitter, xy.shape)*pitch)
    assert spacing == pytest.approx(pitch, rel=.1)
    mirrored = np.sign(np.cov(at[:, 0], found[:, 0])[0, 1])
    back = found*[mirrored, 1] - at
    assert (back == back[0]).all()
    assert not hexagonal or not (found.sum(1) % 2).any()

@examples(60)
@given(st.integers(40, 3000), st.integers(40, 3000), st.floats(.02, 1), st.just(1.) | st.floats(.05, 1.), st.sampled_from([np.floor, np.rint, np.ceil]))
def test_image_scale(width, height, scale, factor, rounded):
    full = np.array([width, height])
    size, image = np.maximum(rounded(full*scale), 1).astype(int), np.maximum(np.rint(full*factor), 1).astype(int)
    with TemporaryDirectory() as folder:
        path = Path(folder)/'he.png'
        Image.new('1', tuple(image)).save(path)
        picture = np.zeros(size[::-1], np.uint8)                                # of one colour, as the image: only sizes tell
        found, doubt = image_scale(path, picture, scale)
        assert found == pytest.approx(factor, rel=2.2/size.min() + 2.2/image.min()) and (factor < 1 or found == 1)    # both are rounded, and 1 is taken where that leaves it possible
        if max(size)*.8 > min(size) + 3 and min(image) > 50:
            Image.new('1', tuple(image[::-1])).save(path)
            with pytest.raises(InputError, match='neither turned nor cropped'): image_scale(path, picture, scale)

# --- sections

@examples(60)
@given(st.data(), sections(), st.sampled_from([(-1., 'negative'), (.5, 'fractional'), (np.nan, 'not a number'), (np.inf, 'infinite')]), st.booleans())
def test_check_counts(data, section, bad, is_sparse):
    check_counts(section)
    i, j = data.draw(st.integers(0, len(section) - 1)), data.draw(st.integers(0, section.n_vars - 1))
    X = dense(section.X).copy()
    X[i, j] = bad[0]
    section.X = sparse.csc_matrix(X) if is_sparse else X
    with pytest.raises(InputError) as e: check_counts(section)
    assert f'the count of gene {section.var_names[j]} at spot {section.obs_names[i]} is {bad[1]}' in str(e.value) and '1 such in all' in str(e.value)

@examples(40)
@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(0, 5), st.sampled_from([None, b'', b'before']), st.sampled_from([OSError(errno.ENOSPC, 'full'), KeyboardInterrupt(), ValueError('no')]))
def test_whole_file(parts, moment, before, error):
    "An error at any moment leaves what was there, or nothing"
    with TemporaryDirectory() as folder:
        path = Path(folder)/'f'
        if before is not None: path.write_bytes(before)
        def write():
            with whole_file(path) as part, open(part, 'wb') as f:
                for i,p in enumerate(parts):
                    if i == moment: raise error
                    f.write(p); f.flush()
        if moment < len(parts):
            with pytest.raises(InputError if isinstance(error, OSError) else type(error)): write()
            assert list(Path(folder).iterdir()) == [path]*(before is not None) and (before is None or path.read_bytes() == before)
        else:
            write()
            assert path.read_bytes() == b''.join(parts) and list(Path(folder).iterdir()) == [path]

@examples(30)
@given(st.lists(st.tuples(st.sampled_from('ABCD'), st.integers(1, 6)), min_size=1, unique=True), st.sampled_from(['section', 'patient']))
def test_leave_one_out(names, by):
    catalogue = pd.DataFrame(dict(patient=[p for p,_ in names]), index=[f'{p}{i}' for p,i in names])
    folds = leave_one_out(catalogue, by)
    assert sorted(t for _,_,test in folds for t in test) == sorted(catalogue.index)
    for held_out,train,test in folds:
        assert sorted(train + test) == sorted(catalogue.index) and test and not set(train) & set(test)
        assert set(test) == ({held_out} if by == 'section' else set(catalogue.index[catalogue.patient == held_out]))

# --- patches

def picture(width, height, seed): return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)

def cut(pixels, x, y, side):
    "A patch by slicing, from an image that goes on in white"
    out, x0, y0 = np.full((side, side, 3), 255, np.uint8), int(np.floor(x)) - side//2, int(np.floor(y)) - side//2
    for i in range(side):
        for j in range(side):
            if 0 <= y0 + i < pixels.shape[0] and 0 <= x0 + j < pixels.shape[1]: out[i, j] = pixels[y0 + i, x0 + j]
    return out

CENTRE = st.tuples(st.floats(-60, 120), st.floats(-60, 120)) | st.sampled_from([(-1e9, 1e9), (-.5, -1e-9), (0., 0.)])

@examples(80)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 99), st.lists(CENTRE, min_size=1, max_size=6), st.integers(1, 17))
def test_patches_by_slicing(width, height, seed, centres, size):
    pixels = picture(width, height, seed)
    patches, padded = cut_patches(Image.fromarray(pixels), np.array(centres), size)
    expected = [cut(pixels, x, y, size) for x,y in centres]
    assert (patches.permute(0, 2, 3, 1).numpy() == expected).all()
    inside = [0 <= np.floor(x) - size//2 and np.floor(x) - size//2 + size <= width and 0 <= np.floor(y) - size//2 and np.floor(y) - size//2 + size <= height for x,y in centres]
    assert padded == len(centres) - sum(inside)

@examples(50)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 99), st.tuples(*[st.sampled_from([16, 32, 48])]*2), st.sampled_from([None, 'deflate', 'lzw', 'zstd', 'jpeg']), st.booleans(),
       st.lists(st.tuples(st.integers(-40, 120), st.integers(-40, 120), st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=5))
def test_tiles_as_pillow_sees_them(width, height, seed, tile, compression, bigtiff, boxes):
    pixels = np.asarray(Image.fromarray(picture(9, 9, seed)).resize((width, height)))
    with TemporaryDirectory() as folder:
        path = Path(folder)/'he.tif'
        tifffile.imwrite(path, pixels, photometric='rgb', tile=tile, compression=compression, bigtiff=bigtiff)
        with open_image(path) as tiled, Image.open(path) as pillow:
            whole = pillow.convert('RGB') if compression == 'jpeg' else Image.fromarray(pixels)
            assert isinstance(tiled, TiledImage) and tiled.size == (width, height)
            for x,y,w,h in boxes:
                expected = Image.new('RGB', (w, h), 'white')
                expected.paste(whole, (-x, -y))
                assert (np.asarray(tiled.crop((x, y, x + w, y + h))) == np.asarray(expected)).all()

@examples(60)
@given(st.integers(8, 60), st.integers(8, 60), st.integers(0, 99), st.lists(CENTRE, min_size=1, max_size=5), st.tuples(st.integers(0, 70), st.integers(0, 70)), st.integers(1, 12), st.floats(1, 20), st.booleans())
def test_moved_patches(width, height, seed, centres, by, size, diameter, tiled):
    "The image on a larger white canvas, and the places with it: the same patches"
    pixels = picture(width, height, seed)
    moved = np.pad(pixels, ((by[1], 5), (by[0], 3), (0, 0)), constant_values=255)
    with TemporaryDirectory() as folder:
        def patches(pixels, centres, file):
            path = Path(folder)/file
            if tiled: tifffile.imwrite(path, pixels, photometric='rgb', tile=(16, 16))
            else: Image.fromarray(pixels).save(path)
            section = ad.AnnData(np.empty((0, 0), np.float32), uns=dict(histogene={}, spatial=dict(s=dict(images={}, scalefactors=dict(spot_diameter_fullres=diameter), metadata=dict(source_image_path=str(path))))))
            return extract_patches(section, size, centres)
        assert (patches(pixels, np.array(centres), 'a.tif') == patches(moved, np.floor(centres) + by, 'b.tif')).all()

@examples(40)
@given(st.integers(0, 99), st.integers(1, 9))
def test_turns_and_flattened_patches(seed, size):
    patches = torch.from_numpy(picture(size, size, seed)).permute(2, 0, 1)[None]
    turned = [turn_patches(patches, way) for way in range(8)]
    assert all((np.sort(t.numpy(), None) == np.sort(patches.numpy(), None)).all() for t in turned) and (turned[0] == patches).all()
    assert (turn_patches(turn_patches(patches, 2), 2) == patches).all() and all((turn_patches(turn_patches(patches, w), w) == patches).all() for w in (4, 5, 6, 7))
    assert (flatten_patches(patches).reshape(3, size, size) == patches[0]).all() and (flatten_patches(patches, 'released').reshape(size, size, 3).permute(2, 1, 0) == patches[0]).all()

MASK = st.tuples(st.integers(1, 14), st.integers(1, 14)).flatmap(lambda s: arrays(bool, s, elements=st.booleans(), fill=st.just(False)).filter(np.any))
SCALE = st.floats(.05, 3) | st.sampled_from([.1, .3, 1/3, 1., 1000/9391])

@examples(60)
@given(MASK, SCALE, st.lists(CENTRE, min_size=1, max_size=9))
def test_in_tissue(mask, scale, points):
    def on(x, y):
        i, j = np.floor(y*scale + 1e-9), np.floor(x*scale + 1e-9)
        return bool(0 <= i < mask.shape[0] and 0 <= j < mask.shape[1] and mask[int(i), int(j)])
    assert in_tissue(np.array(points), mask, scale).tolist() == [on(*p) for p in points]

@examples(40)
@given(MASK, SCALE, st.tuples(st.integers(0, 10**5), st.integers(0, 10**5)), st.floats(1, 300))
def test_the_edge_of_a_pixel_belongs_to_it(mask, scale, shift, diameter):
    """However large the image, and however the place was computed"""
    far = lambda at: (at/scale + np.array(shift) - diameter/2) + diameter/2 - shift
    at = np.argwhere(mask)[:, ::-1]
    assert in_tissue(far(at), mask, scale).all()

def exact(x): return Fraction(float(x))

@examples(80)
@given(MASK, SCALE, st.floats(1, 40) | st.integers(1, 20).map(float), st.integers(1, 5))
def test_dense_grid(mask, scale, diameter, k):
    "All places of one lattice that are on tissue, from its first column and row on, in exact arithmetic; none off it"
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    pitch = exact(diameter/k)*exact(scale)                                       # in pixels of the mask
    assume(len(mask)*mask.shape[1]/float(pitch)**2 < 4000)
    along = [[first + i*pitch for i in range(int((last + 1 - first)/pitch) + 1)] for first,last in ((int(c[0]), int(c[-1])) for c in (cols, rows))]
    assume(all(a % 1 < 1 - 1e-7 for line in along for a in line))
    expected = {(i, j) for i,x in enumerate(along[0]) for j,y in enumerate(along[1]) if int(x) < mask.shape[1] and int(y) < mask.shape[0] and mask[int(y), int(x)]}
    if not expected:
        with pytest.raises(InputError, match='smaller than a patch'): dense_grid(mask, scale, diameter, k*k)
        return
    centres, place = dense_grid(mask, scale, diameter, k*k)
    assert len(place) == len(expected) and {tuple(p) for p in place.tolist()} == expected
    assert np.allclose(centres, np.array([cols[0], rows[0]])/scale + place*diameter/k)

@examples(60)
@given(MASK, SCALE, st.floats(1, 40), st.integers(2, 5))
def test_dense_patches_cover_the_tissue(mask, scale, diameter, k):
    "Where tissue is nowhere thinner than a sub-patch, every point of it is within a patch"
    side = int(np.ceil(diameter/k*scale)) + 1
    thick = np.zeros(np.array(mask.shape) + side - 1, bool)
    for i,j in np.argwhere(mask): thick[i:i+side, j:j+side] = True
    points = (np.argwhere(thick)[:, ::-1] + .5)/scale
    assume(len(points)*(k/diameter/scale)**2 < 4000)
    centres, _ = dense_grid(thick, scale, diameter, k*k)
    assert (np.abs(points[:, None] - centres).max(2).min(1) <= diameter/2 + 1e-6 + .5/scale).all()

# --- positions

def with_spots(at, xy, diameter, name='s'): return new_section(np.ones((len(at), 1)), ['G'], [f's{i}' for i in range(len(at))], xy, *at.T, name, 's', spot_diameter=diameter)

@examples(80)
@given(grids(least=2), st.tuples(st.floats(-1000, 1000), st.floats(-1000, 1000)), st.floats(.1, 10), st.floats(-.4, .4))
def test_grid_from_spots(grid, by, factor, off):
    "The map to array positions is found again; an image moved or scaled together with the diameter changes nothing"
    at, xy, pitch, _ = grid
    assume(np.linalg.matrix_rank(np.c_[at, np.ones(len(at))]) == 3)
    section = with_spots(at, xy, pitch/2)
    n_pos, G = at.max() + 1, fit_grid(section)
    assert np.allclose(np.c_[xy/(pitch/2), np.ones(len(xy))] @ G, at, atol=1e-6)
    assert (pixel_positions(xy, pitch/2, G, n_pos) == grid_positions(section, n_pos)).all()
    centres = xy + off*(xy[1:2] - xy[:1])/max(1, np.abs(at[1] - at[0]).max())
    moved = fit_grid(with_spots(at, xy + by, pitch/2))
    assert np.allclose(moved[:2], G[:2], atol=1e-6)
    expected = pixel_positions(centres, pitch/2, G, n_pos + 1)
    assert (pixel_positions(centres + by, pitch/2, moved, n_pos + 1) == expected).all()
    scaled = fit_grid(with_spots(at, factor*xy, factor*pitch/2))
    assert np.allclose(scaled, G, atol=1e-6) and (pixel_positions(factor*centres, factor*pitch/2, scaled, n_pos + 1) == expected).all()

@examples(60)
@given(arrays(np.int64, st.tuples(st.integers(1, 8), st.just(2)), elements=st.integers(-3, 12)), st.integers(1, 9))
def test_positions_beyond_the_model(at, n_pos):
    "Spots beyond the positions of a model are refused; tissue may reach one step past them, which counts as the edge"
    bad = ((at < 0) | (at >= n_pos)).any(1)
    section = ad.AnnData(np.zeros((len(at), 1), np.float32), obs=pd.DataFrame(dict(array_col=at[:, 0], array_row=at[:, 1]), index=[str(i) for i in range(len(at))]), uns=dict(spatial=dict(s={})))
    G = np.r_[np.eye(2), [[0, 0]]]
    if bad.any():
        with pytest.raises(InputError, match=rf'position \(x={at[bad][0, 0]}, y={at[bad][0, 1]}\) is beyond.*\({bad.sum()} such'): grid_positions(section, n_pos)
    else: assert (grid_positions(section, n_pos).numpy() == at).all()
    far = ((at < -1) | (at > n_pos)).any(1)
    if far.any():
        with pytest.raises(InputError, match=rf'\({far.sum()} such'): pixel_positions(at*7., 7., G, n_pos)
    else: assert (pixel_positions(at*7., 7., G, n_pos).numpy() == at.clip(0, n_pos - 1)).all()

# --- super-resolution

PLACES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=25, unique=True).map(np.array)

@examples(100)
@given(PLACES, st.integers(1, 5), st.integers(0, 99))
def test_cover_by_brute_force(place, k, seed):
    X = np.random.default_rng(seed).normal(size=(len(place), 2)).astype(np.float32)
    over = {}
    for (i,j),x in zip(place, X):
        for a in range(k):
            for b in range(k): over.setdefault((i + a, j + b), []).append(x)
    cells, mean, cover = average_patches(X, place, k)
    assert sorted(over) == [tuple(c) for c in cells] and cover.sum() == len(place)*k*k
    for c,m,n in zip(cells, mean, cover): assert n == len(over[tuple(c)]) <= k*k and np.allclose(m, np.mean(over[tuple(c)], 0), atol=1e-5)

def dense_section(place, k, d, corner, X=None):
    "As `predict_dense` leaves it; unless given, each sub-patch is a gene of its own"
    cells = average_patches(np.zeros((len(place), 1), np.float32), place, k)[0]
    obs = pd.DataFrame(dict(cell_col=cells[:, 0], cell_row=cells[:, 1]), index=[f'{i}x{j}' for i,j in cells])
    return ad.AnnData(np.eye(len(cells), dtype=np.float32) if X is None else X(cells), obs, uns=dict(histogene=dict(patch_diameter=d, corner=corner, superres=k*k, predicted_by='HisToGene_SR')))

@examples(60)
@given(st.data(), PLACES, st.integers(1, 5), st.floats(1, 100), st.tuples(st.floats(-50, 1000), st.floats(-50, 1000)))
def test_spots_by_shared_area(data, place, k, d, corner):
    dense, step, corner = dense_section(place, k, d, np.array(corner)), d/k, np.array(corner)
    cells = dense.obs[['cell_col', 'cell_row']].to_numpy()
    off = data.draw(arrays(float, (min(len(place), 4), 2), elements=st.floats(-.8, .8)))
    spots = corner + place[:len(off)]*step + d/2 + off*d
    low, high = corner + cells*step, corner + (cells + 1)*step
    area = np.clip(np.minimum(high, spots[:, None] + d/2) - np.maximum(low, spots[:, None] - d/2), 0, None).prod(2)      # (spots, sub-patches)
    section = with_spots(np.argwhere(np.ones((len(spots), 1))), spots, d)
    assume((area.max(1) > 1e-3*step**2).all() and not ((area > 0) & (area < 1e-5*step**2)).any())
    W = recover_spots(dense, section).X
    assert (W >= 0).all() and np.allclose(W.sum(1), 1, atol=1e-5) and np.allclose(W, area/area.sum(1, keepdims=True), atol=1e-5)
    constant = recover_spots(dense_section(place, k, d, corner, lambda cells: np.full((len(cells), 1), 7.25, np.float32)), section)
    assert np.allclose(constant.X, 7.25)

@examples(40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.floats(1, 100), st.tuples(st.floats(-50, 1000), st.floats(-50, 1000)), st.integers(0, 99))
def test_total_is_kept(cols, rows, k, d, corner, seed):
    "Spots side by side over all sub-patches hold what these hold"
    tiles = np.argwhere(np.ones((cols, rows)))
    dense = dense_section(tiles*k, k, d, np.array(corner), lambda cells: np.random.default_rng(seed).random((len(cells), 3), dtype=np.float32))
    spots = recover_spots(dense, with_spots(tiles, np.array(corner) + tiles*d + d/2, d))
    assert np.allclose(spots.X.sum(0)*k*k, dense.X.sum(0), rtol=1e-4)

def histogene(seed, size=4, n_genes=3, **config):
    torch.manual_seed(seed)
    return HisToGene(n_genes, size, **{**dict(n_pos=16, dim=8, depth=2, heads=2), **config}).double().eval()

def seen(seed, n, size=4, n_pos=16):
    "Patches and positions"
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 255, (n, 3, size, size), np.uint8)), torch.from_numpy(rng.integers(0, n_pos, (n, 2)))

@examples(30)
@given(arrays(bool, (6, 7), elements=st.booleans(), fill=st.just(True)).filter(np.any), st.sampled_from([.125, .25, .3]), st.floats(9, 30), st.integers(1, 3), st.tuples(st.integers(0, 6), st.integers(0, 6)), st.integers(0, 99))
def test_moved_super_resolution(mask, scale, diameter, k, by, seed):
    "The image on a larger canvas, mask and spots moved with it: the same sub-patches in other places"
    model = histogene(seed)
    model.about = dict(genes=['A', 'B', 'C'], normalization='paper')
    shift = np.rint(np.array(by)/scale)
    assume(np.allclose(shift*scale, by) and (np.arange(20)*diameter/k % 1 < 1 - 1e-6).all())
    pixels, at = picture(60, 50, seed), np.argwhere(np.ones((3, 3)))
    def predicted(pixels, mask, shift):
        path = Path(folder)/'he.png'
        Image.fromarray(pixels).save(path)
        section = new_section(np.ones((9, 1)), ['G'], range(9), 5.3 + at*16.17 + shift, *(at + 5).T, 's', 's', path, diameter)
        try: return predict_dense(model, section, k*k, fit_grid(section), (mask, scale), device='cpu')
        except InputError as e: return 'smaller than a patch' in str(e)
    with TemporaryDirectory() as folder:
        a = predicted(pixels, mask, 0)
        b = predicted(np.pad(pixels, ((int(shift[1]), 4), (int(shift[0]), 2), (0, 0)), constant_values=255), np.pad(mask, ((by[1], 1), (by[0], 1))), shift)
    if a is True or b is True: assert a is b; return
    assert list(a.obs_names) == list(b.obs_names) and np.allclose(a.obsm['spatial'] + shift, b.obsm['spatial']) and (a.obs.n_patches == b.obs.n_patches).all()
    assert (a.obs[['array_col', 'array_row']] == b.obs[['array_col', 'array_row']]).all(axis=None) and np.allclose(a.X, b.X, atol=1e-6)

# --- models

@examples(30)
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from(['centred', 'raw']), st.sampled_from(['paper', 'released']))
def test_order_of_spots(n, seed, pixels, order):
    "Permuting spots permutes predictions; attention adds up to 1; a section is predicted the same whatever is predicted with it"
    model, (patches, positions) = histogene(seed, pixels=pixels, order=order), seen(seed, n)
    other, by = seen(seed + 1, n), torch.from_numpy(np.random.default_rng(seed).permutation(n))
    with torch.no_grad():
        alone = model(patches, positions)
        assert alone.shape == (n, 3) and torch.allclose(model(patches[by], positions[by]), alone[by], atol=1e-9)
        batch = model(torch.stack([other[0], patches]), torch.stack([other[1], positions]))
    assert torch.allclose(batch[1], alone, atol=1e-9) and torch.allclose(batch[0], model(*other), atol=1e-9)
    maps = attention_maps(model, patches, positions, torch.arange(n))
    assert maps.shape == (2, 2, n, n) and (maps >= 0).all() and torch.allclose(maps.sum(-1), torch.ones(2, 2, n, dtype=maps.dtype), atol=1e-9)
    assert torch.allclose(attention_maps(model, patches[by], positions[by], torch.arange(n)), maps[:, :, by][..., by], atol=1e-9)

@lru_cache
def texture_model():
    model, g = TextureModel(5, 2, (1.,), 32, members=2, dim=8, depth=1, heads=2, array=(4, 3)).double().eval(), torch.Generator().manual_seed(0)
    for name,t in model.state_dict().items():
        if not name.startswith('textures'): t.copy_(torch.rand(t.shape, generator=g) + .1)
    return model

@examples(30)
@given(arrays(np.int64, st.tuples(st.integers(1, 9), st.just(2)), elements=st.integers(-2, 6)), st.integers(0, 99))
def test_texture_model(positions, seed):
    "The order of spots does not matter to it either, and beyond the array nothing is known"
    model, n = texture_model(), len(positions)
    numbers, by, positions = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 160))), torch.from_numpy(np.random.default_rng(seed).permutation(n)), torch.from_numpy(positions)
    with torch.no_grad(): assert torch.allclose(model(numbers[by], positions[by]), model(numbers, positions)[by], atol=1e-9)
    table = model.yields.numpy()
    known = [table[x, y] if 0 <= x < 4 and 0 <= y < 3 else 0 for x,y in positions.tolist()]
    assert (model.on_table(model.yields, positions).numpy() == known).all() and (at_positions(table, positions.numpy()) == known).all()

# --- scales, panels, measures

@examples(60)
@given(st.data(), sections(n_genes=5), st.sampled_from(['paper', 'released']))
def test_scales(data, section, method):
    "Sequenced deeper, a spot is the same; in the paper's scale a gene does not depend on which others are asked for"
    section.X = sparse.csr_matrix(np.minimum(dense(section.X), 10**5))
    panel = data.draw(st.lists(st.sampled_from(list(section.var_names)), min_size=1, unique=True))
    once, deeper = normalize(section, panel, method), section.copy()
    deeper.X = sparse.csr_matrix(dense(section.X)*data.draw(arrays(np.int64, (len(section), 1), elements=st.integers(1, 100))))
    assert list(once.var_names) == panel and (once.X >= 0).all() and ((once.X == 0) == (dense(section[:, panel].X) == 0)).all()
    assert np.allclose(normalize(deeper, panel, method).X, once.X, rtol=1e-5)
    if method == 'paper': assert (normalize(section, panel[-1:], method).X == once[:, panel[-1:]].X).all()
    assert np.allclose(normalize(section[::-1], panel[::-1], method)[::-1, ::-1].X, once.X, rtol=1e-6)

def counted(rng, n, genes, name):
    rate = rng.gamma(.5, 4, len(genes))*rng.gamma(2, .5, (n, len(genes)))
    at = np.stack(np.divmod(np.arange(n), 6), 1)
    return new_section(rng.poisson(rate), genes, [f'{x}x{y}' for x,y in at], at*10, *at.T, name, name[0])

@examples(25)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(12, 40), st.integers(1, 15), st.integers(0, 12), st.randoms(use_true_random=False))
def test_panels(seed, n_sections, n_genes, n_top, min_spots, random):
    "The order of sections and of spots does not change which genes are chosen; the genes come in the first section's order"
    rng = np.random.default_rng(seed)
    genes = [f'G{i}' for i in range(n_genes)]
    made = [counted(rng, int(rng.integers(5, 25)), list(rng.permutation(genes)[:n_genes - int(rng.integers(0, 3))]), f'A{i}') for i in range(n_sections)]
    assume(all(s.X.sum() for s in made))
    def chosen(sections):
        try: return select_panel(sections, n_top, min_spots)
        except InputError as e: assert 'Lower min_spots' in str(e); return []
    panel = chosen(made)
    shuffled = [s[rng.permutation(len(s))].copy() for s in random.sample(made, n_sections)]
    again = chosen(shuffled)
    assert set(again) == set(panel)
    for sections,p in ((made, panel), (shuffled, again)): assert p == [g for g in sections[0].var_names if g in p]
    assert all(sum(int((s[:, g].X > 0).sum()) for s in made) >= min_spots for g in panel)

@examples(40)
@given(sections(most=4), st.integers(1, 9))
def test_variable_genes(section, n_top):
    "Of any section, however small: genes of it, or our own error"
    try: found = variable_genes(section, n_top)
    except InputError as e: assert 'so no gene is variable' in str(e) or 'no gene varies' in str(e)
    else: assert found == [g for g in section.var_names if g in found]

def expression(X): return ad.AnnData(np.asarray(X, dtype=float), pd.DataFrame(index=[f's{i}' for i in range(len(X))]), pd.DataFrame(index=[f'g{i}' for i in range(X.shape[1])]))

TENTHS = st.integers(-20, 20).map(lambda i: i/10)

@examples(80)
@given(st.data(), st.integers(1, 9), st.integers(1, 4))
def test_correlations(data, n, genes):
    "r does not change under affine maps, takes the sign of the slope, and is missing, with the reason, exactly where something is constant"
    Y, P = (data.draw(arrays(float, (n, genes), elements=TENTHS)) for _ in range(2))
    a, b = data.draw(arrays(float, (2, genes), elements=st.sampled_from([-7., -1., -.3, .2, 1., 5.]))), data.draw(arrays(float, (2, genes), elements=TENTHS))
    r, mapped = gene_correlations(expression(Y), expression(P)), gene_correlations(expression(a[0]*Y + b[0]), expression(a[1]*P + b[1])[::-1, ::-1])
    flat = [np.ptp(X, axis=0) == 0 for X in (Y, P)]
    assert r.status.tolist() == (['too few spots']*genes if n < 3 else ['no variance observed' if o else 'constant prediction' if p else 'ok' for o,p in zip(*flat)]) == mapped.status.tolist()
    assert (r.r.isna() == (r.status != 'ok')).all() and (r.p.isna() == r.r.isna()).all() and r.r.dropna().between(-1, 1).all()
    assert np.allclose(mapped.r, r.r*np.sign(a.prod(0)), atol=1e-7, equal_nan=True)
    for i in np.flatnonzero(r.status == 'ok'): assert r.r.iloc[i] == pytest.approx(np.corrcoef(Y[:, i], P[:, i])[0, 1], abs=1e-9)

@examples(60)
@given(st.data(), grids(least=2, most=6), st.floats(0, 360), st.floats(.1, 10))
def test_neighbours(data, grid, turn, factor):
    "Neighbours, what a spot yields beside them, and Moran's I, by brute force; turned and scaled they are the same"
    at, xy, _, _ = grid
    n, angle = len(at), np.deg2rad(turn)
    assume(n > 2)
    counts = data.draw(arrays(np.int64, (n, 2), elements=st.integers(0, 1000)))
    section = new_section(counts, ['A', 'B'], range(n), xy, *at.T, 's', 's')
    other = new_section(counts, ['A', 'B'], range(n), factor*xy @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], *at.T, 's', 's')
    D = np.linalg.norm(xy[:, None] - xy, axis=2)
    np.fill_diagonal(D, np.inf)
    near = D <= 1.6*np.median(D.min(1))
    graph = neighbour_graph(section)
    assert ((graph > 0).toarray() == near).all() and np.allclose(np.ravel(graph.sum(1)), near.any(1)) and ((neighbour_graph(other) > 0).toarray() == near).all()
    total = counts.sum(1)
    expected = [np.log((total[i] + 1)/((np.median(total[near[i]]) if near[i].any() else total[i]) + 1)) for i in range(n)]
    assert np.allclose(local_yield(section), expected, atol=1e-6) and np.allclose(local_yield(other), expected, atol=1e-6)
    z = counts - counts.mean(0)
    with np.errstate(invalid='ignore', divide='ignore'): I = np.where(np.ptp(counts, axis=0) > 0, n/near.any(1).sum()*(z*(graph @ z)).sum(0)/(z**2).sum(0), np.nan)
    assert np.allclose(morans_i(section), I, atol=1e-5, equal_nan=True)

@examples(40)
@given(st.lists(sections(n_genes=3, least=2, most=5), min_size=1, max_size=3))
def test_what_arrays_yield(made):
    yields, dead = array_yields(made)
    assert yields.shape == dead.shape == tuple(np.max([s.obs[['array_col', 'array_row']].max() for s in made], 0) + 1)
    assert (np.abs(yields) <= 1).all() and (dead >= 0).all() and (dead < 1).all()
    again = array_yields([s[::-1].copy() for s in made[::-1]])
    assert np.allclose(again[0], yields, atol=1e-6) and np.allclose(again[1], dead)
    seen = {p for s in made for p in zip(s.obs.array_col, s.obs.array_row)}
    assert all((yields[x, y] == 0) and (dead[x, y] == 0) for x,y in np.ndindex(*yields.shape) if (x, y) not in seen)

@examples(30)
@given(sections(), st.integers(0, 99))
def test_halves_add_up(section, seed):
    a, b = halve_counts(section, seed)
    check_counts(a), check_counts(b)
    assert (dense(a.X) + dense(b.X) == dense(section.X)).all()
