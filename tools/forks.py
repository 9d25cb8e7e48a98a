"""Work in a process of its own that need not import PyTorch, scanpy and their like again: it is forked from a process that has imported them once.

Where a system cannot fork safely, such a process is started anew. The first one waits for the imports, all others start at once.
"""
import hashlib, inspect, multiprocessing, os, pickle, re, runpy, shlex, shutil, sys, tempfile
from pathlib import Path
from types import SimpleNamespace

library = Path(__file__).resolve().parent.parent/'histogene_nb'
context = multiprocessing.get_context('forkserver' if sys.platform == 'linux' else 'spawn')
context.set_forkserver_preload([*(f'histogene_nb.{p.stem}' for p in sorted(library.glob('[!_]*.py'))), 'scanpy', 'sklearn.cluster', 'seaborn', 'torch._dynamo', 'execnb.shell'])

def _child(work, args, folder, out, err, environment):
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for n,file in ((1, out), (2, err)): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), n)
    os.environ.update(environment)
    os.chdir(folder)
    work(*args)

def run(work, *args, folder='.', environment={}, limit=3600, context=context):
    "Call `work(*args)` in `folder`: its exit code and what it printed, as returncode, out and err; None as the code if it hung for `limit` seconds"
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs)/'out', Path(logs)/'err'
        process = context.Process(target=_child, args=(work, args, str(folder), out, err, environment))
        process.start(); process.join(limit)
        code = process.exitcode
        if code is None: process.kill(); process.join()
        said = [f.read_text(encoding='utf-8', errors='replace') if f.exists() else '' for f in (out, err)]
    return SimpleNamespace(returncode=code, out=said[0], err=said[1])

def script(*words):
    "What a shell does with these words, the first of them the path of a console script of this package"
    sys.modules.pop('histogene_nb.commands', None)                                # which looks at the words when it is imported
    sys.argv = [str(w) for w in words]
    runpy.run_path(sys.argv[0], run_name='__main__')

def draw_once(store):
    "In this process, a synthetic section that some process has drawn before is taken from the folder `store`"
    from histogene_nb import tissue
    from histogene_nb.files import whole_file
    draw = tissue.synthetic_section
    def synthetic_section(folder, *args, **kwargs):
        given = inspect.signature(draw).bind(folder, *args, **kwargs)
        given.apply_defaults()
        name = given.arguments['name']
        kept = Path(store)/f"{name}-{hashlib.sha1(repr([v for k,v in given.arguments.items() if k != 'folder']).encode()).hexdigest()[:12]}"
        if not kept.with_suffix('.pickle').is_file():
            section = draw(kept, *given.args[1:])
            with whole_file(kept.with_suffix('.pickle')) as part: part.write_bytes(pickle.dumps(section))
        section = pickle.loads(kept.with_suffix('.pickle').read_bytes())
        with whole_file(image := Path(folder)/f'{name}.jpg') as part: part.write_bytes((kept/f'{name}.jpg').read_bytes())
        section.uns['spatial'][name]['metadata']['source_image_path'] = str(image)
        return section
    tissue.synthetic_section = synthetic_section

def typed(shell):
    """What `!` does in a notebook: a command of this package runs in a process forked from the notebook's, anything else as ever.

    It sees what the notebook sees, a pretended device too. A process that has computed on several threads cannot be forked"""
    ordinary, fork = shell.system, multiprocessing.get_context('fork')
    def system(lines):
        for line in shell.var_expand(lines, depth=1).replace('\\\n', ' ').splitlines():
            words = shlex.split(line) if re.fullmatch('histogene_[^|<>&;$]*', line) else ()
            path = words and shutil.which(words[0])
            if not path: ordinary(line); continue
            ran = run(script, path, *words[1:], context=fork)
            print(ran.out + ran.err, end='')
            shell.user_ns['_exit_code'] = ran.returncode
            if ran.returncode is None: raise TimeoutError(f'still running: {line}')
            if ran.returncode: break
    return system

def cells_run(path, store, cells=None, painted=True, marks=('eval:false', 'slow')):
    """Run a notebook's first `cells` cells, or all, in the current folder, but those with one of these marks; the number of each once it has run.

    The first error ends it, with its cell. Figures that are not `painted` are made, but not turned into pictures"""
    draw_once(store)
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from matplotlib_inline.backend_inline import set_matplotlib_formats
    shell, nb = CaptureShell(mpl_format='png'), read_nb(path)
    if sys.platform == 'linux': shell.system = typed(shell)
    set_matplotlib_formats(*['png']*painted, bbox_inches=None, dpi=20)                # small, as nobody looks at them
    for n,cell in enumerate(nb.cells[:cells], 1):
        flags = [l[2:].replace(' ', '') for l in cell.source.splitlines() if l.startswith('#|')]
        if cell.cell_type != 'code' or set(flags) & set(marks): continue
        outputs = shell.run(cell.source)
        if shell.exc: sys.exit(f'{cell.source}\n\n' + '\n'.join(''.join(o['traceback']) for o in outputs if o['output_type'] == 'error'))
        yield n

def notebook(path, store):
    "Run a notebook in the current folder"
    for _ in cells_run(path, store): pass
