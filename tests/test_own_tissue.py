"People's own sections, as they really come: which image is meant, pixels of every kind, Visium folders of all ages; what is read is right, the rest is refused in words"
import gzip, io, json, os, shutil, warnings, zlib
from pathlib import Path
import imagecodecs, numpy as np, pandas as pd, pytest, tifffile
from PIL import Image
from scipy import ndimage, sparse
from scipy.io import mmwrite
from histogene_nb.files import InputError, reading
from histogene_nb.images import as_rgb, decoding, open_image
from histogene_nb.matching import count_on_tissue, image_notes, image_scale, thumbnail
from histogene_nb.patches import tissue_mask
from histogene_nb.readers import read_section
from histogene_nb.sections import new_section, place, section_name, small_copy
from conftest import needs_images

PX, PITCH, WIDE = 600, 40, 22

def tissue(seed, x0=.42):
    "A piece of tissue beside the middle of the glass; no two places look the same"
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:PX, :PX]/PX
    rough = np.stack([ndimage.gaussian_filter(rng.normal(size=(PX, PX)), 3) for _ in range(3)], -1)*400
    inside = ((x - x0)/.3)**2 + ((y - .6)/.33)**2 < 1
    return np.where(inside[..., None], np.clip(rough + [170, 110, 160], 0, 255), 243).astype(np.uint8)

def shrunk(pixels, k): return np.asarray(Image.fromarray(pixels).reduce(k))

def refused(match, f, *args, **kwargs):
    with pytest.raises(InputError, match=match) as e: f(*args, **kwargs)
    return str(e.value)

@pytest.fixture(scope='module')
def full(): return tissue(0)

@pytest.fixture(scope='module')
def spots(full):
    "Of all places of a square array: barcode, whether in tissue, row, column, pixels"
    row, col = (a.ravel() for a in np.mgrid[:14, :14])
    y, x = 30 + PITCH*row, 30 + PITCH*col
    inside = ndimage.uniform_filter((full < 240).all(-1).astype(float), 15)[y, x] > .5
    return pd.DataFrame(dict(barcode=[f'SPOT{i:03}-1' for i in range(len(row))], in_tissue=inside.astype(int), array_row=row, array_col=col, pxl_row_in_fullres=y, pxl_col_in_fullres=x))

def write_mtx(folder, spots, prefix='', packed=True, genes='features.tsv'):
    counts = np.random.default_rng(0).poisson(2., (5, len(spots)))
    text = io.BytesIO(); mmwrite(text, sparse.coo_matrix(counts))
    kinds = '\tGene Expression' if genes.startswith('features') else ''
    files = {'matrix.mtx': text.getvalue(), genes: ''.join(f'ENSG{i}\tG{i}{kinds}\n' for i in range(5)).encode(), 'barcodes.tsv': '\n'.join(spots.barcode).encode()}
    folder.mkdir(exist_ok=True)
    for name,data in files.items(): (folder/f'{prefix}{name}{".gz"*packed}').write_bytes(gzip.compress(data) if packed else data)
    return counts.T

FACTORS = dict(spot_diameter_fullres=WIDE, tissue_hires_scalef=.5, tissue_lowres_scalef=.125, fiducial_diameter_fullres=30.)

@pytest.fixture
def outs(tmp_path, full, spots):
    "A Visium folder of one's own"
    folder = tmp_path/'mine'/'outs'
    (folder/'spatial').mkdir(parents=True)
    write_mtx(folder/'filtered_feature_bc_matrix', spots)
    spots.to_csv(folder/'spatial'/'tissue_positions.csv', index=False)
    (folder/'spatial'/'scalefactors_json.json').write_text(json.dumps(FACTORS))
    Image.fromarray(shrunk(full, 2)).save(folder/'spatial'/'tissue_hires_image.png')
    Image.fromarray(shrunk(full, 8)).save(folder/'spatial'/'tissue_lowres_image.png')
    return folder

def is_right(section, spots, scale=1.):
    "The spots in tissue, at their places in pixels of an image at this scale"
    inside = spots[spots.in_tissue == 1]
    assert list(section.obs_names) == list(inside.barcode) and section.uns['histogene']['image_scale'] == pytest.approx(scale)
    assert np.allclose(section.obsm['spatial'], inside[['pxl_col_in_fullres', 'pxl_row_in_fullres']]*scale)
    assert np.array_equal(section.obs[['array_row', 'array_col']], inside[['array_row', 'array_col']])
    assert place(section).diameter == pytest.approx(WIDE*scale) and section.uns['histogene'].get('on_tissue', len(inside)*(scale < .2)) > .95*len(inside)
    return section

# --- which image is meant

def at_size(px): return lambda full: np.asarray(Image.fromarray(full).resize((px, px)))

FITS = {'itself': (np.asarray, 1), 'twice the size': (at_size(2*PX), 2), 'at two thirds': (at_size(400), 2/3), 'darker': (lambda f: (255*(f/255.)**1.5).astype(np.uint8), 1),
        'sharpened': (lambda f: np.clip(f + .7*(f - ndimage.gaussian_filter(f.astype(float), (2, 2, 0))), 0, 255).astype(np.uint8), 1), 'grey': (lambda f: f.mean(-1).astype(np.uint8), 1)}

@pytest.mark.parametrize('beside', [True, False])
@pytest.mark.parametrize('case', FITS)
def test_an_image_that_fits(outs, full, spots, capsys, case, beside):
    change, scale = FITS[case]
    path = (outs if beside else outs.parent)/'he.png'
    Image.fromarray(change(full)).save(path)
    s = is_right(read_section(outs, image=None if beside else path), spots, scale)
    said = capsys.readouterr().out
    assert place(s).path == str(path) and 'spots on tissue' in said and 'LOOK' not in said and (scale == 1 or 'of full resolution' in said)

MISFITS = {'cropped by 4 %': (lambda f: f[12:-12, 12:-12], 'does not show what'), 'cropped at a corner': (lambda f: f[20:, 20:], 'does not show what'),
           'turned by 180': (lambda f: f[::-1, ::-1], 'would fit .* if it were turned by 180 degrees'), 'mirrored': (lambda f: f[:, ::-1], 'would fit .* if it were mirrored left to right'),
           'upside down': (lambda f: f[::-1], 'would fit .* if it were mirrored top to bottom'), 'a quarter turn': (lambda f: np.rot90(f), 'would fit .* if it were turned by 90 degrees to the right'),
           'another section': (lambda f: tissue(1), 'does not show what'), 'another, elsewhere': (lambda f: tissue(2, .55), 'does not show what'),
           'squeezed': (lambda f: np.asarray(Image.fromarray(f).resize((PX, PX - 40))), 'of 600 x 560 pixels does not have the shape'), 'inverted': (lambda f: 255 - f, 'does not show what')}

@pytest.mark.parametrize('case', MISFITS)
def test_an_image_that_does_not_fit(outs, full, case):
    change, match = MISFITS[case]
    Image.fromarray(np.ascontiguousarray(change(full))).save(outs/'he.png')
    said = refused(f'he.png: this image {match}', read_section, outs)
    assert 'because it lies beside the counts' in said and str(outs/'spatial'/'tissue_hires_image.png') in said
    refused(match, read_section, outs, image=outs/'he.png')
    assert place(read_section(outs, image=outs/'spatial'/'tissue_hires_image.png')).path.endswith('hires_image.png')       # as it says

def test_a_plot_beside_the_counts(outs, spots):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 6))
    ax.scatter(spots.array_col, spots.array_row, c=spots.in_tissue)
    fig.savefig(outs/'umap.png'); plt.close(fig)
    refused('umap.png: this image does not show what', read_section, outs)

def test_two_images_beside_the_counts(outs, full):
    for name in 'he.tif', 'he_1.png': Image.fromarray(full).save(outs/name)
    said = refused('2 images could be the full-resolution one: he.tif, he_1.png. Say which', read_section, outs)
    assert str(outs/'he.tif') in said and place(read_section(outs, image=outs/'he.tif')).path == str(outs/'he.tif')

def test_what_is_doubtful_is_said(outs, full, capsys):
    Image.fromarray(np.roll(full, 3, 1)).save(outs/'he.png')                  # by a quarter of a per cent of its width
    assert "correlates with the section's own picture by 0." in read_section(outs).uns['histogene']['image_doubt'] and 'LOOK at the image' in capsys.readouterr().out
    Image.fromarray(np.full((PX//2, PX//2), 200, np.uint8)).save(outs/'spatial'/'tissue_hires_image.png')
    assert 'nothing to compare' in read_section(outs).uns['histogene']['image_doubt'] and 'LOOK at the image' in capsys.readouterr().out

def redrawn(change, *kinds): # spaceranger's pictures of something else
    def edit(outs, full, spots):
        for k in kinds: Image.fromarray(np.ascontiguousarray(shrunk(change(full), dict(hires=2, lowres=8)[k]))).save(outs/'spatial'/f'tissue_{k}_image.png')
    return edit

def factors(**new): return lambda outs, full, spots: (outs/'spatial'/'scalefactors_json.json').write_text(json.dumps(FACTORS | new))

def renamed(**names): return lambda outs, full, spots: spots.rename(columns=names).to_csv(outs/'spatial'/'tissue_positions.csv', index=False)

EXCHANGED = dict(pxl_row_in_fullres='pxl_col_in_fullres', pxl_col_in_fullres='pxl_row_in_fullres')
OWN_PICTURES = {'hires of another section': (redrawn(lambda f: tissue(2, .72), 'hires'), 'hires_image.png: this image does not show what .* Its own picture here is tissue_lowres_image.png'),
                'hires turned': (redrawn(lambda f: f[::-1, ::-1], 'hires'), 'would fit .* if it were turned by 180 degrees'), 'both of another section': (redrawn(lambda f: tissue(2, .78), 'hires', 'lowres'), '21 of 67 spots lie on tissue; if it were'),
                'a scale factor of another': (factors(tissue_hires_scalef=.25), 'beside tissue_lowres_image.png its scale is 0.5, and the scale factors say 0.25')}
DOUBTFUL = {'factors of another': (factors(tissue_hires_scalef=.3, tissue_lowres_scalef=.075), '40 of 67 spots lie on tissue; if'), "the fiducials' width": (factors(spot_diameter_fullres=144.5), 'spots are 72.2 pixels wide and lie 20 apart'),
            "a width in pixels of a picture": (factors(spot_diameter_fullres=2.), 'spots are 1 pixels wide and lie 20 apart'), 'pixels exchanged': (renamed(**EXCHANGED), 'x follows array_row, y array_col'),
            'rows for columns': (renamed(array_row='array_col', array_col='array_row'), 'x follows array_row, y array_col'), 'in fluorescence': (redrawn(lambda f: np.where((f < 240).all(-1, keepdims=True), f//4, 3).astype(np.uint8), 'hires', 'lowres'), 'it is dark where the spots are')}

@pytest.mark.parametrize('case', OWN_PICTURES)
def test_own_pictures_are_asked_too(outs, full, spots, case):
    edit, match = OWN_PICTURES[case]
    edit(outs, full, spots)
    refused(match, read_section, outs)

@pytest.mark.parametrize('case', DOUBTFUL)
def test_odd_scales_and_sides_are_said(outs, full, spots, capsys, case):
    edit, match = DOUBTFUL[case]
    edit(outs, full, spots)
    assert match in read_section(outs).uns['histogene']['image_doubt'] and 'LOOK at the image' in capsys.readouterr().out

def section_on(path, spots, factor=1., wide=WIDE):
    at = spots[spots.in_tissue == 1]
    return new_section(np.ones((len(at), 2)), 'AB', at.barcode, at[['pxl_col_in_fullres', 'pxl_row_in_fullres']]*factor, at.array_col, at.array_row, 'mine', 'mine', path, wide*factor)

def test_spots_are_witnesses_where_there_is_no_picture(tmp_path, full, spots):
    n = int(spots.in_tissue.sum())
    Image.fromarray(full).save(tmp_path/'he.png')
    assert image_notes(count_on_tissue(section_on(tmp_path/'he.png', spots))) == [f'{n} of {n} spots on tissue in the image']
    far = tissue(0, .2)                                                       # turned, hardly any of its tissue would lie where it is now
    few = spots[spots.pxl_col_in_fullres < 160]
    for name,pixels in dict(good=far, turned=far[::-1, ::-1]).items(): Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path/f'{name}.png')
    count_on_tissue(section_on(tmp_path/'good.png', few))
    refused('turned.png: 0 of .* spots lie on tissue; if it were turned by 180 degrees', count_on_tissue, section_on(tmp_path/'turned.png', few))
    Image.fromarray(np.full((PX, PX), 244, np.uint8)).save(tmp_path/'glass.png')
    assert image_notes(count_on_tissue(section_on(tmp_path/'glass.png', spots))) == []

# --- which scale

@pytest.mark.parametrize('factor', [.03, .1, .25])
def test_positions_in_pixels_of_a_smaller_picture(tmp_path, full, spots, factor):
    Image.fromarray(np.asarray(Image.fromarray(full).resize((3000, 3000)))).save(tmp_path/'he.jpg')
    refused('he.jpg: spots lie .* pixels apart, .* in pixels of a smaller picture', count_on_tissue, section_on(tmp_path/'he.jpg', spots, factor*5 if factor < .06 else factor))
    assert 'LOOK' not in str(image_notes(count_on_tissue(section_on(tmp_path/'he.jpg', spots, 5))))

def test_positions_in_pixels_of_a_large_picture(tmp_path, full, spots):
    "A fifth of the image's size, but wide enough to be spots: refused where they lie on glass, else said"
    Image.fromarray(np.asarray(Image.fromarray(full).resize((6000, 6000)))).save(tmp_path/'he.jpg')
    refused('he.jpg: spots lie .* in pixels of a smaller picture', count_on_tissue, section_on(tmp_path/'he.jpg', spots, 2))
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    everywhere = np.pad(noise, ((0, 50), (0, 50), (0, 0)), constant_values=244)
    Image.fromarray(everywhere).resize((6000, 6000)).save(tmp_path/'all.jpg')
    assert 'LOOK at the image: spots lie' in str(image_notes(count_on_tissue(section_on(tmp_path/'all.jpg', spots, 2))))

@pytest.mark.parametrize('change', [lambda p: p/255, lambda p: (p/255).astype(np.float32)*1.003, lambda p: p.astype(np.uint16)*257, lambda p: p.transpose(2, 0, 1), lambda p: p.astype(float)])
def test_tissue_of_a_picture_of_any_numbers(full, change): assert (tissue_mask(change(full)) == tissue_mask(full)).mean() > .999

# --- pixels of every kind

def deep(pixels, bits): return (pixels*((2**bits - 1)/255)).astype(np.uint16)

def written(path, pixels, kind):
    "The picture in a file of some kind"
    three, rgb = np.ascontiguousarray(pixels.transpose(2, 0, 1)), dict(photometric='rgb')
    exif = Image.Exif(); exif[274] = 6
    on_its_side = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, 1)))
    if kind == 'pages': tifffile.imwrite(path, three, photometric='minisblack')
    elif kind == 'pages of plain TIFF':
        with tifffile.TiffWriter(path) as f: [f.write(p, photometric='minisblack', metadata=None) for p in three]
    elif kind == 'ImageJ': tifffile.imwrite(path, three, imagej=True, metadata=dict(axes='CYX'))
    elif kind == 'thumbnail first':
        with tifffile.TiffWriter(path) as f: [f.write(np.ascontiguousarray(p), metadata=None, **rgb) for p in (pixels[::4, ::4], pixels)]
    elif kind == 'thumbnail first, in tiles':
        with tifffile.TiffWriter(path) as f: [f.write(np.ascontiguousarray(p), metadata=None, tile=(64, 64), **rgb) for p in (pixels[::4, ::4], pixels)]
    elif kind.startswith('turned'): on_its_side.save(path, exif=exif, **(dict(quality=98, subsampling=0) if path.suffix == '.jpg' else {}))
    elif kind == '12 bits in strips': tifffile.imwrite(path, deep(pixels, 12), rowsperstrip=16, compression='deflate', **rgb)
    elif kind == '12 bits in tiles': tifffile.imwrite(path, deep(pixels, 12), tile=(64, 64), **rgb)
    elif kind == '16 bits in planes': tifffile.imwrite(path, deep(three, 16), planarconfig='separate', **rgb)
    elif kind == '12 bits in OME': tifffile.imwrite(path, deep(pixels, 12), ome=True, **rgb)
    elif kind in ('12 bits.png', '16 bits.png'): path.write_bytes(imagecodecs.png_encode(deep(pixels, int(kind[:2]))))
    elif kind == '12 bits.jp2': path.write_bytes(imagecodecs.jpeg2k_encode(deep(pixels, 12), level=0))
    elif kind == 'floats': tifffile.imwrite(path, pixels.astype(np.float32)/255*1.002, **rgb)
    elif kind == 'floats to 255': tifffile.imwrite(path, pixels.astype(np.float32), **rgb)
    elif kind == 'packed': path.write_bytes(gzip.compress(imagecodecs.png_encode(np.ascontiguousarray(pixels))))
    elif kind == 'one dimension more': tifffile.imwrite(path, pixels[None], **rgb)
    elif kind == 'alpha': Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])).save(path)
    else: raise ValueError(kind)

KINDS = {'pages': '.tif', 'pages of plain TIFF': '.tif', 'ImageJ': '.tif', 'thumbnail first': '.tif', 'thumbnail first, in tiles': '.btf', 'turned JPEG': '.jpg', 'turned PNG': '.png', 'turned TIFF': '.tif', 'turned WebP': '.webp',
         '12 bits in strips': '.tif', '12 bits in tiles': '.tiff', '16 bits in planes': '.tif', '12 bits in OME': '.ome.tif', '12 bits.png': '.png', '16 bits.png': '.png', '12 bits.jp2': '.jp2', 'floats': '.tif',
         'floats to 255': '.tif', 'packed': '.png.gz', 'one dimension more': '.tif', 'alpha': '.png'}
ABOUT = {'turned JPEG': 12, 'turned WebP': 30}                                  # they lose some

@pytest.mark.parametrize('kind', KINDS)
def test_pixels_of_every_kind(tmp_path, full, kind):
    pixels, path = full[100:400, 50:500:2], tmp_path/f'he{KINDS[kind]}'
    written(path, pixels, kind)
    with open_image(path) as im:
        assert im.size == (225, 300)
        got = np.asarray(as_rgb(im.crop((0, 0, *im.size)))).astype(int)
    assert np.percentile(np.abs(got - pixels), 99) <= ABOUT.get(kind, 1)

def test_modes_of_pixels(tmp_path, full):
    image = Image.fromarray(full[200:400, 200:400])
    for mode,suffix in ('CMYK', '.jpg'), ('CMYK', '.tif'), ('P', '.png'), ('P', '.tif'), ('L', '.jpg'), ('LA', '.png'), ('RGBA', '.tif'), ('YCbCr', '.tif'):
        image.convert(mode).save(tmp_path/f'he{suffix}')
        with open_image(tmp_path/f'he{suffix}') as im: small = small_copy(im, 200).astype(int)
        expected = np.asarray(image.convert(mode).convert('RGB')).astype(int)
        assert np.abs(small - expected).mean() < 8, mode

def test_colours_that_pillow_does_not_know(monkeypatch):
    def convert(self, mode): raise ValueError('conversion from LAB to RGB not supported')
    monkeypatch.setattr(Image.Image, 'convert', convert)
    refused('no RGB can be made of its colours', as_rgb, Image.new('LAB', (9, 9)))

def test_arrays_of_every_kind(full):
    p = full[200:300, 200:280]
    for same in p, p[None], p.transpose(2, 0, 1), p.transpose(2, 0, 1)[None], p/255, p/255*1.002, p.astype(np.int64), deep(p, 16), deep(p, 12), deep(p, 10), np.dstack([p, np.full(p.shape[:2], 255, np.uint8)]):
        assert np.abs(np.asarray(as_rgb(np.asarray(same))).astype(int) - p).max() <= 1
    for grey in p[..., 0], p[..., :1], p[None, ..., 0]: assert (np.asarray(as_rgb(grey)) == p[..., :1]).all()
    assert (np.asarray(as_rgb(p[..., 0] > 128))[..., 0] == (p[..., 0] > 128)*255).all()
    for wrong in p/255*3, p/255 - .5, p.astype(float)*1000, p.astype(np.int16) - 300, np.where(p > 250, np.nan, p/255), np.full(p.shape, np.inf), (p > 128).astype(np.int32):
        refused('hold values from', as_rgb, wrong)
    for wrong in p.transpose(2, 0, 1)[:2], np.zeros((5, 9, 9)), np.zeros((2, 9, 9, 3)), np.zeros(9), np.zeros((0, 5, 3)): refused('not one image in grey or RGB', as_rgb, wrong)
    refused('not numbers', as_rgb, p.astype(object))

def test_several_images_of_one_size(tmp_path, full):
    with tifffile.TiffWriter(tmp_path/'he.tif') as f: [f.write(full[:100, :90], photometric='rgb', metadata=None) for _ in range(4)]
    refused('he.tif: this TIFF is of uint8 with axes .*, not one image', open_image(tmp_path/'he.tif').__enter__)

@pytest.mark.parametrize('channels', [2, 4, 5])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_fluorescence_is_not_taken_for_colours(tmp_path, full, channels, dtype):
    tifffile.imwrite(tmp_path/'if.tif', np.stack([full[:100, :90, 0]]*channels).astype(dtype), photometric='minisblack')
    refused('if.tif: this TIFF is of uint.*, not one image', open_image(tmp_path/'if.tif').__enter__)

# --- beside the counts: scanners' files, and Visium HD's image

@pytest.mark.parametrize('name', ['he.btf', 'he.svs', 'he.ndpi', 'he.qptiff', 'he.jp2', 'HE.TIF', 'he.scn'])
def test_slides_beside_the_counts(outs, full, spots, name):
    if name == 'he.jp2': Image.fromarray(full).save(outs/name)
    else: tifffile.imwrite(outs/name, full, tile=(128, 128), photometric='rgb', bigtiff=name == 'he.btf')
    assert place(is_right(read_section(outs), spots)).path == str(outs/name)

@pytest.mark.parametrize('where', ['.', '..', '../..'])
def test_the_image_of_visium_hd(outs, full, spots, where):
    bin = outs/'binned_outputs'/'square_016um'
    bin.mkdir(parents=True)
    for f in 'spatial', 'filtered_feature_bc_matrix': (outs/f).rename(bin/f)
    Image.fromarray(full).save(bin/where/'he.jpg', quality=98)
    s = is_right(read_section(outs), spots)
    assert Path(place(s).path).samefile(bin/where/'he.jpg') and section_name(s) == 'mine_square_016um'

def test_cells_are_not_bins(outs):
    cells = outs/'segmented_outputs'
    cells.mkdir(); (cells/'cell_segmentations.geojson').touch(); (cells/'filtered_feature_cell_matrix.h5').touch()
    (outs/'spatial').rename(cells/'spatial')
    for given in outs, cells, outs.parent: refused('segmented_outputs: these are counts of segmented cells.* binned_outputs/square_016um', read_section, given)
    for size in '008', '016': (outs/'binned_outputs'/f'square_{size}um'/'spatial').mkdir(parents=True)
    assert str(outs/'binned_outputs'/'square_016um') in refused('segmented cells', read_section, cells)

@pytest.mark.parametrize('suffix', ['.czi', '.vsi', '.pdf', '.heic', '.jxl'])
def test_images_of_other_programs_are_not_called_damaged(outs, suffix):
    (outs/f'he{suffix}').write_bytes(b'ZISRAWFILE' + bytes(3000) if suffix == '.czi' else bytes(3000))
    assert 'damaged' not in refused(f'this is a {suffix[1:]} file.*Export it as a TIFF', read_section, outs, image=outs/f'he{suffix}')
    if suffix == '.jxl': refused('cannot identify image file', read_section, outs, image=outs/'he.jxl')

@pytest.mark.parametrize('text,match', [('version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n', 'It is a pointer of Git LFS'), ('\n<!DOCTYPE html><html>Sign in', 'It is a web page')])
def test_what_was_downloaded_is_not_the_file(outs, tmp_path, text, match):
    for name in 'he.tif', 'he.jpg', 'he.czi', 'he.pdf', 's.h5ad': (tmp_path/name).write_text(text)
    for name in 'he.tif', 'he.jpg', 'he.czi', 'he.pdf': refused(f'{name}: cannot be read as an image .*{match}', read_section, outs, image=tmp_path/name)
    refused(f's.h5ad: cannot be read as an .h5ad file .*{match}', read_section, tmp_path/'s.h5ad')

@pytest.mark.parametrize('category,module,quiet', [(UserWarning, 'PIL.TiffImagePlugin', True), (Image.DecompressionBombWarning, 'PIL.Image', True), (UserWarning, 'mine', False), (RuntimeWarning, 'mine', False)])
def test_warnings_of_pillow_alone_are_hidden(category, module, quiet):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        with decoding('he.tif'): warnings.warn_explicit('odd', category, 'file.py', 1, module)
    assert len(said) == 1 - quiet

def test_what_is_no_image(outs, tmp_path):
    (tmp_path/'he.zarr').mkdir()
    refused('he.zarr: this is a folder', read_section, outs, image=tmp_path/'he.zarr')
    (tmp_path/'s.h5ad').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(99))
    refused('s.h5ad: cannot be read as an image', read_section, outs, image=tmp_path/'s.h5ad')

# --- which spots count, and what a Visium folder may look like

@pytest.mark.parametrize('yes,no', [('TRUE', 'FALSE'), ('True', 'False'), ('true', 'false'), ('1.0', '0.0'), ('"1"', '"0"')])
def test_in_tissue(outs, spots, yes, no):
    spots.assign(in_tissue=spots.in_tissue.map({1: yes, 0: no})).to_csv(outs/'spatial'/'tissue_positions.csv', index=False, quoting=3)
    s = is_right(read_section(outs), spots, .5)
    assert s.uns['histogene']['not_in_tissue'] == (spots.in_tissue == 0).sum()

def test_in_tissue_is_something_else(outs, spots):
    spots.assign(in_tissue='maybe').to_csv(outs/'spatial'/'tissue_positions.csv', index=False)
    refused("in_tissue of a spot is 'maybe', neither 0 nor 1", read_section, outs)

def test_a_column_of_positions_twice(outs, spots):
    spots.assign(again=1).set_axis([*spots.columns, 'pxl_row_in_fullres'], axis=1).to_csv(outs/'spatial'/'tissue_positions.csv', index=False)
    refused('two columns pxl_row_in_fullres', read_section, outs)

POSITIONS = {'list without a header': ('tissue_positions_list.csv', dict(header=False)), 'list with one': ('tissue_positions_list.csv', {}), 'new, without one': ('tissue_positions.csv', dict(header=False)),
             'gzipped list': ('tissue_positions_list.csv.gz', dict(header=False)), 'gzipped': ('tissue_positions.csv.gz', {}), 'tabs': ('tissue_positions.tsv', dict(sep='\t')), "of R": ('tissue_positions.csv', dict(quoting=1)),
             'with a prefix': ('GSM1_A_tissue_positions_list.csv.gz', {})}

@pytest.mark.parametrize('case', POSITIONS)
def test_positions(outs, spots, case):
    name, how = POSITIONS[case]
    (outs/'spatial'/'tissue_positions.csv').unlink()
    spots.to_csv(outs/'spatial'/name, index=False, **how)
    is_right(read_section(outs), spots, .5)

def test_positions_by_their_names(outs, spots):
    "In another order, with more columns, and with barcodes as an index without a name"
    spots.assign(more='x')[['more', *spots.columns[::-1]]].to_csv(outs/'spatial'/'tissue_positions.csv', index=False)
    is_right(read_section(outs), spots, .5)
    spots.set_index('barcode').rename_axis(None).to_csv(outs/'spatial'/'tissue_positions.csv')
    is_right(read_section(outs), spots, .5)
    spots.iloc[:, :5].to_csv(outs/'spatial'/'tissue_positions.csv', index=False, header=False)
    refused('no header, and 5 columns instead of 6', read_section, outs)

@pytest.mark.parametrize('how', [dict(quoting=2), dict(header=[c.upper() for c in ('in_tissue', 'array_row', 'array_col', 'pxl_row_in_fullres', 'pxl_col_in_fullres')])])
def test_positions_by_the_names_of_seurat_and_in_capitals(outs, spots, how):
    seurat = spots.set_axis(['barcode', 'tissue', 'row', 'col', 'imagerow', 'imagecol'], axis=1).set_index('barcode').rename_axis(None)
    seurat.to_csv(outs/'spatial'/'tissue_positions.csv', **how)
    is_right(read_section(outs), spots, .5)

def test_counts_of_another_section(outs, spots):
    "One in ten barcodes is known, as two arrays of one make share some"
    write_mtx(outs/'filtered_feature_bc_matrix', spots.assign(barcode=spots.barcode.where(spots.index % 10 == 0, spots.barcode + 'x')))
    refused('only 20 of 196 spots with counts have a position.*Nine in ten must match', read_section, outs)

def test_positions_in_parquet(outs, spots):
    pytest.importorskip('pyarrow')
    (outs/'spatial'/'tissue_positions.csv').unlink()
    spots.astype(dict(in_tissue=bool)).to_parquet(outs/'spatial'/'tissue_positions.parquet')
    is_right(read_section(outs), spots, .5)

def test_spots_without_a_position(outs, spots):
    gone = spots.index[spots.in_tissue == 1][:3]
    there = spots.astype(dict(pxl_row_in_fullres=float))
    there.loc[gone[:2], 'pxl_row_in_fullres'] = np.nan
    there = there.drop(gone[2])
    there.to_csv(outs/'spatial'/'tissue_positions.csv', index=False)
    s = is_right(read_section(outs), spots.drop(gone), .5)
    assert s.uns['histogene']['counts_without_position'] == 3
    spots.assign(pxl_row_in_fullres=np.nan).to_csv(outs/'spatial'/'tissue_positions.csv', index=False)
    refused('no spot has a position', read_section, outs)

def test_spots_off_the_image(outs, spots, capsys):
    at = spots.index[spots.in_tissue == 1]
    for n in 1, 2, len(at)//4:
        moved = spots.copy()
        moved.loc[at[:n], 'pxl_col_in_fullres'] = -5 - np.arange(n)
        moved.to_csv(outs/'spatial'/'tissue_positions.csv', index=False)
        if n > 2: refused(f'is outside the image tissue_hires_image.png .*; {n} such in all', read_section, outs)
        else:
            s = is_right(read_section(outs), spots.drop(at[:n]), .5)
            assert s.uns['histogene']['off_image'] == n and f'{n} off the image, left out' in capsys.readouterr().out

SCALES = {'text': lambda f: f | dict(note='derived'), 'null': lambda f: f | dict(fiducial_diameter_fullres=None), 'arrays of one': lambda f: {k: [v] for k,v in f.items()}, 'text numbers': lambda f: {k: str(v) for k,v in f.items()},
          'more': lambda f: f | dict(regist=dict(a=1), many=[1, 2])}

@pytest.mark.parametrize('case', SCALES)
def test_scale_factors(outs, spots, case):
    (outs/'spatial'/'scalefactors_json.json').write_text(json.dumps(SCALES[case](FACTORS)))
    is_right(read_section(outs), spots, .5)

def test_scale_factors_of_pictures_that_are_there(outs, spots):
    without = lambda k: json.dumps({a: b for a,b in FACTORS.items() if a != k})
    file = outs/'spatial'/'scalefactors_json.json'
    file.write_text(without('tissue_lowres_scalef'))
    refused('tissue_lowres_scalef is missing', read_section, outs)
    (outs/'spatial'/'tissue_lowres_image.png').unlink()
    is_right(read_section(outs), spots, .5)
    file.write_text(without('spot_diameter_fullres'))
    refused('spot_diameter_fullres is missing', read_section, outs)
    file.write_text('[1, 2]'); refused('cannot be read as JSON', read_section, outs)
    file.unlink(); refused('the scale factors are missing', read_section, outs)

@pytest.mark.parametrize('genes', ['features.tsv', 'genes.tsv'])
@pytest.mark.parametrize('packed', [True, False])
def test_counts_in_three_files(outs, spots, packed, genes):
    shutil.rmtree(outs/'filtered_feature_bc_matrix')
    counts = write_mtx(outs/'filtered_feature_bc_matrix', spots, packed=packed, genes=genes)
    s = is_right(read_section(outs), spots, .5)
    assert np.array_equal(s.X.toarray(), counts[spots.in_tissue == 1]) and list(s.var_names) == [f'G{i}' for i in range(5)] and list(s.var.gene_ids) == [f'ENSG{i}' for i in range(5)]
    (outs/'filtered_feature_bc_matrix').rename(outs/'raw_feature_bc_matrix')
    is_right(read_section(outs), spots, .5)
    (outs/'raw_feature_bc_matrix'/f'barcodes.tsv{".gz"*packed}').unlink()
    refused('the barcodes are missing', read_section, outs)
    short = write_mtx(outs/'raw_feature_bc_matrix', spots, packed=packed, genes=genes)
    (outs/'raw_feature_bc_matrix'/f'barcodes.tsv{".gz"*packed}').write_bytes(gzip.compress(b'a\nb') if packed else b'a\nb')
    refused('barcodes.tsv.*it has 2 lines, and matrix.mtx', read_section, outs)

@pytest.mark.parametrize('packed', [True, False])
def test_flat_folder_of_geo(outs, spots, full, packed):
    flat, prefix = outs.parent/'GSM', 'GSM1234_A1_'
    write_mtx(flat, spots, prefix, packed)
    for f in (outs/'spatial').iterdir():
        data = f.read_bytes()
        (flat/f'{prefix}{f.name}{".gz"*packed}').write_bytes(gzip.compress(data) if packed else data)
    is_right(read_section(flat), spots, .5)
    Image.fromarray(full).save(flat/f'{prefix}he.jpg', quality=98)
    assert place(is_right(read_section(flat), spots)).path.endswith('A1_he.jpg')
    shutil.copy(next(flat.glob('*positions*')), flat/f'GSM1235_B1_{next(flat.glob("*positions*")).name[len(prefix):]}')
    refused('2 files could be the positions', read_section, flat)

def test_one_key_of_spatial_is_a_mark(outs, spots):
    "CELLxGENE requires uns['spatial']['is_single']"
    s = read_section(outs)
    s.uns['spatial'] = {'is_single': True, **s.uns['spatial']}
    assert section_name(s) == 'mine' and place(s).diameter == WIDE/2

# --- safety

def claiming(path, w=20_000, h=20_000):
    data = io.BytesIO(); Image.new('RGB', (64, 64), (200, 100, 150)).save(data, 'JPEG')
    data = bytearray(data.getvalue()) + bytes(36_000)
    at = data.index(b'\xff\xc0') + 5
    data[at:at+4] = h.to_bytes(2, 'big') + w.to_bytes(2, 'big')
    path.write_bytes(data)

def test_a_file_too_small_for_what_it_claims(tmp_path):
    claiming(tmp_path/'he.jpg')
    refused('its header says 20000 x 20000 pixels, but its 3. kB cannot hold', open_image(tmp_path/'he.jpg').__enter__)
    png = bytearray(imagecodecs.png_encode(np.zeros((8, 8, 3), np.uint8)))
    png[16:24] = (15_000).to_bytes(4, 'big')*2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, 'big')                       # or the checksum would be what is wrong
    (tmp_path/'he.png').write_bytes(png)
    refused('its header says 15000 x 15000 pixels', open_image(tmp_path/'he.png').__enter__)
    Image.new('RGB', (9000, 9000), 'white').save(tmp_path/'plain.jpg', quality=1)             # of one colour, and honest
    with open_image(tmp_path/'plain.jpg') as im: assert im.size == (9000, 9000)

def test_too_little_memory(tmp_path):
    def fails():
        with decoding(tmp_path/'he.tif'): raise MemoryError
    refused('he.tif: there is too little memory', fails)
    (tmp_path/'a.h5ad').touch()
    def fails_too():
        with reading(tmp_path/'a.h5ad', 'an .h5ad file'): raise MemoryError
    refused('a.h5ad: there is too little memory', fails_too)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no named pipes here')
@pytest.mark.parametrize('path', ['spatial', 'filtered_feature_bc_matrix', 'filtered_feature_bc_matrix/matrix.mtx.gz', 'filtered_feature_bc_matrix/barcodes.tsv.gz', 'spatial/tissue_positions.csv',
                                  'spatial/scalefactors_json.json', 'spatial/tissue_hires_image.png', 'he.tif', ''])
def test_named_pipes_are_not_waited_for(outs, spots, path):
    at = outs/path
    if at.is_dir(): shutil.rmtree(at)
    at.unlink(missing_ok=True)
    os.mkfifo(at)
    if path == 'he.tif': is_right(read_section(outs), spots, .5)
    elif 'hires' in path: is_right(read_section(outs), spots, .125)
    else: refused('', read_section, outs)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no named pipes here')
@pytest.mark.parametrize('path', ['', 'zarr.json', '.zgroup', 'tables'])
def test_pipes_in_a_store(tmp_path, path):
    pytest.importorskip('spatialdata')
    if path: (tmp_path/'a.zarr').mkdir()
    os.mkfifo(tmp_path/'a.zarr'/path)
    with pytest.raises(InputError): read_section(tmp_path/'a.zarr')

# --- real ones, as they stand

SHARED = Path(os.environ.get('HISTOGENE_DATA', '.'))

@needs_images
@pytest.mark.parametrize('path,n,image,scale', [('visium/mouse_colon', 2604, 'he_fullres.jpg', 1.), ('visium/outs', 2172, 'tissue_lowres_image.png', .1), ('visium/fixtures/10xVisium/section1', 22, 'tissue_lowres_image.png', .051033426),
                                                ('visium/fixtures/10xVisium/section2/outs', 22, 'tissue_lowres_image.png', .051033426), ('visium/fixtures/binned_outputs', 10, 'tissue_lowres_image.png', None)])
def test_real_visium(path, n, image, scale):
    s = read_section(SHARED/path)
    assert len(s) == n == s.uns['histogene']['on_tissue'] and Path(place(s).path).name == image and 'image_doubt' not in s.uns['histogene']
    assert scale is None or s.uns['histogene']['image_scale'] == pytest.approx(scale)

@needs_images
def test_real_image_the_wrong_way(tmp_path):
    colon = SHARED/'visium'/'mouse_colon'
    with Image.open(colon/'he_fullres.jpg') as im:
        im.draft('RGB', (im.width//4, im.height//4)); small = im.copy()
    small.rotate(180).save(tmp_path/'turned.jpg')
    small.crop((20, 20, small.width - 20, small.height - 20)).save(tmp_path/'cropped.jpg')
    small.save(tmp_path/'quarter.jpg')
    with Image.open(colon/'spatial'/'tissue_hires_image.png') as im: own = np.asarray(im.convert('RGB'))
    refused('if it were turned by 180 degrees', image_scale, tmp_path/'turned.jpg', own, .25)
    refused('does not show', image_scale, tmp_path/'cropped.jpg', own, .25)
    refused('does not', image_scale, SHARED/'mob'/'ST-imgs'/'HE_Rep1.jpg', own, .25)
    assert image_scale(tmp_path/'quarter.jpg', own, .25) == (pytest.approx(.25, rel=1e-3), '')

@needs_images
@pytest.mark.parametrize('name,size', [('cmu-1-small-region.svs', (2220, 2967)), ('tcga-cr-7395-01a-01-ts1.svs', (4443, 3567)), ('kidney-48-5.tif', (1493, 901))])
def test_real_slides(name, size):
    shown = tissue_mask(thumbnail(SHARED/'slides'/name)[1]).mean()
    assert shown == pytest.approx({'cmu': .46, 'tcg': .70, 'kid': .009}[name[:3]], rel=.05)            # seen to be right
    with open_image(SHARED/'slides'/name) as im:
        assert im.size == size
        assert tissue_mask(small_copy(im, 600)).any()
