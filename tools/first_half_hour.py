"""The first half hour on a graphics card: what this package does there, checked, measured and written down.

    python tools/first_half_hour.py              on a card; into histogene_nb/results/cards/
    python tools/first_half_hour.py 5 6          these parts only; the others' last results stay
    python tools/first_half_hour.py --small      all in miniature, without a card; into ./first_half_hour
    python tools/first_half_hour.py --table F    what a file of results says, to be read
    python tools/first_half_hour.py --estimates  times on cards that are not at hand, from counted work

It needs no data. The file is written after each part. A part that fails is recorded with its error, the
next one goes on in a new process, and the exit code is 1. The file names no folders, and no computer.
"""
import argparse, gc, json, math, os, platform, re, subprocess, sys, tempfile, time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch
import numpy as np, pandas as pd, torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
import histogene_nb
import benchmark
from histogene_nb.folds import provenance
from histogene_nb.devices import (PRECISIONS, default_device, device_name, gradient_scaler, in_blocks,
                                  memory, precision_on)
from histogene_nb.files import InputError, whole_file
from histogene_nb.interface import from_pretrained, predict, run_model, save_pretrained
from histogene_nb.model import HisToGene, attention_maps
from histogene_nb.patches import extract_patches
from histogene_nb.tensors import read_tensors
from histogene_nb.stnet import load_lite0
from histogene_nb.texture import Textures, texture_numbers, TextureModel
from histogene_nb.tissue import synthetic_section
from histogene_nb.training import fit, one_pass

RESULTS = Path(histogene_nb.__file__).parent/'results'/'cards'

SIZES = dict(
    full=dict(
        model=dict(n_genes=785),                                              # otherwise of the paper's size
        toy=dict(n_genes=100, patch_size=32, dim=128, depth=2, heads=4), toy_spots=100, toy_epochs=10,
        few=4, repeat_epochs=5, compare_epochs=30, lr=1e-4, spots=(300, 700), steps=20, product=8192,
        patches=(8_715, 35_753), attention_patches=(8_715, 35_753),
        px=3400, texture={}, windows=2048, window_px=224,
        sections=31, section_spots=300, epochs=100, limit=300),
    small=dict(
        model=dict(n_genes=40, patch_size=16, dim=64, depth=2, heads=4),
        toy=dict(n_genes=12, patch_size=16, dim=32, depth=2, heads=4), toy_spots=40, toy_epochs=5,
        few=3, repeat_epochs=3, compare_epochs=60, lr=3e-3, spots=(30, 70), steps=8, product=512,
        patches=(200, 800), attention_patches=(300, 1200),
        px=1200, texture=dict(windows=(1.,), size=56, members=1, dim=16), windows=64, window_px=56,
        sections=5, section_spots=30, epochs=10, limit=5))

TOLERANCE = dict(float32=1e-3, bfloat16=2e-2, float16=2e-2)                    # of losses, relative

# By the name that the driver gives a card: capability; dense peaks in TFLOP/s of float32 (of the ordinary
# cores: PyTorch's products use no TF32 unless told to), float16 and bfloat16 (tensor cores, half of what is
# printed "with sparsity"); GB/s of its memory. From NVIDIA's datasheets; H100 and H200 in their SXM form.
CARDS = {k: dict(zip(('capability', 'float32', 'float16', 'bfloat16', 'GBs'), v)) for k,v in {
    r'V100-SXM2':      ((7, 0), 15.7, 125., None, 900),
    r'\bT4$':          ((7, 5), 8.1, 65., None, 320),
    r'A100-SXM4-40GB': ((8, 0), 19.5, 312., 312., 1555),
    r'A100-SXM4-80GB': ((8, 0), 19.5, 312., 312., 2039),
    r'A100.80GB PCIe': ((8, 0), 19.5, 312., 312., 1935),
    r'\bA10$':         ((8, 6), 31.2, 125., 125., 600),
    r'\bL4$':          ((8, 9), 30.3, 121., 121., 300),
    r'\bL40S$':        ((8, 9), 91.6, 362., 362., 864),
    r'H100 80GB HBM3': ((9, 0), 67., 989., 989., 3350),
    r'H100 PCIe':      ((9, 0), 51., 756., 756., 2000),
    r'\bH200$':        ((9, 0), 67., 989., 989., 4800)}.items()}


# ---- what the parts share

class Skip(Exception):
    "Not to be had on this device"

def wait(device):
    "Until the device has done what it was given"
    if device.type == 'cuda': torch.cuda.synchronize(device)
    if device.type == 'mps': torch.mps.synchronize()

@contextmanager
def measured(device):
    "Seconds and peak memory (GB) of what is done within: on a card all, on a processor what comes on top"
    proc, found = device.type == 'cpu' and Path('/proc/self/clear_refs').exists(), {}
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
    wait(device)
    base, start = benchmark.memory() if proc else 0, time.perf_counter()
    yield found
    wait(device)
    found['seconds'] = time.perf_counter() - start
    if proc: found['peak_GB'] = max(0., benchmark.peak() - base)
    if device.type == 'cuda': found['peak_GB'] = torch.cuda.max_memory_allocated(device)/1e9

def available(device):
    "The precisions in which a network's layers can compute here"
    if device.type != 'cuda': return ['float32', 'bfloat16'][:1 + (device.type == 'cpu')]
    found = []
    for p in PRECISIONS:
        with suppress(InputError): found.append(precision_on(device, p))
    return found

def chosen(device):
    "float32, and what is chosen beside it"
    return list(dict.fromkeys(['float32', precision_on(device)]))

def network(config):
    "A model, the same each time"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HisToGene(**config)

def made(config, sections, spots, seed=0):
    "Sections whose genes follow the brightness of noisy patches, which changes smoothly over the tissue"
    config, examples = network_size(config).config, []
    own = torch.randn(config['n_genes'], generator=torch.Generator().manual_seed(99))
    for i in range(sections):
        g = torch.Generator().manual_seed(1000*seed + i)
        place = torch.stack([torch.arange(spots) % 20, torch.arange(spots)//20 % config['n_pos']], 1)
        field = torch.sin(place[:, 0]/4 + i) + torch.cos(place[:, 1]/5)
        noise = torch.randint(-60, 61, (spots, 3, *2*[config['patch_size']]), generator=g, dtype=torch.int16)
        patches = (noise + (128 + 30*field).to(torch.int16)[:, None, None, None]).clamp(0, 255)
        targets = 3 + field[:, None]*own + .3*torch.randn(spots, len(own), generator=g)
        examples.append((patches.to(torch.uint8), place, targets))
    return examples

def trained(config, examples, device, **how):
    "A model and its losses"
    model = network(config)
    return model, fit(model, examples, device=device, progress=False, **{'lr': 1e-4, **how})

def apart(a, b):
    "The largest difference of numbers, relative to the second's size"
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(np.abs(a - b).max()/np.abs(b).max())

def correlations(a, b):
    "Pearson's r of each column"
    a, b = (np.asarray(x, dtype=float) - np.asarray(x, dtype=float).mean(0) for x in (a, b))
    return (a*b).sum(0)/np.sqrt((a**2).sum(0)*(b**2).sum(0))

def per_spread(a, b):
    "The largest difference of numbers, by column, relative to the second's standard deviation"
    spread = np.asarray(b, dtype=float).std(0)
    return float((np.abs(np.asarray(a, dtype=float) - b).max(0)/spread)[spread > 1e-6].max())

def many(patches, n):
    "n patches, those there are again and again"
    return patches.repeat(math.ceil(n/len(patches)), 1, 1, 1)[:n]

def peak_rate(device, precision):
    "The card's peak in TFLOP/s, if its datasheet is known"
    name = device_name(device)
    return next((card[precision] for pattern,card in CARDS.items() if re.search(pattern, name)), None)

def product_rate(device, precision, n, times=5):
    "TFLOP/s of a large matrix product, the best of some"
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision))
    def once():
        wait(device); start = time.perf_counter(); a @ b; wait(device)
        return 2*n**3/(time.perf_counter() - start)/1e12
    return max(once() for _ in range(times + 1))

def shares(TFLOP, seconds, device, precision, s, known={}):
    "The rate reached, its share of the datasheet's peak, and of a large product's rate on this device"
    if (way := (device, precision)) not in known: known[way] = product_rate(*way, s['product'])
    rate, peak, product = TFLOP/seconds, peak_rate(*way), known[way]
    return dict(TFLOPs=rate, peak_TFLOPs=peak, share_of_peak=rate/peak if peak else None,
                product_TFLOPs=product, share_of_product=rate/product)

def difference(a, b): return max(abs(x - y)/y for x,y in zip(a, b, strict=True))

def kept_to(rows): return all(r['losses_apart'] < r['tolerance'] for r in rows)


# ---- counted work

def network_size(config):
    "A model without its numbers"
    with torch.device('meta'): return HisToGene(**config)

def counted(config, n, precision, training):
    "Of a step, or a prediction, on n spots: TFLOP, GB moved in the device's memory, and its peak at most"
    model, b, full = network_size(config), 4 if precision == 'float32' else 2, precision == 'float32'
    c, P, first = model.config, sum(w.numel() for w in model.parameters()), model.patch_embed.weight.numel()
    pixels, wide = n*3*c['patch_size']**2, n*c['dim']
    # Weights: read forward and backward, gradients written; Adam reads four numbers a weight, writes three.
    # In 16 bits they are cast, and gradients too; float16's are looked at for infinities: read and written.
    weights = P*(8 + 4 + 28 if full else 8 + 2 + 2 + 6 + 28 + 8*(precision == 'float16'))
    if not training: weights = P*(4 if full else 8) + first*b*(n//256)      # W_h again for each 256 patches
    # A layer's outputs, 18 a spot and feature, are written and read; backward does about twice as much.
    layers = 2*18*wide*c['depth']*b*(3 if training else 1)
    # Pixels: from bytes to float32, centred in place, cast, read; and again for the gradient of W_h.
    moved = weights + layers + pixels*((17 if full else 21) + b*training)
    # Kept for backward by each layer, per spot and feature: 12 numbers, two of them float32 in any case, and
    # the masks of dropout, 4 bytes. A prediction keeps nothing; it is widest at attention.
    kept = wide*c['depth']*(10*b + 2*4 + 4) + pixels*b
    widest = wide*(28 if full else 18) + n*c['n_genes']*4
    top = (16*P + kept if training else 4*P + widest) + pixels + (0 if full else 2*P)
    TFLOP = float(benchmark.flops([n], model, training))/1e12
    return dict(TFLOP=TFLOP, GB_moved=moved/1e9, counted_peak_GB=top/1e9)

class Counter(TorchDispatchMode):
    "Counts operations that compute something: not those that only look at a tensor in another way"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func._schema.returns
        self.n += not (out and all(r.alias_info and not r.alias_info.is_write for r in out))
        return func(*args, **(kwargs or {}))

def operations(depth, precision, training, patches=300):
    "How many operations the processor hands out in a step or a prediction; width does not matter"
    config = dict(n_genes=4, patch_size=2, dim=16, heads=1, depth=depth)
    model, (example,) = network(config), made(config, 1, patches)
    opt, cpu = torch.optim.Adam(model.parameters(), fused=True), torch.device('cpu')
    precision = 'bfloat16' if precision == 'float16' else precision           # a processor knows it better
    scaler = gradient_scaler(cpu, precision)
    with Counter() as counter:
        if training: one_pass(model, opt, [example], cpu, False, precision=precision, scaler=scaler)
        else: run_model(model, example[:2], cpu, precision)
    return counter.n


# ---- the parts

def driver():
    "Version of the card's driver"
    asked = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split('\n')[0].strip()

def about(device, s):
    "The device, its driver, versions, and the precision that is chosen"
    free, total = memory(device)
    found = dict(precision=precision_on(device), free_GB=free/1e9, total_GB=total/1e9,
                 system=f'{platform.system()} {platform.machine()}', processors=os.cpu_count(),
                 python=platform.python_version(), cuda=torch.version.cuda,
                 packages={p: version(p) for p in ('numpy', 'timm', 'safetensors')})
    if device.type != 'cuda': return found
    known = torch.cuda.get_device_properties(device)
    return dict(**found, capability=f'{known.major}.{known.minor}', driver=driver(),
                cards=torch.cuda.device_count(), cudnn=torch.backends.cudnn.version(),
                nccl=dist.is_nccl_available(), datasheet_peak_TFLOPs=peak_rate(device, precision_on(device)),
                tf32_in_convolutions=torch.backends.cudnn.allow_tf32,
                tf32_in_products=torch.backends.cuda.matmul.allow_tf32)

def places(model): return {t.device.type for t in [*model.parameters(), *model.buffers()]}

def histogene_checks(device, s):
    "A model trained on the device: where it is, its attention, and what is saved of it"
    examples = made(s['toy'], 3, s['toy_spots'])
    model, losses = trained(s['toy'], examples, device, epochs=s['toy_epochs'], lr=1e-3)
    whole, (patches, positions, _) = places(model), examples[0]
    maps = attention_maps(model, patches, positions, torch.arange(5))
    with tempfile.TemporaryDirectory() as folder: again = from_pretrained(save_pretrained(model, folder))
    here, loaded = (run_model(m, (patches, positions), device) for m in (model, again))
    there = run_model(again, (patches, positions), 'cpu')
    near, far = apart(loaded, here), apart(there, here)
    found = dict(losses=[losses[0], losses[-1]], loaded_apart=near, processor_apart=far)
    return found, {'losses fall': losses[-1] < losses[0],
                   'HisToGene is whole on the device': whole == {device.type},
                   'attention after training adds up to 1': bool(((maps.sum(-1) - 1).abs() < 1e-3).all()),
                   'HisToGene saved and loaded predicts the same': near < 1e-3,
                   'the processor predicts the same': far < TOLERANCE[precision_on(device)]}

def texture_checks(device, s):
    "A texture model trained on the device: where its parts are, where its network runs, what is saved of it"
    with tempfile.TemporaryDirectory() as folder:
        sections, seen = [synthetic_section(folder, n, px=s['px']) for n in ('X1', 'Y1')], []
        panel = list(sections[0].var_names[:s['toy']['n_genes']])
        model, _ = TextureModel.train_on(sections, panel, rank=2, alpha=1., device=device, **s['texture'])
        whole, again = places(model), from_pretrained(save_pretrained(model, Path(folder)/'model'))
        model.cpu().textures.stem.register_forward_pre_hook(lambda _, x: seen.append(str(x[0].device)))
        here, loaded = (predict(m, sections[0], device).X for m in (model, again))
        there = predict(again, sections[0], 'cpu').X
    near, far = apart(loaded, here), apart(there, here)
    found = dict(texture_first_call_on=seen[0], texture_loaded_apart=near, texture_processor_apart=far)
    return found, {'the texture model is whole on the device': whole == {device.type},
                   'its network runs on the device': torch.device(seen[0]).type == device.type,
                   'the texture model saved and loaded predicts the same': near < 1e-3,
                   'the processor predicts the same from textures': far < 1e-2}

def said(ask):
    "What an attempt that needs too much memory says, and whether that is one line for the user"
    try: ask()
    except InputError as e: return str(e), '\n' not in str(e)
    except Exception as e: return one_line(e), False
    return 'nothing: there was enough memory', False

def memory_checks(device, s):
    "Too long a sequence for prediction, for training, and for attention maps of all its spots"
    if device.type != 'cuda': return dict(out_of_memory='left out: only where there is a card'), {}
    total, model = memory(device)[1], network(dict(n_genes=2, patch_size=1, dim=4096, depth=1, heads=16))
    def example(n): return torch.zeros(n, 3, 1, 1).byte(), torch.zeros(n, 2).long(), torch.zeros(n, 2)
    n = int((1.5*total/(4*16))**.5)                                           # 16 heads' matrices
    long, square = example(int(1.5*total/(4*4096))), example(n)
    asks = dict(prediction=lambda: run_model(model, long[:2], device),
                training=lambda: fit(model, [long], 1, device=device, progress=False),
                attention=lambda: attention_maps(model.to(device), *square[:2], torch.arange(n)))
    found, right = {}, {}
    for what,ask in asks.items():
        model.zero_grad(); gc.collect(); torch.cuda.empty_cache()
        found[what], right[f'too little memory for {what} is said in one line'] = said(ask)
    model.zero_grad(); gc.collect(); torch.cuda.empty_cache()
    right['the card works afterwards'] = bool(np.isfinite(run_model(model, example(10)[:2], device)).all())
    return dict(out_of_memory=found), right

def checks(device, s):
    "What a pretended device could only pretend"
    each = [part(device, s) for part in (histogene_checks, texture_checks, memory_checks)]
    found, right = ({k: v for pair in each for k,v in pair[i].items()} for i in (0, 1))
    return dict(found, checks=right)

def repeat_row(device, s, precision):
    "The same training and prediction twice, with one seed"
    examples = made(s['model'], s['few'], s['spots'][0])
    def once(): return trained(s['model'], examples, device, epochs=s['repeat_epochs'], precision=precision)
    (a, first), (b, second) = once(), once()
    pairs = [(k, v, w) for (k,v),w in zip(a.state_dict().items(), b.state_dict().values())]
    differ = {k: float((v - w).abs().max()) for k,v,w in pairs if not torch.equal(v, w)}
    x, y, z = (run_model(m, examples[0][:2], device, precision) for m in (a, a, b))
    most = max(differ, key=differ.get, default=None)
    return dict(precision=precision, training_bitwise_equal=not differ and first == second,
                tensors=len(pairs), tensors_that_differ=len(differ), most_in=most,
                weights_apart=differ.get(most, 0.),
                losses_apart=apart(second, first), predictions_of_both_apart=apart(z, x),
                prediction_bitwise_equal=np.array_equal(x, y), predictions_apart=apart(y, x))

def repeats(device, s):
    "How far one training is from the same again"
    return dict(epochs=s['repeat_epochs'], rows=[repeat_row(device, s, p) for p in chosen(device)])

def precisions(device, s):
    "What 16 bits change: losses, predictions of a section that was not trained on, r of each gene"
    kinds = chosen(device) if device.type == 'cuda' else available(device)
    if len(kinds) == 1: raise Skip(f'only {kinds[0]} is computed on {device.type}')
    examples, found, rows = made(s['model'], s['few'], s['spots'][0]), {}, []
    (patches, positions, targets), = made(s['model'], 1, s['spots'][0], seed=1)
    for p in kinds:
        how = dict(epochs=s['compare_epochs'], precision=p, lr=s['lr'])
        model, losses = trained(s['model'], examples, device, **how)
        out = run_model(model, (patches, positions), device, p)
        r, distinct = correlations(out, targets), [len(np.unique(column)) for column in out.T]
        found[p] = losses, out, r
        rows.append(dict(precision=p, first_loss=losses[0], last_loss=losses[-1], median_r=np.median(r),
                         spots=len(out), fewest_values_of_a_gene=min(distinct),
                         median_values_of_a_gene=np.median(distinct)))
    (la, a, ra), (lb, b, rb) = found[kinds[1]], found['float32']
    return dict(rows=rows, losses_apart=difference(la, lb), predictions_apart=apart(a, b),
                predictions_apart_per_spread=per_spread(a, b), largest_change_of_r=np.abs(ra - rb).max(),
                mean_change_of_r=(ra - rb).mean(), lowest_r_between_both=correlations(a, b).min(),
                checks={'the last losses are within a tenth': abs(la[-1] - lb[-1]) < .1*lb[-1]})

class Over(Exception):
    "The time for it is over"

def timed_fit(model, examples, epochs, device, limit=math.inf, **how):
    "Losses and seconds of each epoch, as many as begin within the limit"
    losses, times = [], []
    def timed(*args, **more):
        if sum(times) > limit: raise Over
        start = time.perf_counter()
        losses.append(one_pass(*args, **more))                                # it waits for its losses
        times.append(time.perf_counter() - start)
        return losses[-1]
    with suppress(Over): fit(model, examples, epochs, device=device, progress=False, one_pass=timed, **how)
    return losses, times

def step_row(device, s, n, precision):
    "Seconds of a training step on n spots, the share of what the card could do, and its memory"
    examples, work = made(s['model'], 4, n), counted(s['model'], n, precision, True)
    with measured(device) as found:
        times = timed_fit(network(s['model']), examples, 1 + s['steps']//4, device, precision=precision)[1]
    step = float(np.median(times[1:]))/4                                      # the first makes Adam's state
    return dict(spots=n, precision=precision, ms_a_step=1000*step, TFLOP=work['TFLOP'],
                **shares(work['TFLOP'], step, device, precision, s),
                peak_GB=found.get('peak_GB'), counted_peak_GB=work['counted_peak_GB'])

def steps(device, s):
    "Training steps in each precision"
    return dict(rows=[step_row(device, s, n, p) for n in s['spots'] for p in available(device)])

def written_out(q, k, v):
    "Attention in blocks, as where there is no kernel"
    with sdpa_kernel(SDPBackend.MATH): return in_blocks(q, k, v)

def attention_row(device, n, precision, config):
    "Attention in blocks, with PyTorch's kernel for each block and without any, against the kernel at once"
    shape = 3, 1, config['heads'], n, config['dim']//config['heads']
    qkv = torch.randn(shape, device=device).to(getattr(torch, precision))
    row = dict(patches=n, precision=precision)
    ways = dict(kernel=F.scaled_dot_product_attention, blocks=in_blocks, blocks_without=written_out)
    for name,way in ways.items():
        way(*qkv[..., :64, :])                                                  # warm
        with measured(device) as found: out = way(*qkv)
        if name == 'kernel': whole = out
        else: row[f'{name}_apart'] = float((out.float() - whole.float()).abs().max())
        row |= {f'{name}_s': found['seconds'], f'{name}_peak_GB': found.get('peak_GB')}
    return row

def superres_row(device, s, n, precision):
    "A whole section's patches as one sequence"
    model, work = network(s['model']), counted(s['model'], n, precision, False)
    (drawn, place, _), = made(s['model'], 1, 200)
    patches, positions = many(drawn, n), torch.zeros(n, 2, dtype=torch.long)
    run_model(model, (drawn, place), device, precision)                           # warm
    with measured(device) as found: run_model(model, (patches, positions), device, precision)
    return dict(patches=n, precision=precision, **found, counted_peak_GB=work['counted_peak_GB'],
                TFLOP=work['TFLOP'], **shares(work['TFLOP'], found['seconds'], device, precision, s))

@torch.no_grad()
def superres(device, s):
    "Super-resolved sections, and attention by itself at their lengths"
    rows = [superres_row(device, s, n, p) for n in s['patches'] for p in chosen(device)]
    if device.type == 'mps': return dict(rows=rows, attention='left out: there is no kernel to compare with')
    config = network_size(s['model']).config
    attention = [attention_row(device, n, p, config) for n in s['attention_patches'] for p in chosen(device)]
    close = all(row[k] < 1e-2 for row in attention for k in row if k.endswith('_apart'))
    return dict(rows=rows, attention=attention, checks={'attention in blocks is that of the kernel': close})

def tf32(device, numbers):
    "How far the numbers of textures move with the format in which convolutions compute on newer cards"
    if device.type != 'cuda': return 'left out: only a card has it'
    if torch.cuda.get_device_capability(device) < (8, 0): return 'left out: cards have it from 8.0 on'
    found, was = [], torch.backends.cudnn.allow_tf32
    try:
        for on in (True, False, False):
            torch.backends.cudnn.allow_tf32 = on
            found.append(numbers().numpy())
    finally: torch.backends.cudnn.allow_tf32 = was
    on, off, again = found
    return dict(apart_per_spread=per_spread(on, off), apart_without_a_change=per_spread(again, off))

@torch.no_grad()
def textures(device, s):
    "How many windows a second are looked at, and what TF32 changes"
    net, px, windows, rows = Textures(load_lite0()).to(device), s['window_px'], s['windows'], []
    def row(what, n, batch, work):
        work()                                                                  # warm
        with measured(device) as found: work()
        rows.append(dict(what=what, batch=batch, windows=n, windows_a_second=n/found['seconds'], **found))
    with tempfile.TemporaryDirectory() as folder:
        section = synthetic_section(folder, 'X1', px=s['px'])
        patches = extract_patches(section, px, width=2)
        row('with cutting', len(section), 16, lambda: texture_numbers(net, section, (2.,), px))
    looked_at = many(patches, windows)
    def means(batch): return torch.cat([m.mean((2, 3)) for m in net(batch.to(device))], 1).cpu()
    def numbers(batch=16): return torch.cat([means(b) for b in looked_at.split(batch)])
    for batch in (16, 128): row('network alone', windows, batch, lambda: numbers(batch))
    return dict(window_px=px, rows=rows, tf32=tf32(device, numbers))

def job(device, size, epochs, precision, checkpoint=None, batch=1, out=None):
    "A training to be killed, or in one of several processes; no dropout, which devices draw differently"
    s = SIZES[size]
    how = dict(epochs=epochs, precision=precision, batch=batch, checkpoint=checkpoint, every=0, lr=1e-3)
    _, losses = trained({**s['toy'], 'dropout': 0.}, made(s['toy'], 4, s['toy_spots']), device, **how)
    backend = dist.distributed_c10d.get_backend_config() if dist.is_initialized() else None
    if out and os.environ.get('RANK') == '0': write(Path(out), dict(losses=losses, backend=backend))
    return losses

def start(words, how, env={}):
    "A process that does a `job`"
    line = [sys.executable, *words, __file__, '--job', json.dumps(how)]
    return subprocess.Popen(line, env={**os.environ, **env}, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)

def last_error(text):
    "The line of a process's errors that says what happened"
    lines = [l.strip() for l in text.splitlines() if l.strip()] or ['it said nothing']
    errors = [l for l in lines if re.search(r'(Error|Exception)\b.*:', l) and 'ChildFailed' not in l]
    return (errors or lines)[-1]

def epochs_in(file):
    "Epochs that a checkpoint has, 0 where there is none yet"
    return len(json.loads(read_tensors(file)[1]['state'])['losses']) if file.is_file() else 0

def kill_after(file, at_least, **how):
    "Start a training, and kill it when its checkpoint has some epochs; how many it has"
    child, until = start([], dict(how, checkpoint=str(file), epochs=100_000)), time.monotonic() + 180
    while epochs_in(file) < at_least and child.poll() is None and time.monotonic() < until: time.sleep(.05)
    ended = child.poll() is not None
    child.kill()                                                              # SIGKILL
    errors = child.communicate()[1]
    if ended or not file.is_file(): raise RuntimeError(f'no checkpoint of a training: {last_error(errors)}')
    return epochs_in(file)

def killed_row(precision, device, first, then, size):
    "A training killed on one device and resumed on another; the processor's part is float32"
    on = {d: precision if d == device else 'float32' for d in (first, then)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'training.safetensors'
        done = kill_after(file, 3, device=str(first), size=size, precision=on[first])
        losses = job(str(then), size, done + 5, on[then], file)
    whole = job('cpu', size, done + 5, 'float32')
    return dict(killed_on=f'{first.type} {on[first]}', after=done, resumed_on=f'{then.type} {on[then]}',
                epochs=len(losses), losses_apart=difference(losses, whole), tolerance=TOLERANCE[precision])

def killed(device, s):
    "Killed on the device and resumed on the processor, and the other way, against a training left alone"
    cpu = torch.device('cpu')
    ways = [(p, device, *way) for p in chosen(device) for way in ((device, cpu), (cpu, device))]
    rows = [killed_row(*way, size_of(s)) for way in ways]
    return dict(rows=rows, checks={'killed and resumed, the losses are those of a whole run': kept_to(rows)})

def together(device, cards, how):
    "A training in two processes: its losses, and what they talk by"
    seen = os.environ.get('CUDA_VISIBLE_DEVICES', '0,1').split(',')
    few = dict(CUDA_VISIBLE_DEVICES=','.join(seen[:cards])) if device.type == 'cuda' else {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/'losses.json'
        words = '-m torch.distributed.run --standalone --nproc_per_node 2'.split()
        run = start(words, dict(how, device=device.type, out=str(out)), few)
        try: errors = run.communicate(timeout=240)[1]
        except subprocess.TimeoutExpired:
            run.terminate(); run.communicate()                                  # it ends its processes
            raise RuntimeError('two processes did not end in four minutes') from None
        if not out.is_file(): raise RuntimeError(f'two processes failed: {last_error(errors)}')
        return json.loads(out.read_text())

def ranks(device, s):
    "Two processes, on one card and on two where there are two, against one with as many sections a step"
    if device.type == 'mps': raise Skip('several processes train on cpu or cuda')
    cards, rows = torch.cuda.device_count() if device.type == 'cuda' else 0, []
    for p in chosen(device):
        how = dict(size=size_of(s), epochs=s['toy_epochs'], precision=p, batch=2)
        alone = job(str(device), **how)
        for n in range(1, 1 + min(2, max(cards, 1))):
            found = together(device, n, how)
            rows.append(dict(processes=2, cards=n if cards else 0, precision=p, talk_by=found['backend'],
                             losses_apart=difference(found['losses'], alone), tolerance=TOLERANCE[p]))
    return dict(rows=rows, checks={'two processes lose what one does': kept_to(rows)})

# The paper, of 31 sections of HER2+ on "24 cores Intel Xeon 8260 CPU and a single NVIDIA V100 (32GB) GPU":
# "On average, it took HisToGene 11 minutes but 27 minutes for ST-Net."
def fold(device, s):
    "A fold of the paper's size, as many epochs as there is time for"
    p, n, epochs = precision_on(device), s['section_spots'], s['epochs']
    examples = made(s['model'], s['sections'], n)
    work = s['sections']*counted(s['model'], n, p, True)['TFLOP']
    with measured(device) as found:
        losses, times = timed_fit(network(s['model']), examples, epochs, device, s['limit'], lr=1e-5)
    epoch = float(np.median(times[1:] or times))
    minutes = (sum(times) + (epochs - len(times))*epoch)/60
    out = dict(precision=p, sections=s['sections'], spots=n, epochs=epochs, epochs_timed=len(times),
               extrapolated=len(times) < epochs, seconds_of_first_epoch=times[0], seconds_an_epoch=epoch,
               minutes=minutes, peak_GB=found.get('peak_GB'), losses=[losses[0], losses[-1]],
               **shares(work, epoch, device, p, s))
    return dict(**out, papers_minutes=11, papers_over_these=11/minutes) if size_of(s) == 'full' else out

EACH = about, checks, repeats, precisions, steps, superres, textures, killed, ranks, fold
PARTS = dict(enumerate(EACH, 1))

def size_of(s): return next(k for k,v in SIZES.items() if v is s)


# ---- one part after the other

ENDED = 'its process ended before it did'

def one_line(e):
    "An error in one line, without the folders of this computer"
    text = ' '.join((str(e).strip() or repr(e)).split())
    return f'{type(e).__name__}: ' + re.sub(r'(?<![\w.])(?:[A-Z]:)?[/\\](?:[\w.+~-]+[/\\])+', '', text)[:500]

def slug(name): return re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')

def write(file, results):
    with whole_file(file) as part: part.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')

def read(file): return json.loads(file.read_text(encoding='utf-8'))

def run_part(part, device, s):
    "What a part found, or its error"
    try: found = json.loads(json.dumps(part(device, s), default=float))
    except Skip as e: return dict(skipped=str(e))
    except Exception as e: return dict(failed=one_line(e))
    wrong = [k for k,v in found.get('checks', {}).items() if not v]
    return dict(failed=f'not so: {"; ".join(wrong)}', **found) if wrong else found

def results_file(numbers, small, device, out):
    "Where the results go; made without those of the parts that begin anew"
    name = device_name(device)
    file = (Path(out) if out else RESULTS)/f'{slug(name)}{"-small" if small else ""}.json'
    known = read(file)['parts'] if file.is_file() else {}
    stay = {k: v for k,v in known.items() if v['number'] not in numbers}
    write(file, dict(device=name, size='small' if small else 'full', parts=stay))
    return file.resolve()

def work_through(numbers, small, device, out, state):
    "Parts until one fails, each written down; a card may be of no use to this process after that"
    try: device = default_device(device)
    except InputError as e: sys.exit(str(e))
    if not small and device.type == 'cpu':
        sys.exit('There is no card here. --small does all of it in miniature on the processor.')
    said = read(state)
    if 'file' not in said:                                                    # the first of these processes
        said['file'] = str(results_file(numbers, small, device, out))
        write(state, said)
    for n in numbers:
        begun, name = time.perf_counter(), PARTS[n].__name__
        def record(found):
            done = read(file := Path(said['file']))
            done['parts'][name] = {'number': n, **found, **provenance(said['command'], begun, device)}
            done['parts'] = dict(sorted(done['parts'].items(), key=lambda item: item[1]['number']))
            write(file, done)
        record(dict(failed=ENDED))
        record(found := run_part(PARTS[n], device, SIZES['small' if small else 'full']))
        outcome = next((f'{k}: {found[k]}' for k in ('failed', 'skipped') if k in found), 'done')
        print(f'{n:>2} {name:<10} {time.perf_counter() - begun:6.1f} s  {outcome}', flush=True)
        if 'failed' in found: sys.exit(1)
        gc.collect()
        if device.type == 'cuda': torch.cuda.empty_cache()

def all_parts(numbers, words, command):
    "Processes until all parts are done; the exit code"
    begun, left = time.perf_counter(), numbers
    with tempfile.TemporaryDirectory() as folder:
        write(state := Path(folder)/'state.json', dict(command=command))
        while left:
            line = [sys.executable, __file__, *map(str, left), *words, '--state', state]
            code = subprocess.run(line).returncode
            if 'file' not in (said := read(state)): return code or 1
            parts = {p['number']: p for p in read(Path(said['file']))['parts'].values()}
            for n in left:
                if parts.get(n, {}).get('failed') == ENDED: print(f'{n:>2} {PARTS[n].__name__}: {ENDED}')
            left = [n for n in left if n not in parts]
    failed = [n for n in numbers if 'failed' in parts[n]]
    seconds, name = time.perf_counter() - begun, Path(said['file']).name
    print(f'{seconds:.0f} s, {len(failed)} of {len(numbers)} parts failed: {name}')
    return 1 if failed else 0


# ---- readable

MADE_BY = 'number command histogene_nb torch device device_name threads date seconds peak_memory_GB'.split()

def shown(value):
    if isinstance(value, float): return f'{value:.4g}'
    if isinstance(value, list): return ', '.join(map(shown, value))
    return ', '.join(f'{k}: {shown(v)}' for k,v in value.items()) if isinstance(value, dict) else str(value)

def part_lines(name, found):
    "A part as text"
    made_by = f"histogene_nb {found['histogene_nb']}, torch {found['torch']}, {found['date']}"
    yield f"\n{found['number']}. {name}: {found['seconds']:.1f} s, {made_by}"
    for k,v in found.items():
        if k in MADE_BY: continue
        if isinstance(v, list) and v and isinstance(v[0], dict):
            rows = pd.DataFrame([{c: '-' if x is None else shown(x) for c,x in row.items()} for row in v])
            yield from rows.T.to_string(header=False).splitlines()
        elif k == 'checks': yield from (f'  {"yes" if ok else "NO "}  {what}' for what,ok in v.items())
        else: yield f'  {k}: {shown(v)}'

def table(results):
    "A file of results as text"
    parts = (line for name,found in results['parts'].items() for line in part_lines(name, found))
    return '\n'.join([f"{results['device']} ({results['size']})", *parts])


# ---- cards that are not at hand

ASSUMED = dict(compute_share=.3, bandwidth_share=.6, us_an_operation=10., copy_GBs=10.)
PAPERS = "V100, the paper's"
NOT_AT_HAND = {'T4': r'\bT4$', 'L4': r'\bL4$', 'H100 SXM': r'H100 80GB HBM3', PAPERS: r'V100-SXM2'}
WORK = {'1 epoch, 31 sections of 300 spots': (300, 31), '100 epochs': (300, 3100),
        'a 4x section, 8,715 patches': (8_715, 1)}

def precision_of(capability):
    "What `precision_on` chooses on such a card"
    with patch('torch.cuda.get_device_capability', return_value=capability):
        return precision_on(torch.device('cuda'))

def bounds(known, once, ops, precision):
    "Seconds of one step if it only computed, only moved numbers in memory, or only waited for the processor"
    return dict(compute_s=once['TFLOP']/known[precision]/ASSUMED['compute_share'],
                bandwidth_s=once['GB_moved']/known['GBs']/ASSUMED['bandwidth_share'],
                operations_s=ops*ASSUMED['us_an_operation']/1e6)

def estimate(card, known, precision, work):
    "A row: the slowest of the bounds, and copying patches where they are seen once"
    (n, times), training = WORK[work], WORK[work][0] == 300
    once = counted(SIZES['full']['model'], n, precision, training)
    ops = operations(8, precision, training, n)
    patches_GB, each = n*3*112**2/1e9, bounds(known, once, ops, precision)
    slowest, copy = max(each, key=each.get), 0. if training else patches_GB/ASSUMED['copy_GBs']
    top = once['counted_peak_GB'] + 31*patches_GB*training                    # with all sections on the card
    return dict(kind='estimate', card=card, precision=precision, work=work,
                estimate_s=each[slowest]*times + copy, estimate_peak_GB=top, slowest=slowest[:-2],
                **{k: v*times for k,v in each.items()}, copy_s=copy, TFLOP=once['TFLOP']*times,
                GB_moved=once['GB_moved']*times, operations=ops*times, peak_TFLOPs=known[precision],
                peak_GBs=known['GBs'], **{f'assumed_{k}': v for k,v in ASSUMED.items()},
                histogene_nb=histogene_nb.__version__, torch=torch.__version__)

def estimates():
    "Cards that are not at hand: nothing here was measured"
    cards = {card: CARDS[pattern] for card,pattern in NOT_AT_HAND.items()}
    on = {card: precision_of(known['capability']) for card,known in cards.items()}
    on[PAPERS] = 'float32'                                                    # as the released code computes
    return pd.DataFrame([estimate(card, known, on[card], w) for card,known in cards.items() for w in WORK])

def arguments():
    names = {p.__name__: n for n,p in PARTS.items()}
    parser = argparse.ArgumentParser(description='What this package does on a graphics card, written down')
    parser.add_argument('parts', nargs='*', help=', '.join(f'{n} {k}' for k,n in names.items()))
    parser.add_argument('--small', action='store_true', help='in miniature, in at most three minutes')
    parser.add_argument('--device', help='chosen unless given')
    parser.add_argument('--out', help='folder for the results; --small: ./first_half_hour unless given')
    parser.add_argument('--table', type=Path, metavar='FILE', help='print a file of results')
    parser.add_argument('--estimates', action='store_true', help='write estimates.csv')
    for word,kind in (('--job', json.loads), ('--state', Path)):              # between its own processes
        parser.add_argument(word, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.numbers = [names.get(p) or (int(p) if p.isdigit() else 0) for p in args.parts] or list(PARTS)
    if not set(args.numbers) <= set(PARTS): parser.error(f'parts are {", ".join(names)}, or their numbers')
    return args

def main():
    args = arguments()
    if args.job: return job(**args.job)
    if args.table: return print(table(read(args.table)))
    if args.estimates:
        with whole_file((Path(args.out) if args.out else RESULTS)/'estimates.csv') as part:
            return estimates().round(5).to_csv(part, index=False)
    out = args.out or ('first_half_hour' if args.small else None)
    if args.state: return work_through(args.numbers, args.small, args.device, out, args.state)
    small, given = ['--small'][:args.small], dict(device=args.device, out=out)
    words = small + [w for k,v in given.items() if v for w in (f'--{k}', v)]
    command = ' '.join(['python tools/first_half_hour.py', *small, *args.parts])
    sys.exit(all_parts(args.numbers, words, command))

if __name__ == '__main__': main()
