"Slides: images read by region, and images too large to be read: `TiledImage`, `SlideImage`, `open_image`"
import io, os, re, struct, subprocess, sys, time, zlib, warnings
from contextlib import redirect_stdout
from functools import partial
import imagecodecs, numpy as np, pytest, tifffile
from anndata import AnnData
from PIL import Image
from scipy import sparse
from histogene_nb.patches import cut_patches, extract_patches, tissue_mask
from histogene_nb.files import InputError
from histogene_nb.images import SlideImage, TiledImage, decoding, image_mpp, open_image
from histogene_nb.sections import add_hires, check_counts, small_copy
from histogene_nb.superres import predict_image
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
    assert (extract_patches(section, 64, CENTRES) == whole()[0]).all() and 'n_padded' not in section.uns['histogene']     # that is of its own spots
    spots = AnnData(np.empty((len(CENTRES), 0), np.float32), obsm={'spatial': np.asarray(CENTRES, float)}, uns=section.uns)
    assert (extract_patches(spots, 64) == whole()[0]).all() and spots.uns['histogene']['n_padded'] == whole()[1]
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
    "Decoded whole, by the largest number in them"
    for n,pixels in enumerate([PIXELS.astype(dtype), (PIXELS*(4095/255)).astype(dtype)]):
        path = tmp_path/f'{n}.tif'
        tifffile.imwrite(path, pixels, photometric='rgb', tile=(64, 64), ome=ome)
        with open_image(path) as im: assert im.size == (350, 270) and np.abs(np.asarray(im.crop((0, 0, 350, 270))).astype(int) - PIXELS).max() <= 1

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
        path, start = tmp_path/'bad.tif', time.process_time()
        path.write_bytes(data[:rng.integers(8, len(good))] if i % 5 == 0 else data)
        try:
            extract_patches(section_of(path), 64, CENTRES), add_hires(section_of(path))
            result = 'read'
        except InputError as e: result = 'refused'; assert 'bad.tif' in str(e)
        assert time.process_time() - start < 20                                # of computing, however busy the machine is
        seen[result] = seen.get(result, 0) + 1
    assert set(seen) == {'read', 'refused'}, seen

def write_large(path, size=40_000, tile=512):
    "A slide of white glass and some islands of tissue, written tile by tile: JPEG in tiles, no pyramid; what repeats is encoded once"
    rng = np.random.default_rng(0)
    noise = np.asarray(Image.fromarray(rng.integers(90, 230, (160, 160, 3), np.uint8)).resize((2048, 2048), Image.Resampling.BICUBIC))
    centres, radii = rng.uniform(.2, .8, (6, 2))*size, rng.uniform(.08, .16, 6)*size
    encode = partial(imagecodecs.jpeg8_encode, colorspace='RGB', outcolorspace='YCBCR', subsampling='420')
    glass, within = encode(np.full((tile, tile, 3), 244, np.uint8)), {}
    def tiles():
        for y in range(0, size, tile):
            for x in range(0, size, tile):
                gap, place = (np.hypot(*(centres - [x + tile/2, y + tile/2]).T) - radii).min(), (y % 2048, x % 2048)
                if gap > .71*tile: yield glass; continue                                            # half a diagonal: no tissue in this tile
                out = noise[place[0]:place[0] + tile, place[1]:place[1] + tile]
                if gap > -.71*tile:
                    squares = [(np.arange(a, a + tile) - centres[:, i:i + 1])**2 for i,a in enumerate((x, y))]     # (6, tile)
                    white = (squares[0][:, None] + squares[1][:, :, None] > radii[:, None, None]**2).all(0)
                    yield encode(np.where(white[..., None], np.uint8(244), out)); continue
                if place not in within: within[place] = encode(out.copy())
                yield within[place]
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
    "Mask, patches, and a dense prediction from the image alone, by the command, of an untrained model; under 4 GB in all"
    slide, out = tmp_path/'slide.tif', tmp_path/'predicted.h5ad'
    write_large(slide)
    assert slide.stat().st_size < 600e6
    said, memory = measured("""
import torch
from histogene_nb.model import HisToGene
from histogene_nb.interface import save_pretrained
from histogene_nb.commands import histogene_predict
net = HisToGene(n_genes=785, dim=256, depth=2, heads=8)
net.about = dict(genes=[f'g{i}' for i in range(785)], normalization='paper', grid=[[.4, 0.], [0., .4], [0., 0.]])
save_pretrained(net, folder)
histogene_predict(folder, image=slide, spot_diameter=400, superres=4, out=out)""", slide=str(slide), folder=str(tmp_path/'model'), out=str(out))
    text, = (line for line in said if 'patches x genes' in line)
    assert memory < 4 and out.is_file() and int(text.split()[0]) > 5000

# Scanners' own formats, written as OpenSlide expects them

def svs(path, pixels=PIXELS, factors=(2, 4), about='|AppMag = 20|MPP = 0.5', **options):
    "An Aperio slide: the image, a thumbnail, smaller levels, a label and a photograph of the whole glass that is larger than the image"
    aperio, (h, w) = 'Aperio Image Library v11.2.1\r\n', pixels.shape[:2]
    plain = dict(photometric='rgb', metadata=None, software=False)
    tiled = plain | dict(tile=(64, 64), compression='deflate') | options
    with tifffile.TiffWriter(path) as f:
        f.write(pixels, description=f'{aperio}{w}x{h} [0,0 {w}x{h}] (64x64) JPEG/RGB Q=90{about}', **tiled)
        f.write(np.asarray(Image.fromarray(pixels).resize((80, 60))), description=aperio + 'thumbnail', rowsperstrip=60, compression='jpeg', **plain)
        for k in factors: f.write(np.asarray(Image.fromarray(pixels).reduce(k)), description=f'{aperio}{w}x{h} -> {w//k}x{h//k} JPEG/RGB Q=90', **tiled)
        f.write(np.zeros((200, 100, 3), np.uint8), description=aperio + 'label 100x200', subfiletype=1, rowsperstrip=200, compression='lzw', **plain)
        f.write(np.zeros((400, 900, 3), np.uint8), description=aperio + 'macro 900x400', subfiletype=9, rowsperstrip=400, compression='jpeg', **plain)

def ndpi(path, pixels=PIXELS[:256, :320]):
    "A Hamamatsu slide in one file: a JPEG a level, and its own tags"
    tags = [(65420, 4, 1, 1, True), (65421, 11, 1, 20., True), (65424, 9, 1, 0, True)]             # version, lens, focal plane
    tifffile.imwrite(path, pixels, photometric='rgb', compression='jpeg', compressionargs=dict(level=95), rowsperstrip=len(pixels), metadata=None, software='NDP.scan', extratags=tags, resolution=(2e4, 2e4), resolutionunit='CENTIMETER')

def vms(path, pixels=PIXELS[:256, :320]):
    "A Hamamatsu slide in several files: a text that names photographs"
    h, w = pixels.shape[:2]
    for name,image in {path.stem: pixels, 'map': pixels[::4, ::4], 'macro': pixels[:40, :40]}.items(): Image.fromarray(image).save(path.with_name(f'{name}.jpg'), quality=95, subsampling=1, restart_marker_rows=1)
    path.write_text(f'[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile={path.stem}.jpg\nMapFile=map.jpg\nMacroImage=macro.jpg\n'
                    f'OptimisationFile=\nPhysicalWidth={w*500}\nPhysicalHeight={h*500}\n')

def mrxs(path, pixels=PIXELS[:256, :256], missing=(), tile=64):
    "A 3DHISTECH slide: an empty file, and in the folder beside it an index and tiles in PNG, of which some were not scanned"
    folder, n, data, pages = path.with_suffix(''), len(pixels)//tile, b'', []
    for z in 0, 1:
        small, page = Image.fromarray(pixels).reduce(2**z), []
        for row in range(0, n, 2**z):
            for col in range(0, n, 2**z):
                if (col, row) in missing: continue
                png, x, y = io.BytesIO(), col//2**z*tile, row//2**z*tile
                small.crop((x, y, x + tile, y + tile)).save(png, 'PNG')
                page += [row*n + col, len(data), len(png.getvalue()), 0]; data += png.getvalue()
        pages.append(page)
    head, index, where = b'01.02' + b'x'*8, b'', []
    for page in pages:
        where.append(len(head) + 16 + len(index))
        index += struct.pack(f'<iiii{len(page)}i', 0, where[-1] + 8, len(page)//4, 0, *page)
    path.touch(); folder.mkdir()
    (folder/'Index.dat').write_bytes(head + struct.pack('<iiii', len(head) + 8, 0, *where) + index)
    (folder/'Data.dat').write_bytes(data)
    levels = ''.join(f'[L{z}]\nIMAGE_CONCAT_FACTOR={z}\nOVERLAP_X=0\nOVERLAP_Y=0\nMICROMETER_PER_PIXEL_X={.5*2**z}\nMICROMETER_PER_PIXEL_Y={.5*2**z}\n'
                     f'IMAGE_FILL_COLOR_BGR=0\nIMAGE_FORMAT=PNG\nDIGITIZER_WIDTH={tile}\nDIGITIZER_HEIGHT={tile}\n' for z in (0, 1))
    (folder/'Slidedat.ini').write_text(f'[GENERAL]\nSLIDE_VERSION=01.02\nSLIDE_ID=xxxxxxxx\nIMAGENUMBER_X={n}\nIMAGENUMBER_Y={n}\nOBJECTIVE_MAGNIFICATION=20\n[HIERARCHICAL]\nHIER_COUNT=1\nNONHIER_COUNT=0\n'
        'INDEXFILE=Index.dat\nHIER_0_NAME=Slide zoom level\nHIER_0_COUNT=2\nHIER_0_VAL_0_SECTION=L0\nHIER_0_VAL_1_SECTION=L1\n[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data.dat\n' + levels)

def ycbcr(path): svs(path, np.asarray(Image.fromarray(PIXELS).convert('YCbCr')), compression=33003, compressionargs=dict(level=0, mct=False))

SCANNED = {'deflate.svs': (svs, 0), 'jpeg.svs': (lambda p: svs(p, compression='jpeg', compressionargs=dict(level=95)), 6), 'rgb.svs': (lambda p: svs(p, compression=33005), 0),
           'ycbcr.svs': (ycbcr, 2), 'he.ndpi': (ndpi, 6), 'he.vms': (vms, 6), 'he.mrxs': (mrxs, 0)}   # and by how much a grey value differs on average, at most

@pytest.mark.parametrize('name', SCANNED)
def test_patches_of_scanners_formats_are_those_of_the_pixels(tmp_path, name):
    write, most = SCANNED[name]
    write(tmp_path/name)
    kind, (w, h), (patches, padded) = opened(tmp_path/name)
    expected, n = cut_patches(Image.fromarray(PIXELS[:h, :w]), CENTRES, 64)
    assert kind is SlideImage and (w, h) == {'he.ndpi': (320, 256), 'he.vms': (320, 256), 'he.mrxs': (256, 256)}.get(name, (350, 270)) and padded == n
    assert np.abs(patches.numpy().astype(int) - expected.numpy()).mean() <= most
    with open_image(tmp_path/name) as im: small = small_copy(im, 80).astype(int)
    assert np.abs(small - np.asarray(Image.fromarray(PIXELS[:h, :w]).resize(small.shape[1::-1], Image.Resampling.BOX))).mean() < 12     # and not the label, nor the whole glass
    assert image_mpp(tmp_path/name) == .5

def test_a_thumbnail_is_of_a_small_level(tmp_path):
    svs(tmp_path/'he.svs')
    with open_image(tmp_path/'he.svs') as im:
        assert [l.size for l in im.smaller] == [(175, 135), (88, 68)]
        im.crop = None                                                        # the full resolution is not touched
        assert small_copy(im, 80).shape == (62, 80, 3)

def test_what_was_not_scanned_is_white(tmp_path):
    mrxs(tmp_path/'he.mrxs', missing=[(1, 0), (2, 3)])
    with open_image(tmp_path/'he.mrxs') as im: out = np.asarray(im.crop((-10, 0, 256, 256)))
    expected = PIXELS[:256, :256].copy()
    expected[:64, 64:128] = expected[192:, 128:192] = 255
    assert (out[:, 10:] == expected).all() and (out[:, :10] == 255).all()
    tiles = [b'' if i % 3 else zlib.compress(bytes(64*64*3)) for i in range(30)]
    tifffile.imwrite(tmp_path/'he.svs', iter(tiles), shape=(270, 350, 3), dtype='u1', photometric='rgb', tile=(64, 64), compression='deflate', metadata=None, software=False, description='Aperio Image Library v11.2.1\r\n|AppMag = 20')
    with open_image(tmp_path/'he.svs') as im: out = np.asarray(im.crop((0, 0, 256, 64)))
    assert (out[:, :64] == 0).all() and (out[:, 64:192] == 255).all() and (out[:, 192:] == 0).all() and image_mpp(tmp_path/'he.svs') is None

def test_patches_of_two_slides_with_equal_files_are_kept_apart(tmp_path):
    "A .mrxs is often the same empty file: what differs is in its folder"
    for name,pixels in ('a.mrxs', PIXELS[:256, :256]), ('b.mrxs', 255 - PIXELS[:256, :256]): mrxs(tmp_path/name, pixels)
    a, b = (extract_patches(section_of(tmp_path/f'{n}.mrxs'), 64, CENTRES, tmp_path/'cache') for n in 'ab')
    assert len(list((tmp_path/'cache').iterdir())) == 2 and (a[0] != b[0]).any()

def test_a_slide_without_its_folder(tmp_path):
    mrxs(tmp_path/'he.mrxs')
    (tmp_path/'he'/'Index.dat').unlink()
    refused('he.mrxs: the image is damaged or incomplete.*Index.dat', tmp_path/'he.mrxs')
    (tmp_path/'he').rename(tmp_path/'elsewhere')
    refused('the folder he, which is not beside it', tmp_path/'he.mrxs')

def test_a_tile_for_which_there_is_no_memory(tmp_path):
    "OpenSlide would end the process"
    svs(tmp_path/'he.svs', factors=())
    with tifffile.TiffFile(tmp_path/'he.svs', mode='r+') as f:
        for tag in 322, 323: f.pages[0].tags[tag].overwrite(2**18, dtype='I')
    refused('262144 x 262144 = .* would have to be decoded at once', tmp_path/'he.svs')

@pytest.mark.parametrize('name', ['jpeg.svs', 'ycbcr.svs', 'he.ndpi'])
def test_damaged_slides_of_scanners(tmp_path, name):
    "In a process of their own, which is still there at the end"
    SCANNED[name][0](tmp_path/name)
    _, _ = measured("""
import warnings
from pathlib import Path
import numpy as np
from histogene_nb.files import InputError
from histogene_nb.images import decoding, open_image
from histogene_nb.sections import small_copy
warnings.simplefilter('ignore')
path = Path(path)
good, rng, seen = path.read_bytes(), np.random.default_rng(0), {}
header = int.from_bytes(good[4:8], 'little')                                 # the tags of the first image
for i in range(150):
    data, at = bytearray(good), rng.integers(0, len(good), 4) if i % 2 else header + rng.integers(0, 250, 3)
    for a in at[at < len(good)]: data[a] = rng.integers(256)
    path.write_bytes(data[:rng.integers(8, len(good))] if i % 5 == 0 else data)
    try:
        with open_image(path) as im, decoding(path): small_copy(im, 50), im.crop((0, 0, 300, 260))
        result = 'read'
    except InputError as e: result = 'refused'; assert path.name in str(e)
    seen[result] = seen.get(result, 0) + 1
assert min(seen.get(r, 0) for r in ('read', 'refused')) > 5, seen""", path=str(tmp_path/name))

@pytest.mark.filterwarnings('ignore:Truncated File Read')
def test_a_slide_cut_short(tmp_path):
    "In the image it is refused; in what comes after it, the image is read all the same"
    svs(tmp_path/'he.svs', compression='jpeg')
    good, whole = (tmp_path/'he.svs').read_bytes(), extract_patches(section_of(tmp_path/'he.svs'), 64, CENTRES)
    with tifffile.TiffFile(tmp_path/'he.svs') as f: end = f.pages[1].offset
    for n in 100, end//2, end - 500:
        (tmp_path/'he.svs').write_bytes(good[:n])
        with pytest.raises(InputError, match='he.svs'): extract_patches(section_of(tmp_path/'he.svs'), 64, CENTRES)
    (tmp_path/'he.svs').write_bytes(good[:-300])
    assert (extract_patches(section_of(tmp_path/'he.svs'), 64, CENTRES) == whole).all()

@pytest.mark.parametrize('options,mpp', [(dict(resolution=(2e4, 2e4), resolutionunit='CENTIMETER'), .5), (dict(resolution=(300, 300), resolutionunit='INCH'), None), (dict(resolution=(0, 0), resolutionunit='CENTIMETER'), None),
    (dict(ome=True, metadata=dict(PhysicalSizeX=.25)), .25), (dict(ome=True, metadata=dict(PhysicalSizeX=250, PhysicalSizeXUnit='nm')), .25), (dict(ome=True, metadata=dict(PhysicalSizeX=1, PhysicalSizeXUnit='pixel')), None),
    (dict(ome=True), None), (dict(ome=True, metadata=dict(PhysicalSizeX=-1)), None)], ids=str)
def test_micrometres_of_a_pixel(tmp_path, options, mpp):
    tifffile.imwrite(tmp_path/'he.tif', PIXELS, photometric='rgb', tile=(64, 64), **options)
    assert image_mpp(tmp_path/'he.tif') == mpp

def test_micrometres_of_a_spot(tmp_path):
    from histogene_nb.commands import histogene_predict
    from histogene_nb.model import HisToGene
    from histogene_nb.interface import save_pretrained
    rng = np.random.default_rng(0)
    pixels = np.full((1000, 1200, 3), 244, np.uint8)
    pixels[300:700, 300:900] = rng.integers(0, 255, (400, 600, 3))
    svs(tmp_path/'he.svs', pixels); svs(tmp_path/'mute.svs', pixels, about='')
    net = HisToGene(n_genes=3, dim=16, depth=1, heads=2)
    net.about = dict(genes=['a', 'b', 'c'], normalization='paper', grid=[[.4, 0.], [0., .4], [0., 0.]])
    net.eval()
    a, b = predict_image(net, tmp_path/'he.svs', 110), predict_image(net, tmp_path/'he.svs', spot_um=55)
    assert len(a) > 10 and (a.X == b.X).all() and (a.obsm['spatial'] == b.obsm['spatial']).all()
    with pytest.raises(InputError, match='mute.svs.*--spot-diameter'): predict_image(net, tmp_path/'mute.svs', spot_um=55)
    for wrong in {}, dict(spot_um=55, spot_diameter=110):
        with pytest.raises(InputError, match='Give either'): predict_image(net, tmp_path/'he.svs', **wrong)
    for um in -1, 0, np.nan:
        with pytest.raises(InputError, match='above 0'): predict_image(net, tmp_path/'he.svs', spot_um=um)
    save_pretrained(net, tmp_path/'model')
    out = io.StringIO()
    with redirect_stdout(out): histogene_predict(tmp_path/'model', image=tmp_path/'he.svs', spot_um=55, out=tmp_path/'p.h5ad')
    assert '1 spot = 110 pixels = 55 micrometres' in out.getvalue() and (tmp_path/'p.h5ad').is_file()

def test_a_sparse_matrix_that_points_outside_itself(tmp_path):
    section = AnnData(sparse.csr_matrix(np.eye(4, dtype=np.float32)))
    check_counts(section)
    section.X.indices[2] = 9
    with pytest.raises(InputError, match='sparse matrix is damaged'): check_counts(section)

@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is measured as Linux counts it')
def test_an_aperio_slide_of_40_000_pixels(tmp_path):
    "Mask and patches"
    slide, size, tile = tmp_path/'slide.svs', 40_000, 256
    noise = np.random.default_rng(0).integers(90, 230, (tile, tile, 3), np.uint8)
    glass, tissue = (imagecodecs.jpeg8_encode(a, level=75, colorspace='RGB', outcolorspace='RGB') for a in (np.full_like(noise, 244), noise))
    with tifffile.TiffWriter(slide, bigtiff=True) as f:
        for k in 1, 4, 16:
            side = size//k
            tiles = (tissue if .3 < x/side < .7 and .4 < y/side < .8 else glass for y in range(0, side, tile) for x in range(0, side, tile))
            f.write(tiles, shape=(side, side, 3), dtype='u1', tile=(tile, tile), photometric='rgb', compression='jpeg', metadata=None, software=False,
                    description=f'Aperio Image Library v11.2.1\r\n{size}x{size} JPEG/RGB Q=75|AppMag = 20|MPP = 0.5')
    (text,), memory = measured("""
from histogene_nb.images import open_image
from histogene_nb.sections import small_copy
from histogene_nb.patches import cut_patches, dense_grid, tissue_mask
with open_image(slide) as im:
    thumbnail = small_copy(im)
    mask = tissue_mask(thumbnail)
    centres, _ = dense_grid(mask, thumbnail.shape[1]/im.width, 400, 1)
    patches, _ = cut_patches(im, centres[::4], 112, 400)
print(type(im).__name__, im.size, f'{mask.mean():.2f}', len(centres))""", slide=str(slide))
    kind, share, n = re.fullmatch(r'(\w+) \(40000, 40000\) (\S+) (\d+)', text).groups()
    assert kind == 'SlideImage' and .14 < float(share) < .2 and int(n) > 1500 and memory < 1.5

def rough(h, w): return np.random.default_rng(0).normal(150, 40, (h, w, 3)).clip(0, 255).astype(np.uint8)

@pytest.mark.parametrize('glass', [215, 240])
def test_fields_that_were_not_scanned_are_not_tissue(glass):
    "Pure white there, grey glass around the tissue: the step between them is no tissue, nor is the glass"
    slide = np.full((400, 600, 3), 255, np.uint8)
    slide[60:340, 80:520] = (glass + np.random.default_rng(1).normal(0, 1, (280, 440, 3))).astype(np.uint8)
    slide[120:280, 160:440] = rough(160, 280)
    mask = tissue_mask(slide)
    assert mask[140:260, 180:420].all() and not mask[:100].any() and not mask[300:].any() and not mask[:, :130].any() and not mask[:, 470:].any()

@pytest.mark.parametrize('around', [254, 255, 'tissue'])
def test_white_beside_what_is_no_grey_glass_changes_nothing(around):
    "Glass that is nearly white itself, or tissue up to the edge of what was scanned: the picture is looked at as it is"
    from histogene_nb.patches import _scanned
    slide = np.full((400, 600, 3), 255, np.uint8)
    slide[60:340, 80:520] = rough(280, 440) if around == 'tissue' else around
    slide[120:280, 160:440] = rough(160, 280)
    assert _scanned(slide) is slide

def test_what_libraries_print_of_a_damaged_tiff(tmp_path, capfd):
    "Pillow's libtiff prints from C, beside what is said by the package"
    Image.fromarray(PIXELS).save(tmp_path/'a.tif', compression='tiff_lzw')
    with tifffile.TiffFile(tmp_path/'a.tif', mode='r+') as f: f.pages[0].tags[284].overwrite(7)
    capfd.readouterr()
    with pytest.raises(InputError), open_image(tmp_path/'a.tif') as im, decoding(tmp_path/'a.tif'): small_copy(im)
    assert capfd.readouterr().err == ''

def test_what_pillow_warns_of_a_damaged_tiff(tmp_path):
    "A tag that claims more than the file holds: where the image can be read, not a word"
    Image.fromarray(PIXELS).save(tmp_path/'a.tif', description='about it')
    data = bytearray((tmp_path/'a.tif').read_bytes())
    at = data.index(struct.pack('<HH', 270, 2))
    data[at+4:at+8] = struct.pack('<I', 10**9)
    (tmp_path/'a.tif').write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with open_image(tmp_path/'a.tif') as im, decoding(tmp_path/'a.tif'): assert (np.asarray(im) == PIXELS).all()
