"""What a picture is worth in molecules, and the same predictions by many recipes: the tables of judging/worth and judging/recipes.

    HISTOGENE_DATA=... python experiments/worth.py runs           predictions of the methods below, one seed, kept in the folder `runs`
    HISTOGENE_DATA=... python experiments/worth.py runs tables    the tables alone, of the folds that are there

HisToGene, which takes hours, is left out; ST-Net and the small CNN, in their leaderboard's settings, come last, and the tables that the package
keeps were made without them. Folds that are there already are not done again. One thread. The tables go into the package's results/worth_recipes, with what made them.
"""
import json, sys, time
from functools import partial
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd
from scipy import sparse
from scipy.stats import rankdata
import histogene_nb
from histogene_nb.commands import reader
from histogene_nb.crossval import cross_validate
from histogene_nb.depth import log_total, without_depth
from histogene_nb.expression import normalize, read_panel
from histogene_nb.files import data_folder
from histogene_nb.folds import finished_folds, provenance, read_prediction
from histogene_nb.measures import neighbour_graph, thin
from histogene_nb.methods import baselines, depth_maps, ridges, texture_model
from histogene_nb.worth import from_molecules, learn_patterns, worth
from leaderboard import own, sections, slow

results = Path(histogene_nb.__file__).parent/'results'/'worth_recipes'
methods = {'baselines': baselines, 'depth': depth_maps, 'ridge': ridges,
           'texture without transformers': partial(texture_model, members=0, label='texture without transformers'),
           'texture': partial(texture_model, label='texture'), **own, 'ST-Net': slow['ST-Net']}
SEEDS, SAMPLES, FEWEST = 5, 200, .25                   # thinnings; bootstrap samples; molecules a spot
dense = lambda X: np.asarray(X.todense() if hasattr(X, 'todense') else X, dtype=np.float64)
load = lambda: (reader(sections)[0], read_panel(data_folder().parent/'reference'/'published_panel_785.csv'))

def predictions(run):
    "(question, section) -> the training sections' names, and a dictionary of predictions"
    found = {}
    for f in finished_folds(run):
        question = 'patient out, B' if f['test'] == ['B4'] else 'section out' if len(f['test']) == 1 else 'patient out, C'
        for s in f['test']:
            _, mine = found.setdefault((question, s), (f['training'], {}))
            for file in f['folder'].glob(f'{s}-*.h5ad'):
                p = read_prediction(file, s)
                mine[p.uns['histogene']['predicted_by']] = p
    return {k: found[k] for k in sorted(found)}

def complete(found):
    "Without the methods that have not predicted every section of every question"
    everywhere = set.intersection(*(set(p) for _,p in found.values()))
    return {k: (training, {m: p for m,p in mine.items() if m in everywhere}) for k,(training,mine) in found.items()}


# ---- worth in molecules

def small(section, panel):
    "The panel's genes, and the molecules of all others as one: thinned, they are distributed as they would be apart"
    X = dense(section[:, panel].X)
    others = np.asarray(section.X.sum(1), dtype=float).reshape(-1, 1) - X.sum(1, keepdims=True)
    out = ad.AnnData(sparse.csr_matrix(np.hstack([X, others])), obs=section.obs, obsm=section.obsm, uns=section.uns)
    out.var_names = [*panel, 'all others']
    return out

def mean_r(Y, P, W):
    "Mean over genes of r over spots, as `gene_correlations` has it, for each row of weights: (n, genes) twice, (samples, n) -> (samples,)"
    W = W/W.sum(1, keepdims=True)
    y, p = Y - Y.mean(0), P - P.mean(0)
    my, mp = W @ y, W @ p
    vy, vp = W @ y**2 - my**2, W @ p**2 - mp**2
    known = (vy > 1e-9) & (vp > 1e-9)
    r = np.where(known, (W @ (y*p) - my*mp)/np.sqrt(np.where(known, vy*vp, 1)), np.nan)
    return np.full(len(W), np.nan) if not known.any() else np.nanmean(r, 1)

def resampled(section, samples, rng):
    "Weights of the spots: all, then samples of the squares of 4 x 4 array positions: (samples + 1, n)"
    place = section.obs[['array_col', 'array_row']].to_numpy(dtype=float)//4
    _, square = np.unique(place, axis=0, return_inverse=True)
    square, n = square.ravel(), square.max() + 1
    times = rng.multinomial(n, np.full(n, 1/n), samples)                                       # (samples, squares)
    return np.concatenate([np.ones((1, len(section))), times[:, square]]).astype(float)

def ways(expression, depth):
    "In all, and beyond depth"
    x = expression.copy()
    x.X = dense(x.X)
    return {'in all': x.X, 'beyond depth': without_depth(x, depth).X}

def scores(section, training, mine, panel, patterns, W, seeds):
    "what -> molecules or method -> r (seeds, samples), judged by a half of the molecules"
    depth, total = log_total(section), float(section.X.sum())/len(section)
    grid = FEWEST*2.**np.arange(int(np.log2(total/2/FEWEST)) + 1)
    seen = {m: ways(p[section.obs_names, panel], depth) for m,p in mine.items()}
    found, learned = {'in all': {}, 'beyond depth': {}}, learn_patterns(training, panel, patterns)
    for seed in range(seeds):
        half, other = thin(section, .5, seed)
        truth = ways(normalize(half, panel), depth)
        drawn = {m: from_molecules(thin(other, m/total*2, (seed, i))[0], training, learned, (seed, i)) for i,m in enumerate(grid)}
        everyone = {**seen, **{m: ways(p, depth) for m,p in drawn.items()}}
        for name,x in everyone.items():
            for what in found: found[what].setdefault(name, []).append(mean_r(truth[what], x[what], W))
    return {what: {k: np.array(v) for k,v in by.items()} for what,by in found.items()}, dict(of=total, median=np.median(np.expm1(depth)))

def over_seeds(r, draws):
    "(seeds, samples + 1) -> (samples + 1): the mean over seeds; of a sample over seeds drawn anew"
    return np.concatenate([[r[:, 0].mean()], np.take_along_axis(r[:, 1:], draws, 0).mean(0)])

def weighed(found, names, total, draws):
    "Rows of worth.csv and curves.csv: scores of one section, or of several as a mean"
    rows, lines = [], []
    for what in ('in all', 'beyond depth'):
        average = {k: np.mean([over_seeds(f[what][k], draws) for f in found], 0) for k in found[0][what] if all(k in f[what] for f in found)}
        grid = sorted(k for k in average if not isinstance(k, str))
        curve = pd.DataFrame({m: average[m] for m in grid})                                    # (SAMPLES + 1, molecules)
        lines += [dict(**names, what=what, molecules=m, r=curve[m][0], low=curve[m][1:].quantile(.025), high=curve[m][1:].quantile(.975)) for m in grid]
        for method,r in average.items():
            if not isinstance(method, str): continue
            w = np.array([worth(curve.loc[i], v) for i,v in enumerate(r)])
            # a quantile by rank: infinity and 0 are values, and not to be averaged
            low, high = np.quantile(w[1:], [.025, .975], method='nearest') if len(w) > 1 else (np.nan, np.nan)
            rows.append(dict(**names, what=what, method=method, r=r[0], worth=w[0], low=low, high=high, **total, least=grid[0], most=grid[-1]))
    return rows, lines

def weigh(run, patterns=3, samples=SAMPLES, seeds=SEEDS):
    "worth.csv and curves.csv of a run"
    read, panel = load()
    rng, kept, rows, lines = np.random.default_rng(0), {}, [], []
    draws, by = rng.integers(seeds, size=(seeds, samples)), complete(predictions(run))
    light = {s: small(read(s), panel) for s in sections}
    for (question, s),(training, mine) in by.items():
        W = resampled(light[s], samples, rng)
        found, total = scores(light[s], [light[t] for t in training], mine, panel, patterns, W, seeds)
        kept.setdefault(question, []).append((s, found, total))
        print(time.strftime('%T'), patterns, question, s, flush=True)
    for question,many in kept.items():
        parts = [([found], dict(question=question, section=s), total) for s,found,total in many]
        for found,names,total in [*parts, ([f for _,f,_ in many], dict(question=question, section='all'), pd.DataFrame([t for *_,t in many]).mean().to_dict())]:
            more = weighed(found, names, total, draws)
            rows += more[0]; lines += more[1]
    return pd.DataFrame(rows), pd.DataFrame(lines)


# ---- recipes

def by_gene(Y, P):
    "r over spots of each gene; NaN where there is none"
    a, b = Y - Y.mean(0), P - P.mean(0)
    with np.errstate(invalid='ignore', divide='ignore'): r = (a*b).sum(0)/np.sqrt((a**2).sum(0)*(b**2).sum(0))
    flat = lambda x: np.ptp(x, axis=0) <= 1e-6*np.abs(x).max(0)
    return np.where(flat(Y) | flat(P), np.nan, r)

def mean(r): return np.nan if np.isnan(r).all() else np.nanmean(r)
def top(r, n=50): return mean(np.sort(r[~np.isnan(r)])[::-1][:n]) if (~np.isnan(r)).any() else np.nan

def scaled(section, panel):
    "Measured expression on each scale: name -> (n, genes)"
    counts, total = dense(section[:, panel].X), np.asarray(section.X.sum(1), dtype=float).reshape(-1, 1)
    log = dense(normalize(section, panel).X)
    near = neighbour_graph(section)
    return {'house': log, 'raw counts': counts, 'median': np.log1p(counts/np.maximum(total, 1)*np.median(total)),
            'released': dense(normalize(section, panel, 'released').X), 'smoothed': (log + 8*(near @ log))/9}

def variable(logs):
    "The 50 genes of the largest variance within sections"
    return np.argsort(-np.mean([x.var(0) for x in logs], 0))[:50]

def one_section(training, P, logs, measured, depth):
    "recipe -> value, in one section"
    Y = measured['house']
    r, without = by_gene(Y, P), lambda x: without_depth(ad.AnnData(x), depth).X
    ranks = lambda x: rankdata(x, axis=0)
    return {'mean over genes of r, section by section': mean(r),
            'undefined r counted as 0': np.nan_to_num(r).mean(),
            'median over genes': np.nan if np.isnan(r).all() else np.nanmedian(r),
            'Spearman': mean(by_gene(ranks(Y), ranks(P))),
            "each method's own 50 best genes": top(r),
            '50 variable genes, chosen on all sections': mean(r[variable(logs.values())]),
            '50 variable genes, chosen on training sections': mean(r[variable([logs[t] for t in training])]),
            'measured as raw counts': mean(by_gene(measured['raw counts'], P)),
            'measured as log1p, scaled to the median': mean(by_gene(measured['median'], P)),
            "measured on the released code's scale": mean(by_gene(measured['released'], P)),
            'measured map smoothed over neighbours': mean(by_gene(measured['smoothed'], P)),
            'per spot, over genes': mean(by_gene(Y.T, P.T)),
            'beyond depth': mean(by_gene(without(Y), without(P)))}

def pooled(Ys, Ps):
    "recipe -> value, over the spots of several sections"
    Y, P = np.concatenate(Ys), np.concatenate(Ps)
    return {'all sections\' spots pooled, mean over genes': mean(by_gene(Y, P)),
            'all values at once': mean(by_gene(Y.reshape(-1, 1), P.reshape(-1, 1)))}

def recipes(run):
    "recipes.csv: a row per question, method and recipe; 'all five' is a section out, B4 too, as the paper does"
    read, panel = load()
    measured = {s: scaled(read(s), panel) for s in sections}
    logs, depths = {s: m['house'] for s,m in measured.items()}, {s: log_total(read(s)) for s in sections}
    by = complete(predictions(run))
    questions = {'all five': [k for k in by if k[0] != 'patient out, C'], **{q: [k for k in by if k[0] == q] for q in ('section out', 'patient out, B', 'patient out, C')}}
    rows, done = [], {}
    for k,(training, mine) in by.items():
        for m,p in mine.items():
            P = dense(p[read(k[1]).obs_names, panel].X)
            done[k, m] = P, one_section(training, P, logs, measured[k[1]], depths[k[1]])
    for q,keys in questions.items():
        for m in by[keys[0]][1]:
            here = [done[k, m] for k in keys]
            values = pd.DataFrame([v for _,v in here]).mean().to_dict() | pooled([logs[k[1]] for k in keys], [P for P,_ in here])
            rows += [dict(question=q, method=m, recipe=r, value=v) for r,v in values.items()]
    return pd.DataFrame(rows)


def reader_matters(run):
    "patterns.csv: what the texture model is worth to readers of molecules who know more patterns, or one; two thinnings"
    rows = []
    for n in (1, 3, 10):
        table, _ = weigh(run, n, samples=0, seeds=2)
        t = table[(table.section == 'all') & (table.method == 'texture')]
        rows.append(t[['what', 'question', 'worth', 'most']].assign(patterns=n))
    return pd.concat(rows)

def write_tables(run):
    start = time.perf_counter()
    results.mkdir(exist_ok=True)
    recipes(run).round(5).to_csv(results/'recipes.csv', index=False)
    for name,table in zip(('worth', 'curves'), weigh(run)): table.round(5).to_csv(results/f'{name}.csv', index=False)
    reader_matters(run).round(4).to_csv(results/'patterns.csv', index=False)
    folds = [dict(method=f['method'], seed=f['seed'], test=f['test'], seconds=f['seconds'], date=f['date']) for f in finished_folds(run)]
    about = provenance('experiments/worth.py', start, sections=sections, thinnings=SEEDS, bootstrap_samples=SAMPLES, folds=folds)
    (results/'worth.json').write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')

def main(folder, only=None):
    out = Path(folder)
    read, catalogue = reader(sections)
    if only is None:
        cross_validate(read, catalogue, methods, out, by=('section', 'patient'), panel=load()[1], cache=out/'patches', cores=1, command='experiments/worth.py')
    write_tables(out)

if __name__ == '__main__':
    if not 2 <= len(sys.argv) <= 3 or sys.argv[2:] not in ([], ['tables']): sys.exit(__doc__)
    main(*sys.argv[1:])
