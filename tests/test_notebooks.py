"""Every notebook runs from top to bottom, in a new process and an empty folder, in IPython without a kernel (tools/run_notebooks.py runs it in one).

The pages of the paper share one folder: the run that the first of them makes is the run that they all show.
Synthetic sections are drawn once for all pages."""
import os
import pytest
from conftest import name, needs_counts, notebooks, reads_counts
from forks import notebook, run

def marks(path): return [pytest.mark.xdist_group('paper')]*(path.parent.name == 'paper') + [needs_counts]*reads_counts(path)

@pytest.mark.parametrize('path', [pytest.param(p, marks=marks(p), id=name(p)) for p in notebooks()])
def test_notebook(path, tmp_path, tmp_path_factory):
    shared = tmp_path_factory.getbasetemp()
    if path.parent.name == 'paper':
        tmp_path = shared/'paper'
        tmp_path.mkdir(exist_ok=True)
    tissue = (shared.parent if 'PYTEST_XDIST_WORKER' in os.environ else shared)/'tissue'
    ran = run(notebook, path, tissue, folder=tmp_path, environment={'MPLBACKEND': 'agg'})
    if ran.returncode != 0: pytest.fail(f'{name(path)}: {ran.err or "hung"}', pytrace=False)
