"""What the verdicts need of the HER2+ counts and labels, so that their page needs neither: spots, arrays, the rule of the panel, how far K-means' seed moves an ARI, and attention by label.

    HISTOGENE_DATA=... python experiments/counted.py
"""
import json, time
from pathlib import Path
import numpy as np, pandas as pd
import histogene_nb
from histogene_nb.clusters import cluster_spots, label_ari
from histogene_nb.expression import normalize, read_panel, select_panel
from histogene_nb.files import data_folder
from histogene_nb.folds import provenance
from histogene_nb.fold_tables import map_section, read_tables
from histogene_nb.her2st import _step, her2st_catalogue, read_her2st, released_sections

start, results = time.perf_counter(), Path(histogene_nb.__file__).parent/'results'
catalogue, published = her2st_catalogue(), read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
sections = {n: read_her2st(data_folder(), n, verbose=False) for n in catalogue.index}

spots = pd.DataFrame.from_dict({n: dict(spots=s.n_obs, largest_x=int(s.obs.array_col.max()), largest_y=int(s.obs.array_row.max()), pitch_px=round(float(_step(s.obsm['spatial'], s.obs)), 2),
                              **{f'spots with {k} genes': int(((s.X > 0).sum(1) >= k).sum()) for k in (500, 800, 1000)}) for n,s in sections.items()}, orient='index')
spots.rename_axis('section').assign(released=spots.index.isin(released_sections())).to_csv(results/'counted_sections.csv')

seeds = {}
for n in catalogue.index[catalogue.labels.notna()]:
    observed = normalize(sections[n], published)
    near = np.argsort(np.linalg.norm(observed.obsm['spatial'][:, None] - observed.obsm['spatial'], axis=2), axis=1, kind='stable')[:, :6]
    smooth = observed.copy(); smooth.X = observed.X[near].mean(1)
    for what,s in {'observed': observed, 'observed, smoothed': smooth}.items():
        for seed in range(6): seeds[n, what, seed] = label_ari(s.obs.annotation, cluster_spots(s, seed=seed))['ari']
pd.Series(seeds, name='ari').rename_axis(['section', 'what', 'seed']).round(4).to_csv(results/'counted_ari.csv')

a1 = map_section(read_tables(results/'real_A1'), 'A1', 'HisToGene')
layers = [c for c in a1.obs if c.startswith('attention_')]
by_label = (a1.obs[layers]*a1.n_obs).groupby(sections['A1'].obs.annotation.reindex(a1.obs_names).astype(str)).agg('mean').assign(spots=sections['A1'].obs.annotation.value_counts())
by_label.rename_axis('label').round(3).to_csv(results/'counted_attention.csv')

rule = select_panel([sections[n] for n in released_sections()])
found = dict(published=len(published), by_the_rule=len(rule), published_by_the_rule=len(set(rule) & set(published)))
(results/'counted.json').write_text(json.dumps(dict(panel=found, run=provenance('experiments/counted.py', start)), indent=1))
