"Bad input beyond reading and downloading sections: one clear error each, what was there before untouched"
import errno, gzip, json, os, shutil, signal, subprocess, sys, tempfile
from pathlib import Path
import anndata as ad, numpy as np, pytest, torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import forks
from conftest import wait_for
from histogene_nb.commands import histogene_predict, histogene_train
from histogene_nb.folds import write_h5ad
from histogene_nb.cscc import read_cscc
from histogene_nb.report import html_report
from histogene_nb.expression import common_genes, normalize, read_panel, select_panel, variable_genes
from histogene_nb.model import HisToGene
from histogene_nb.interface import from_pretrained, save_pretrained, predict, run_model
from histogene_nb.patches import extract_patches
from histogene_nb.readers import read_section
from histogene_nb.position import grid_positions
from histogene_nb.files import InputError
from histogene_nb.her2st import read_her2st
from histogene_nb.sections import add_hires, section_name
from histogene_nb.superres import predict_image, predict_superres, recover_spots
from histogene_nb.texture import TextureModel
from histogene_nb.tissue import synthetic_section
from histogene_nb.training import fit, training_example

TINY = dict(dim=16, depth=1, heads=2)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Two sections as AnnData and .h5ad, a panel, a trained model in memory and in a folder"
    folder = tmp_path_factory.mktemp('made')
    sections = [synthetic_section(folder, n, px=1200) for n in ('X1', 'Y1')]
    for s in sections: write_h5ad(s, folder/f'{section_name(s)}.h5ad')
    panel = select_panel(sections, n_top=40, min_spots=20)
    model, _ = HisToGene.train_on(sections, panel, epochs=1, lr=1e-3, **TINY)
    save_pretrained(model, folder/'model')
    return dict(folder=folder, sections=sections, panel=panel, model=model)

@pytest.fixture
def section(made): return made['sections'][0].copy()

@pytest.fixture
def model(made): return made['model']

@pytest.fixture
def panel(made): return made['panel']

@pytest.fixture
def saved(made, tmp_path): return Path(shutil.copytree(made['folder']/'model', tmp_path/'model'))

@pytest.fixture
def other_model(made):
    "Of the same shape as `model`, for other genes"
    genes = [g for g in made['sections'][0].var_names if g not in made['panel']][:len(made['panel'])]
    return HisToGene.train_on(made['sections'], genes, epochs=1, lr=1e-3, seed=1, **TINY)[0]

def refused(match, f, *args, **kwargs):
    with pytest.raises(InputError, match=match) as e: f(*args, **kwargs)
    return str(e.value)

def with_image(section, path):
    info = section.uns['spatial'][section_name(section)]
    info['metadata']['source_image_path'], info['images'] = str(path), {}
    return section

def picture(section): return Path(section.uns['spatial'][section_name(section)]['metadata']['source_image_path'])

def state(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

# --- the files of a section

COUNTS, SPOTS = '\tA\tB\n1x1\t2\t3\n2x1\t0\t4\n', 'x\ty\tpixel_x\tpixel_y\n1\t1\t10\t10\n2\t1\t30\t10\n'

def her2st_files(root, counts, spots):
    for path,content in ((f'ST-cnts/T1.tsv{counts[1]}', counts[0]), ('ST-spotfiles/T1_selection.tsv', spots[0])):
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        (root/path).write_bytes(content)
    return lambda **kw: read_her2st(root, 'T1', verbose=False, **kw)

def cscc_files(root, counts, spots):
    (root/f'GSM4284316_P2_ST_rep1_stdata.tsv{counts[1]}').write_bytes(counts[0])
    (root/f'GSM4284316_spot_data-selection-P2_ST_rep1.tsv{spots[1]}').write_bytes(spots[0])
    return lambda **kw: read_cscc(root, 'P2_ST_rep1', verbose=False, **kw)

def packed(text): return gzip.compress(text.encode(), mtime=0)

BAD_COUNTS = [('', 'first line'), ('\n', 'first line'), ('x\n1\n', 'first line'), ('\tA\tB\n', 'it holds no spots'), (COUNTS.replace('\t', ','), 'first line'),
    (COUNTS.replace('2\t3', 'two\t3'), "gene A is 'two', which is not a number"), (COUNTS.replace('2\t3', '-2\t3'), 'gene A at spot 1x1 is negative'), (COUNTS.replace('2\t3', '\t3'), 'not a number'),
    (COUNTS.replace('2\t3', '9'*60 + '\t3'), 'is infinite'), (COUNTS + '1x1\t1\t1\n', 'spot 1x1 occurs twice'), (COUNTS.replace('1x1', 'nanxnan'), 'no grid position'), (COUNTS.replace('1x1', '1e300x1'), 'no grid position'),
    (COUNTS.replace('1x1', '9'*30 + 'x1'), 'no grid position'), (COUNTS.encode('utf-16'), 'not a number|first line'), (bytes(60), 'first line')]
BAD_SPOTS = [('', 'not a tab-separated table'), ('\n', 'not a tab-separated table'), ('x\n1\n', 'has no y'), (SPOTS[:SPOTS.index('\n') + 1], 'no spot of it is in'), (SPOTS.replace('\t', ','), 'has no x'),
    (SPOTS.replace('\n1\t', '\none\t'), 'no grid position'), (SPOTS.replace('\n1\t', '\n1e300\t'), 'no grid position'), (SPOTS + '9e99\t1\t5\t5\n', 'no grid position'),
    (SPOTS + '1\t1\t10\t10\n', 'spot 1x1 occurs twice'), (SPOTS.replace('10\t10', 'left\t10'), 'no pixel position'), (SPOTS.encode('utf-16'), 'not a tab-separated table'), (b'\xff'*60, 'not a tab-separated table')]
BAD_GZIP = [(b'hello', 'cannot be unpacked'), (packed(COUNTS)[:5], 'cannot be unpacked'), (packed(COUNTS)[:-9], 'cannot be unpacked'), (packed(COUNTS) + b'more', 'cannot be unpacked'),
    (packed(COUNTS)[:10] + b'\xff'*50, 'cannot be unpacked')]

def as_bytes(content): return content if isinstance(content, bytes) else content.encode()

DAMAGED = [(files, what, *c) for what,cases in {'counts': BAD_COUNTS, 'spots': BAD_SPOTS, 'counts.gz': BAD_GZIP, 'spots.gz': BAD_GZIP}.items()
           for files in (her2st_files, cscc_files)[what == 'spots.gz':] for c in cases]             # the HER2+ layout has no packed spot files

@pytest.mark.parametrize('files,what,content,match', DAMAGED)
def test_damaged_files_of_a_section(tmp_path, files, what, content, match):
    what, _, gz = what.partition('.')
    given = {'counts': (COUNTS.encode(), ''), 'spots': (SPOTS.encode(), ''), what: (as_bytes(content), gz and '.gz')}
    refused(match, files(tmp_path, **given))

@pytest.mark.parametrize('files', [her2st_files, cscc_files])
def test_folder_for_a_file_and_impossible_spots(tmp_path, files):
    read = files(tmp_path, (COUNTS.encode(), ''), (SPOTS.encode(), ''))
    assert read().shape == (2, 2)
    for diameter in (0, -1, float('nan'), float('inf')): refused('spot diameter is a number of pixels above 0', read, spot_diameter=diameter)
    spots = next(p for p in tmp_path.rglob('*selection*'))
    spots.unlink(); spots.mkdir()
    assert spots.name in refused('cannot be unpacked', read)

# --- images

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('format,options', [('jpeg', {}), ('png', {}), ('tiff', {}), ('tiff', dict(compression='tiff_lzw')), ('bmp', {})])
def test_truncated_image(section, model, tmp_path, format, options):
    path, cache = tmp_path/f'cut.{format}', tmp_path/'cache'
    with Image.open(picture(section)) as im: im.save(path, format, **options)
    path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    section = with_image(section, path)
    for f in (lambda: extract_patches(section, cache=cache), lambda: predict(model, section), lambda: predict_superres(model, section),
              lambda: predict_image(model, path, 112)):
        message = refused('damaged or incomplete|cannot be read as an image', f)
        assert path.name in message and 'again' in message
    assert not cache.exists()

def test_image_that_vanished(section, model, tmp_path):
    path = tmp_path/'he.jpg'
    shutil.copy(picture(section), path)
    section = with_image(section, path)
    extract_patches(section, cache=tmp_path/'cache')
    path.unlink()
    for f in (lambda: extract_patches(section, cache=tmp_path/'cache'), lambda: predict(model, section)):
        assert 'he.jpg' in refused('of section X1 is not there any more. Put it back', f)
    assert 'he.jpg' in refused('there is no such image', predict_image, model, path, 112)

def test_image_of_another_size(section, tmp_path):
    with Image.open(picture(section)) as im: im.resize((600, 600)).save(tmp_path/'small.jpg')
    message = refused('600 x 600 pixels, but section X1 was made with one of 1200 x 1200', extract_patches, with_image(section, tmp_path/'small.jpg'))
    assert 'small.jpg' in message and 'Put that image back' in message

@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', 'CMYK', '1'])
def test_image_modes(section, tmp_path, mode):
    with Image.open(picture(section)) as im: im.convert(mode).save(tmp_path/'he.tif')
    with Image.open(tmp_path/'he.tif') as im: as_rgb = np.asarray(im.convert('RGB'))
    x,y = np.floor(section.obsm['spatial'][3]).astype(int) - 56
    patches = extract_patches(with_image(section, tmp_path/'he.tif'))
    assert patches.shape[1:] == (3, 112, 112) and (patches[3].permute(1, 2, 0).numpy() == as_rgb[y:y+112, x:x+112]).all()

@pytest.mark.parametrize('mode,options', [('RGBA', {}), ('LA', {}), ('P', dict(transparency=0)), ('RGB', dict(transparency=(0, 0, 0)))])
def test_transparent_pixels_are_white(section, tmp_path, mode, options):
    with Image.open(picture(section)) as im: rgb = im.convert('RGB')
    x,y = np.floor(section.obsm['spatial'][3]).astype(int)
    rgb.paste((0, 0, 0), (x-56, y-56, x, y+56))
    image = rgb.convert('L').convert('P') if mode == 'P' else rgb.convert(mode)
    if mode[-1] == 'A': image.putalpha(rgb.convert('L').point(lambda v: 255*(v > 0)))
    image.save(tmp_path/'he.png', **options)
    section = with_image(section, tmp_path/'he.png')
    assert (extract_patches(section)[3][:, :, :56] == 255).all() and (extract_patches(section)[3][:, :, 56:] < 255).any()
    scale = add_hires(section).uns['spatial']['X1']['scalefactors']['tissue_hires_scalef']
    assert (section.uns['spatial']['X1']['images']['hires'][int(y*scale), int((x - 28)*scale)] == 255).all()

def test_image_without_tissue(model, tmp_path):
    Image.new('RGB', (900, 900), 'white').save(tmp_path/'glass.png')
    assert 'glass.png' in refused('no tissue', predict_image, model, tmp_path/'glass.png', 112)

@pytest.mark.parametrize('diameter,match', [(0, 'above 0'), (-3, 'above 0'), (float('nan'), 'above 0'), (1e6, '1200 x 1200 pixels, less than one spot')])
def test_spot_diameter_of_an_image(section, model, diameter, match): refused(match, predict_image, model, picture(section), diameter)

@pytest.mark.parametrize('diameter', [0., .3, -2., float('nan'), float('inf')])
def test_spot_diameter_of_a_section(section, diameter):
    section.uns['spatial']['X1']['scalefactors']['spot_diameter_fullres'] = diameter
    refused(f'X1: the spot diameter is {diameter:g} pixels', extract_patches, section)

@pytest.mark.parametrize('diameter', [1, 1.4, 2])
def test_spots_of_a_pixel_or_two(section, diameter):
    section.uns['spatial']['X1']['scalefactors']['spot_diameter_fullres'] = diameter
    side = round(diameter)
    x,y = np.floor(section.obsm['spatial'][3]).astype(int) - side//2
    with Image.open(picture(section)) as im: window = im.convert('RGB').crop((x, y, x + side, y + side))
    assert (extract_patches(section)[3].permute(1, 2, 0).numpy() == np.asarray(window.resize((112, 112), Image.Resampling.BICUBIC))).all()

def test_spot_too_small_for_a_grid(model, section): refused('at least one pixel', predict_image, model, picture(section), .3)

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_centres_that_are_not_finite(section, tmp_path, value):
    n, section.obsm['spatial'][[2, 4], 1] = len(section), value
    refused(f'X1: 2 of {n} patch centres are not finite, the first is number 2', extract_patches, section, cache=tmp_path/'cache')
    assert not (tmp_path/'cache').exists()

@pytest.mark.parametrize('centres,match', [(np.zeros((3, 3)), r'shape \(3, 3\)'), ([5, 5], r'shape \(2,\)'), (5, r'shape \(\)'), (np.zeros(0), r'shape \(0,\)'), ([['a', 'b']], 'not numbers'), ([[1, 2], [3]], 'not numbers')])
def test_centres_of_another_shape(section, centres, match): refused(f'X1: the patch centres .*{match}', extract_patches, section, centres=centres)

@pytest.mark.parametrize('size', [0, -1, .5, 56., float('nan'), float('inf')])
def test_size_of_patches(section, size): refused(f'X1: size is a whole number of pixels from 1, not {size}', extract_patches, section, size)

# --- genes

def test_no_gene_in_common(made, section, model):
    foreign = section.copy()
    foreign.var_names = [f'ENSG{i:011}' for i in range(section.n_vars)]
    refused("X1: none of the panel's .* genes is in this section. Do both use gene symbols", normalize, foreign, made['panel'])
    refused('No gene is common to the 2 sections', common_genes, [section, foreign])
    refused('No gene is common to the 2 sections', select_panel, [section, foreign])
    refused("X1: none of the panel's", HisToGene.train_on, [foreign], made['panel'], **TINY)

def test_no_gene_in_common_with_the_model(made, section, saved, tmp_path):
    section.var_names = [f'ENSG{i:011}' for i in range(section.n_vars)]
    file, out = write_h5ad(section, tmp_path/'foreign.h5ad'), tmp_path/'p.h5ad'
    assert 'foreign.h5ad' in refused(f"none of the model's {len(made['panel'])} genes", histogene_predict, str(saved), str(file), out=str(out))
    assert not out.exists() and not out.with_suffix('.json').exists()

def test_panel_gene_missing(made, section, panel):
    less = section[:, [g for g in section.var_names if g != panel[4]]].copy()
    message = refused(f'X1: gene {panel[4]} of the panel is not in this section', normalize, less, panel)
    assert 'common_genes' in message
    refused(f'X1: gene {panel[4]} of the panel', HisToGene.train_on, [made['sections'][1], less], panel, **TINY)

def test_no_counts_in_a_spot(section, panel):
    X = section.X.toarray(); X[3] = 0
    section.X = X
    try: out = normalize(section, panel)
    except InputError as e: assert section.obs_names[3] in str(e)
    else: assert np.isfinite(out.X).all()

@pytest.mark.parametrize('n_top', [0, -1, 2.5, float('nan')])
def test_number_of_variable_genes(section, n_top):
    for f in (variable_genes, lambda s,n: select_panel([s], n, 5)): refused(f'n_top. must be a whole number, 1 or more, not {n_top}', f, section, n_top)

@pytest.mark.parametrize('min_spots', [-1, float('nan')])
def test_number_of_spots_of_a_gene(section, min_spots): refused(f'min_spots. must be a number, 0 or more, not {min_spots}', select_panel, [section], 40, min_spots)

def test_section_without_a_count(made, section):
    section.X = section.X*0
    refused('X1: there is no count above 0', variable_genes, section, 40)
    refused('X1: there is no count above 0', select_panel, [made['sections'][1], section], 40, 5)

def test_choosing_genes_leaves_torch_its_threads(made):
    "In a process of its own: numba sets OpenMP's number of threads when it first computes"
    code = ('import sys, torch; from histogene_nb.readers import read_section; from histogene_nb.expression import variable_genes\n'
            'section, before = read_section(sys.argv[1]), torch.get_num_threads()\n'
            'variable_genes(section, 40); print(before, torch.get_num_threads())')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '2', 'NUMBA_THREADING_LAYER': 'omp'}
    assert subprocess.run([sys.executable, '-c', code, made['folder']/'X1.h5ad'], env=env, capture_output=True, text=True, check=True).stdout.split()[-2:] == ['1', '1']

@pytest.mark.parametrize('text,match', [(None, 'no such panel file'), ('', 'no gene in this file'), ('gene\n', 'no gene'), ('\n \n', 'no gene'),
                                        ('gene\nA\nB\nA\n', 'gene A is listed twice'), (b'\xff\xfe\x00\x01', 'not a text file')])
def test_bad_panel_file(tmp_path, text, match):
    path = tmp_path/'panel.csv'
    if text is not None: path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert 'panel.csv' in refused(match, read_panel, path)

@pytest.mark.parametrize('text', ['gene\nA\nB\n', 'A\nB\n', '\ufeffGene\r\nA\r\nB\r\n', ',gene\n0,A\n1,B\n', 'rank,gene,p\n1,A,.5\n2,B,.6\n', '"gene"\n"A"\n"B"\n'])
def test_panel_files(tmp_path, text):
    (tmp_path/'panel.csv').write_bytes(text.encode())
    assert read_panel(tmp_path/'panel.csv') == ['A', 'B']

def test_no_sections(panel):
    for f in (lambda: select_panel([]), lambda: common_genes([])): refused('There is no section', f)

# --- positions

def test_position_beyond_n_pos(made, section, saved):
    far = section.copy()
    far.obs['array_col'] += 60
    message = refused(r'X1: position \(x=6\d, y=\d\) is beyond .* 64 positions', predict, made['model'], far)
    assert 'larger n_pos' in message
    for sections,n_pos in (([far], 64), ([section], 2)):
        refused(f'X1: position .* beyond .* {n_pos} positions, 0 to {n_pos-1}', HisToGene.train_on, sections, made['panel'], epochs=1, n_pos=n_pos, **TINY)
    assert HisToGene.suited([far])['n_pos'] > 64 == HisToGene.suited([section])['n_pos']
    refused('X1: position .* beyond', predict_superres, made['model'], far)
    refused('X1: position .* beyond', grid_positions, far, 64)

def test_negative_position(section):
    section.obs['array_row'] -= 3
    refused(r'X1: position \(x=\d, y=-3\) is beyond', grid_positions, section)

@pytest.mark.parametrize('factor', [0, 2, 3, -4, 2.25])
def test_superres_factor(section, model, factor): refused('is a square', predict_superres, model, section, factor)

def test_spots_of_another_section(made, model):
    x, y = (s.copy() for s in made['sections'])
    y.obsm['spatial'] = y.obsm['spatial'] + 5000
    refused(f'Y1: spot {y.obs_names[0]} lies outside the super-resolved tissue', recover_spots, predict_superres(model, x), y)

# --- a saved model

def damage(file, f): file.write_bytes(f(file.read_bytes()))

@pytest.mark.parametrize('f', [lambda b: b'', lambda b: b[:5], lambda b: b[:100], lambda b: b[:len(b)//2], lambda b: b[:-1], lambda b: b + b'xx',
                               lambda b: os.urandom(len(b)), lambda b: b'\0'*len(b)],
                         ids=['empty', 'five bytes', 'in the header', 'half', 'one byte short', 'two bytes long', 'random', 'zeros'])
def test_corrupt_weights(saved, f):
    damage(saved/'model.safetensors', f)
    assert str(saved) in refused('this saved model is damaged.*Copy it again, or train it again', from_pretrained, saved)

def test_pickle_is_not_read(saved, model):
    torch.save(model.state_dict(), saved/'model.safetensors')
    refused('damaged', from_pretrained, saved)

def test_model_of_an_earlier_version(saved_texture):
    config = json.loads((saved_texture/'config.json').read_text())
    (saved_texture/'config.json').write_text(json.dumps({**config, 'views': 4}))
    refused("made by an earlier version.*'views'.*Train it again", from_pretrained, saved_texture)

@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '3', '"dim"', '{}', b'\xff\xfe', b'\0'*40])
def test_corrupt_config(saved, text):
    (saved/'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(saved) in refused('this saved model is damaged', from_pretrained, saved)

@pytest.mark.parametrize('change,match', [
    (dict(colour='blue'), "damaged.*'colour'"), (dict(dim=32), r'weights blocks.0.attention.out.bias have shape \(16,\), this model needs \(32,\)'),
    (dict(depth=2), 'weights blocks.1.* are missing'), (dict(n_pos=32), r'weights x_embed.weight have shape \(64, 16\)'), (dict(patch_size=56), 'weights patch_embed'),
    (dict(n_genes=3), 'damaged.*genes for 3 outputs'), (dict(heads=3), 'damaged.*multiple of heads'), (dict(heads=0), 'damaged'), (dict(depth=0), 'damaged'),
    (dict(dim=-16), 'damaged'), (dict(dim='16'), 'damaged'), (dict(dim=10**10), 'damaged'), (dict(dropout=7), 'damaged.*dropout'), (dict(pixels='blue'), 'damaged.*pixels'),
    (dict(depth=None), 'damaged'), (dict(about=None), 'damaged')])
def test_config_that_does_not_fit(saved, change, match):
    config = json.loads((saved/'config.json').read_text())
    (saved/'config.json').write_text(json.dumps({**config, **change}))
    assert str(saved) in refused(match, from_pretrained, saved)

@pytest.mark.parametrize('genes', [[], ['A'], 'A'])
def test_config_with_other_genes(saved, genes):
    config = json.loads((saved/'config.json').read_text())
    config['about']['genes'] = genes
    (saved/'config.json').write_text(json.dumps(config))
    refused('damaged.*genes for', from_pretrained, saved)

def test_model_of_another_shape(saved, panel):
    save_pretrained(HisToGene(n_genes=len(panel), dim=32, depth=1, heads=2), saved/'wide')
    shutil.copy(saved/'wide/model.safetensors', saved/'model.safetensors')
    message = refused('weights .* have shape .* of a model of another size', from_pretrained, saved)
    assert str(saved) in message

@pytest.fixture(scope='module')
def texture_folder(made, tmp_path_factory):
    "A small texture model"
    model, _ = TextureModel.train_on(made['sections'], made['panel'], rank=2, alpha=1., steps=20, windows=(1., 2.), size=32, members=1, dim=16, depth=1, heads=2)
    return save_pretrained(model, tmp_path_factory.mktemp('texture'))

@pytest.fixture
def saved_texture(texture_folder, tmp_path): return Path(shutil.copytree(texture_folder, tmp_path/'texture'))

@pytest.mark.parametrize('f', [lambda b: b'', lambda b: b[:len(b)//2], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]], ids=['empty', 'half', 'one bit'])
def test_corrupt_weights_of_a_texture_model(saved_texture, f):
    damage(saved_texture/'model.safetensors', f)
    assert str(saved_texture) in refused('this saved model is damaged.*Copy it again, or train it again', from_pretrained, saved_texture)

@pytest.mark.parametrize('change,match', [
    (dict(kind='forest'), "damaged.*no kind of model 'forest'"), (dict(kind='HisToGene'), 'damaged'), (dict(kind=None), 'damaged'), (dict(kind=['texture']), 'damaged'),
    (dict(rank=4), 'weights basis have shape .*, this model needs'), (dict(windows=[1.]), 'weights centre have shape'), (dict(windows=[]), 'damaged.*windows'), (dict(windows=[-1., 2.]), 'damaged.*windows'),
    (dict(members=2), 'weights members.1.* are missing'), (dict(members=0), 'weights members.0.* belong to no part'), (dict(members=-1), 'damaged.*members'), (dict(array=[3, 3]), 'weights dead_share have shape'),
    (dict(array=[0, 3]), 'damaged.*array'), (dict(dim='16'), 'damaged'), (dict(heads=3), 'damaged'), (dict(n_genes=3), 'damaged.*genes for 3 outputs'), (dict(colour='blue'), "damaged.*'colour'")])
def test_config_that_does_not_fit_a_texture_model(saved_texture, change, match):
    config = json.loads((saved_texture/'config.json').read_text())
    (saved_texture/'config.json').write_text(json.dumps({**config, **change}))
    assert str(saved_texture) in refused(match, from_pretrained, saved_texture)

def test_weights_of_another_kind(saved, saved_texture):
    for a,b in ((saved, saved_texture), (saved_texture, saved)):
        weights = shutil.copy(b/'model.safetensors', b/'own')
        shutil.copy(a/'model.safetensors', b/'model.safetensors')
        refused('weights .* (are missing|belong to no part)', from_pretrained, b)
        shutil.copy(weights, b/'model.safetensors')

@pytest.mark.parametrize('options,match', [(dict(steps=19), 'steps is 20 or more'), (dict(lr=0), 'lr above 0'), (dict(members=-1), 'members 0 or more'), (dict(windows=()), 'windows above 0'), (dict(windows=(0., 1.)), 'windows above 0'),
                                           (dict(rank=0), 'rank'), (dict(rank=-2), 'rank'), (dict(alpha=0.), 'alpha'), (dict(alpha=-1.), 'alpha'), (dict(alpha=np.nan), 'alpha'), (dict(size=0), 'size')])
def test_impossible_texture_training(made, options, match):
    refused(match, TextureModel.train_on, made['sections'], made['panel'], **{**dict(steps=20, windows=(1.,), size=32, members=1, rank=2, alpha=1.), **options})

@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_file_of_the_model_missing(saved, name):
    (saved/name).unlink()
    assert name in refused('there is no such file.*Give the folder that histogene_train wrote', from_pretrained, saved)

def test_model_that_does_not_know_its_genes(section):
    refused('does not know its genes', predict, HisToGene(n_genes=3, **TINY), section)

@pytest.mark.parametrize('options', [dict(heads=3), dict(heads=0), dict(depth=0), dict(dim=0), dict(dropout=2), dict(dropout=-1), dict(pixels='x'), dict(n_genes=0), dict(n_pos=0)])
def test_impossible_models(options): refused(next(iter(options)), HisToGene, **{**dict(n_genes=5), **TINY, **options})

def test_patches_and_positions_of_other_shapes(model):
    patches, positions = torch.zeros(4, 3, 112, 112, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.long)
    for p,q,match in ((patches[:3], positions, 'positions'), (patches[..., :100], positions, 'positions.*Cut them with size=112'), (patches, positions[:, :1], 'positions'), (patches, positions + 64, 'positions.*larger n_pos'), (patches, positions - 1, 'positions')):
        with pytest.raises(InputError, match=match): run_model(model, (p, q))

# --- training

def examples(made): return [training_example(s, made['panel']) for s in made['sections']]

def fresh(made, **options):
    torch.manual_seed(0)
    return HisToGene(n_genes=len(made['panel']), **{**TINY, **options})

def trained(made, file, epochs=2): fit(fresh(made), examples(made), epochs=epochs, lr=1e-3, checkpoint=file, progress=False)

def without(file, part):
    with safe_open(file, 'pt') as f: metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys() if part not in k}
    save_file(tensors, file, metadata)

@pytest.mark.parametrize('f', [lambda p: p.write_bytes(b''), lambda p: damage(p, lambda b: b[:-9]), lambda p: damage(p, lambda b: os.urandom(len(b))),
                               lambda p: save_file(load_file(p), p), lambda p: without(p, 'adam.head'), lambda p: without(p, 'model.head')],
                         ids=['empty', 'truncated', 'random', 'no state', 'no Adam', 'no weights'])
def test_corrupt_training_checkpoint(made, tmp_path, f):
    file = tmp_path/'training.safetensors'
    trained(made, file)
    f(file)
    before = file.read_bytes()
    message = refused('this checkpoint is damaged', fit, fresh(made), examples(made), epochs=3, lr=1e-3, checkpoint=file, progress=False)
    assert 'training.safetensors' in message and 'Delete it' in message and file.read_bytes() == before

def test_training_checkpoint_of_another_run(made, tmp_path):
    file = tmp_path/'training.safetensors'
    trained(made, file)
    before, data = file.read_bytes(), examples(made)
    run = dict(model=fresh(made), examples=data, epochs=3, lr=1e-3, checkpoint=file, progress=False)
    for other in (dict(lr=1e-4), dict(seed=1), dict(augment=True), dict(examples=data[:1]), dict(examples=data[::-1]), dict(model=fresh(made, dim=32))):
        message = refused('of a run with other data or settings', fit, **{**run, **other})
        assert 'training.safetensors' in message and file.read_bytes() == before
    refused('has already done 2 epochs, more than the 1', fit, **{**run, 'epochs': 1})

def test_targets_that_are_not_finite(made):
    data = examples(made)
    for bad in (float('nan'), float('inf')):
        targets = data[1][2].clone(); targets[3, 4] = bad
        model = fresh(made)
        before = model.head[1].weight.clone()
        refused('targets of section 2 of 2 .* not finite', fit, model, [data[0], (*data[1][:2], targets)], epochs=1, progress=False)
        assert torch.equal(model.head[1].weight, before)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_patches_that_are_not_finite(made, tmp_path, value):
    (patches, positions, targets), file = examples(made)[0], tmp_path/'training.safetensors'
    patches = patches.float(); patches[2, 1, 5, 5] = value
    refused('the loss is not finite in epoch 1', fit, fresh(made), [(patches, positions, targets)], epochs=1, checkpoint=file, every=0, progress=False)
    assert not file.exists()

def test_training_that_diverges(made, tmp_path):
    file = tmp_path/'training.safetensors'
    message = refused('the loss is not finite', fit, fresh(made), examples(made), epochs=30, lr=1e30, checkpoint=file, every=0, progress=False)
    assert 'smaller learning rate' in message
    if file.exists():
        with safe_open(file, 'pt') as f: assert np.isfinite(json.loads(f.metadata()['state'])['losses']).all()

@pytest.mark.parametrize('options', [dict(epochs=0), dict(epochs=-1), dict(every=-1), dict(every=float('nan')), dict(lr=0), dict(lr=-1.), dict(lr=float('nan')), dict(lr=float('inf')), dict(epochs=float('nan')), dict(epochs=float('inf'))])
def test_impossible_training(made, options): refused('epochs is 1 or more, every 0 or more', fit, fresh(made), examples(made), progress=False, **options)

@pytest.mark.parametrize('device', ['gpu', 'cuda', 'cuda:99', 'mps'])
def test_device_that_is_not_there(made, section, device):
    if device == 'cuda' and torch.cuda.is_available() or device == 'mps' and torch.backends.mps.is_available(): pytest.skip(f'there is {device} here')
    refused(f"There is no device '{device}'", predict, made['model'], section, device)

def test_section_given_twice(made):
    x, y = made['sections']
    refused('Section X1 is among the training sections 2 times', HisToGene.train_on, [x, y, x.copy()], made['panel'], epochs=1, **TINY)

def test_seeds_of_any_size(made):
    def losses(seed): return HisToGene.train_on(made['sections'], made['panel'], epochs=2, lr=1e-3, seed=seed, device='cpu', **TINY)[1]
    seeds = [0, 1, -1, 10**15, 10**15 + 1, 10**30]
    found = [losses(s) for s in seeds]
    assert len({tuple(f) for f in found}) == len(seeds) and losses(10**15) == found[3]

def test_nothing_to_train_on(made): refused('There is no section to train on', fit, fresh(made), [])

def test_no_section_a_step(made): refused('batch, the sections a step, is 1 or more', fit, fresh(made), examples(made), batch=0, progress=False)

def train(folder, out, checkpoint, epochs):
    sections = [read_section(str(folder/f'{n}.h5ad')) for n in ('X1', 'Y1')]
    genes = list(sections[0].var_names[:30])
    torch.set_num_threads(1)
    model, losses = HisToGene.train_on(sections, genes, epochs=epochs, lr=1e-3, device='cpu', checkpoint=checkpoint, every=0, **TINY)
    save_pretrained(model, out)
    print(losses)

def test_killed_training_goes_on_as_if_it_had_not_been(made, tmp_path):
    def finished(out, *args):
        done = forks.run(train, made['folder'], tmp_path/out, *args)
        assert done.returncode == 0, done.err
        return done.out
    file = tmp_path/'training.safetensors'
    process = forks.context.Process(target=train, args=(made['folder'], tmp_path/'never', file, 100_000))
    process.start()
    try:
        wait_for(lambda: file.exists() or not process.is_alive())
    finally: process.kill(); process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path/'never').exists()
    with safe_open(file, 'pt') as f: done = len(json.loads(f.metadata()['state'])['losses'])
    resumed, whole = finished('resumed', file, done + 2), finished('whole', None, done + 2)
    assert resumed == whole != ''
    a, b = (load_file(tmp_path/o/'model.safetensors') for o in ('resumed', 'whole'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- a section in a file

def change(path, f):
    def g(a): return a.uns['spatial']['X1'][path] if path else a
    return lambda a: f(g(a))

def set_count(value):
    def f(a):
        X = a.X.toarray(); X[3, 5] = value
        a.X = X
    return f

@pytest.mark.parametrize('f,match', [
    (lambda a: a.obsm.pop('spatial'), r"obsm\['spatial'\] is missing"),
    (lambda a: a.uns['spatial'].update(X2={'a': 1}), 'has 2'),
    (set_count(-5), 'gene KRT19 at spot 0x1 is negative'), (set_count(.5), 'gene KRT19 at spot 0x1 is fractional'), (set_count(np.nan), 'gene KRT19 at spot 0x1 is not a number'),
    (change('scalefactors', lambda s: s.pop('spot_diameter_fullres')), 'spot_diameter_fullres'), (change('scalefactors', lambda s: s.update(spot_diameter_fullres=0.)), 'spot diameter of 0'),
    (change('scalefactors', lambda s: s.update(spot_diameter_fullres=np.nan)), 'spot diameter of nan'), (change('metadata', lambda m: m.update(source_image_path='gone.jpg')), 'gone.jpg: there is no such image'),
    (lambda a: a.obsm['spatial'].__setitem__(2, [50_000, 5]), 'spot 2x0 at pixel .* is outside the image'),
    (lambda a: a.obs.__setitem__('array_col', [f'c{i}' for i in range(len(a))]), "array_col.*other than whole numbers"), (lambda a: a.obs.__setitem__('array_col', np.nan), 'array_col'),
    (lambda a: a.obs.__setitem__('array_col', 0), 'array position 0x0 occurs twice'),
    (lambda a: setattr(a, 'obs_names', ['s', 's', *a.obs_names[2:]]), 'spot s occurs twice')])
@pytest.mark.filterwarnings('ignore')
def test_h5ad_that_is_no_section(section, tmp_path, f, match):
    section.obs_names = [f'{x}x{y}' for x,y in zip(section.obs.array_col, section.obs.array_row)]
    assert section.var_names[5] == 'KRT19' and list(section.obs_names[2:4]) == ['2x0', '0x1']
    f(section)
    section.write_h5ad(tmp_path/'odd.h5ad')
    assert 'odd.h5ad' in refused(match, read_section, tmp_path/'odd.h5ad')

@pytest.mark.parametrize('f', [lambda a: setattr(a, 'X', a.X.toarray()), lambda a: setattr(a, 'X', a.X.astype(int)), lambda a: setattr(a, 'X', a.X.tocsc()), lambda a: a.uns.pop('histogene'),
                               lambda a: a.uns['spatial']['X1'].pop('images'), lambda a: a.uns['spatial']['X1']['metadata'].pop('image_width')],
                         ids=['dense', 'integers', 'csc', 'no uns histogene', 'no images', 'no image width'])
def test_h5ad_of_other_programs(section, model, panel, tmp_path, f):
    expected = predict(model, section).X, normalize(section, panel).X
    f(section)
    section.write_h5ad(tmp_path/'other.h5ad')
    again = read_section(tmp_path/'other.h5ad')
    assert (predict(model, again).X == expected[0]).all() and np.allclose(normalize(again, panel).X, expected[1], atol=1e-6)
    assert len(predict_superres(model, again))

@pytest.mark.parametrize('content', [None, b'', b'hello', 'half'])
def test_h5ad_that_cannot_be_read(made, tmp_path, content):
    path = tmp_path/'bad.h5ad'
    if content == 'half': content = (made['folder']/'X1.h5ad').read_bytes()[:50_000]
    if content is not None: path.write_bytes(content)
    assert 'bad.h5ad' in refused('there is no such file|cannot be read', read_section, path)

def test_section_without_counts(section, saved, tmp_path):
    file, out = write_h5ad(section[:, :0].copy(), tmp_path/'bare.h5ad'), tmp_path/'p.h5ad'
    histogene_predict(str(saved), str(file), out=str(out))
    assert ad.read_h5ad(out).n_obs == len(section) and json.loads(out.with_suffix('.json').read_text())['results'] == {}

def test_prediction_does_not_overwrite_its_section(made, saved, tmp_path):
    file = Path(shutil.copy(made['folder']/'X1.h5ad', tmp_path))
    before = file.read_bytes()
    assert 'X1.h5ad' in refused('this is the section itself', histogene_predict, str(saved), str(file), out=str(file))
    assert file.read_bytes() == before

@pytest.mark.parametrize('name', ['a b', 'é-1.2', '.x', "it's", '100%'])
def test_odd_names(section, model, tmp_path, name):
    path = tmp_path/f'{name}.jpg'
    shutil.copy(picture(section), path)
    out = write_h5ad(predict_image(model, path, 112), tmp_path/f'{name}.h5ad')
    assert section_name(ad.read_h5ad(out)) == path.stem

# --- a full disk

@pytest.fixture
def full_disk(tmp_path):
    "A file system of its own with little room: `fill(n)` leaves n bytes"
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('no right to mount a small file system here')
    def fill(left):
        (disk/'filler').unlink(missing_ok=True)
        free = os.statvfs(disk).f_bavail*os.statvfs(disk).f_frsize
        with open(disk/'filler', 'wb') as f: f.write(b'\0'*(free - left))
    yield disk, fill
    subprocess.run(['umount', '-l', disk], check=True)

def savers(made, other_model):
    "What writes where, once with something small and once with what is to be refused"
    x, y = made['sections']
    return {'model': lambda f, first: save_pretrained(made['model'] if first else other_model, f),
            'checkpoint': lambda f, first: fit(fresh(made), examples(made), epochs=1 if first else 2, lr=1e-3, checkpoint=f/'training.safetensors', progress=False),
            'h5ad': lambda f, first: write_h5ad(x if first else y, f/'s.h5ad'),
            'cache': lambda f, first: extract_patches(x if first else y, 56 if first else 112, cache=f),
            'report': lambda f, first: html_report(f/'report.html', 'title', texts={'a': 'b'*(10 if first else 200_000)}),
            'tissue': lambda f, first: synthetic_section(f, 'X1' , seed=0 if first else 1, px=1200)}

WHAT = ['model', 'checkpoint', 'h5ad', 'cache', 'report', 'tissue']

@pytest.mark.filterwarnings('ignore')                                       # h5py warns of each object that it could not write
@pytest.mark.parametrize('left', [0, 16_384])
@pytest.mark.parametrize('what', WHAT)
def test_full_disk(made, other_model, full_disk, what, left):
    disk, fill = full_disk
    save = savers(made, other_model)[what]
    save(disk/'out', True)
    before = state(disk/'out')
    fill(left)
    message = refused(str(disk/'out'), save, disk/'out', False)
    assert 'free some space' in message.lower() and ('No space left' in message or 'requested and' in message)     # NumPy: '... requested and 256 written'
    assert before and state(disk/'out') == before
    (disk/'filler').unlink()
    save(disk/'out', False)
    assert state(disk/'out') != before

@pytest.mark.parametrize('what', WHAT)
def test_disk_that_fails_at_the_last_step(made, other_model, tmp_path, monkeypatch, what):
    save = savers(made, other_model)[what]
    save(tmp_path/'out', True)
    before = state(tmp_path/'out')
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        refused('No space left', save, tmp_path/'out', False)
    assert state(tmp_path/'out') == before

def test_model_is_still_itself_after_a_failed_save(made, other_model, saved, monkeypatch):
    "Weights and description are of one model, whichever file could not be written"
    replace = os.replace
    def full(source, target):
        if Path(target).name == 'model.safetensors': raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)
    before = state(saved)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        refused('model.safetensors.*No space left', save_pretrained, other_model, saved)
    assert state(saved) == before and from_pretrained(saved).about['genes'] == made['panel']

def saved_within_a_limit(folder, out):
    import resource
    section, model = read_section(folder/'X1.h5ad'), from_pretrained(folder/'model')
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    for save in (lambda: save_pretrained(model, out), lambda: write_h5ad(section, out/'s.h5ad')):
        try: save()
        except InputError as e: print('refused', e)

def test_limit_on_the_size_of_files(made, tmp_path):
    "What a quota does: the write itself fails, in another process"
    pytest.importorskip('resource')
    out = tmp_path/'out'
    r = forks.run(saved_within_a_limit, made['folder'], out)
    assert r.out.count('refused') == 2 and f'{out/"model.safetensors"}: cannot' in r.out and f'{out/"s.h5ad"}: cannot' in r.out, r.out
    assert not [p for p in out.rglob('*') if p.is_file()]

@pytest.mark.parametrize('what', ['model', 'h5ad', 'report'])
def test_folder_that_cannot_be_written(made, other_model, what):
    "Root may write anywhere, so root is somebody else meanwhile"
    save, root = savers(made, other_model)[what], os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/'out'
        save(out, True)
        before = state(out)
        Path(folder).chmod(0o755); out.chmod(0o555)
        try:
            if root: os.seteuid(65534)
            refused('cannot', save, out, False)
        finally:
            if root: os.seteuid(0)
            out.chmod(0o700)
        assert state(out) == before

def test_out_is_a_file(made, tmp_path):
    (tmp_path/'out').write_text('mine')
    files = [str(made['folder']/'X1.h5ad')]
    refused('this folder cannot be made', histogene_train, files, out=str(tmp_path/'out'), min_spots=5, epochs=1)
    refused('this folder cannot be made', histogene_train, files, out=str(tmp_path/'out/model'), min_spots=5, epochs=1)
    assert (tmp_path/'out').read_text() == 'mine'
