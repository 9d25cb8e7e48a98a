"""What sister sections, and the choice of genes, do to a cross-validation; the tables go into the package.

    HISTOGENE_DATA=... python experiments/leakage.py runs
    HISTOGENE_DATA=... python experiments/leakage.py --sisters    `sisters` alone, which needs no training
    HISTOGENE_DATA=... python experiments/leakage.py --thinned    `thinned` alone, which takes a minute

`sisters`: r from one sister by position alone, on both scales, to set beside a re-run that was on the released one.
`pairs`: a section predicted from other sections' counts by position on the array alone, all 36 sections.
`one_teacher`: one section trains, another is predicted, the five sections with photographs; B4 with fewer spots too, as few as a section of C has.
`thinned`: the same by ridge regression on colours, and the sections of C with fewer molecules too, as few as a spot of B4 has.
`panels`: sections left out in turn, with genes chosen in four ways.
`runs` keeps predictions; folds that are there already are not done again. A leaderboard's `patches`, copied into `runs`, save the time for textures.
"""
import json, sys, time
from functools import cache, partial
from pathlib import Path
import numpy as np, pandas as pd
import histogene_nb
from histogene_nb.commands import reader
from histogene_nb.folds import Fold, fold_name, provenance, run_fold
from histogene_nb.methods import baselines, ridges, texture_model
from histogene_nb.evaluation import as_prediction, gene_correlations, position_baseline
from histogene_nb.expression import SCALES, common_genes, normalize, read_panel, select_panel
from histogene_nb.files import data_folder
from histogene_nb.her2st import her2st_catalogue, read_her2st
from histogene_nb.measures import thin
from histogene_nb.sections import leave_one_out
from histogene_nb.texture import colour_numbers, ridge_baseline

results = Path(histogene_nb.__file__).parent/'results'/'leakage'
sections = ['B4', 'C2', 'C3', 'C4', 'C5']
methods = {'baselines': baselines, 'ridge': ridges, 'texture without array': partial(texture_model, use_array=False, label='texture without array')}
command = 'experiments/leakage.py'

def fold(method, read, training, test, out, panel, cache):
    "Scores of one fold (a row per method, section and gene), those without r left out"
    found = run_fold(Fold(method, training, test), methods[method], read, out, panel, cache=cache, command=command)
    print(f"{out.name}: {'+'.join(training)} -> {fold_name(test)}, {method}: {found['n_genes']} genes, {found['seconds']:.0f} s", flush=True)
    scores = pd.read_csv(out/f'{method}-{fold_name(test)}-seed0'/'scores.csv')
    return scores.dropna(subset='r').assign(training='+'.join(training), n_training_spots=found['n_training_spots'])

def means(scores, by):
    "Means over genes"
    return scores.groupby(by, sort=False).agg(r=('r', 'mean'), ceiling=('ceiling', 'mean'), n_genes=('gene', 'size')).reset_index()

def pairs(measured, panel):
    "Mean r of position alone, learned from one other section, from all sisters, all strangers, and all others"
    known, rows = {n: normalize(s, panel) for n,s in measured.items()}, []
    for b in known:
        others = [n for n in known if n != b]
        sisters = [n for n in others if n[0] == b[0]]
        teachers = {**{n: [n] for n in others}, 'all sisters': sisters, 'all strangers': [n for n in others if n not in sisters], 'all others': others}
        rows += [dict(training=t, section=b, r=gene_correlations(known[b], position_baseline([known[n] for n in names], known[b])).r.mean()) for t,names in teachers.items()]
    return pd.DataFrame(rows)

def sisters(measured, panel):
    "Mean r of position alone from one sister, over the sisters of each section, on both scales"
    rows = []
    for scale in SCALES:
        known = {n: normalize(s, panel, scale) for n,s in measured.items()}
        rows += [dict(section=b, scale=scale, r=gene_correlations(known[b], position_baseline([known[a]], known[b])).r.mean())
                 for b in known for a in known if a != b and a[0] == b[0]]
    return pd.DataFrame(rows).groupby(['section', 'scale']).r.mean().unstack().reset_index()

def one_teacher(out, read, panel):
    "One section trains, the others are predicted"
    size, rng = round(np.mean([len(read(c)) for c in sections[1:]])), np.random.default_rng(1)
    few = read('B4')[np.sort(rng.choice(len(read('B4')), size, replace=False))].copy()
    some = {'B4, fewer spots': few, **{n: read(n) for n in sections}}
    rows = [fold(m, some.get, [a], [s for s in sections if s[0] != a[0] or (a[0] == 'C' and s != a)], out/f'from {a}', panel, out/'patches') for a in some for m in methods]
    return means(pd.concat(rows), ['method', 'training', 'section', 'n_training_spots'])

def thinned(measured, panel):
    "Mean r of ridge regression on colours, taught by one section, whole or thinned to as few molecules a spot as B4's mean, or as its median"
    some = {n: measured[n] for n in sections}
    totals = {n: np.asarray(s.X.sum(1)).ravel() for n,s in some.items()}
    mean, median = ({n: f(t) for n,t in totals.items()} for f in (np.mean, np.median))
    numbers, known = {n: colour_numbers(s) for n,s in some.items()}, {n: normalize(s, panel) for n,s in some.items()}
    rows = []
    for a in some:
        few = lambda of: normalize(thin(some[a], min(1, of['B4']/of[a]))[0], panel).X
        for molecules,Y in {'whole': known[a].X, "B4's mean": few(mean), "B4's median": few(median)}.items():
            for b in some:
                predicted = as_prediction(known[b], ridge_baseline([numbers[a]], [Y], numbers[b]), [known[a]], 'ridge on colours')
                if a != b: rows.append(dict(training=a, molecules=molecules, mean=mean[a], median=median[a], section=b, r=gene_correlations(known[b], predicted).r.mean()))
    return pd.DataFrame(rows)

def panels(out, read, catalogue, published):
    "The folds by section, with genes chosen in four ways: means over all genes of each panel, and over those in all four"
    rule = lambda names: dict(n_top=1000, min_spots=round(sum(len(read(n)) for n in names)/10))            # the paper's 1,000 spots are about a tenth of its spots
    common = common_genes([read(n) for n in sections])                                                   # what a section lists is known before its counts are
    choose = cache(lambda *names: select_panel([read(n)[:, common] for n in names], **rule(names)))
    rows = []
    for _,training,test in leave_one_out(catalogue):
        chosen = {'training sections': choose(*training), 'all five sections': choose(*sections), 'test section': choose(*test), 'published': published}
        shared = set.intersection(*map(set, chosen.values()))
        r = {k: fold('ridge', read, training, test, out/f'genes of {k}', genes, out/'patches') for k,genes in chosen.items()}
        first = r['training sections'].set_index(['method', 'gene']).r
        for k,scores in r.items():
            change = (scores.set_index(['method', 'gene']).r - first).abs().max()                         # of the same gene, between panels
            for which,part in {'its own': scores, 'shared by all': scores[scores.gene.isin(shared)]}.items(): rows.append(means(part, ['method', 'section']).assign(chosen_on=k, genes=which, largest_change=change))
    return pd.concat(rows)

def save(name, table): table.round(5).to_csv(results/f'{name}.csv', index=False)
def every_section(): return {n: read_her2st(data_folder(), n, verbose=False) for n in her2st_catalogue().index}
def published(): return read_panel(data_folder().parent/'reference'/'published_panel_785.csv')

def main(folder):
    start, out = time.perf_counter(), Path(folder)
    results.mkdir(exist_ok=True)
    read, catalogue = reader(sections)
    read, panel, measured = cache(read), published(), every_section()
    save('one_teacher', one_teacher(out, read, panel))
    save('panels', panels(out, read, catalogue, panel))
    save('pairs', pairs(measured, panel))
    save('sisters', sisters(measured, panel))
    save('thinned', thinned(measured, panel))
    (results/'run.json').write_text(json.dumps(provenance(command, start, sections=sections, seed=0), indent=1))

if __name__ == '__main__':
    alone = {'--sisters': sisters, '--thinned': thinned}.get(sys.argv[1])
    save(sys.argv[1][2:], alone(every_section(), published())) if alone else main(sys.argv[1])
