"""Paper against released code: one difference switched at a time, the rest as the library has it. The tables go into the package.

    python experiments/switches.py runs                               synthetic tissue and a small model, five seeds: some 20 minutes on one core
    HISTOGENE_DATA=... python experiments/switches.py runs real       the paper's model, trained on B4, C2, C4 and C5, tested on C3, three seeds: many hours

`runs` keeps patches and checkpoints. What is in the tables already is not done again; they are written after each run, and seed 0 of every switch comes first.
"""
import sys, time
from functools import cache, partial
from pathlib import Path
import numpy as np, pandas as pd, torch
from torch import nn
import histogene_nb
from histogene_nb.folds import provenance
from histogene_nb.evaluation import gene_correlations, position_baseline
from histogene_nb.expression import normalize, read_panel, select_panel
from histogene_nb.measures import noise_ceiling
from histogene_nb.model import HisToGene
from histogene_nb.patches import dense_grid
from histogene_nb.position import fit_grid
from histogene_nb.files import whole_file, data_folder
from histogene_nb.her2st import read_her2st, released_sections
from histogene_nb.sections import section_name
from histogene_nb.superres import between_spots, predict_dense, predict_superres, recover_spots, section_mask
from histogene_nb.tissue import synthetic_section
from histogene_nb.devices import drawn_from
from histogene_nb.training import fit, training_example
from histogene_nb.interface import predict, predicted_section, run_model

results = Path(histogene_nb.__file__).parent/'results'/'switches'
KINDS = dict(synthetic=dict(training=['X1', 'Y1', 'Y3', 'Z1'], test=['X2', 'Y2'], seeds=range(5), base=dict(epochs=60, lr=3e-3, dim=64, depth=2, heads=4), parts=20, leave_out=[]),
             real=dict(training=['B4', 'C2', 'C4', 'C5'], test=['C3'], seeds=range(3), base=dict(epochs=100, lr=1e-5, dim=1024, depth=8, heads=16), parts=30, leave_out=['wide heads']))
# parts: into how many the released index cuts the spots' extent; synthetic arrays are two thirds as wide as those of the HER2+ sections. Wide heads at full size: six times the weights

def the_data(kind, out):
    "How to read a section, the panel of the paper's rule, and one of the most variable genes of a single section that takes no part, as the released one is"
    training = KINDS[kind]['training']
    if kind == 'synthetic':
        read = cache(partial(synthetic_section, out/'tissue'))
        return read, select_panel([read(s) for s in training], n_top=60, min_spots=60), select_panel([read('W1')], n_top=60, min_spots=20)
    read = cache(lambda name: read_her2st(data_folder(), name, verbose=False))
    others, tested = [read(s) for s in released_sections() if s not in KINDS[kind]['test']], [read(s) for s in KINDS[kind]['test']]
    rule = [g for g in select_panel(others) if all(g in s.var_names for s in tested)]              # of the paper's 31 training sections: fewer do not have its 1,000 spots
    return read, rule, read_panel(data_folder().parent/'reference'/'published_panel_785.csv')

def widen_heads(model):
    "Q, K and V of each head as wide as the model, as the paper writes them; W_0 then has to take all heads' columns"
    dim, heads = model.config['dim'], model.config['heads']
    for block in model.blocks: block.attention.qkv, block.attention.out = nn.Linear(dim, 3*heads*dim, bias=False), nn.Linear(heads*dim, dim)

def first_patch_only(model):
    "All patches after the first are zeros, as in the released data set of the cSCC series"
    model.register_forward_pre_hook(lambda _, args: (torch.cat([args[0][:1], torch.zeros_like(args[0][1:])]), args[1]))

def from_first(section):
    "A section that counts its positions from the first column and row that it uses"
    section = section.copy()
    for axis in ('array_col', 'array_row'): section.obs[axis] -= section.obs[axis].min()
    return section

def diameter(section): return section.uns['spatial'][section_name(section)]['scalefactors']['spot_diameter_fullres']

def released_index(section, parts):
    "The released code's position of a pixel, pixel // (extent // parts), in the form of `fit_grid`: rounding half a step lower is rounding down"
    x, y = diameter(section)/(np.ptp(section.obsm['spatial'], axis=0)//parts)
    return np.array([[x, 0], [0, y], [1e-9 - .5, 1e-9 - .5]])

def other_stars(model, section, parts, kept):
    "HisToGene* from the same model, its super-resolution done as in the released code in one respect"
    (mask, scale), grid, spots, d = section_mask(section), fit_grid(section), section.obsm['spatial'], diameter(section)
    box = np.zeros_like(mask)
    (x0, y0), (x1, y1) = np.floor((spots.min(0) - d/2)*scale).astype(int).clip(0), np.ceil((spots.max(0) + d/2)*scale).astype(int)
    box[y0:y1 + 1, x0:x1 + 1] = True
    centres, _ = dense_grid(mask, scale, d, 4)
    shared = np.clip(.75*d - np.abs(spots[:, None] - centres), 0, d/2).prod(-1)                     # (n, patches): of a spot with the middle quarter of a patch
    X = run_model(model, model.look(between_spots(section, centres, grid), kept))
    return {'released index': recover_spots(predict_dense(model, section, 4, released_index(section, parts), (mask, scale), cache=kept), section),
            'bounding box': recover_spots(predict_dense(model, section, 4, grid, (box, scale), cache=kept), section),
            'not averaged': predicted_section(model, section, (shared/shared.sum(1, keepdims=True) @ X).astype(np.float32), 'HisToGene*')}

def one_run(training, test, panel, seed, out, checkpoint, normalization='paper', epochs=100, lr=1e-5, augment=False, change=None, positions=None, from_mean=False, parts=None, **options):
    "(switch or None, level, prediction) of the test sections, losses, number of parameters: as `train`, with a change of the model or of the sections' positions"
    if positions: training, test = ([positions(s) for s in t] for t in (training, test))
    with drawn_from(seed):
        model = HisToGene(len(panel), **options)
        if change: change(model)
    model.about, kept = dict(genes=panel, normalization=normalization), out/'patches'
    examples = [training_example(s, panel, normalization, cache=kept) for s in training]
    if from_mean: model.head[1].bias.data = torch.cat([y for _,_,y in examples]).mean(0)
    losses = fit(model, examples, epochs, lr, seed, augment=augment, checkpoint=checkpoint, progress=False)
    predicted = [(None, *p) for s in test for p in (('HisToGene', predict(model, s, cache=kept)), ('HisToGene*', recover_spots(predict_superres(model, s, 4, cache=kept), s)))]
    if parts: predicted += [(name + ', from the mean'*from_mean, 'HisToGene*', p) for s in test for name,p in other_stars(model, s, parts, kept).items()]
    return predicted, losses, sum(w.numel() for w in model.parameters())

def the_switches(base, parts, rule, listed):
    "name -> what `one_run` is given; one change of the base each, but for the last two"
    b = dict(base, panel=rule)
    return {'base': dict(b, parts=parts), 'flattening order': dict(b, order='released'), 'raw pixels': dict(b, pixels='raw'), 'released scale': dict(b, normalization='released'),
            "one section's panel": dict(b, panel=listed), 'augmentation': dict(b, augment=True), '30 positions': dict(b, n_pos=30, positions=from_first), 'wide heads': dict(b, change=widen_heads),
            'first patch only': dict(b, change=first_patch_only), 'half the layers': dict(b, depth=base['depth']//2), 'a tenth of the learning rate': dict(b, lr=base['lr']/10),
            'from the mean': dict(b, from_mean=True, parts=parts), 'raw pixels, from the mean': dict(b, pixels='raw', from_mean=True),
            'as released': dict(b, pixels='raw', order='released', normalization='released', panel=listed)}

def main(folder, kind='synthetic'):
    out, setting, command = Path(folder)/kind, KINDS[kind], ' '.join(['experiments/switches.py', *[kind]*(kind != 'synthetic')])
    read, rule, listed = the_data(kind, out)
    training, test = ([read(s) for s in setting[k]] for k in ('training', 'test'))
    shared = [g for g in rule if g in listed]                                                       # every r is over these genes
    observed = {(section_name(s), scale): normalize(s, rule, scale)[:, shared] for s in test for scale in ('paper', 'released')}
    def row(switch, level, seed, p):
        r = {scale: gene_correlations(observed[section_name(p), scale], p[:, shared]).r for scale in ('paper', 'released')}
        return dict(switch=switch, level=level, seed=seed, section=section_name(p), n_genes=p.n_vars, n_r=int(r['paper'].notna().sum()), r=r['paper'].mean(), r_released=r['released'].mean())
    files = [results/f'{kind}.csv', results/f'{kind}_runs.csv']
    rows, runs = (pd.read_csv(f).to_dict('records') if f.is_file() else [] for f in files)
    if not rows:
        rows = [row('position only', 'position only', 0, position_baseline([normalize(s, rule) for s in training], s)) for s in test]
        rows += [dict(switch='ceiling', level='ceiling', seed=0, section=section_name(s), n_genes=len(rule), n_r=len(shared), r=noise_ceiling(s, rule)[shared].mean()) for s in test]
    results.mkdir(parents=True, exist_ok=True)
    for seed in setting['seeds']:
        for name,options in the_switches(setting['base'], setting['parts'], rule, listed).items():
            if name in setting['leave_out'] or any((r['switch'], r['seed']) == (name, seed) for r in runs): continue
            start, checkpoint = time.perf_counter(), out/f'{name}-{seed}.safetensors'
            predicted, losses, parameters = one_run(training, test, seed=seed, out=out, checkpoint=checkpoint, **options)
            rows += [row(switch or name, level, seed, p) for switch,level,p in predicted]
            runs += [dict(switch=name, seed=seed, training='+'.join(setting['training']), test='+'.join(setting['test']), n_genes=len(options['panel']), n_shared=len(shared), epochs=len(losses),
                          lr=options['lr'], dim=options['dim'], depth=options['depth'], heads=options['heads'], parameters=parameters, first_loss=losses[0], last_loss=losses[-1], **provenance(command, start))]
            for f,t in zip(files, (rows, runs)):
                with whole_file(f) as part: pd.DataFrame(t).round(5).to_csv(part, index=False)
            checkpoint.unlink(missing_ok=True)
            print(name, seed, *(f"{r['level']} {r['section']} {r['r']:.3f}" for r in rows if (r['switch'], r['seed']) == (name, seed)), f"{runs[-1]['seconds']} s", flush=True)

if __name__ == '__main__': main(*sys.argv[1:])
