"Write histogene_nb/data/her2st_files.csv, the git blob SHA-1 of every file of the HER2+ repository, from SOURCES.tsv."
import os
from pathlib import Path
import pandas as pd

source = Path(os.environ.get('HISTOGENE_DATA', '../shared'))/'her2st'/'SOURCES.tsv'
target = Path(__file__).parent.parent/'histogene_nb'/'data'/'her2st_files.csv'
files = pd.read_csv(source, sep='\t')
files = files[files.path.str.contains('/ST-')].sort_values('path')
files.to_csv(target, index=False, lineterminator='\n')
print(f'{target.name}: {len(files)} files')
