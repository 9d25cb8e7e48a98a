"""Run notebooks and save their outputs, each from an empty folder: python tools/run_notebooks.py [--stale] [nbs/idea/patches.ipynb ...]

All notebooks but the workshop's exercises unless some are named; with --stale, those of them whose outputs are not of today's code. The pages of the paper share a folder, and with it
the run that they show. Progress bars are left out of the outputs, figures get a palette, and metadata are left out but for a mark of the code and results that the outputs are of.
"""
import ast, base64, hashlib, io, re, sys, tempfile, time, tokenize
from datetime import datetime
from pathlib import Path
import nbformat
from PIL import Image
from nbclient import NotebookClient

root = Path(__file__).resolve().parent.parent
nbs, library = root/'nbs', root/'histogene_nb'

def modules_used(code):
    "The library's modules that some code imports, directly or through others"
    found, todo = set(), {code}
    while todo:
        text = todo.pop()
        names = set(re.findall(r'(?:from|import) +(?:histogene_nb)?\.(\w+)', text))
        for listed in re.findall(r'from +(?:histogene_nb|\.) +import +([\w, ]+)', text): names |= {n.split()[0] for n in listed.split(',') if n.strip()}
        names = {n for n in names if (library/f'{n}.py').is_file()} - found
        found |= names
        todo |= {(library/f'{n}.py').read_text(encoding='utf-8') for n in names}
    return sorted(found)

def without_words(code):
    "Code without its comments and docstrings, which no output depends on, and without empty lines"
    lines = code.splitlines()
    python = re.sub(r'^(\s*)[%!].*', r'\1pass', code, flags=re.M)
    words = [n.body[0] for n in ast.walk(ast.parse(python)) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n, clean=False) is not None]
    cuts = [(d.lineno, d.col_offset, d.end_lineno, d.end_col_offset) for d in words]
    for t in tokenize.tokenize(io.BytesIO(python.encode()).readline):
        if t.type == tokenize.COMMENT: cuts.append((t.start[0], len(lines[t.start[0] - 1][:t.start[1]].encode()), t.end[0], len(lines[t.start[0] - 1].encode())))
    for first,start,last,end in sorted(cuts, reverse=True):                                          # columns are of bytes, as ast counts them
        rest = lines[last - 1].encode()[end:].decode()
        lines[first - 1:last] = [lines[first - 1].encode()[:start].decode() + rest, *['']*(last - first)]
    return '\n'.join(l.rstrip() for l in lines if l.strip())

def fingerprint(nb):
    "What a notebook's outputs depend on: its code that is run, the library's modules that it uses, and the results and data in the package that it names"
    code = '\n'.join(c.source for c in nb.cells if c.cell_type == 'code' and 'eval: false' not in c.source)
    h = hashlib.blake2b(without_words(code).encode(), digest_size=8)
    for m in modules_used(code): h.update(without_words((library/f'{m}.py').read_text(encoding='utf-8')).encode())
    for entry in sorted([*(library/'results').iterdir(), *(library/'data').iterdir()]):
        start = entry.stem.rpartition('_')[0]
        if entry.stem in code or start and start + '_{' in code:
            for f in sorted(entry.rglob('*.*')) if entry.is_dir() else [entry]: h.update(f.read_bytes())
    return h.hexdigest()

def stale(path):
    "Whether a notebook's saved outputs are of other code or results than today's"
    nb = nbformat.read(path, 4)
    return nb.metadata.get('ran') != fingerprint(nb)

def progress_bar(output):
    return '%|' in output.get('text', '') or any('%|' in str(v) or 'widget' in k for k,v in output.get('data', {}).items() if not k.startswith('image/'))

def seconds(cell):
    "How long a cell that was just run took"
    began, ended = (datetime.fromisoformat(cell.metadata['execution'][k].replace('Z', '+00:00')) for k in ('iopub.execute_input', 'shell.execute_reply'))
    return (ended - began).total_seconds()

def lighter(output):
    "Replace a figure's PNG by one with a palette of 256 colours where that is smaller"
    picture = output.get('data', {}).get('image/png')
    if picture is None: return output
    made, image = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGBA')
    white = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    white.quantize(256, kmeans=2).save(made, 'png', optimize=True)
    small = base64.b64encode(made.getvalue()).decode()
    if len(small) < len(picture): output['data']['image/png'] = small
    return output

def run(path, shared):
    nb, start = nbformat.read(path, 4), time.perf_counter()
    skipped = [c for c in nb.cells if c.cell_type == 'code' and 'eval: false' in c.source]
    for c in skipped: c.cell_type = 'raw'
    with tempfile.TemporaryDirectory() as empty:
        folder = shared if path.parent.name == 'paper' else empty
        NotebookClient(nb, timeout=3600, kernel_name='python3', resources={'metadata': {'path': str(folder)}}).execute()
    for c in skipped: c.cell_type = 'code'; c.setdefault('outputs', []); c.setdefault('execution_count', None)
    for i,c in enumerate(nb.cells):
        if 'execution' in c.metadata and (took := seconds(c)) > 5: print(f'    cell {i}, {took:.0f} s: {c.source[:80]!r}')
        c.metadata = {}
        if 'outputs' in c: c.outputs = [lighter(o) for o in c.outputs if not progress_bar(o)]
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}, 'ran': fingerprint(nb)}
    nbformat.write(nb, path)
    print(f'{path.name}: {time.perf_counter() - start:.0f} s', flush=True)

if __name__ == '__main__':
    paths = [Path(p).resolve() for p in sys.argv[1:] if p != '--stale'] or sorted(p for p in nbs.rglob('*.ipynb') if not any(q.startswith(('.', '_')) for q in p.relative_to(nbs).parts) and not p.with_stem(f'{p.stem}_solutions').exists())
    if '--stale' in sys.argv: paths = [p for p in paths if stale(p)]
    with tempfile.TemporaryDirectory() as shared:
        for path in paths: run(path, shared)
