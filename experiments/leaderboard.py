"""The leaderboard of the five real sections: every method through the same cross-validation; its tables go into the package.

    HISTOGENE_DATA=... python experiments/leaderboard.py runs         every method, three seeds where chance has a part
    HISTOGENE_DATA=... python experiments/leaderboard.py runs fast    all but HisToGene, ST-Net and the small CNN
    HISTOGENE_DATA=... python experiments/leaderboard.py runs own     the small CNN of the page on your own model
    HISTOGENE_DATA=... python experiments/leaderboard.py runs 1 2     HisToGene and ST-Net alone, with these seeds

Sections and patients are left out in turn. `runs` keeps predictions; folds that are there already are not done again.
HisToGene and ST-Net, which take hours, run two folds at a time through Ray, one thread each.
The tables are written after each part. What they hold of other methods, folds and seeds stays.
"""
import sys, time
from functools import cache, partial
from pathlib import Path
import pandas as pd
import histogene_nb
from histogene_nb.commands import reader
from histogene_nb.crossval import cross_validate
from histogene_nb.fold_tables import mean_measures
from histogene_nb.folds import finished_folds, fold_name, provenance
from histogene_nb.methods import baselines, depth_maps, histogene, ridges, spot_model, texture_model
from histogene_nb.expression import read_panel
from histogene_nb.files import data_folder
from histogene_nb.her2st import her2st_catalogue, read_her2st
from histogene_nb.small_cnn import SmallCNN

results = Path(histogene_nb.__file__).parent/'results'/'leaderboard'
KEPT = ('method', 'seed', 'rank', 'alpha', 'parameters', 'n_training_spots', 'seconds', 'peak_memory_GB', 'command', 'histogene_nb', 'torch', 'device', 'threads', 'date')      # of what made a fold
sections = ['B4', 'C2', 'C3', 'C4', 'C5']
slow = {'HisToGene': partial(histogene, precision='float32'), 'ST-Net': partial(spot_model, kind='ST-Net', backbone='efficientnet_lite0', patch_size=112)}
own = {'small CNN': SmallCNN}        # its settings were chosen before any of these sections was looked at
once = {'baselines': baselines, 'depth': depth_maps, 'ridge': ridges, 'texture without array and transformers': partial(texture_model, use_array=False, members=0), 'texture without transformers': partial(texture_model, members=0)}

@cache
def counts():
    "The other sections on the make of array that these five are on, patients A to D (judging/array)"
    patient = her2st_catalogue().patient
    return tuple(read_her2st(data_folder(), s, verbose=False) for s in patient.index if patient[s] in 'ABCD' and s not in sections)

def more_counts(*args, **options):
    "The texture model, its array taught by those sections' counts too, the tested patient's left out"
    return texture_model(*args, array_from=counts(), **options)

fast = {'texture': texture_model, 'texture, array from more counts': more_counts, 'texture without array': partial(texture_model, use_array=False), 'texture, one transformer': partial(texture_model, members=1)}

def write_table(table, name, keys, results=results):
    "Into the package's table, in place of its rows with the same keys"
    path = results/f'{name}.csv'
    if path.is_file():
        old = pd.read_csv(path, float_precision='round_trip')
        kept = old[~old.set_index(keys).index.isin(table.set_index(keys).index)]
        table = pd.DataFrame(kept.to_dict('records') + table.to_dict('records'))
    table.to_csv(path, index=False)

def write(out):
    "The tables of all folds that are done"
    folds = finished_folds(out)
    results.mkdir(exist_ok=True)
    write_table(mean_measures(folds).round(5), 'measures', ['method', 'fold', 'section', 'seed'])
    write_table(pd.DataFrame([{'fold': fold_name(f['test']), **{k: f.get(k) for k in KEPT}} for f in folds]), 'folds', ['method', 'fold', 'seed'])
    inner = [pd.DataFrame(f['inner_folds']).melt(['rank', 'alpha'], var_name='left_out', value_name='r').assign(fold=fold_name(f['test'])) for f in folds if f['method'] == 'texture' and f['seed'] == 0 and f['inner_folds']]
    if inner: write_table(pd.concat(inner), 'inner_folds', ['fold', 'left_out', 'rank', 'alpha'])

def main(folder, *parts):
    start, out = time.perf_counter(), Path(folder)
    read, catalogue = reader(sections)
    panel = read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
    named = lambda methods: {k: partial(m, label=k) if k.startswith('texture') else m for k,m in methods.items()}
    run = partial(cross_validate, read, catalogue, out=out, by=('section', 'patient'), panel=panel, cache=out/'patches', command='experiments/leaderboard.py')
    for part in parts or ('fast', 'own', 0, 1, 2):
        if part == 'fast':
            run(named(once))
            run(named(fast), seeds=(0, 1, 2))
        elif part == 'own': run(own, seeds=(0, 1, 2))
        else: run(slow, seeds=(int(part),), ray='local', cores=1)
        write(out)
    print(provenance('experiments/leaderboard.py', start))

if __name__ == '__main__':
    folder, *parts = sys.argv[1:] or sys.exit(__doc__)
    if wrong := [p for p in parts if p not in ('fast', 'own') and not p.isdecimal()]: sys.exit(f'{", ".join(wrong)}: a part is fast, own, or the number of a seed.\n\n{__doc__}')
    main(folder, *parts)
