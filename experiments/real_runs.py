"""The runs on real sections that the paper's pages show; their tables go into the package.

    HISTOGENE_DATA=... python experiments/real_runs.py runs

`real5`: cross-validation of B4, C2, C3, C4 and C5, by section and by patient. `real_A1`: the labelled section A1, from models trained on those five;
its image is the one of 2000 x 2138 pixels in the repository of the data, whose black surroundings and inset are made white.
`runs` keeps predictions; what is there already is not done again. Two folds at a time, one thread each: on two cores faster than one after the other.
"""
import os, shutil, subprocess, sys
from pathlib import Path
import numpy as np
from PIL import Image
import histogene_nb
from histogene_nb.folds import write_h5ad
from histogene_nb.files import data_folder
from histogene_nb.her2st import read_her2st
from histogene_nb.sections import new_section

results = Path(histogene_nb.__file__).parent/'results'
sections = ['B4', 'C2', 'C3', 'C4', 'C5']
settings = ['--panel', 'published_panel_785.csv', '--backbone', 'efficientnet_lite0', '--stnet_px', '112', '--gene_sets', 'c2.cp.v7.0.gmt', '--ray', 'local', '--cores', '1']

def white_around(name, folder):
    "A reduced image of patient A without what is no tissue, into a folder"
    image = np.array(Image.open(data_folder()/'reduced'/f'{name}_HE_image_dark.png').convert('RGB'))
    image[image.max(2) < 10] = 255
    image[:545, 1485:] = 255                                     # the inset
    Image.fromarray(image).save(folder/f'{name}.png')

def reduced_a1(folder):
    "A1 on its reduced image"
    white_around('A1', folder)
    full, scale = read_her2st(data_folder(), 'A1', verbose=False), 2000/6954
    return new_section(full.X, full.var_names, full.obs_names, full.obsm['spatial']*scale, full.obs.array_col, full.obs.array_row, 'A1', 'A', folder/'A1.png', 112*scale,
                       full.uns['histogene']['source'], full.obs.annotation)

def main(folder):
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(data_folder().parent/'reference'/'published_panel_785.csv', folder)
    shutil.copy(data_folder().parent/'genesets'/'c2.cp.v7.0.no-kegg-biocarta-stke.symbols.gmt', folder/'c2.cp.v7.0.gmt')
    write_h5ad(reduced_a1(folder), folder/'A1.h5ad')
    os.chdir(folder)                                             # commands, as they are kept with the results, then hold no path
    os.environ['OMP_NUM_THREADS'] = '1'
    for out,args in {'real5': [*sections, '--by', 'both'], 'real_A1': [*sections, 'A1.h5ad', '--only', 'A1']}.items():
        subprocess.run([str(Path(sys.executable).parent/'histogene_reproduce'), *args, *settings, '--out', out], check=True)
        shutil.copytree(Path(out)/'tables', results/out, dirs_exist_ok=True)

if __name__ == '__main__': main(sys.argv[1])
