"""What p-values over spots are worth on the real sections: beside them, those of the predicted map shifted over the array; for predictions that can be made again in seconds.

    HISTOGENE_DATA=... python experiments/shifts.py

A section left out, of the five with photographs. Per method and section: mean r over genes, how far shifts alone spread it, and the share of genes with p < 0.05 by
spots and by shifts. Over the sections, genes are ranked by the mean of -log10 p, by spots, and by r in units of the standard deviation of its own shifts: how many of the best 100 are the same.
"""
import json, time
from pathlib import Path
import pandas as pd
from scipy.stats import norm
import histogene_nb
from histogene_nb.evaluation import as_prediction, gene_correlations, position_baseline
from histogene_nb.expression import normalize, read_panel
from histogene_nb.files import data_folder
from histogene_nb.folds import provenance
from histogene_nb.her2st import read_her2st
from histogene_nb.measures import morans_i, shifted_p, shifted_r
from histogene_nb.texture import colour_numbers, ridge_baseline

start, results = time.perf_counter(), Path(histogene_nb.__file__).parent/'results'
panel, names = read_panel(data_folder().parent/'reference'/'published_panel_785.csv'), ['B4', 'C2', 'C3', 'C4', 'C5']
raw = {n: read_her2st(data_folder(), n, verbose=False) for n in names}
known, numbers = {n: normalize(s, panel) for n,s in raw.items()}, {n: colour_numbers(s) for n,s in raw.items()}

def by_colours(train, n): return as_prediction(known[n], ridge_baseline([numbers[t] for t in train], [known[t].X for t in train], numbers[n]), [known[t] for t in train], 'ridge on colours')
def by_position(train, n): return position_baseline([known[t] for t in train], known[n])

rows, common = [], {}
for method,predict in {'ridge on colours': by_colours, 'position only': by_position}.items():
    spots, shifts = {}, {}
    for n in names:
        predicted = predict([t for t in names if t != n], n)
        by_spot, shifted = gene_correlations(known[n], predicted), shifted_r(known[n], predicted)
        mean = shifted.mean(axis=1)
        spots[n], shifts[n] = by_spot.neg_log10_p, (shifted.iloc[0].abs()/shifted.iloc[1:].std()).map(lambda z: -norm.logsf(z))  # no p of a few hundred shifts ranks the best
        rows.append(dict(method=method, section=n, spots=len(known[n]), shifts=len(shifted), moran=morans_i(predicted).mean(), mean_r=mean.iloc[0], shifted_sd=mean.iloc[1:].std(),
                         p_of_mean=shifted_p(mean.to_frame('r')).r, by_spots=(by_spot.p < .05).mean(), by_shifts=(shifted_p(shifted) < .05).mean()))
    best = [set(pd.DataFrame(by).mean(axis=1).nlargest(100).index) for by in (spots, shifts)]
    common[method] = len(best[0] & best[1])
pd.DataFrame(rows).round(4).to_csv(results/'shifts.csv', index=False)
(results/'shifts.json').write_text(json.dumps(dict(best_100_in_common=common, run=provenance('experiments/shifts.py', start)), indent=1))
