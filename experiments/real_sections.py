"""The main job on real sections: train on B4, C2, C4, C5, predict C3 at spots and 4x; results go into the package.

    HISTOGENE_DATA=... python experiments/real_sections.py runs
    HISTOGENE_DATA=... python experiments/real_sections.py reference    only the numbers to compare with, from reference/numbers.md beside the data

Full-size model, published 785-gene panel, 100 epochs; once with pixels centred (the default) and once raw, as the released code
has them. `runs` keeps models and predictions; what is there already is not done again, an interrupted training goes on.
"""
import json, os, re, subprocess, sys
from pathlib import Path
import anndata as ad, pandas as pd
import histogene_nb
from histogene_nb.files import data_folder

results = Path(histogene_nb.__file__).parent/'results'

def run(*args): subprocess.run([str(Path(sys.executable).parent/args[0]), *args[1:]], check=True)

def reference():
    "Mean r of one run of the released code, where that was run"
    table = (data_folder().parent/'reference'/'numbers.md').read_text().partition("| test section | authors' code")[2].partition('\n\n')[0]
    found = re.findall(r'^\| ([A-H]\d)[^|]*\| (-?\d\.\d+) \|', table, re.M)
    if not found: sys.exit("reference/numbers.md beside the data: there is no table that begins with 'test section' and 'authors' code', or no number in it. Copy the file again.")
    rows = [('released code, trained on the other four', s, float(r), 'one run of the released code, 8 layers, 100 epochs, its own normalisation') for s,r in found]
    pd.DataFrame(rows, columns=['what', 'section', 'mean_r', 'source']).to_csv(results/'reference.csv', index=False)

def main(folder):
    reference()
    panel = (data_folder().parent/'reference'/'published_panel_785.csv').read_text()
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)                                             # commands, as they are kept with the results, then hold no path
    Path('published_panel_785.csv').write_text(panel)
    summary, genes = [], {}
    for pixels in ('raw', 'centred'):
        model, cache = f'model_{pixels}', ['--cache', 'patches']
        if not Path(model, 'config.json').exists():
            run('histogene_train', 'B4', 'C2', 'C4', 'C5', '--panel', 'published_panel_785.csv', '--pixels', pixels, '--out', model, *cache)
        for superres in ('1', '4'):
            out = Path(f'C3_{pixels}_{superres}x.h5ad')
            if not out.exists(): run('histogene_predict', model, 'C3', '--superres', superres, '--out', str(out), *cache)
            about = json.loads(out.with_suffix('.json').read_text())
            (method, r), = about['results'].items()
            train = about['trained_by']
            summary.append(dict(pixels=pixels, method=method, **r, train_seconds=train['seconds'], train_peak_GB=train['peak_memory_GB'], predict_seconds=about['seconds'],
                                predict_peak_GB=about['peak_memory_GB'], train_command=train['command'], predict_command=about['command'],
                                **{k: about[k] for k in ('histogene_nb', 'torch', 'device', 'threads', 'date')}, seed=about['training']['seed'], epochs=about['training']['epochs'],
                                first_loss=about['training']['losses'][0], last_loss=about['training']['losses'][-1]))
            genes[f'{method}, {pixels}'] = pd.read_csv(out.with_suffix('.csv'), index_col=0)
    pd.DataFrame(summary).to_csv(results/'real_C3_summary.csv', index=False)
    pd.concat(genes, names=['method', 'gene']).round(5).to_csv(results/'real_C3_genes.csv')
    top = genes['HisToGene, centred'].r.nlargest(4).index
    for superres in ('1', '4'):
        a = ad.read_h5ad(f'C3_centred_{superres}x.h5ad')
        place = pd.DataFrame(a.obsm['spatial'], columns=['x', 'y'], index=a.obs_names).round(2)
        place.join(a[:, top].to_df().round(4)).to_csv(results/f'real_C3_maps_{superres}x.csv', index_label='spot')

if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    reference() if sys.argv[1] == 'reference' else main(sys.argv[1])
