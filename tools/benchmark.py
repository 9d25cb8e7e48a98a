"""Measure the package beside a straightforward version of the same step, on five real HER2+ sections.

    HISTOGENE_DATA=... python tools/benchmark.py             all steps, into histogene_nb/results/benchmark.json
    HISTOGENE_DATA=... python tools/benchmark.py load epoch  some of them, or parts such as superres_ours; the others' last results stay

The straightforward version does what is known of the released code: whole images as float32 in memory, a loop over spots,
attention as an N x N matrix, Adam without fusing. Each measurement is a process of its own, so that its peak memory is its own.
"""
import gzip, json, os, platform, subprocess, sys, tempfile, threading, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from histogene_nb.devices import fast_bfloat16
from histogene_nb.files import data_folder
from histogene_nb.her2st import read_her2st, released_sections
from histogene_nb.sections import new_section
from histogene_nb.expression import read_panel
from histogene_nb.model import HisToGene
from histogene_nb.position import fit_grid, pixel_positions
from histogene_nb.patches import cache_file, dense_grid, extract_patches
from histogene_nb.superres import predict_superres, section_mask
from histogene_nb.training import fit, one_pass, training_example
from histogene_nb.interface import run_model
import histogene_nb

SECTIONS = ['B4', 'C2', 'C3', 'C4', 'C5']
RESULT = Path(histogene_nb.__file__).parent/'results'/'benchmark.json'
cache = os.environ.get('BENCHMARK_CACHE')


# ---- the straightforward version

def plain_patches(image, centres):
    "Each spot's patch, cut in a loop"
    patches = torch.zeros(len(centres), 3*112*112)
    for i,(x,y) in enumerate(centres): patches[i] = image[x-56:x+56, y-56:y+56].flatten()
    return patches

def plain_section(root, name, panel):
    "A section as float32: the whole image, (x, y, 3), its spots' centres, positions and targets"
    counts = pd.read_csv(gzip.open(root/f'ST-cnts/{name}.tsv.gz'), sep='\t', index_col=0)
    spots = pd.read_csv(root/f'ST-spotfiles/{name}_selection.tsv', sep='\t')
    spots.index = [f'{round(x)}x{round(y)}' for x,y in zip(spots.x, spots.y)]
    joined = counts.join(spots, how='inner')
    Image.MAX_IMAGE_PIXELS = None
    image = torch.from_numpy(np.array(Image.open(next((root/f'ST-imgs/{name[0]}/{name}').glob('*.jpg')))).astype(np.float32)).permute(1, 0, 2)
    Y = joined[panel].to_numpy(dtype=np.float64)
    Y = np.log10(Y/np.maximum(Y.sum(1, keepdims=True), 1)*1e4 + 1)
    return image, joined[['pixel_x', 'pixel_y']].astype(int).to_numpy(), torch.tensor(joined[['x', 'y']].to_numpy().round().astype(int)), torch.tensor(Y, dtype=torch.float32)

class PlainLayer(nn.Module):
    "Attention as softmax of an N x N matrix, then an MLP"
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.qkv, self.out = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Linear(dim, 3*dim, bias=False), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2*dim), nn.GELU(), nn.Dropout(.1), nn.Linear(2*dim, dim), nn.Dropout(.1))
        self.dropout = nn.Dropout(.1)
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2)*q.shape[-1]**-.5, -1)
        x = x + self.dropout(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.mlp(self.norm2(x))

class Plain(nn.Module):
    def __init__(self, genes, dim=1024, depth=8, heads=16):
        super().__init__()
        self.patch, self.x, self.y, self.dropout = nn.Linear(3*112*112, dim), nn.Embedding(64, dim), nn.Embedding(64, dim), nn.Dropout(.1)
        self.layers = nn.Sequential(*(PlainLayer(dim, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, genes))
    def forward(self, patches, positions):
        return self.head(self.layers(self.dropout(self.patch(patches) + self.x(positions[..., 0]) + self.y(positions[..., 1]))))


# ---- the steps, each in a process of its own

def matmul_rate(n=4096, times=5, dtype=torch.float32):
    "GFLOP/s of a matrix product, the best of some"
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    def once():
        start = time.perf_counter(); a @ b
        return 2*n**3/(time.perf_counter() - start)/1e9
    return max(once() for _ in range(times))

def the_panel(): return read_panel(data_folder().parent/'reference'/'published_panel_785.csv')

def processor(): return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))

def status(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])/1e6      # GB

def memory():
    "Start to measure the peak from here; the memory (GB) in use at this point"
    Path('/proc/self/clear_refs').write_text('5')
    return status('VmRSS')

def peak(): return status('VmHWM')

def load(section):
    "Time and peak memory of loading the sections: of all there is in memory, of what came after the imports, and of the process's own, without pages of libraries and other files"
    panel, base, start = the_panel(), memory(), time.perf_counter()
    with watched() as most: loaded = [section(n, panel) for n in SECTIONS]
    return dict(seconds=time.perf_counter() - start, peak_GB=peak(), above_imports_GB=peak() - base, own_GB=most['RssAnon'], sections=len(loaded))

def load_plain(): return load(lambda name, panel: plain_section(data_folder(), name, panel))

def load_ours(): return load(lambda name, panel: training_example(read_her2st(data_folder(), name, verbose=False), panel, cache=cache))

def flops(lengths, model, training=True):
    "Floating-point operations of the matrix products of one pass over sequences of these lengths; in training also both gradients, but that of the pixels"
    n, c = np.array(lengths, dtype=float), model.config
    weights = {k: p.numel() for k,p in model.named_parameters() if p.ndim == 2 and 'embed' not in k.split('.')[0] or k == 'patch_embed.weight'}
    forward = 2*n.sum()*sum(weights.values()) + 4*(n**2).sum()*c['dim']*c['depth']
    return 3*forward - 2*n.sum()*weights['patch_embed.weight'] if training else forward

def epoch():
    """Both versions in turn, ours in both precisions, so that all meet the same machine; the straightforward one cuts each section's patches
    when its turn comes, as the released code does"""
    panel = the_panel()
    examples = [training_example(read_her2st(data_folder(), n, verbose=False), panel, cache=cache) for n in SECTIONS]
    sections = [plain_section(data_folder(), n, panel) for n in SECTIONS]
    model, plain = HisToGene(), Plain(len(panel))
    adam = torch.optim.Adam(plain.parameters(), lr=1e-5, foreach=False, fused=False)
    def plain_epoch():
        for image,centres,positions,targets in sections:
            loss = F.mse_loss(plain(plain_patches(image, centres)[None], positions[None])[0], targets)
            adam.zero_grad(); loss.backward(); adam.step()
    times, rows = [], []
    def timed(*args, **how):
        start = time.perf_counter(); loss = one_pass(*args, **how); times.append(time.perf_counter() - start)
        return loss
    def ours(precision):
        times.clear()
        fit(model, examples, epochs=3, progress=False, one_pass=timed, precision=precision)
        return min(times[1:])                                   # the first epoch of a new optimiser also allocates its state
    for _ in range(5):
        rate, plain_times = matmul_rate(), []
        for _ in range(2):
            start = time.perf_counter(); plain_epoch(); plain_times.append(time.perf_counter() - start)
        row = dict(plain=min(plain_times), ours=ours('float32'), matmul_GFLOPs=max(rate, matmul_rate()))
        rows.append({**row, 'bfloat16': ours('bfloat16'), 'bfloat16_matmul_GFLOPs': matmul_rate(dtype=torch.bfloat16)})
    rows = pd.DataFrame(rows)
    work = flops([len(p) for p,_,_ in examples], model)/1e9
    best = {k: rows[k].max() if 'matmul' in k else rows[k].min() for k in rows}                     # others use this machine too: the best of each
    return dict(GFLOP=work, **best, ratio=best['ours']/best['plain'], ours_GFLOPs=work/best['ours'], share_of_matmul_rate=work/best['ours']/best['matmul_GFLOPs'],
                median_ratio=(rows.ours/rows.plain).median(), bfloat16_ratio=best['bfloat16']/best['plain'], bfloat16_median_ratio=(rows.bfloat16/rows.plain).median(),
                rounds=rows.to_dict('records'))

def dense_input(n=8715):
    "The first n patches of a 4x grid on B4, the section with most tissue, and their positions"
    section = read_her2st(data_folder(), 'B4', verbose=False)
    mask, scale = section_mask(section)
    centres, _ = dense_grid(mask, scale, 112, 4)
    return extract_patches(section, centres=centres[:n], cache=cache), pixel_positions(centres[:n], 112, fit_grid(section))

@torch.no_grad()
def superres_plain():
    patches, positions = dense_input()
    model = Plain(785).eval()
    start = time.perf_counter(); model(patches.flatten(1).float()[None], positions[None])
    return dict(seconds=time.perf_counter() - start, peak_GB=peak(), patches=len(patches))

def superres_ours(precision='float32'):
    patches, positions = dense_input()
    model = HisToGene().eval()
    start = time.perf_counter(); run_model(model, (patches, positions), 'cpu', precision)
    seconds, rate, work = time.perf_counter() - start, matmul_rate(dtype=getattr(torch, precision)), flops([len(patches)], model, training=False)/1e9
    return dict(seconds=seconds, peak_GB=peak(), patches=len(patches), GFLOP=work, matmul_GFLOPs=rate, share_of_matmul_rate=work/seconds/rate, seconds_at_matmul_rate=work/rate)

def superres_bfloat16(): return superres_ours('bfloat16')

def superres_25x(name='B4', tile=None, precision='float32'):
    "The whole way at 25x on B4, the real section with most tissue: cutting patches, one sequence through the model, averaging"
    section, model = read_her2st(data_folder(), name, verbose=False), HisToGene().eval()
    mask, scale = section_mask(section)
    model.about = dict(genes=the_panel(), normalization='paper')
    n = len(dense_grid(mask, scale, 112, 25)[0])
    start, busy = time.perf_counter(), time.process_time()
    dense = predict_superres(model, section, 25, 'cpu', tile=tile, precision=precision)
    return dict(section=name, patches=n, sub_patches=len(dense), tile=tile, precision=precision, seconds=time.perf_counter() - start, core_seconds=time.process_time() - busy, peak_GB=peak())

def superres_25x_tiles(): return superres_25x(tile=12)
def superres_25x_bfloat16(): return superres_25x(precision='bfloat16')
def superres_25x_tiles_bfloat16(): return superres_25x(tile=12, precision='bfloat16')

@torch.no_grad()
def long(n, make, depth=8, flat=False):
    "A sequence of n random patches through a model of full width: seconds, seconds of all cores together, and the memory on top of the patches"
    torch.manual_seed(0)
    patches, positions, model = torch.randint(256, (n, 3, 112, 112), dtype=torch.uint8), torch.randint(64, (n, 2)), make(785, depth=depth).eval()
    base, start, busy = memory(), time.perf_counter(), time.process_time()
    if flat: model(patches.flatten(1).float()[None], positions[None])
    else: run_model(model, (patches, positions), 'cpu', 'float32')
    return dict(patches=n, layers=depth, seconds=time.perf_counter() - start, core_seconds=time.process_time() - busy, peak_GB=peak(), above_patches_GB=peak() - base)

def long_plain_2000(): return long(2000, Plain, flat=True)
def long_plain_4000(): return long(4000, Plain, flat=True)
def long_plain_8000(): return long(8000, Plain, flat=True)
def long_ours_2000(): return long(2000, HisToGene)
def long_ours_4000(): return long(4000, HisToGene)
def long_ours_8000(): return long(8000, HisToGene)
def long_ours_8000_one_layer(): return long(8000, HisToGene, depth=1)
def long_ours_100000_one_layer(): return long(100_000, HisToGene, depth=1)

def many_sections(n, spots=350, genes=785):
    "Sections of the HER2+ data's size, each under a file that says it is an image of full size, which nobody needs to decode: their patches are in the cache (`warm_many`)"
    rng, place, names = np.random.default_rng(0), np.stack(np.divmod(np.arange(spots), 18), 1), [f'S{i+1}' for i in range(n)]
    return [new_section(rng.poisson(2., (spots, genes)), [f'gene{i}' for i in range(genes)], [f'{x}x{y}' for x,y in place], 300. + 290*place, *place.T, name, name, Path(cache)/f'{name}.jpg') for name in names]

def warm_many(n):
    "The images, 4 MB each as the real ones are, and the patches of `many_sections`"
    rng = np.random.default_rng(1)
    Image.new('RGB', (9500, 9500), 'white').save(plain := Path(cache)/'plain.jpg')
    for i in range(n): (Path(cache)/f'S{i+1}.jpg').write_bytes(plain.read_bytes() + rng.bytes(4_000_000 - plain.stat().st_size))
    for i,section in enumerate(many_sections(n)):
        np.save(cache_file(cache, section, section.obsm['spatial'], 112, 112), rng.integers(256, size=(len(section), 3, 112, 112), dtype=np.uint8))

@contextmanager
def watched(every=.01):
    "The largest resident memory within this context (GB): all, that of the process's own, and pages of files, which the system takes back when it needs room"
    keys, most, over = ('VmRSS', 'RssAnon', 'RssFile'), {}, threading.Event()
    def look():
        while not over.is_set():
            for k in keys: most[k] = max(most.get(k, 0), status(k))
            over.wait(every)
    thread = threading.Thread(target=look)
    thread.start()
    try: yield most
    finally: over.set(); thread.join()

def stream(n, examples_of=training_example):
    "An epoch over n sections from a warm cache, with a checkpoint at its end: memory beyond the model and optimiser, time until the first section is seen"
    start = time.perf_counter()
    for name in released_sections(): read_her2st(data_folder(), name, verbose=False)
    read, sections, panel = time.perf_counter() - start, many_sections(n), [f'gene{i}' for i in range(785)]
    base, start, epoch = {k: status(k) for k in ('VmRSS', 'RssAnon', 'RssFile')}, time.perf_counter(), {}
    def timed(*args, **how):
        epoch['start'] = time.perf_counter() - start
        with watched() as most: loss = one_pass(*args, **how)
        epoch.update(seconds=time.perf_counter() - start - epoch['start'], **most)
        return loss
    with watched() as most:
        examples = [examples_of(s, panel, cache=cache) for s in sections]
        model = HisToGene(len(panel))
        fit(model, examples, 1, device='cpu', checkpoint=Path(cache)/'training.safetensors', progress=False, one_pass=timed)
    (Path(cache)/'training.safetensors').unlink()
    known = 3*4*sum(w.numel() for w in model.parameters())/1e9                    # weights, and Adam's two means
    beyond = lambda peak: {f'{what}_GB': peak[k] - base[k] - (known if k != 'RssFile' else 0) for k,what in (('VmRSS', 'all'), ('RssAnon', 'own'), ('RssFile', 'files'))}
    return dict(sections=n, patches_GB=sum(x.numel() for x,_,_ in examples)/1e9, targets_GB=sum(4*y.numel() for _,_,y in examples)/1e9, model_and_Adam_GB=known, gradients_GB=known/3,
                to_first_epoch_seconds=epoch['start'], reading_32_real_counts_seconds=read, epoch_seconds=epoch['seconds'], epoch_beyond=beyond(epoch), with_checkpoint_beyond=beyond(most))

def copied(section, panel, cache):
    "As `training_example`, but with patches in memory of the process's own"
    patches, *rest = training_example(section, panel, cache=cache)
    return patches.clone(), *rest

def stream_4(): return stream(4)
def stream_32(): return stream(32)
def stream_32_in_memory(): return stream(32, copied)

MISTAKES = dict(download=['J7'], train=['nowhere/section.h5ad', '--out', 'model'], predict=['nowhere', 'C3'], plot=['nowhere.h5ad'], reproduce=['nowhere/section.h5ad'])

def answers():
    "Seconds until a command has answered, the best of three: its help, a mistyped path or name, and what importing all that it works with takes"
    def seconds(*words):
        start = time.perf_counter()
        done = subprocess.run([str(w) for w in words], cwd=cache, capture_output=True, text=True)
        if 'Traceback' in done.stderr: sys.exit(done.stderr)
        return time.perf_counter() - start
    def best(*words): return min(seconds(*words) for _ in range(3))
    path, everything = Path(sys.executable).parent, 'import histogene_nb.crossval, histogene_nb.superres, histogene_nb.texture, scanpy, sklearn.cluster'
    return {'importing everything': best(sys.executable, '-c', everything), 'help': {c: best(path/f'histogene_{c}', '--help') for c in ('demo', *MISTAKES)},
            'mistake': {c: best(path/f'histogene_{c}', *words) for c,words in MISTAKES.items()}}

STEPS = dict(answers=('answers',), load=('load_plain', 'load_ours'), epoch=('epoch',), superres=('superres_plain', 'superres_ours', 'superres_bfloat16'),
             dense25=('superres_25x', 'superres_25x_tiles', 'superres_25x_bfloat16', 'superres_25x_tiles_bfloat16'),
             long=('long_plain_2000', 'long_plain_4000', 'long_plain_8000', 'long_ours_2000', 'long_ours_4000', 'long_ours_8000', 'long_ours_8000_one_layer', 'long_ours_100000_one_layer'), stream=('stream_4', 'stream_32', 'stream_32_in_memory'))

def measure(step):
    out = subprocess.run([sys.executable, __file__, '--step', step], capture_output=True, text=True)
    if out.returncode: sys.exit(f'{step} failed:\n{out.stderr}')
    print(step, out.stdout.strip(), flush=True)
    return json.loads(out.stdout.splitlines()[-1])

def main(names):
    global cache
    if unknown := set(names) - {*STEPS, *(p for parts in STEPS.values() for p in parts)}:
        sys.exit(f'There is no step {", ".join(sorted(unknown))}; there is {", ".join(STEPS)}.')
    todo = {s: [p for p in parts if s in names or p in names] for s,parts in STEPS.items()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ['BENCHMARK_CACHE'] = cache = folder
        for n in SECTIONS if names != ['answers'] else (): training_example(read_her2st(data_folder(), n, verbose=False), the_panel(), cache=cache)     # warm
        if todo['superres']: dense_input()
        if todo['stream']: warm_many(32)
        found = {p: {**measure(p), 'processor': processor(), 'date': time.strftime('%Y-%m-%d')} for parts in todo.values() for p in parts}
    made_by = dict(histogene_nb=histogene_nb.__version__, torch=torch.__version__, python=platform.python_version(), device='cpu', processor=processor(), fast_bfloat16=fast_bfloat16(),
                   threads=torch.get_num_threads(), date=time.strftime('%Y-%m-%d'), sections=SECTIONS)
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for step,parts in todo.items():
        if not parts: continue
        one = len(STEPS[step]) == 1
        kept = {p: {'date': result[step]['date'], **result[step][p]} for p in STEPS[step] if p in result.get(step, {})}   # of an earlier day
        all_parts = {**kept, **{p: found[p] for p in parts}}
        result[step] = {'command': f'python tools/benchmark.py {step}', **made_by, **(found[parts[0]] if one else all_parts)}
        if step in ('load', 'superres') and len(all_parts) == len(STEPS[step]):
            plain, ours, *half = (all_parts[p] for p in STEPS[step])
            result[step]['ours over plain'] = {k: ours[k]/plain[k] for k in ('seconds', 'peak_GB', 'above_imports_GB', 'own_GB') if k in plain}
            if half: result[step]['bfloat16 over plain'] = {k: half[0][k]/plain[k] for k in ('seconds', 'peak_GB')}
    RESULT.write_text(json.dumps(result, indent=1, default=float) + '\n')
    print(json.dumps({s: result[s] for s,parts in todo.items() if parts}, indent=1, default=float))

if __name__ == '__main__':
    if sys.argv[1:2] == ['--step']: print(json.dumps(globals()[sys.argv[2]](), default=float))
    else: main(sys.argv[1:] or list(STEPS))
