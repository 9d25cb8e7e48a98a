"""Every notebook runs from top to bottom, in a new kernel and an empty folder, as it would in Colab.

The pages of the paper share one folder: the run that the first of them makes is the run that they all show."""
import re
import nbformat, pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from conftest import name, notebooks

def runs(cell):
    "Not what nbdev leaves out too: cells marked `#| eval: false` or `#| slow`"
    flags = [l[2:].replace(' ', '') for l in cell.source.splitlines() if l.startswith('#|')]
    return cell.cell_type == 'code' and 'eval:false' not in flags and 'slow' not in flags

def one_after_another(path): return pytest.mark.xdist_group('paper') if path.parent.name == 'paper' else ()

@pytest.mark.parametrize('path', [pytest.param(p, marks=one_after_another(p), id=name(p)) for p in notebooks()])
def test_notebook(path, tmp_path, tmp_path_factory):
    if path.parent.name == 'paper':
        tmp_path = tmp_path_factory.getbasetemp()/'paper'
        tmp_path.mkdir(exist_ok=True)
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if runs(c)]
    nb.metadata = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    client = NotebookClient(nb, timeout=1200, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}})
    try: client.execute(); error = ''
    except CellExecutionError as e: error = re.sub(r'\x1b\[[0-9;]*m', '', str(e))
    if error: pytest.fail(f'{name(path)}: {error}', pytrace=False)
