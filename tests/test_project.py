"""What holds for the project as a whole: notebooks, library and README agree, the wheel is complete, everything is described."""
import ast, importlib, inspect, json, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest
from fastcore.docments import docments
from conftest import cells, exports, name, notebooks, root
from run_notebooks import stale

made = 'settings.ini setup.py MANIFEST.in README.md LICENSE CHANGELOG.md _quarto.yml nbs histogene_nb'.split()
modules = sorted(p.stem for p in (root/'histogene_nb').glob('*.py') if not p.name.startswith('_'))
all_notebooks = pytest.mark.parametrize('path', notebooks(), ids=name)
all_modules = pytest.mark.parametrize('module', modules)

def run(*args, cwd): return subprocess.run([str(a) for a in args], cwd=cwd, check=True, capture_output=True, text=True).stdout

def test_citation(about):
    "CITATION.cff is of this version"
    said = dict(l.split(': ', 1) for l in (root/'CITATION.cff').read_text(encoding='utf-8').splitlines() if ': ' in l and not l.startswith(' '))
    assert (said['version'], said['title'], said['repository-code']) == (about['version'], about['lib_name'], f"https://github.com/{about['user']}/{about['repo']}")

@pytest.fixture
def copy(tmp_path):
    "The project without what git does not hold"
    for o in made:
        if (root/o).is_dir(): shutil.copytree(root/o, tmp_path/o, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'nbdev.yml'))
        else: shutil.copy(root/o, tmp_path/o)
    return tmp_path

def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}


# ---- in sync

def test_in_sync(copy):
    "`make sync` changes nothing."
    before, bin = files(copy), Path(sys.executable).parent
    run(bin/'nbdev_export', cwd=copy)
    run(bin/'nbdev_clean', cwd=copy)
    after = files(copy)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"make sync would change {', '.join(changed)}"

def test_modules_have_notebooks():
    "Nothing is in the library that no notebook exports: a renamed notebook leaves its old module behind."
    assert {exports(p) for p in notebooks()} - {None} == set(modules)

@pytest.mark.parametrize('path', sorted([*(root/'experiments').glob('*.py'), *(root/'tools').glob('*.py')]), ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_scripts_import_what_is_there(path):
    "Experiments run for hours and tools now and then, so no other test would notice that the library has moved on."
    wanted = [(n.module, a.name) for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('histogene_nb.') for a in n.names]
    gone = [f'{m}.{name}' for m,name in wanted if not hasattr(importlib.import_module(m), name)]
    assert not gone, f'{path.name} imports what is not there: {gone}'

def test_readme():
    import readme
    text, pictures = readme.readme()
    assert (root/'README.md').read_text(encoding='utf-8') == text, 'README.md is not that of nbs/index.ipynb: make sync'
    assert pictures and all((root/p).read_bytes() == png and f']({p})' in text for p,png in pictures.items())

def test_readme_from_cells():
    "Hidden cells are left out, code and what it printed are fenced, links to notebooks go to the site."
    import readme
    def code(s, **out): return dict(cell_type='code', source=s, outputs=[out] if out else [])
    def blocks(c): return list(readme.blocks(c, 'https://site'))
    assert blocks(code('#| hide\n1')) == []
    assert blocks(code('#| echo: false\n1', output_type='stream', text='a\n')) == ['```\na\n```']
    assert blocks(code('#| eval: false\n1+1')) == ['```python\n1+1\n```']
    assert blocks(code('#| label: idea\n#| fig-alt: "An idea."\nx', output_type='display_data', data={'image/png': ''}))[1] == '![An idea.](nbs/images/idea.png)'
    assert blocks(code('x', output_type='execute_result', data={'image/png': '', 'text/plain': '<Figure>'})) == ['```python\nx\n```']
    assert blocks(dict(cell_type='raw', source='---\na: 1\n---')) == []
    page = dict(cell_type='markdown', source='[a](tissue/tissue.ipynb#x) [b](https://other/c.ipynb)')
    assert blocks(page) == ['[a](https://site/tissue/tissue.html#x) [b](https://other/c.ipynb)']


# ---- the wheel

def test_wheel(copy, about):
    "The wheel, built from the sdist, holds every module and data file; it requires no nbdev, and nothing with an upper bound."
    run(sys.executable, '-m', 'build', '--no-isolation', cwd=copy)
    wheel = zipfile.ZipFile(next((copy/'dist').glob('*.whl')))
    want = {str(p.relative_to(root)) for p in (root/'histogene_nb').rglob('*') if p.suffix in ('.py', '.json', '.csv', '.npz')}
    assert not want - set(wheel.namelist())
    info = next(n for n in wheel.namelist() if n.endswith('METADATA'))
    requires = [l for l in wheel.read(info).decode().splitlines() if l.startswith('Requires-Dist:') and 'extra ==' not in l]
    assert len(requires) == len(about['requirements'].split())
    assert not [l for l in requires if 'nbdev' in l or '<' in l or '==' in l]
    scripts = wheel.read(info.replace('METADATA', 'entry_points.txt')).decode()
    for s in about['console_scripts'].split(): assert s.replace('=', ' = ') in scripts


# ---- notebooks

@all_notebooks
def test_opening(path):
    "A notebook says what it is and in one line what it is for."
    first = cells(path, 'markdown')[0]['source']
    assert re.match(r'# \S.*\n+> \S', first), f'{name(path)} does not open with a title and a > line'

@all_notebooks
def test_no_nbdev(path):
    "Readers in Colab have no nbdev."
    for c in cells(path):
        source = re.sub(r'^\s*[%!].*', 'pass', c['source'], flags=re.M)
        names = [n for o in ast.walk(ast.parse(source)) for n in
                 ([a.name for a in o.names] if isinstance(o, ast.Import) else [o.module or ''] if isinstance(o, ast.ImportFrom) else [])]
        assert not [n for n in names if n.split('.')[0] == 'nbdev']

machine_path = re.compile(r'(?<![\w.])(?:/(?:home|Users|root|tmp|var|private|mnt|opt|work)/[\w.-]+|[A-Z]:\\+Users)')

@all_notebooks
def test_outputs(path):
    "Outputs are saved, for the site shows those: no error, no path of the machine it was run on, small enough to open in Colab."
    assert path.stat().st_size < 3e6
    run = [c for c in cells(path) if not re.search(r'^#\| *(export|hide|default_exp|eval: *false)', c['source'], re.M)]
    assert not run or any(c['outputs'] for c in run), f'{name(path)} was saved without outputs: run it from top to bottom and save it'
    for c in cells(path):
        assert not [o for o in c['outputs'] if o['output_type'] == 'error'], f"saved error after:\n{c['source']}"
        shown = [{**o, 'data': {k: v for k, v in o.get('data', {}).items() if not k.startswith('image/')}} for o in c['outputs']]
        assert not (m := machine_path.search(json.dumps(shown))), f"{m[0]} in what is saved after:\n{c['source']}"
        assert not (m := machine_path.search(c['source'])), f"{m[0]} in:\n{c['source']}"

@all_notebooks
def test_outputs_are_of_this_code(path): assert not stale(path), f'{name(path)}: its saved outputs are of other code or results: tools/run_notebooks.py --stale, then make sync'

def test_stale_outputs_are_found(copy, monkeypatch):
    "A change of a notebook, of a module that it uses by way of another, or of results that it shows; not of anything else"
    monkeypatch.setattr('run_notebooks.library', copy/'histogene_nb')
    page, module, results = copy/'nbs'/'judging'/'leakage.ipynb', copy/'histogene_nb'/'sections.py', copy/'histogene_nb'/'results'
    def after(file, change):
        before = file.read_text(encoding='utf-8')
        file.write_text(change(before), encoding='utf-8')
        found = stale(page)
        file.write_text(before, encoding='utf-8')
        return found
    assert not stale(page)
    assert after(module, lambda t: t + 'x = 1\n') and after(results/'leaderboard'/'measures.csv', lambda t: t + '\n') and after(page, lambda t: t.replace('import matplotlib', 'import os, matplotlib', 1))
    assert not after(module, lambda t: t + '# a remark\n') and not after(module, lambda t: t.replace('"""', '"""More: ', 1).replace('    "Read', '    "Read on', 1)) and not after(copy/'histogene_nb'/'workshop.py', str.upper) and not after(results/'reference.csv', str.upper) and not after(page, lambda t: t.replace('# Section out, patient out', '# Out'))

@all_notebooks
def test_colab(path):
    "The first code cell is the one that prepares Colab."
    import colab
    code = cells(path)
    assert not code or code[0]['source'] == colab.setup(), 'make sync'

@pytest.mark.parametrize('there', [True, False])
def test_colab_cell(there, about, monkeypatch, capsys):
    "It installs from the address in settings.ini where the package is missing, nothing where it is there, and names the device."
    import builtins, colab
    asked, real = [], builtins.__import__
    class Shell:
        def run_line_magic(self, name, line): asked.append((name, line))
    def imported(name, *args, **kwargs):
        if name == 'histogene_nb' and not there: raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', imported)
    exec(colab.setup(), dict(get_ipython=Shell))
    assert asked == ([] if there else [('pip', f"install -q git+{about['git_url']}")])
    assert re.fullmatch(r'computes on .+ \((cpu|mps|cuda)\) in (float32|bfloat16|float16)(, large models in bfloat16)?\n', capsys.readouterr().out)

def test_addresses(about):
    "Links to the project's own repository are those of settings.ini"
    text = ''.join(c['source'] for path in notebooks() for c in cells(path, 'markdown'))
    found = re.findall(r'github(?:\.com)?/([\w-]+)/(histogene_nb)\b', text)
    assert found and set(found) == {(about['user'], about['repo'])}


# ---- every exported name is described

def returns_value(f):
    "Does the function return something?"
    tree = ast.parse(inspect.cleandoc('\n' + inspect.getsource(f)) if inspect.getsource(f)[0].isspace() else inspect.getsource(f))
    def own(node):
        for o in ast.iter_child_nodes(node):
            if isinstance(o, (ast.FunctionDef, ast.Lambda, ast.ClassDef)): continue
            yield o
            yield from own(o)
    return any(isinstance(o, ast.Return) and o.value and not (isinstance(o.value, ast.Constant) and o.value.value is None) for o in own(tree.body[0]))

def missing(f, label):
    "What is not said about the function `f`"
    f = inspect.unwrap(f)
    if not (f.__doc__ or '').strip(): yield f'{label}: docstring'
    said = docments(f, full=True)
    for k, p in inspect.signature(f).parameters.items():
        if k not in ('self', 'cls') and not k.startswith('_') and p.kind != p.VAR_KEYWORD and not said[k]['docment']: yield f'{label}: {k}'
    if returns_value(f) and not said['return']['docment']: yield f'{label}: what it returns'

@all_modules
def test_described(module):
    "Each exported function has a docstring and a comment beside each parameter; of classes, how one is made and its methods' docstrings, or those of what they override."
    mod, gaps = importlib.import_module(f'histogene_nb.{module}'), []
    for nm in mod.__all__:
        o = getattr(mod, nm)
        if not inspect.isclass(o) and inspect.isfunction(inspect.unwrap(o)): gaps += missing(o, nm)
        elif inspect.isclass(o):
            if not (o.__dict__.get('__doc__') or '').strip(): gaps.append(f'{nm}: docstring')
            for k, f in vars(o).items():
                if not inspect.isfunction(f): continue
                if k == '__init__': gaps += [g for g in missing(f, nm) if not g.endswith('docstring')]
                elif not k.startswith('_') and not (inspect.getdoc(getattr(o, k)) or '').strip(): gaps.append(f'{nm}.{k}: docstring')
    if gaps: pytest.fail(f'{module}: not described are\n' + '\n'.join(gaps), pytrace=False)
