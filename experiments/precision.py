"""The five real sections in both precisions: HisToGene trained and used in bfloat16, beside the leaderboard's float32.

    HISTOGENE_DATA=... python experiments/precision.py runs        three seeds, each section left out in turn
    HISTOGENE_DATA=... python experiments/precision.py runs 1      one seed

`runs` keeps predictions; folds that are there already are not done again. The table goes into the package after each fold.
"""
import sys
from functools import partial
from pathlib import Path
import histogene_nb
from histogene_nb.commands import reader
from histogene_nb.crossval import cross_validate
from histogene_nb.expression import read_panel
from histogene_nb.files import data_folder
from histogene_nb.fold_tables import mean_measures
from histogene_nb.folds import finished_folds
from histogene_nb.methods import spot_model
from leaderboard import sections

table = Path(histogene_nb.__file__).parent/'results'/'precision.csv'

def main(folder, *seeds):
    out = Path(folder)
    read, catalogue = reader(sections)
    panel = read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
    method = {'HisToGene in bfloat16': partial(spot_model, kind='HisToGene', label='HisToGene in bfloat16', precision='bfloat16')}
    for seed in [int(s) for s in seeds] or [0, 1, 2]:
        for left_out in sections:
            cross_validate(read, catalogue, method, out=out, by=('section',), panel=panel, cache=out/'patches',
                           seeds=(seed,), only=[left_out], command='experiments/precision.py')
            mean_measures(finished_folds(out)).round(5).to_csv(table, index=False)

if __name__ == '__main__':
    folder, *seeds = sys.argv[1:] or sys.exit(__doc__)
    main(folder, *seeds)
