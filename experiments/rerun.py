"""Sum up an independent re-run of HisToGene and ST-Net on the paper's 32 sections (QSong-github/HGGEP, MIT licence): means of its correlations per gene and per section.

    HISTOGENE_DATA=... python experiments/rerun.py
"""
from pathlib import Path
import pandas as pd
import histogene_nb
from histogene_nb.files import data_folder

reference, results = data_folder().parent/'reference', Path(histogene_nb.__file__).parent/'results'
runs = {m: pd.read_csv(reference/f'rerun_her2_{f}_pcc.csv', index_col=0) for m,f in {'HisToGene': 'histogene', 'ST-Net': 'stnet'}.items()}
pd.DataFrame({m: r.mean() for m,r in runs.items()}).rename_axis('gene').sort_index().round(4).to_csv(results/'rerun_genes.csv')
pd.DataFrame({m: r.mean(axis=1) for m,r in runs.items()}).rename_axis('section').sort_index().round(4).to_csv(results/'rerun_sections.csv')
