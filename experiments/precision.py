"""HisToGene of the paper's size, trained in bfloat16: the five real sections, sections and patients left out in turn; its tables go into the package.

    HISTOGENE_DATA=... python experiments/precision.py runs        three seeds
    HISTOGENE_DATA=... python experiments/precision.py runs 0      one seed
    HISTOGENE_DATA=... python experiments/precision.py runs loss   B4's run in float32, for its losses

The same runs in float32 are the leaderboard's. A run takes a quarter of an hour of one core. What is interrupted goes on, and runs that are in the tables already stay there.
"""
import sys, time
from functools import partial
from pathlib import Path
import pandas as pd
import histogene_nb
from histogene_nb.commands import reader
from histogene_nb.crossval import cross_validate
from histogene_nb.expression import read_panel
from histogene_nb.files import data_folder
from histogene_nb.fold_tables import mean_measures
from histogene_nb.folds import finished_folds, fold_name, provenance
from histogene_nb.methods import spot_model
from leaderboard import sections, write_table

results = Path(histogene_nb.__file__).parent/'results'/'two_precisions'
FACTS = ('method', 'seed', 'precision', 'n_training_spots', 'seconds', 'peak_memory_GB', 'command', 'histogene_nb', 'torch', 'device', 'threads', 'date')

def write(out):
    "The tables of all runs that are done here, beside those that were done elsewhere"
    folds = finished_folds(out)
    at = [(f, dict(fold=fold_name(f['test']), seed=f['seed'], precision=f['precision'])) for f in folds]
    made = {'measures': mean_measures(folds).round(5),
            'folds': pd.DataFrame([{**key, **{k: f.get(k) for k in FACTS}} for f,key in at]),
            'losses': pd.concat([pd.DataFrame(dict(key, method=f['method'], epoch=range(1, len(f['losses']) + 1), loss=f['losses'])) for f,key in at])}
    results.mkdir(exist_ok=True)
    for name,table in made.items(): write_table(table, name, ['method', 'fold', 'seed'], results)

def main(folder, *parts):
    start, out = time.perf_counter(), Path(folder)
    read, catalogue = reader(sections)
    panel = read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
    def run(precision, seed, fold):
        name = f'HisToGene in {precision}'
        cross_validate(read, catalogue, {name: partial(spot_model, label=name, precision=precision)}, out, ('section', 'patient'), panel,
                       seeds=(seed,), only=[fold], cache=out/'patches', command='experiments/precision.py')
        write(out)
    for part in parts or ('0', 'loss', '1', '2'):
        if part == 'loss': run('float32', 0, 'B4')
        else:
            for fold in [*sections, 'C2+C3+C4+C5']: run('bfloat16', int(part), fold)
    print(provenance('experiments/precision.py', start))

if __name__ == '__main__':
    main(*sys.argv[1:]) if sys.argv[1:] else sys.exit(__doc__)
