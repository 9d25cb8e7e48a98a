"""Seven sections of three patients: A1 and A2 on their reduced images join B4 and C2 to C5; every section and every patient left out.

    HISTOGENE_DATA=... python experiments/three_patients.py runs           what chance has no part in, then the texture model with one seed
    HISTOGENE_DATA=... python experiments/three_patients.py runs 1 2       these seeds, of the methods that chance has a part in

A's images are those of 2,000 pixels in the repository of the data, a 3.5th of the full resolution; their black surroundings and inset are made white.
A2 lies on its picture as `A2_selection_on_app_image.tsv` beside it says. `runs` keeps predictions; folds that are there already are not done again.
The tables go into the package's results/three_patients, with what made them.
"""
import shutil, sys, time
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
from histogene_nb.her2st import read_her2st
from histogene_nb.methods import baselines, depth_maps, ridges, texture_model
from real_runs import white_around
from leaderboard import KEPT, sections as full, write_table

results, command = Path(histogene_nb.__file__).parent/'results'/'three_patients', 'experiments/three_patients.py'
reduced = ['A1', 'A2']
texture_alone = partial(texture_model, members=0, label='texture without transformers')

def without_chance(*args, **how):
    "Position alone, the two maps of depth, ridge regression on colours and on textures, and the texture model without its transformers"
    return sum((f(*args, **how)[0] for f in (baselines, depth_maps, ridges, texture_alone)), []), {}

trained = {'texture': partial(texture_model, label='texture')}

def whitened(folder):
    "The two pictures of A without what is no tissue; and where A2's spots lie on its own"
    folder.mkdir(parents=True, exist_ok=True)
    for s in reduced: white_around(s, folder)
    shutil.copy(data_folder()/'reduced'/'A2_selection_on_app_image.tsv', folder)

def write(out):
    "The tables of all folds that are done"
    folds = finished_folds(out)
    results.mkdir(exist_ok=True)
    write_table(mean_measures(folds).round(5), 'measures', ['method', 'fold', 'section', 'seed'], results)
    write_table(pd.DataFrame([{'fold': fold_name(f['test']), 'training': '+'.join(f['training']), **{k: f.get(k) for k in KEPT}} for f in folds]), 'folds', ['method', 'fold', 'seed'], results)

def main(folder, *seeds):
    start, out = time.perf_counter(), Path(folder)
    whitened(out/'images')
    read, catalogue = reader(full)
    read_any = lambda s: read_her2st(data_folder(), s, verbose=False, image=out/'images'/f'{s}.png') if s in reduced else read(s)
    catalogue = pd.concat([pd.DataFrame(dict(patient='A'), index=reduced), catalogue])
    panel = read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
    run = partial(cross_validate, read_any, catalogue, out=out, by=('patient', 'section'), panel=panel, cache=out/'patches', cores=1, command=command)
    if not seeds:
        run({'without chance': without_chance})
        write(out)
    run(trained, seeds=tuple(map(int, seeds or (0,))))
    write(out)
    print(provenance(command, start))

if __name__ == '__main__':
    folder, *seeds = sys.argv[1:] or sys.exit(__doc__)
    if wrong := [s for s in seeds if not s.isdecimal()]: sys.exit(f'{", ".join(wrong)}: give the numbers of seeds.\n\n{__doc__}')
    main(folder, *seeds)
