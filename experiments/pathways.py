"""Write the pathways of the kept cross-validations anew from their tables of r (the folds themselves are not kept): what histogene_reproduce --gene_sets writes.

    HISTOGENE_DATA=... python experiments/pathways.py
"""
from pathlib import Path
import histogene_nb
from histogene_nb.files import data_folder
from histogene_nb.fold_tables import best_pathways, read_tables

gene_sets, = (data_folder().parent/'genesets').glob('c2.cp.v7.0*.gmt')   # MSigDB, C2 canonical pathways
for run in ('real5', 'real_A1'):
    folder = Path(histogene_nb.__file__).parent/'results'/run
    best_pathways(read_tables(folder), gene_sets).to_csv(folder/'pathways.csv', index=False, float_format='%.4g')
