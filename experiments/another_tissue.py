"""Two other tissues: each method learns on one section of the mouse olfactory bulb and is tested on the other, and on one half of a mouse colon and is tested on the other half.

    HISTOGENE_DATA=... python experiments/another_tissue.py runs               both tissues, three seeds, and the bulb once more by commands as typed in a shell
    HISTOGENE_DATA=... python experiments/another_tissue.py runs commands      a part alone: bulb, colon or commands

The sections lie beside the HER2+ data, in `mob` and `visium/mouse_colon`. The colon is cut by a line along y through the median of its spots' x; spots nearer to it than half the widest window
that a method sees, with its rim, are left out, so that no window of one half reaches into the other. Each half counts its columns from its own first one: HisToGene has learned no others.
Genes are those of the paper's rule on the training section alone: its 1,000 most variable, if a tenth of its spots have them.
`runs` keeps predictions; folds that are there already are not done again. The tables are written after each tissue.
"""
import json, subprocess, sys, time
from functools import cache, partial
from pathlib import Path
import numpy as np, pandas as pd
from scipy.spatial import cKDTree
import histogene_nb
from histogene_nb.crossval import cross_validate
from histogene_nb.expression import normalize
from histogene_nb.files import data_folder
from histogene_nb.fold_tables import mean_measures
from histogene_nb.folds import finished_folds, fold_name, provenance, read_prediction, read_scores
from histogene_nb.her2st import read_her2st
from histogene_nb.methods import baselines, depth_maps, ridges, spot_model, texture_model
from histogene_nb.position import grid_positions
from histogene_nb.readers import read_section
from histogene_nb.sections import place

results, command = Path(histogene_nb.__file__).parent/'results'/'another_tissue', 'experiments/another_tissue.py'
SMALL = dict(epochs=400, lr=1e-3, patch_size=28, dim=128, depth=2, heads=4)     # a spot of the bulb is 29 pixels wide; steps were chosen on training losses alone
TISSUES = {'bulb': dict(sections=['MOB_Rep1', 'MOB_Rep2'], min_spots=27, superres=4, genes=['Penk', 'Doc2g', 'Kctd12', 'Slc17a7']),
           'colon': dict(sections=['left', 'right'], min_spots=110, superres=None, genes=['Tagln', 'Igha', 'Mptx1', 'Cyp2c55'])}
REACH = 5                                                           # spot diameters: half a window of 8, and its rim

def half(section, keep, name):
    "Some spots of a section, as a section of its own"
    found = section[keep].copy()
    first = found.obs.array_col.min()
    found.obs['array_col'] -= first - first % 2                     # columns of a hexagonal array go with rows
    found.uns['spatial'] = {name: next(iter(section.uns['spatial'].values()))}
    found.uns['histogene'] = {**section.uns['histogene'], 'section': name}
    return found

@cache
def read(name):
    "A section of the bulb, or a half of the colon"
    if name in TISSUES['bulb']['sections']: return read_section(data_folder().parent/'mob'/name, verbose=False)
    colon = read_section(data_folder().parent/'visium'/'mouse_colon', verbose=False)
    x, away = colon.obsm['spatial'][:, 0], REACH*place(colon).diameter
    return half(colon, x < np.median(x) - away if name == 'left' else x > np.median(x) + away, name)

def without_training(*args, **how):
    "The training mean, position alone, the two maps of depth, and ridge regression on colours and on textures"
    return sum((f(*args, **how)[0] for f in (baselines, depth_maps, partial(ridges, size=112))), []), {}

def fit_error(model, section, predicted, cache):
    "How far training came; and how many of the tested spots lie at positions that it never saw"
    at, (low, high) = grid_positions(section, model.config['n_pos']).numpy(), np.array(model.about['positions'])
    return {**{k: model.about['training'][k] for k in ('error', 'mean_error')}, 'spots_beyond': int(((at < low) | (at > high)).any(1).sum())}

def methods(superres, **_):
    "What is trained, with chance in it"
    histogene = partial(spot_model, kind='HisToGene', superres=superres, watch=fit_error, **SMALL)
    return {'texture': partial(texture_model, superres=superres, use_array=False, size=112), 'HisToGene': histogene}

def typed(out, genes, min_spots, **_):
    "The bulb by commands alone; what they say"
    (out/'mob').unlink(missing_ok=True)
    (out/'mob').symlink_to(data_folder().parent/'mob')
    a, b = (f'mob/{n}' for n in TISSUES['bulb']['sections'])
    small = ' '.join(f'{k}={v}' for k,v in SMALL.items() if k not in ('epochs', 'lr'))
    how = {'texture': '--model texture --setting use_array=False size=112', 'histogene': f"--epochs {SMALL['epochs']} --lr {SMALL['lr']} --setting {small}"}
    lines = [l for m,settings in how.items() for l in (f'histogene_train {a} --min-spots {min_spots} {settings} --out {m} --cache patches',
             *(f'histogene_predict {m} {b} --superres {k} --out {m}_{k}x.h5ad --cache patches' for k in (1, 4)))]
    lines.append(f"histogene_plot {' '.join(f'{m}_{k}x.h5ad' for m in how for k in (1, 4))} --section {b} --genes {' '.join(genes)} --out layers.png")
    return [dict(command=l, output=said(l, out)) for l in lines]

def said(line, folder):
    "What a command prints, when it is run in a folder"
    name, *args = line.split()
    return subprocess.run([str(Path(sys.executable).parent/name), *args], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

def map_of(p, genes):
    "Places and values, as small as they can be kept"
    return dict(xy=np.rint(p.obsm['spatial']).astype(np.uint16), values=p[:, genes].to_df().to_numpy(np.float32).round(3), width=np.float32(place(p).diameter))

DRAWN = 'texture', 'texture_SR', 'HisToGene', 'HisToGene_SR', 'predicted_depth'

def maps(folds, genes):
    "name -> array: of each section what was measured of these genes, and what the first seed predicts no farther than two widths of a spot from one; and its molecules"
    found = {}
    for f in folds:
        (s,), files = f['test'], [f['folder']/f"{f['test'][0]}-{m}.h5ad" for m in DRAWN]
        shown = {file.stem.partition('-')[2]: read_prediction(file, s) for file in files if file.is_file() and f['seed'] == 0}
        shown['observed'] = normalize(read(s), genes)
        near = lambda p: cKDTree(read(s).obsm['spatial']).query(p.obsm['spatial'])[0] < 2*place(read(s)).diameter
        found.update({f'{s}/{by}/{k}': v for by,p in shown.items() for k,v in map_of(p[near(p)], genes).items()})
        found[f'{s}/molecules'] = np.asarray(read(s).X.sum(1)).ravel().astype(np.uint32)
    return found

def best(scores, n=10):
    "The genes that the texture model predicts best beyond depth, of each section"
    t = scores[(scores.method == 'texture') & (scores.seed == 0)]
    return set(t.sort_values('beyond_depth', ascending=False).groupby('section').head(n).gene)

def write(out):
    "The tables of all folds that are done"
    measures, genes, runs, drawn = [], [], [], {}
    for tissue,about in TISSUES.items():
        if not list((out/tissue).glob('*/fold.json')): continue
        folds = finished_folds(out/tissue)
        measures.append(mean_measures(folds).assign(tissue=tissue))
        scores = pd.concat([read_scores(f['folder']).assign(seed=f['seed']) for f in folds])
        keep = scores.gene.isin({*about['genes'], *best(scores)})
        genes.append(scores[keep][['method', 'section', 'seed', 'gene', 'r', 'beyond_depth', 'ceiling', 'ceiling_beyond_depth']].assign(tissue=tissue))
        runs += [{'tissue': tissue, 'fold': fold_name(f['test']), 'training': '+'.join(f['training']), 'first_loss': (f.get('losses') or [None])[0], 'last_loss': (f.get('losses') or [None])[-1],
                  **{k: f.get(k) for k in KEPT}} for f in folds]
        drawn.update(maps(folds, about['genes']))
    for name,table in dict(measures=pd.concat(measures), genes=pd.concat(genes), folds=pd.DataFrame(runs)).items(): table.round(4).to_csv(results/f'{name}.csv', index=False)
    np.savez_compressed(results/'maps.npz', **drawn)

KEPT = ('method', 'seed', 'n_genes', 'n_training_spots', 'parameters', 'rank', 'error', 'mean_error', 'spots_beyond', 'seconds', 'peak_memory_GB', 'command', 'histogene_nb', 'torch', 'device', 'threads', 'date')

def ones(section):
    "Among the counts above 0 of genes seen in 2 to 5 % of the spots, the share of ones; and what it would be of genes that are the same everywhere, were each molecule counted once (Poisson)"
    X = section.X.tocsc()
    seen = np.diff(X.indptr)/len(section)
    rare = (seen > .02) & (seen < .05)
    many = -np.log(1 - seen[rare])                                  # molecules a spot
    return dict(ones=float((X[:, rare].data == 1).mean()), ones_expected=float(np.average(many*np.exp(-many)/seen[rare], weights=seen[rare])), largest=float(X.data.max()))

def facts(start):
    "What the page says of the sections and settings, and what made its tables"
    sections = {n: read(n) for t in TISSUES.values() for n in t['sections']} | {'HER2+ C2': read_her2st(data_folder(), 'C2', verbose=False)}
    totals = {n: np.asarray(s.X.sum(1)) for n,s in sections.items()}
    spots = {n: dict(spots=len(s), genes=s.n_vars, **{k: float(f(totals[n])) for k,f in dict(median=np.median, least=np.min, most=np.max, spread=lambda t: np.log1p(t).std()).items()}, **ones(s)) for n,s in sections.items()}
    return dict(sections=spots, tissues=TISSUES, histogene=SMALL, reach=REACH, run=provenance(command, start))

def main(folder, *parts):
    start, out = time.perf_counter(), Path(folder).resolve()
    results.mkdir(exist_ok=True)
    for part in parts or PARTS:
        if part == 'commands':
            (out/'typed').mkdir(parents=True, exist_ok=True)
            (results/'commands.json').write_text(json.dumps(typed(out/'typed', **TISSUES['bulb']), indent=1))
            continue
        about = TISSUES[part]
        run = partial(cross_validate, read, pd.DataFrame(dict(patient=''), index=about['sections']), out=out/part, panel=dict(n_top=1000, min_spots=about['min_spots']),
                      cache=out/'patches', cores=1, command=command)
        run({'without training': without_training})
        run(methods(**about), seeds=(0, 1, 2))
        write(out)
    (results/'run.json').write_text(json.dumps(facts(start), indent=1))

PARTS = *TISSUES, 'commands'

if __name__ == '__main__':
    folder, *parts = sys.argv[1:] or sys.exit(__doc__)
    if wrong := set(parts) - set(PARTS): sys.exit(f'{", ".join(sorted(wrong))}: a part is one of {", ".join(PARTS)}.\n\n{__doc__}')
    main(folder, *parts)
