"""Put the cell that prepares Colab in front of the first code cell of every notebook: python tools/colab.py

Where the package is installed from stands in settings.ini. The site does not show the cell, and tests do not run it in each notebook, as it would install nothing there.
"""
from configparser import ConfigParser
from pathlib import Path
import nbformat

root = Path(__file__).resolve().parent.parent
start = '#| hide\n#| eval: false\n# In Colab:'

def setup(folder=root):
    "The cell's source"
    config = ConfigParser()
    config.read(folder/'settings.ini', encoding='utf-8')
    return f"""{start} installs the package where it is missing, and says what it computes on
try: import histogene_nb
except ImportError:
    get_ipython().run_line_magic('pip', 'install -q git+{config['DEFAULT']['git_url']}')
from histogene_nb.devices import computes_on
print(computes_on())"""

def prepare(nb, source):
    "Put `source` in front of a notebook's first code cell, in the place of an earlier one; whether that changed it"
    code = [i for i,c in enumerate(nb.cells) if c.cell_type == 'code']
    if not code or nb.cells[code[0]].source == source: return False
    if nb.cells[code[0]].source.startswith(start): nb.cells[code[0]].source = source
    else:
        nb.cells.insert(code[0], nbformat.v4.new_code_cell(source, id='colab'))
        nb.nbformat_minor = 5
    return True

if __name__ == '__main__':
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        nb = nbformat.read(path, 4)
        if '.ipynb_checkpoints' not in path.parts and prepare(nb, setup()): path.write_text(nbformat.writes(nb, indent=1) + '\n', encoding='utf-8')
