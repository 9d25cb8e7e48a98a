"""What helps beyond depth, and how far could it go? Ideas tried one by one, by ridge regression, on the five real sections; the tables of judging/depth.

    HISTOGENE_DATA=... python experiments/biology.py runs           ideas, bounds, sums; what is seen of the sections is kept in `runs`
    HISTOGENE_DATA=... python experiments/biology.py runs bounds    the bounds alone

Each idea changes one thing. Its penalty and number of patterns are those with the best mean r beyond depth over inner folds (training sections left out in turn); with B4 alone
in training, those chosen for B4. No array, no transformers, but in the sums: there the texture model without transformers, or the same model taught the curve
of the depth alone, is added to the rest that ridge regression predicts. One thread. The tables go into the package's results/biology, with what made them.
"""
import json, sys, time
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, torch
from scipy import ndimage
from scipy.linalg import eigh
from scipy.spatial import cKDTree
from anndata import AnnData
from fastcore.meta import delegates
import histogene_nb
from histogene_nb.commands import reader
from histogene_nb.depth import log_total, without_depth
from histogene_nb.expression import normalize, read_panel
from histogene_nb.files import data_folder
from histogene_nb.folds import provenance
from histogene_nb.her2st import her2st_catalogue, read_her2st
from histogene_nb.interface import run_model
from histogene_nb.measures import neighbour_graph
from histogene_nb.patches import extract_patches
from histogene_nb.stnet import load_lite0
from histogene_nb.texture import DEAD, TextureModel, Textures, colour_numbers, local_yield, texture_numbers
from leaderboard import sections

results, command = Path(histogene_nb.__file__).parent/'results'/'biology', 'experiments/biology.py'
C, MORE = sections[1:], 1000                                     # of genes outside the panel, the most frequent
OUTER = [(['B4', *(c for c in C if c != t)], [t], 'section out') for t in C] + [(C, ['B4'], 'patient out, B'), (['B4'], C, 'patient out, C')]
ALPHAS, RANKS = (10., 3., 1., .3), (1, 2, 3, 5, 8, 12, 20)


def rest_of(section, X): return without_depth(AnnData(X), log_total(section)).X

def products(rest): return rest.T @ rest, len(rest)

def composition_patterns(rests, rank, more=()):
    "From the `products` of some sections, which genes go together, whatever the depth: each gene's spread (genes,), patterns (rank, genes); of two groups, each with half of the weight"
    within = lambda some: sum(products for products,_ in some)/sum(n for _,n in some)
    both = (within(rests) + within(more))/2 if more else within(rests)
    spread, n = np.sqrt(both.diagonal()) + .02, len(both)                                      # genes that hardly vary stay small
    return spread, eigh(both/np.outer(spread, spread), subset_by_index=[n - rank, n - 1])[1].T[::-1]


# ---- what is seen of a section

STAINS = np.linalg.inv((lambda m: m/np.linalg.norm(m, axis=1, keepdims=True))(np.array([[.650, .704, .286], [.072, .990, .105], [.268, .570, .776]])))
WINDOWS = 112, 224, 336                                          # pixels: 1, 2 and 3 spot diameters

def stains(patches): return -np.log((patches.astype(np.float32) + 1)/256) @ STAINS.astype(np.float32)
def dark(stained): return ndimage.gaussian_filter(stained[..., 0], 1.2)

def threshold(values):
    "Otsu's: the border that sets two classes farthest apart"
    borders = np.linspace(*np.quantile(values, [.01, .995]), 200)[5:-5]
    apart = lambda t: (values > t).mean()*(values <= t).mean()*(values[values > t].mean() - values[values <= t].mean())**2
    return max(borders, key=apart)

def nuclei(haematoxylin, mask):
    "Of each connected blob of 25 pixels or more: its place (y, x), area, short over long axis, mean and spread of its stain"
    label, n = ndimage.label(ndimage.binary_opening(mask))
    inside = label.ravel() > 0
    i, (y, x), h = label.ravel()[inside], (a.ravel()[inside].astype(float) for a in np.indices(label.shape)), haematoxylin.ravel()[inside]
    area = np.bincount(i, minlength=n + 1)[1:].astype(float)
    mean = lambda v: np.bincount(i, v, minlength=n + 1)[1:]/area
    cy, cx, stain = mean(y), mean(x), mean(h)
    vy, vx, vxy = mean(y*y) - cy**2, mean(x*x) - cx**2, mean(x*y) - cx*cy
    root = np.sqrt(np.maximum((vy - vx)**2 + 4*vxy**2, 0))
    short, long = np.maximum((vy + vx - root)/2 + 1/12, 0), (vy + vx + root)/2 + 1/12
    return np.c_[cy, cx, area, np.sqrt(short/long), stain, np.sqrt(np.maximum(mean(h*h) - stain**2, 0))][area >= 25]

def about(found, border):
    "Twelve numbers of a window's nuclei: how many, how large, how round, how dark, how many small and round, long, large, how close"
    if not len(found): return [0, 5, 0, .5, 0, border, 0, 0, 0, 0, 0, np.log(100)]
    area, round_, stain, spread = found[:, 2:].T
    next_ = np.median(cKDTree(found[:, :2]).query(found[:, :2], k=2)[0][:, 1].clip(0, 100)) if len(found) > 1 else 100
    kinds = (area < 110) & (round_ > .6), round_ < .5, area > 250
    return [np.log1p(len(found)), np.log(area).mean(), np.log(area).std(), round_.mean(), round_.std(), stain.mean(), stain.std(), spread.mean(), *(k.mean() for k in kinds), np.log(next_)]

def nuclei_numbers(section, cache):
    "Nuclei, and how much of three windows around each spot is nucleus, pale or pink: (n, 51)"
    patches = extract_patches(section, WINDOWS[-1], cache=cache, width=3.).numpy().transpose(0, 2, 3, 1)
    border = threshold(np.concatenate([dark(stains(p))[::4, ::4].ravel() for p in patches[::max(1, len(patches)//40)]]))
    rows = []
    for p in patches:
        stained, row = stains(p), []
        mask = dark(stained) > border
        found = nuclei(stained[..., 0], mask)
        for side in WINDOWS:
            low = (WINDOWS[-1] - side)//2
            of = slice(low, low + side), slice(low, low + side)
            pink = stained[of][..., 1]
            row += [*about(found[((found[:, :2] >= low) & (found[:, :2] < low + side)).all(1)], border), mask[of].mean(), (p[of].min(2) > 210).mean(), pink.mean(), pink.std(), np.quantile(pink, .9)]
        rows.append(row)
    return np.array(rows)

SEEN = {'textures': lambda s, cache: texture_numbers(Textures(load_lite0()), s, cache=cache).numpy(), 'colours': lambda s, cache: colour_numbers(s, cache=cache), 'nuclei': nuclei_numbers}

def look(section, name, out):
    "What is seen of a section, kept in a folder"
    found = {}
    for what,see in SEEN.items():
        file = out/f'{what} {name}.npy'
        if not file.is_file(): np.save(file, see(section, out/'patches'))
        found[what] = np.load(file).astype(np.float64)
    return found

def load(out):
    "The five sections: what is seen and measured of them; and of all sections, the rest of the expression that depth does not explain, and its covariance"
    panel = read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
    counts = {s: read_her2st(data_folder(), s, verbose=False) for s in her2st_catalogue().index}
    common = set.intersection(*(set(s.var_names) for s in counts.values())) - set(panel)
    share = sum(pd.Series(np.asarray(s.X.sum(0)).ravel()/s.X.sum(), s.var_names) for s in (counts[k][:, sorted(common)] for k in counts))
    genes, rests = [*panel, *share.nlargest(MORE).index], {}
    for name,s in counts.items():
        rest = rest_of(s, normalize(s, genes).X)
        rests[name] = products((rest - rest.mean(0))[local_yield(s) > DEAD].astype(np.float32))
    read, found = reader(sections)[0], {}
    for name in sections:
        s = read(name)
        Y = normalize(s, panel).X.astype(np.float64)
        found[name] = SimpleNamespace(section=s, Y=Y - Y.mean(0), rest=rest_of(s, Y), wide=rest_of(s, normalize(s, genes).X), seen=look(s, name, out), alive=local_yield(s) > DEAD, near=neighbour_graph(s))
        found[name].left = rest_of(s, np.eye(len(s)))            # (n, n): takes the depth out of anything
    return found, rests

def mean_r(section, predicted):
    "Mean r over genes beyond depth of a prediction of all spots"
    a, b = section.rest - section.rest.mean(0), section.left @ predicted
    with np.errstate(invalid='ignore', divide='ignore'): r = (a*b).sum(0)/np.sqrt((a**2).sum(0)*(b**2).sum(0))
    return np.nanmean(np.where((b.std(0) > 1e-9) & (a.std(0) > 1e-9), r, np.nan))


# ---- ideas

USUAL = dict(see=('textures',), weight=1., within=False, without_depth=True, target='rest', patterns='half', genes='panel', smooth=0)
IDEAS = {'expression as it is, each gene on its own': dict(target='Y', patterns=None, without_depth=False),
         'depth out of the targets': dict(patterns=None, without_depth=False),
         'and out of the textures': dict(patterns=None),
         'and patterns of the training sections': dict(patterns='training'),
         'and patterns of other patients, half of the weight': {},
         'the same, every spot of the same weight': dict(patterns='pooled'),
         'the same, none of the training sections': dict(patterns='others'),
         'patterns of 1,000 genes more': dict(genes='more'),
         'textures standardised within sections': dict(within=True),
         'colours in place of textures': dict(see=('colours',)),
         'nuclei in place of textures': dict(see=('nuclei',)),
         'nuclei and colours too': dict(see=('textures', 'nuclei', 'colours')),
         'nuclei and colours too, threefold weight': dict(see=('textures', 'nuclei', 'colours'), weight=3.),
         'predictions smoothed, spot and neighbours alike': dict(smooth=1),
         'predictions smoothed, neighbours threefold': dict(smooth=3)}

def inputs(found, training, see, weight, within, without_depth, **_):
    "What goes into the regression, of all sections: standardised; of training sections without depth, if so asked"
    parts = []
    for k,what in enumerate(see):
        pooled = np.concatenate([found[s].seen[what][found[s].alive] for s in training])
        def standard(x): return ((x - x.mean(0))/(x.std(0) + 1e-6) if within else (x - pooled.mean(0))/(pooled.std(0) + 1e-6))*(weight if k else 1)
        parts.append({s: standard(f.seen[what]) for s,f in found.items()})
    H = {s: np.concatenate([p[s] for p in parts], 1) for s in found}
    return {s: found[s].left @ h if without_depth and s in training else h for s,h in H.items()}

def coded(found, rests, training, test, target, patterns, genes, **_):
    "Targets of all sections, and the basis that leads from their predictions to genes; without patterns, None"
    if patterns is None: return {s: getattr(f, target) for s,f in found.items()}, None
    n = len(rests['B4'][0]) if genes == 'more' else len(found['B4'].rest.T)
    patients = {s[0] for s in test}
    cut = {s: (r[:n, :n], k) for s,(r,k) in rests.items()}
    own, other = [cut[s] for s in training], [r for s,r in cut.items() if s[0] not in patients and s not in training]
    given = {'half': (own, other), 'training': (own, []), 'pooled': (own + other, []), 'others': (other, [])}[patterns]
    spread, V = composition_patterns(given[0], max(RANKS), given[1])
    return {s: f.wide[:, :n]/spread @ V.T for s,f in found.items()}, (V*spread)[:, :len(found['B4'].rest.T)]

def regress(H, T, found, training, tested):
    "Predictions of some sections by each penalty: alpha -> section -> (n, targets)"
    X, T = (np.concatenate([a[s][found[s].alive] for s in training]) for a in (H, T))
    value, vector = eigh(X @ X.T)
    seen, scores = {s: H[s] @ X.T @ vector for s in tested}, vector.T @ T
    return {a: {s: seen[s] @ (scores/(value + a*X.shape[1])[:, None]) for s in tested} for a in ALPHAS}

def tried(found, rests, change):
    "Mean r beyond depth: (training sections, tested section, patterns, penalty) -> r"
    how, r = {**USUAL, **change}, {}
    for training in {*combinations(sections, 3), *(tuple(t) for t,*_ in OUTER)}:
        training = [s for s in sections if s in training]
        tested = [s for s in sections if s not in training]
        T, basis = coded(found, rests, training, tested, **how)
        for a,by in regress(inputs(found, training, **how), T, found, training, tested).items():
            for s,P in by.items():
                for k in RANKS if basis is not None else (0,):
                    predicted = P if basis is None else P[:, :k] @ basis[:k]
                    if m := how['smooth']: predicted = (predicted + m*(found[s].near @ predicted))/(1 + m)
                    r[frozenset(training), s, k, a] = mean_r(found[s], predicted)
    return r

def chosen(r):
    "Rows of ideas.csv, without the idea: the setting chosen on inner folds, its r there and on the sections left out"
    rows, settings = [], sorted({k[2:] for k in r})
    for training,test,question in OUTER:
        if len(training) > 1:
            inner = {k: np.mean([r[(frozenset(training) - {t}, t, *k)] for t in training]) for k in settings}
            best = max(inner, key=inner.get)
        rows += [dict(question=question, section=t, inner=inner[best] if len(training) > 1 else np.nan, beyond_depth=r[(frozenset(training), t, *best)], patterns=best[0], alpha=best[1]) for t in test]
    return rows


# ---- bounds

def bounds(found):
    "Rows of bounds.csv: what the neighbours' own measured expression says of a spot, and what a regression taught on the section itself reaches"
    rows = []
    for name,f in found.items():
        spread, V = composition_patterns([products(f.rest)], max(RANKS))
        rows.append(dict(section=name, what='neighbours measured, gene by gene', patterns=0, beyond_depth=mean_r(f, f.near @ f.rest)))
        for k in RANKS: rows.append(dict(section=name, what='neighbours measured, patterns', patterns=k, beyond_depth=mean_r(f, f.near @ (f.rest/spread @ V[:k].T) @ (V[:k]*spread))))
        for others in (False, True): rows += [dict(section=name, what='textures, half of the spots' + (' and the other sections' if others else ''), patterns=k, beyond_depth=v) for k,v in halved(found, name, others).items()]
    return rows

def halved(found, name, others, times=5):
    "Each half of a section's spots predicted by a regression on the other half, of random halves: patterns -> best mean r over penalties, so more than could be had"
    f, rng, r = found[name], np.random.default_rng(0), {}
    more = [s for s in sections if s != name] if others else []
    H = inputs(found, sections, **USUAL)
    spread, V = composition_patterns([products(found[s].rest[found[s].alive]) for s in [name, *more]], max(RANKS))
    T = {s: found[s].rest/spread @ V.T for s in found}
    for _ in range(times):
        first = rng.permutation(len(f.rest)) % 2 == 0
        P = {a: np.zeros((len(first), max(RANKS))) for a in ALPHAS}
        for half in (first, ~first):
            X, S = (np.concatenate([a[name][~half & f.alive], *(a[s][found[s].alive] for s in more)]) for a in (H, T))
            value, vector = eigh(X @ X.T)
            seen = H[name][half] @ X.T @ vector
            for a in ALPHAS:
                P[a][half] = seen @ (vector.T @ S/(value + a*X.shape[1])[:, None])
                P[a][half] -= P[a][half].mean(0)
        for a,k in product(ALPHAS, RANKS): r.setdefault((a, k), []).append(mean_r(f, P[a][:, :k] @ (V[:k]*spread)))
    return {k: max(np.mean(r[a, k]) for a in ALPHAS) for k in RANKS}

# ---- sums

class CurveModel(TextureModel):
    "The texture model, taught the curve of the depth alone"
    @delegates(TextureModel.learn)
    def learn(self, examples, sections, **kwargs):
        curves = [(x, p, Y - torch.from_numpy(rest_of(s, Y.numpy())).float()) for s,(x,p,Y) in zip(sections, examples)]
        return super().learn(curves, sections, **kwargs)

def plain_r(Y, P):
    "Mean r over genes"
    P = P - P.mean(0)
    norm = np.sqrt((Y**2).sum(0)*(P**2).sum(0))
    return np.divide((Y*P).sum(0), norm, out=np.full(len(norm), np.nan), where=norm > 0)[norm > 0].mean()

def sums(found, rests, ideas, out):
    "Rows of sums.csv: the rest alone, and so many times the rest added to what the texture model says, of the expression or of the curve of the depth"
    rows, panel = [], read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
    for patterns,idea in (('training', 'and patterns of the training sections'), ('half', 'and patterns of other patients, half of the weight')):
        for training,test,question in OUTER:
            best = ideas[(ideas.idea == idea) & (ideas.question == question) & (ideas.section == test[0])].iloc[0]
            how = {**USUAL, 'patterns': patterns}
            T, basis = coded(found, rests, training, test, **how)
            k, by = int(best.patterns), regress(inputs(found, training, **how), T, found, training, test)[best.alpha]
            for base,kind in (('texture', TextureModel), ('curve', CurveModel)):
                model, _ = kind.train_on([found[s].section for s in training], panel, members=0, cache=out/'patches')
                for t in test:
                    f, rest = found[t], by[t][:, :k] @ basis[:k]
                    whole = run_model(model, model.look(f.section, cache=out/'patches'), 'cpu')
                    added = {f'{w:g}': whole + w*rest for w in (0, 1, 2, 3)} | ({'alone': rest} if base == 'curve' else {})
                    rows += [dict(patterns_from=patterns, question=question, section=t, base=base, times=w, r=plain_r(f.Y, P), beyond_depth=mean_r(f, P)) for w,P in added.items()]
    return rows


def main(folder, *parts):
    start, out = time.perf_counter(), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    results.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    found, rests = load(out)
    for part in parts or PARTS:
        if part == 'sums': pd.DataFrame(sums(found, rests, pd.read_csv(results/'ideas.csv'), out)).round(4).to_csv(results/'sums.csv', index=False)
        elif part == 'bounds': pd.DataFrame(bounds(found)).round(4).to_csv(results/'bounds.csv', index=False)
        else:
            rows = []
            for idea,change in IDEAS.items():
                rows += [dict(idea=idea, **row) for row in chosen(tried(found, rests, change))]
                mean = pd.DataFrame(rows).query('idea == @idea').groupby('question').beyond_depth.mean()
                print(f"{time.perf_counter() - start:.0f} s: {idea}: {', '.join(f'{q} {v:.4f}' for q,v in mean.items())}", flush=True)
            pd.DataFrame(rows).round(4).to_csv(results/'ideas.csv', index=False)
    (results/'run.json').write_text(json.dumps(provenance(command, start), indent=1))

PARTS = 'ideas', 'bounds', 'sums'

if __name__ == '__main__':
    folder, *parts = sys.argv[1:] or sys.exit(__doc__)
    if wrong := set(parts) - set(PARTS): sys.exit(f'{", ".join(sorted(wrong))}: a part is one of {", ".join(PARTS)}.\n\n{__doc__}')
    main(folder, *parts)
