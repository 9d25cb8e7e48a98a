"Slides: images read by region, and images too large to be read: `TiledImage`, `open_image`"
import io, os, subprocess, sys, time, zlib
import numpy as np, pytest, tifffile
from anndata import AnnData
from PIL import Image
from histogene_nb.patches import cut_patches, extract_patches
from histogene_nb.sections import InputError, TiledImage, add_hires, open_image, small_copy
from conftest import root

PIXELS = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 255, (13, 18, 3), np.uint8)).resize((350, 270), Image.Resampling.BICUBIC))
CENTRES = np.array([[0, 0], [60.5, 70.2], [349, 269], [175, 135], [400, 20], [-200, -200]])

def opened(path, centres=CENTRES):
    with open_image(path) as im: return type(im), im.size, cut_patches(im, centres, 64)

def whole(centres=CENTRES): return cut_patches(Image.fromarray(PIXELS), centres, 64)

def same(path):
    kind, size, (patches, padded) = opened(path)
    expected, n = whole()
    assert (kind, size, padded) == (TiledImage, (350, 270), n) and (patches == expected).all()

@pytest.mark.parametrize('tile', [(16, 16), (64, 48), (256, 256), (512, 512)])
@pytest.mark.parametrize('options', [{}, dict(compression='deflate'), dict(compression='lzw', predictor=True), dict(compression='zstd'), dict(bigtiff=True), dict(byteorder='>'),
                                     dict(planarconfig='separate'), dict(ome=True), dict(ome=True, planarconfig='separate')], ids=lambda o: ' '.join(map(str, o.values())) or 'plain')
def test_patches_of_tiles_are_those_of_the_pixels(tmp_path, tile, options):
    pixels = PIXELS.transpose(2, 0, 1) if 'planarconfig' in options else PIXELS
    tifffile.imwrite(tmp_path/'he.tif', pixels, photometric='rgb', tile=tile, **options)
    same(tmp_path/'he.tif')

@pytest.mark.parametrize('quality', [60, 90])
def test_jpeg_tiles_as_pillow_decodes_them(tmp_path, quality):
    tifffile.imwrite(tmp_path/'he.tif', PIXELS, photometric='rgb', tile=(64, 64), compression='jpeg', compressionargs=dict(level=quality))
    with open_image(tmp_path/'he.tif') as ours, Image.open(tmp_path/'he.tif') as pillow:
        assert isinstance(ours, TiledImage) and (np.asarray(ours.crop((0, 0, 350, 270))) == np.asarray(pillow.convert('RGB'))).all()

def pyramid(path, pixels=PIXELS, chain=False, **options):
    with tifffile.TiffWriter(path, **{k: options.pop(k) for k in ('bigtiff', 'ome') if k in options}) as f:
        options = dict(tile=(32, 32), photometric='rgb', compression='deflate', metadata=None if chain else {}) | options
        f.write(pixels, subifds=None if chain else 2, **options)
        for k in 2, 4: f.write(np.asarray(Image.fromarray(pixels).reduce(k)), subfiletype=1, **options)

@pytest.mark.parametrize('options', [dict(), dict(chain=True), dict(ome=True), dict(bigtiff=True), dict(compression='jpeg')])
def test_pyramids(tmp_path, options):
    pyramid(tmp_path/'he.tif', **options)
    with open_image(tmp_path/'he.tif') as im:
        assert [l.size for l in im.smaller] == [(175, 135), (88, 68)]
        im.tile.cache_clear()
        small = small_copy(im, 88)
        assert small.shape == (68, 88, 3) and im.tile.cache_info().currsize == 0                   # the full resolution was not touched
    assert np.abs(small - np.asarray(Image.fromarray(PIXELS).reduce(4)).astype(float)).mean() < (8 if options.get('compression') == 'jpeg' else 3)

def test_a_label_is_not_a_level(tmp_path):
    with tifffile.TiffWriter(tmp_path/'he.tif') as f:
        f.write(PIXELS[:40, :40], photometric='rgb', metadata=None)
        f.write(PIXELS, photometric='rgb', tile=(32, 32), metadata=None)
        f.write(PIXELS[:100, :30], photometric='rgb', tile=(32, 32), metadata=None)
    same(tmp_path/'he.tif')
    with open_image(tmp_path/'he.tif') as im: assert im.smaller == []

@pytest.mark.parametrize('max_px', [1, 7, 100, 349, 350, 5000])
@pytest.mark.parametrize('rows', [1, 10, 300])
def test_small_copy_without_a_pyramid(tmp_path, monkeypatch, max_px, rows):
    monkeypatch.setenv('HISTOGENE_MAX_PIXELS', '94499')
    tifffile.imwrite(tmp_path/'he.tif', PIXELS, photometric='rgb', rowsperstrip=min(rows, 269), compression='deflate')
    with open_image(tmp_path/'he.tif') as im: small = small_copy(im, max_px)
    expected = np.asarray(Image.fromarray(PIXELS).resize((min(max_px, 350), max(1, round(min(max_px, 350)*270/350))), Image.Resampling.BICUBIC)).astype(float)
    assert small.shape == expected.shape and np.abs(small - expected).mean() < 4

def test_white_beyond_the_edge_and_where_a_tile_is_left_out(tmp_path):
    tifffile.imwrite(tmp_path/'he.tif', PIXELS, photometric='rgb', tile=(64, 64))
    with open_image(tmp_path/'he.tif') as im: out = np.asarray(im.crop((-10, -20, 360, 300)))
    assert (out[20:290, 10:360] == PIXELS).all() and all((a == 255).all() for a in (out[:20], out[290:], out[:, :10], out[:, 360:]))
    tifffile.imwrite(tmp_path/'he.tif', iter([b'' if i % 3 else bytes(64*64*3) for i in range(30)]), shape=(270, 350, 3), dtype='u1', photometric='rgb', tile=(64, 64), compression='none')
    with open_image(tmp_path/'he.tif') as im: out = np.asarray(im.crop((0, 0, *im.size)))
    assert (out[:64, :64] == 0).all() and (out[:64, 64:192] == 255).all() and (out[:64, 192:256] == 0).all()

def section_of(path):
    info = dict(images={}, scalefactors=dict(spot_diameter_fullres=64.), metadata=dict(source_image_path=str(path)))
    return AnnData(np.empty((0, 0), np.float32), uns={'spatial': {'s': info}, 'histogene': {}})

def test_sections_with_a_slide(tmp_path):
    pyramid(tmp_path/'he.tif')
    section = section_of(tmp_path/'he.tif')
    assert (extract_patches(section, 64, CENTRES) == whole()[0]).all() and section.uns['histogene']['n_padded'] == whole()[1]
    assert add_hires(section, 88).uns['spatial']['s']['scalefactors']['tissue_hires_scalef'] == 88/350

def refused(match, path):
    with pytest.raises(InputError, match=match) as e:
        with open_image(path): pass
    assert path.name in str(e.value)
    return str(e.value)

def test_bombs_and_how_to_allow_them(tmp_path, monkeypatch, recwarn):
    Image.new('1', (23_000, 23_000)).save(tmp_path/'he.png')
    message = refused('23000 x 23000 = 529,000,000 pixels.* limit is 500,000,000', tmp_path/'he.png')
    monkeypatch.setenv(*message.rstrip('.').rpartition(' ')[2].split('='))                         # as the message says
    with open_image(tmp_path/'he.png') as im: assert im.size == (23_000, 23_000)
    for wrong in 'much', 'inf', 'nan', '':
        monkeypatch.setenv('HISTOGENE_MAX_PIXELS', wrong)
        with pytest.raises(InputError, match='HISTOGENE_MAX_PIXELS is'):
            with open_image(tmp_path/'he.png'): pass
    assert not recwarn.list

def test_ordinary_photographs_go_through(tmp_path):
    Image.new('L', (20_000, 20_000)).save(tmp_path/'he.jpg', quality=20)
    with open_image(tmp_path/'he.jpg') as im: assert im.size == (20_000, 20_000) and small_copy(im, 100).shape == (100, 100, 3)

@pytest.mark.parametrize('kind,codec', [('JPEG', 'jpeg'), ('JPEG2000', 'jpeg2000'), ('', 'deflate')])
def test_a_tile_that_claims_to_be_larger(tmp_path, kind, codec):
    data = io.BytesIO()
    if kind: Image.new('RGB', (3000, 3000)).save(data, kind)
    else: data.write(zlib.compress(bytes(3*3000**2)))
    tifffile.imwrite(tmp_path/'he.tif', iter([data.getvalue()]), shape=(64, 64, 3), dtype='u1', tile=(64, 64), photometric='rgb', compression=codec)
    with open_image(tmp_path/'he.tif') as im:
        with pytest.raises(OSError, match='claims to be larger' if kind else 'tile 0'): im.crop((0, 0, 9, 9))
    with pytest.raises(InputError, match='he.tif: the image is damaged or incomplete'): extract_patches(section_of(tmp_path/'he.tif'), 64, CENTRES)

@pytest.mark.parametrize('dtype', [np.uint16, np.int16, np.float32])
@pytest.mark.parametrize('ome', [False, True])
def test_deep_slides(tmp_path, dtype, ome):
    tifffile.imwrite(tmp_path/'he.tif', PIXELS.astype(dtype), photometric='rgb', tile=(64, 64), ome=ome)
    refused('more than 8 bits.*Export it as 8-bit RGB', tmp_path/'he.tif')

@pytest.mark.parametrize('axes,shape', [('ZCYX', (2, 3, 270, 350)), ('CYX', (2, 270, 350)), ('CYX', (5, 270, 350)), ('TYX', (3, 270, 350))])
def test_stacks_are_refused(tmp_path, axes, shape):
    tifffile.imwrite(tmp_path/'he.tif', np.zeros(shape, np.uint8), photometric='minisblack', tile=(64, 64), ome=True, metadata=dict(axes=axes))
    refused('not one image in 8-bit RGB', tmp_path/'he.tif')

@pytest.mark.filterwarnings('ignore')
def test_damaged_slides(tmp_path):
    "A slide with bytes changed or cut off is read, or refused as any other image; nothing else, and not for long"
    pyramid(tmp_path/'good.tif', ome=True, compression='jpeg')
    good, rng, seen = (tmp_path/'good.tif').read_bytes(), np.random.default_rng(0), {}
    for i in range(300):
        data, header = bytearray(good), i % 2
        for at in rng.integers(0, 1000 if header else len(good), rng.integers(1, 9)): data[at] = rng.integers(256)
        path, start = tmp_path/'bad.tif', time.perf_counter()
        path.write_bytes(data[:rng.integers(8, len(good))] if i % 5 == 0 else data)
        try:
            extract_patches(section_of(path), 64, CENTRES), add_hires(section_of(path))
            result = 'read'
        except InputError as e: result = 'refused'; assert 'bad.tif' in str(e)
        assert time.perf_counter() - start < 20
        seen[result] = seen.get(result, 0) + 1
    assert set(seen) == {'read', 'refused'}, seen

def write_large(path, size=40_000, tile=512):
    "A slide of white glass and some islands of tissue, written tile by tile: JPEG in tiles, no pyramid"
    rng = np.random.default_rng(0)
    noise = np.asarray(Image.fromarray(rng.integers(90, 230, (160, 160, 3), np.uint8)).resize((2048, 2048), Image.Resampling.BICUBIC))
    centres, radii = rng.uniform(.2, .8, (6, 2))*size, rng.uniform(.08, .16, 6)*size
    glass = np.full((tile, tile, 3), 244, np.uint8)
    def tiles():
        for y in range(0, size, tile):
            for x in range(0, size, tile):
                gap = (np.hypot(*(centres - [x + tile/2, y + tile/2]).T) - radii).min()
                if gap > tile: yield glass; continue
                out = noise[y % 2048:y % 2048 + tile, x % 2048:x % 2048 + tile].copy()
                if gap > -tile:
                    yy, xx = np.mgrid[y:y + tile, x:x + tile].astype(np.float32)
                    out[(np.hypot(xx[..., None] - centres[:, 0], yy[..., None] - centres[:, 1]) > radii).all(-1)] = 244
                yield out
    with tifffile.TiffWriter(path, bigtiff=True) as f:
        f.write(tiles(), shape=(size, size, 3), dtype='u1', tile=(tile, tile), photometric='rgb', compression='jpeg', metadata=None)

def measured(code, **names):
    "Run code in a process of its own, with these names; what it prints and its peak memory in GB"
    head = 'import time\nstart = time.perf_counter()\n' + ''.join(f'{k} = {v!r}\n' for k,v in names.items())
    tail = "\nprint(time.perf_counter() - start, next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"  # ru_maxrss would count the parent's
    res = subprocess.run([sys.executable, '-c', head + code + tail], capture_output=True, text=True, cwd=root, env=os.environ | dict(PYTHONPATH=str(root)))
    assert res.returncode == 0, res.stderr
    *text, numbers = res.stdout.splitlines()
    seconds, memory = map(float, numbers.split())
    memory /= 2**20
    print(f'{text}: {seconds:.0f} s, {memory:.2f} GB')
    return text, memory

@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is measured as Linux counts it')
def test_a_slide_of_40_000_pixels(tmp_path):
    "Mask, patches, and a dense prediction from the image alone, by the command, of an untrained model; under 4 GB each"
    slide, out = tmp_path/'slide.tif', tmp_path/'predicted.h5ad'
    write_large(slide)
    assert slide.stat().st_size < 600e6
    _, memory = measured("""
import numpy as np
from histogene_nb.sections import open_image, small_copy
from histogene_nb.patches import cut_patches, dense_grid, tissue_mask
with open_image(slide) as im:
    thumbnail = small_copy(im)
    mask = tissue_mask(thumbnail)
    centres, _ = dense_grid(mask, thumbnail.shape[1]/im.width, 400, 4)
    patches, _ = cut_patches(im, centres, 112, 400)
print(im.size, thumbnail.shape, f'{mask.mean():.0%} tissue', tuple(patches.shape))""", slide=str(slide))
    assert memory < 4
    (text, *_), memory = measured("""
import torch
from histogene_nb.model import HisToGene, save_pretrained
from histogene_nb.commands import histogene_predict
net = HisToGene(n_genes=785, dim=256, depth=4, heads=8)
net.about = dict(genes=[f'g{i}' for i in range(785)], normalization='paper', grid=[[.4, 0.], [0., .4], [0., 0.]])
save_pretrained(net, folder)
histogene_predict(folder, image=slide, spot_diameter=400, superres=4, out=out)""", slide=str(slide), folder=str(tmp_path/'model'), out=str(out))
    assert memory < 4 and out.is_file() and int(text.split()[0]) > 5000
