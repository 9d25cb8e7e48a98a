"Bad input, downloads and the facts of the real sections: `histogene_nb.sections`, `histogene_nb.her2st`"
import errno, gzip, os, shutil, subprocess, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
import forks
from conftest import WANTS
from histogene_nb import her2st
from histogene_nb.files import InputError, data_folder, whole_file
from histogene_nb.her2st import *
from histogene_nb.images import *
from histogene_nb.sections import *

GENES = ['ERBB2', 'KRT19', 'COL1A1', 'CD3E', 'GAPDH']
COUNTS, SPOTS, LABELS = 'ST-cnts/T1.tsv.gz', 'ST-spotfiles/T1_selection.tsv', 'ST-pat/lbl/T1_labeled_coordinates.tsv'
IMAGE = 'ST-imgs/T/T1/he.jpg'

def toy_args(folder):
    rng = np.random.default_rng(0)
    y,x = (a.ravel() + 5 for a in np.mgrid[:3, :4])
    image = folder/'he.jpg'
    Image.fromarray(rng.integers(0, 255, (130, 180, 3), np.uint8)).save(image)
    return dict(counts=rng.poisson(8, (12, 5)), genes=GENES, spots=[f'{i}x{j}' for i,j in zip(x, y)], array_col=x, array_row=y,
                spatial=np.stack([x - 4.5, y - 4.5], 1)*40.1, name='T1', patient='T', image_path=image, spot_diameter=20.,
                source='toy', annotation=np.where(x < 7, 'invasive cancer', 'connective tissue'))

@pytest.fixture
def args(tmp_path): return toy_args(tmp_path)

@pytest.fixture
def toy(args): return new_section(**args)

@pytest.fixture
def root(toy, tmp_path): return write_her2st(toy, tmp_path/'her2st')

def edit(root, path, f):
    p = root/path
    text = gzip.decompress(p.read_bytes()).decode() if p.suffix == '.gz' else p.read_text()
    p.write_bytes(gzip.compress(f(text).encode()) if p.suffix == '.gz' else f(text).encode())

def refused(match, f, *args, **kwargs):
    with pytest.raises(InputError, match=match) as e: f(*args, **kwargs)
    return str(e.value)

def lines(f): return lambda text: '\n'.join(f(text.splitlines())) + '\n'

# --- building a section

def test_round_trip(toy, root):
    back = read_her2st(root, 'T1', spot_diameter=20)
    assert back.to_df().equals(toy.to_df()) and back.obs.equals(toy.obs)
    assert (back.obsm['spatial'] == toy.obsm['spatial']).all() and back.X.dtype == np.float32
    assert Path(back.uns['spatial']['T1']['metadata']['source_image_path']).name == 'he.jpg'

def test_h5ad(toy, tmp_path):
    import anndata as ad
    add_hires(toy, 90).write_h5ad(tmp_path/'t.h5ad')
    again = ad.read_h5ad(tmp_path/'t.h5ad')
    assert section_name(again) == 'T1' and again.uns['spatial']['T1']['images']['hires'].shape == (65, 90, 3)

@pytest.mark.parametrize('value,word', [(-1, 'negative'), (1.5, 'fractional'), (np.nan, 'not a number'), (np.inf, 'infinite')])
def test_counts_name_spot_and_gene(args, value, word):
    counts = args['counts'].astype(float)
    counts[4, 2] = value
    refused(f'T1: the count of gene COL1A1 at spot 5x6 is {word}', new_section, **args | dict(counts=counts))

def test_dense_counts_checked(toy):
    toy.X = toy.X.toarray()
    check_counts(toy)
    toy.X[11, 4] = -3
    refused('gene GAPDH at spot 8x7 is negative', check_counts, toy)

@pytest.mark.parametrize('where', [(-1, 5), (5, -1), (180, 5), (5, 130), (1e6, 1e6)])
def test_spot_outside_image(args, where):
    args['spatial'][6] = where
    refused('spot 7x6 at pixel .* outside the image he.jpg of 180 x 130', new_section, **args)

def test_spot_without_pixel_position(args):
    args['spatial'][6,1] = np.nan
    refused('spot 7x6 has no pixel position', new_section, **args)

@pytest.mark.parametrize('key,value,match', [
    ('spots', ['5x5']*2 + ['z%d' % i for i in range(10)], 'spot 5x5 occurs twice'),
    ('genes', ['A', 'B', 'B', 'C', 'D'], 'gene B occurs twice'),
    ('array_col', np.full(12, 5), 'array position 5x5 occurs twice'), ('genes', GENES[:4], '5 columns for 4 genes'),
    ('counts', np.zeros((11, 5)), 'counts has 11 rows for 12'), ('spatial', np.zeros((11, 2)), 'spatial has 11 rows for 12'),
    ('genes', [], '0 genes')])
def test_parts_that_do_not_fit(args, key, value, match): refused(match, new_section, **args | {key: value})

@pytest.mark.parametrize('content,match', [
    (None, 'there is no such image'), (b'', 'cannot be read as an image'), (b'not a jpeg', 'cannot be read')])
def test_bad_image(args, tmp_path, content, match):
    path = tmp_path/'bad.jpg'
    if content is not None: path.write_bytes(content)
    assert 'bad.jpg' in refused(match, new_section, **args | dict(image_path=path))

def test_truncated_jpeg(args, tmp_path):
    path = tmp_path/'cut.jpg'
    path.write_bytes(args['image_path'].read_bytes()[:2000])
    section = new_section(**args | dict(image_path=path))
    assert 'cut.jpg' in refused('damaged or incomplete', add_hires, section)
    assert section.uns['spatial']['T1']['images'] == {}

def test_image_needed_later(args): refused('has no image', add_hires, new_section(**args | dict(image_path=None)))

def test_large_image_is_opened_and_the_limit_put_back(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    Image.new('L', (100, 100)).save(tmp_path/'large.png')
    with open_image(tmp_path/'large.png') as im: assert im.size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 10 and not recwarn.list

def test_section_name(toy):
    toy.uns['spatial']['T2'] = {}
    refused("has 2: \\['T1', 'T2'\\]", section_name, toy)

def test_place(toy, args):
    "What is looked up is the section's own, also where another program left parts out; what is missing is named"
    at, info = place(toy), toy.uns['spatial']['T1']
    assert at == ('T1', 20., info['images'], info['scalefactors'], info['metadata'], str(args['image_path']))
    at.images['hires'] = np.zeros((2, 2, 3), np.uint8)
    assert info['images'] is at.images and place(new_section(**args | dict(image_path=None))).path is None
    toy.uns['spatial']['T1'] = dict(scalefactors=dict(spot_diameter_fullres=np.float32(7)))
    assert place(toy) == ('T1', 7., {}, {'spot_diameter_fullres': 7.}, {}, None) and place(toy).images is place(toy).images

@pytest.mark.parametrize('info,match', [
    ({}, 'spot_diameter_fullres.* is missing'), (dict(scalefactors=dict(spot_diameter_fullres='wide')), 'is wide; it is the width'),
    (dict(scalefactors=dict(spot_diameter_fullres=None)), 'is None'), ('text', "uns\\['spatial'\\]\\['T1'\\] does not hold images"), (dict(metadata=3), 'does not hold')])
def test_place_of_what_is_no_section(toy, info, match):
    toy.uns['spatial']['T1'] = info
    refused(match, place, toy)

# --- reading the layout

@pytest.mark.parametrize('path', [COUNTS, SPOTS])
def test_missing_file(root, path):
    (root/path).unlink()
    message = refused('there is no such file', read_her2st, root, 'T1')
    assert Path(path).name in message and 'download_her2st' in message

def test_missing_folder(tmp_path): refused('nowhere.*there is no such file', read_her2st, tmp_path/'nowhere', 'T1')

@pytest.mark.parametrize('name', ['*', '../T1', '', 'T1/..', '?1'])
def test_names_are_not_patterns(root, name): refused('cannot name a section', read_her2st, root, name)

@pytest.mark.parametrize('keep', [0, 5, 40, -1, -9])
def test_truncated_gz(root, keep):
    whole = (root/COUNTS).read_bytes()
    (root/COUNTS).write_bytes(whole[:keep])
    assert 'T1.tsv.gz' in refused('cannot be unpacked|first line', read_her2st, root, 'T1')

def test_damaged_gz(root):
    whole = bytearray((root/COUNTS).read_bytes())
    whole[len(whole)//2] ^= 255
    (root/COUNTS).write_bytes(whole)
    refused('T1.tsv.gz', read_her2st, root, 'T1')

def test_not_gz(root):
    (root/COUNTS).write_text('hello')
    refused('T1.tsv.gz: cannot be unpacked', read_her2st, root, 'T1')

@pytest.mark.parametrize('path,f,match', [
    (COUNTS, lines(lambda l: l[1:]), 'first line should be'), (COUNTS, lambda t: '', 'first line should be'),
    (COUNTS, lambda t: t.replace('\tKRT19', '\t'), 'first line should be'),
    (COUNTS, lambda t: t.replace('KRT19', 'ERBB2'), 'gene ERBB2 occurs twice'),
    (COUNTS, lines(lambda l: l[:1]), 'it holds no spots'),
    (COUNTS, lambda t: t[:-4], 'line 13, spot 8x7: 4 counts, but the header names 5'),
    (COUNTS, lambda t: t[:-4] + '\t1\t1\t1\n', 'spot 8x7: 7 counts'),
    (COUNTS, lambda t: t.replace('6x5\t', '6x5\t-'), 'gene ERBB2 at spot 6x5 is negative'),
    (COUNTS, lambda t: t.replace('6x5\t', '6x5\t0.'), 'gene ERBB2 at spot 6x5 is fractional'),
    (COUNTS, lambda t: t.replace('6x5\t', '6x5\tx'), "line 3, spot 6x5: the count of gene ERBB2 is 'x.*not a number"),
    (COUNTS, lambda t: t.replace('6x5\t', '6x5\tinf\t').replace('KRT19', 'KRT19\tMORE'), 'not a number|is infinite|counts, but'),
    (COUNTS, lambda t: t.replace('6x5', '5x5'), 'spot 5x5 occurs twice'),
    (COUNTS, lambda t: t.replace('6x5', '5.1x4.9'), 'spot 5x5 occurs twice'),
    (COUNTS, lambda t: t.replace('6x5', 'six'), "spot 'six' has no grid position"),
    (COUNTS, lambda t: t.replace('6x5', '6'), 'has no grid position'),
    (COUNTS, lambda t: t.replace('x', '0x'), 'no spot of it is in T1_selection.tsv'),
    (SPOTS, lambda t: t.replace('pixel_x', 'px'), 'has no pixel_x'), (SPOTS, lambda t: '', 'not a tab-separated table'),
    (SPOTS, lines(lambda l: l + l[-1:]), 'spot 8x7 occurs twice'),
    (SPOTS, lines(lambda l: l[:1] + [i + '\t1' for i in l[1:]]), 'more cells than the header'),
    (SPOTS, lines(lambda l: l[:-1] + [l[-1] + '\t1\t2']), 'not a tab-separated table'),
    (SPOTS, lambda t: t[:t.rindex('7\t8')], 'has no'),
    (SPOTS, lines(lambda l: [*l[:3], l[3].replace('7\t5\t7\t5\t', '7\t5\t7\t5\tleft'), *l[4:]]),
     'spot 7x5 has no pixel position'),
    (SPOTS, lambda t: t.replace('\n6\t5', '\nNA\t5'), 'has no grid position'),
    (LABELS, lambda t: t.replace('label', 'lab'), 'has no label'),
    (LABELS, lines(lambda l: l + l[-1:]), 'label 8x7 occurs twice')])
def test_damaged_tables(root, path, f, match):
    edit(root, path, f)
    refused(match, read_her2st, root, 'T1')

def test_numbers_written_otherwise(root, toy):
    def decimal(line):
        spot,*cells = line.split('\t')
        return '\t'.join([spot] + [f'{c}.0' for c in cells])
    edit(root, COUNTS, lines(lambda l: l[:1] + [decimal(i) for i in l[1:]]))
    assert read_her2st(root, 'T1').to_df().equals(toy.to_df())

def test_windows_line_ends(root, toy):
    for p in (COUNTS, SPOTS, LABELS): edit(root, p, lambda t: t.replace('\n', '\r\n'))
    assert read_her2st(root, 'T1').to_df().equals(toy.to_df())

def test_unzipped_counts(root, toy):
    (root/'ST-cnts/T1.tsv').write_bytes(gzip.decompress((root/COUNTS).read_bytes()))
    (root/COUNTS).unlink()
    assert read_her2st(root, 'T1').to_df().equals(toy.to_df())

def test_bytes_parser_agrees_with_pandas(tmp_path):
    rng = np.random.default_rng(1)
    counts = rng.poisson(10.**rng.uniform(-2, 6, 400), (50, 400))
    table = pd.DataFrame(counts, [f'{i}x1' for i in range(50)], [f'g{i}' for i in range(400)])
    table.to_csv(tmp_path/'c.tsv', sep='\t')
    ids, genes, X = her2st._read_counts(tmp_path/'c.tsv')
    assert ids == list(table.index) and genes == list(table.columns) and (X.toarray() == table.to_numpy()).all()

def test_join_counts_what_it_drops(root, capsys):
    edit(root, COUNTS, lines(lambda l: l[:-1]))                                  # 8x7 has no counts
    edit(root, SPOTS, lines(lambda l: l[:1] + l[2:]))                            # 5x5 has no position
    edit(root, LABELS, lines(lambda l: l[:-1] + ['n\tNA\tNA\tNA\tNA\tinvasive cancer']))
    section = read_her2st(root, 'T1')
    h = section.uns['histogene']
    assert section.n_obs == 10 and '5x5' not in section.obs_names and '8x7' not in section.obs_names
    kinds = 'counts_without_spot', 'spots_without_counts', 'labels_without_spot', 'labels_without_position'
    assert [h[k] for k in kinds] == [1, 1, 1, 1]
    assert capsys.readouterr().out.strip() == join_report(section)
    read_her2st(root, 'T1', verbose=False)
    assert not capsys.readouterr().out

def test_empty_spot_is_kept_and_reported(root, capsys):
    edit(root, COUNTS, lines(lambda l: [*l[:3], '7x5' + '\t0'*5, *l[4:]]))
    section = read_her2st(root, 'T1')
    assert section.n_obs == 12 and section.uns['histogene']['empty_spots'] == 1 and section['7x5'].X.sum() == 0
    assert '1 without a single count, kept' in capsys.readouterr().out

def test_ids_that_round(root, toy):
    edit(root, COUNTS, lambda t: t.replace('5x5', '4.967x5.021'))
    section = read_her2st(root, 'T1')
    assert section.to_df().equals(toy.to_df()) and section.uns['histogene']['ids_rounded'] == 1

def test_join_is_by_position_not_by_line(root, toy):
    edit(root, SPOTS, lines(lambda l: l[:1] + l[:0:-1]))
    edit(root, LABELS, lines(lambda l: l[:1] + l[:0:-1]))
    section = read_her2st(root, 'T1')
    assert (section.obsm['spatial'] == toy.obsm['spatial']).all() and section.obs.equals(toy.obs)

def test_ambiguous_image(root):
    shutil.copy(root/IMAGE, root/'ST-imgs/T/T1/he2.jpg')
    refused("2 files could be the image of T1: \\['he.jpg', 'he2.jpg'\\]", read_her2st, root, 'T1')

def test_absent_image(root):
    shutil.rmtree(root/'ST-imgs')
    section = read_her2st(root, 'T1')
    assert 'source_image_path' not in section.uns['spatial']['T1']['metadata']
    refused('has no image', add_hires, section)

def test_write_needs_whole_counts_and_the_patient(toy, tmp_path):
    toy.X = toy.X * .5
    refused('fractional', write_her2st, toy, tmp_path/'w')
    toy.uns['histogene']['patient'] = 'Q'
    refused("its patient, which is 'Q'", write_her2st, toy, tmp_path/'w')
    assert not (tmp_path/'w').exists()

def test_whole_file_keeps_what_was_there(tmp_path):
    f = tmp_path/'f'
    f.write_text('before')
    def full_disk():
        with whole_file(f) as part:
            part.write_text('half')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    refused('f: cannot be written .No space left on device', full_disk)
    with pytest.raises(KeyboardInterrupt):
        with whole_file(f) as part:
            part.write_text('half')
            raise KeyboardInterrupt
    assert f.read_text() == 'before' and list(tmp_path.iterdir()) == [f]

KILLED = """import os, signal, sys, time
from histogene_nb.files import whole_file
with whole_file(sys.argv[1]) as part:
    part.write_text('half')
    part.with_name(part.name + '.gz').write_text('packed')
    print(part.name, flush=True)
    time.sleep(600)
"""

def test_whole_file_clears_what_a_killed_process_left(tmp_path):
    def start(name):
        process = subprocess.Popen([sys.executable, '-c', KILLED, tmp_path/name], stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().strip()
    running = [start(n) for n in ('f', 'f', 'g')]
    try:
        (dead, left), (alive, writes), (other, elsewhere) = running
        for p in dead, other: p.kill(); p.wait()
        foreign = tmp_path/left.replace(f'.{dead.pid}.', f'.another-computer.{dead.pid}.')
        foreign.write_text('half')
        with whole_file(tmp_path/'f') as part: part.write_text('whole')
        found = {p.name for p in tmp_path.iterdir()}
        assert found == {'f', writes, f'{writes}.gz', elsewhere, f'{elsewhere}.gz', foreign.name}
    finally:
        for p,_ in running: p.kill(); p.wait(); p.stdout.close()
    with whole_file(tmp_path/'f') as part: part.write_text('whole')
    assert {p.name for p in tmp_path.iterdir()} == {'f', elsewhere, f'{elsewhere}.gz', foreign.name}

# --- catalogue and splits

def test_catalogue():
    cat = her2st_catalogue()
    assert len(cat) == 36 and ''.join(cat.patient.unique()) == 'ABCDEFGH'
    assert cat[['counts', 'spotfile', 'image']].notna().all(axis=None)
    assert list(cat.index[cat.labels.notna()]) == ['A1', 'B1', 'C1', 'D1', 'E1', 'F1', 'G2', 'H1']

def test_released_sections():
    names = released_sections()
    assert len(names) == 32 and names[0] == 'A2' and names[-1] == 'G3' and 'A1' not in names

def test_leave_one_out():
    cat = her2st_catalogue()
    for by,n in dict(section=36, patient=8).items():
        folds = leave_one_out(cat, by)
        assert len(folds) == n
        for held_out,train,test in folds: assert not set(train) & set(test) and sorted(train + test) == list(cat.index)
    for held_out,train,test in leave_one_out(cat, 'patient'):
        assert {t[0] for t in test} == {held_out} and held_out not in {t[0] for t in train}
    refused("'slide'", leave_one_out, cat, by='slide')

def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('HISTOGENE_DATA', str(tmp_path))
    assert data_folder() == tmp_path/'her2st'
    monkeypatch.delenv('HISTOGENE_DATA')
    assert data_folder().name == 'her2st' and 'histogene_nb' in str(data_folder())

# --- download

class Site(SimpleHTTPRequestHandler):
    "A web server whose `cut` files break off half-way, and whose `stall` files stop there and wait"
    def log_message(self, *args): pass
    def do_GET(self):
        self.server.asked.append(self.path)
        how = self.server.faults.get(self.path.removeprefix('/data/'))
        if how is None: return super().do_GET()
        if isinstance(how, int): return self.send_error(how)
        body = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body[:len(body)//2]); self.wfile.flush()
        if how == 'stall': self.server.stalled.set(); self.server.go.wait(60)
        self.close_connection = True

@pytest.fixture
def site(root, tmp_path):
    shutil.copytree(root, tmp_path/'site/data')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Site, directory=str(tmp_path/'site')))
    server.daemon_threads = True
    server.asked, server.faults, server.stalled, server.go = [], {}, threading.Event(), threading.Event()
    server.url, server.data = f'http://127.0.0.1:{server.server_port}/', tmp_path/'site/data'
    server.hashes = {p: git_blob_sha1(root/p) for p in (COUNTS, SPOTS, LABELS, IMAGE)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go.set(); server.shutdown(); server.server_close()

@pytest.fixture
def get(site, tmp_path):
    return partial(download_her2st, tmp_path/'got', base_url=site.url, hashes=site.hashes, retries=0, progress=False)

def there(root): return sorted(p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file())

def test_download(site, get, toy):
    root = get()
    assert there(root) == sorted(site.hashes) and read_her2st(root, 'T1').to_df().equals(toy.to_df())
    site.asked.clear(); get()
    assert site.asked == []

def test_download_without_images(site, get): assert there(get(images=False)) == sorted(set(site.hashes) - {IMAGE})

def test_download_unknown_section(get): refused("no section 'Z9'.*T1", get, ['Z9'])

def test_download_unknown_published_section(tmp_path): refused("no section 'J1'", download_her2st, tmp_path, ['B4', 'J1'])

@pytest.mark.parametrize('path', [COUNTS, SPOTS, IMAGE])
def test_download_cut_off_then_resumed(site, get, tmp_path, path):
    site.faults[path] = 'cut'
    assert path in refused('cannot be downloaded|not the published file', get)
    had = there(tmp_path/'got')
    assert path not in had and not [p for p in had if '.part' in p]
    site.faults.clear(); site.asked.clear()
    assert there(get()) == sorted(site.hashes)
    assert sorted(site.asked) == sorted(f'/data/{p}' for p in set(site.hashes) - set(had))

def test_download_tries_again(site, get):
    class Asked(list):
        def append(self, path):
            super().append(path)
            if self.count(f'/data/{SPOTS}') == 2: site.faults.clear()
    site.faults[SPOTS], site.asked = 'cut', Asked()
    assert there(get(retries=2)) == sorted(site.hashes)

def test_download_killed_and_restarted(site, get, tmp_path):
    site.faults[IMAGE] = 'stall'
    process = forks.context.Process(target=download_her2st, args=(str(tmp_path/'got'),), kwargs=dict(base_url=site.url, hashes=site.hashes, retries=0, progress=False))
    process.start()
    try: assert site.stalled.wait(60)
    finally: process.kill(); process.join()
    assert not (tmp_path/'got'/IMAGE).exists()
    site.faults.clear(); site.asked.clear()
    assert set(there(get())) >= set(site.hashes) and site.asked == [f'/data/{IMAGE}']
    assert read_her2st(tmp_path/'got', 'T1').uns['spatial']['T1']['metadata']['image_width'] == 180

def test_download_wrong_content(site, get, tmp_path):
    (site.data/SPOTS).write_text('something else')
    message = refused('not the published file', get)
    assert SPOTS in message and SPOTS not in there(tmp_path/'got') and COUNTS in there(tmp_path/'got')

def test_download_keeps_a_file_it_cannot_replace(site, get, tmp_path):
    root = get()
    (root/SPOTS).write_text('my own')
    site.faults[SPOTS] = 404
    refused('cannot be downloaded', get)
    assert (root/SPOTS).read_text() == 'my own'
    site.faults.clear(); get()
    assert git_blob_sha1(root/SPOTS) == site.hashes[SPOTS]

@pytest.mark.parametrize('status', [404, 403, 500, 503])
def test_download_http_error(site, get, tmp_path, status):
    site.faults[IMAGE] = status
    assert IMAGE in refused(f'cannot be downloaded .{status}', get)
    assert IMAGE not in there(tmp_path/'got')

def test_download_404_is_not_tried_again(site, get):
    site.faults[SPOTS] = 404
    refused('404', get, retries=3)
    assert site.asked.count(f'/data/{SPOTS}') == 1

def test_download_no_network(get): refused('cannot be downloaded', get, base_url='http://127.0.0.1:9/')

def test_download_full_disk(site, get, tmp_path, monkeypatch):
    get(images=False)
    def full(self, url, output, pooch):
        Path(output).write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr('pooch.HTTPDownloader.__call__', full)
    assert 'he.jpg' in refused('cannot be written .No space left', get)
    assert there(tmp_path/'got') == sorted(set(site.hashes) - {IMAGE})

def test_git_blob_sha1(tmp_path):
    (tmp_path/'empty').touch()
    assert git_blob_sha1(tmp_path/'empty') == 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'

# --- the real sections

@pytest.fixture(scope='module')
def real():
    if not os.environ.get('HISTOGENE_DATA'): pytest.skip(WANTS)
    return data_folder()

@pytest.fixture(scope='module')
def all_sections(real): return {n: read_her2st(real, n, verbose=False) for n in her2st_catalogue().index}

def test_real_hash_list(real):
    published = pd.read_csv(real/'SOURCES.tsv', sep='\t').set_index('path').git_blob_sha1
    published = published.rename(lambda p: p.removeprefix('data/'))
    ours = her2st._her2st_files()
    assert ours == {p: h for p,h in published.items() if p.startswith('ST-')}
    for p,h in ours.items():
        if (real/p).exists(): assert git_blob_sha1(real/p) == h

def test_real_spots(all_sections):
    n = {name: s.n_obs for name,s in all_sections.items()}
    assert sum(n.values()) == 13620 and sum(n[i] for i in released_sections()) == 11548
    assert (n['A1'], n['C1'], n['C6'], n['H1']) == (346, 176, 178, 613)

def test_real_join(all_sections):
    h = pd.DataFrame([s.uns['histogene'] for s in all_sections.values()]).set_index('section')
    assert h[['counts_without_spot', 'ids_rounded']].to_numpy().sum() == 0 and h.spots_without_counts.sum() == 33
    assert h.empty_spots[h.empty_spots > 0].to_dict() == {'D5': 1} and h.labels_without_spot.sum() == 6
    assert h.labels_without_position[h.labels_without_position > 0].to_dict() == {'F1': 1, 'G2': 8}
    for s in all_sections.values():
        if 'annotation' not in s.obs: continue
        assert s.obs.annotation.notna().all() and set(s.obs.annotation.cat.categories) <= set(LABEL_COLORS)

def test_real_genes(all_sections):
    def common(names): return set.intersection(*(set(all_sections[n].var_names) for n in names))
    assert len(common(released_sections())) == 12080 and len(common(all_sections)) == 11871

def test_real_parser(real, all_sections):
    table = pd.read_csv(real/'ST-cnts/B4.tsv.gz', sep='\t', index_col=0)
    assert all_sections['B4'].to_df().equals(table.loc[all_sections['B4'].obs_names].astype(np.float32))

def test_real_download_finds_everything_there(real):
    assert download_her2st(real, ['B4', 'C2'], base_url='http://127.0.0.1:9/', progress=False) == real

def test_real_thumbnail(real):
    section = add_hires(read_her2st(real, 'C3', verbose=False), 500)
    info = section.uns['spatial']['C3']
    assert max(info['images']['hires'].shape) == 500
    assert info['scalefactors']['tissue_hires_scalef'] == pytest.approx(500/info['metadata']['image_height'])
