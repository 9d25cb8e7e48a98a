"""HisToGene with as many steps as the paper's, 3,100, its output beginning at the training mean; its tables go into the package.

    HISTOGENE_DATA=... python experiments/paper_steps.py runs         every fold, sections and patients left out, one seed
    HISTOGENE_DATA=... python experiments/paper_steps.py runs B4      these folds only

The paper trains on 31 sections for 100 epochs, a section a step. Here four sections give 400 steps in 100 epochs, so epochs
are added. One training a fold, looked at after 400, 1,000 and 3,100 steps: what more steps bring stands side by side.
A fold takes an hour or more of one core in bfloat16, minutes on a card. What is interrupted goes on, and folds that are in
the tables already stay there.
"""
import sys, time
from pathlib import Path
import pandas as pd, torch
import histogene_nb
from histogene_nb.commands import reader
from histogene_nb.crossval import cross_validate
from histogene_nb.expression import read_panel
from histogene_nb.files import data_folder
from histogene_nb.fold_tables import mean_measures
from histogene_nb.folds import finished_folds, fold_name, provenance, read_scores
from histogene_nb.methods import spot_model
from histogene_nb.model import HisToGene
from histogene_nb.training import fit
from leaderboard import sections, write_table

results = Path(histogene_nb.__file__).parent/'results'/'paper_steps'
name, stops = 'HisToGene from the mean', (400, 1000, 3100)

FACTS = ('method', 'seed', 'precision', 'parameters', 'n_training_spots', 'seconds', 'peak_memory_GB', 'command', 'histogene_nb',
         'torch', 'device', 'threads', 'date')

class FromMean(HisToGene):
    "HisToGene whose output is each gene's training mean at first, as ST-Net's is"
    name = 'HisToGene'
    def learn(self, examples, sections, **settings):
        self.head[1].weight.data.zero_()
        self.head[1].bias.data.copy_(torch.cat([y for *_,y in examples]).mean(0))
        return fit(self, examples, **settings)

def paper_steps(training, test, panel, **how):
    "What HisToGene predicts after each number of steps; the last also super-resolved"
    predicted = []
    for n in stops:
        found, more = spot_model(training, test, panel, FromMean, f'{name}, {n} steps', epochs=-(-n//len(training)),
                                 superres=4 if n == stops[-1] else None,
                                 precision='bfloat16', **how)
        predicted += found
    return predicted, more

def by_gene(folder):
    "r of each gene after the last step, at the spots and super-resolved (*)"
    scores, last = read_scores(folder), f'{name}, {stops[-1]} steps'
    return scores[scores.method.str.startswith(last)].pivot(index=['section', 'gene'], columns='method', values='r').round(4).reset_index()

def write(out):
    "The tables of all folds that are done here, beside those that were done elsewhere"
    folds = finished_folds(out)
    at = [(f, fold_name(f['test']), len(f['training'])) for f in folds]
    made = {'measures': mean_measures(folds).round(5),
            'folds': pd.DataFrame([{'fold': n, **{k: f.get(k) for k in FACTS}} for f,n,_ in at]),
            'losses': pd.concat([pd.DataFrame(dict(fold=n, seed=f['seed'], step=[k*(i + 1) for i in range(len(f['losses']))], loss=f['losses'])).iloc[24::25]
                                 for f,n,k in at]),
            'genes': pd.concat([by_gene(f['folder']).assign(fold=n, seed=f['seed']) for f,n,_ in at])}
    results.mkdir(exist_ok=True)
    for name,table in made.items(): write_table(table, name, ['fold', 'seed'], results)

def main(folder, *folds):
    start, out = time.perf_counter(), Path(folder)
    read, catalogue = reader(sections)
    panel = read_panel(data_folder().parent/'reference'/'published_panel_785.csv')
    cross_validate(read, catalogue, {name: paper_steps}, out, ('section', 'patient'), panel, only=folds or None,
                   cache=out/'patches', command='experiments/paper_steps.py')
    write(out)
    print(provenance('experiments/paper_steps.py', start))

if __name__ == '__main__':
    main(*sys.argv[1:]) if sys.argv[1:] else sys.exit(__doc__)
