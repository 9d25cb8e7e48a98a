"""Sum up an independent re-run of HisToGene and ST-Net on the paper's 32 sections (QSong-github/HGGEP, MIT licence), which published r per section and gene.

Per gene: mean r, and the mean of -log10 p that the paper ranks genes by (p from r and the section's spots). Per section: mean r, spots, and the p of
a paired t test over genes, HisToGene against ST-Net; and the mean r of one map for all genes, the section's measured depth. And the pathways among the best genes.

    HISTOGENE_DATA=... python experiments/rerun.py
"""
from pathlib import Path
import pandas as pd
from scipy.stats import ttest_rel
import histogene_nb
from histogene_nb.depth import log_total
from histogene_nb.evaluation import correlation_table
from histogene_nb.expression import normalize
from histogene_nb.files import data_folder
from histogene_nb.her2st import read_her2st
from histogene_nb.ranking import enrich_pathways, rank_genes

reference, results = data_folder().parent/'reference', Path(histogene_nb.__file__).parent/'results'
runs = {m: pd.read_csv(reference/f'rerun_her2_{f}_pcc.csv', index_col=0) for m,f in {'HisToGene': 'histogene', 'ST-Net': 'stnet'}.items()}
measured = {s: read_her2st(data_folder(), s, verbose=False) for s in runs['HisToGene'].index}
n_spots = pd.Series({s: m.n_obs for s,m in measured.items()})
depth_r = {s: normalize(m, list(runs['HisToGene'])).to_df().corrwith(pd.Series(log_total(m), m.obs_names)).mean() for s,m in measured.items()}
ranked = {m: rank_genes({s: correlation_table(row, n_spots[s]) for s,row in r.iterrows()}) for m,r in runs.items()}

genes = {m: r.mean() for m,r in runs.items()} | {f'{m}, -log10 p': t.mean_neg_log10_p for m,t in ranked.items()}
pd.DataFrame(genes).rename_axis('gene').sort_index().round(4).to_csv(results/'rerun_genes.csv')

sections = pd.DataFrame({m: r.mean(axis=1) for m,r in runs.items()}).round(4).assign(
    spots=n_spots, p=[ttest_rel(row, runs['ST-Net'].loc[s], nan_policy='omit').pvalue for s,row in runs['HisToGene'].iterrows()],
    depth_r=pd.Series(depth_r))
sections.rename_axis('section').sort_index().to_csv(results/'rerun_sections.csv', float_format='%.4g')

gene_sets, = (data_folder().parent/'genesets').glob('c2.cp.v7.0*.gmt')   # MSigDB, C2 canonical pathways
pathways = pd.concat([enrich_pathways(t, gene_sets).reset_index().assign(method=m) for m,t in ranked.items()])
pathways.to_csv(results/'rerun_pathways.csv', index=False, float_format='%.4g')
