"""The same HisToGene from several seeds: r of each gene in each synthetic section, for the page of figure 2a. Ten minutes on two cores.

    python experiments/seeds.py [folder]      a run that was begun there is continued
"""
import json, sys, tempfile, time
from pathlib import Path
import pandas as pd
from histogene_nb.commands import histogene_reproduce
from histogene_nb.fold_tables import correlations, read_tables
from histogene_nb.folds import provenance
from histogene_nb.files import whole_file

SEEDS = 3
results = Path(__file__).resolve().parent.parent/'histogene_nb'/'results'

def main(folder):
    start = time.perf_counter()
    histogene_reproduce(['synthetic'], out=folder, methods='HisToGene', seeds=SEEDS)
    tables = read_tables(Path(folder)/'tables')
    rows = [pd.DataFrame(dict(section=section, seed=seed, r=c.r.round(5)))
            for seed in range(SEEDS) for section,c in correlations(tables, seed=seed)['HisToGene'].items()]
    made = pd.concat(rows).rename_axis('gene').reset_index()[['section', 'seed', 'gene', 'r']]
    about = provenance('experiments/seeds.py', start, settings=tables['run']['methods']['HisToGene'],
                       fold_seconds=round(float(tables['folds'].query("method == 'HisToGene'").seconds.sum()), 1))
    with whole_file(results/'synthetic_seeds.csv') as part:
        part.write_text(made.to_csv(index=False) + f'# {json.dumps(about)}\n', encoding='utf-8')

if __name__ == '__main__':
    if sys.argv[1:]: main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder: main(folder)
