"""Where the spots of a real section look: the attention of a HisToGene of 256 features, for the explorer; kept in the package.

    HISTOGENE_DATA=... python experiments/real_attention.py

Trained on B4, C2, C4 and C5 for 100 epochs, in about a minute; every spot of C3 is a target. The paper's size is too large to keep: 128 heads.
"""
import json, time
from pathlib import Path
import numpy as np, torch
import histogene_nb
from histogene_nb.folds import provenance
from histogene_nb.evaluation import gene_correlations
from histogene_nb.expression import normalize, read_panel
from histogene_nb.model import attention_maps, HisToGene
from histogene_nb.files import data_folder
from histogene_nb.her2st import read_her2st
from histogene_nb.interface import predict

results = Path(histogene_nb.__file__).parent/'results'

def main():
    start, read = time.perf_counter(), lambda name: read_her2st(data_folder(), name, verbose=False)
    panel, section = read_panel(data_folder().parent/'reference'/'published_panel_785.csv'), read('C3')
    model, losses = HisToGene.train_on([read(s) for s in ('B4', 'C2', 'C4', 'C5')], panel, lr=1e-4, dim=256, depth=4, heads=4)
    maps = attention_maps(model, *model.look(section), torch.arange(len(section))).numpy()       # (4, 4, n, n)
    r = gene_correlations(normalize(section, panel), predict(model, section)).r.mean()
    np.savez_compressed(results/'real_attention.npz', maps=maps.astype(np.float16), spots=np.array(section.obs_names, dtype=str),
                        run=json.dumps(provenance('experiments/real_attention.py', start, mean_r=round(r, 4), first_loss=losses[0], last_loss=losses[-1])))
    print(f'mean r {r:.3f}, attention {(maps*len(section)).min():.2f} to {(maps*len(section)).max():.2f} times even')

if __name__ == '__main__': main()
