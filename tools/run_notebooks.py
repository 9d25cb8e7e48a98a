"""Run notebooks and save their outputs, each from an empty folder: python tools/run_notebooks.py [nbs/library/02_patches.ipynb ...]

All notebooks unless some are named. The pages of the paper share a folder, and with it the run that they show. Progress bars are left out of the outputs, and so are metadata.
"""
import sys, tempfile, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient

nbs = Path(__file__).parent.parent/'nbs'

def progress_bar(output):
    return '%|' in output.get('text', '') or any('%|' in str(v) or 'widget' in k for k,v in output.get('data', {}).items() if not k.startswith('image/'))

def run(path, shared):
    nb, start = nbformat.read(path, 4), time.perf_counter()
    skipped = [c for c in nb.cells if c.cell_type == 'code' and 'eval: false' in c.source]
    for c in skipped: c.cell_type = 'raw'
    with tempfile.TemporaryDirectory() as empty:
        folder = shared if path.parent.name == 'paper' else empty
        NotebookClient(nb, timeout=3600, kernel_name='python3', resources={'metadata': {'path': str(folder)}}).execute()
    for c in skipped: c.cell_type = 'code'; c.setdefault('outputs', []); c.setdefault('execution_count', None)
    for c in nb.cells:
        c.metadata = {}
        if 'outputs' in c: c.outputs = [o for o in c.outputs if not progress_bar(o)]
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    nbformat.write(nb, path)
    print(f'{path.name}: {time.perf_counter() - start:.0f} s', flush=True)

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as shared:
        for path in [Path(p) for p in sys.argv[1:]] or sorted(p for p in nbs.rglob('*.ipynb') if not any(q.startswith(('.', '_')) for q in p.parts)): run(path, shared)
