"""SIGKILL while a command works, then the same command again until it ends: what it leaves is compared with an undisturbed run.

    python tools/kills.py [N=50] [seed=0]

Training, prediction, cross-validation and download are killed at N moments spread over their runs, with their whole process group, some of them as typed
in a shell; then as often just before one of the changes that they make to files (a file opened for writing, moved or removed, a folder made). A run is
killed up to three times in a row before it may end. The table goes into the package.
"""
import json, os, signal, sys, tempfile, threading, time
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copytree
import anndata as ad, numpy as np, pandas as pd
import histogene_nb
from forks import context
from histogene_nb.commands import histogene_predict, histogene_train, reader
from histogene_nb.crossval import cross_validate
from histogene_nb.fold_tables import write_tables
from histogene_nb.folds import provenance, write_h5ad
from histogene_nb.methods import baselines, histogene
from histogene_nb.expression import read_panel, select_panel
from histogene_nb.tensors import read_tensors
from histogene_nb.her2st import download_her2st, git_blob_sha1, write_her2st
from histogene_nb.tissue import synthetic_section

results = Path(histogene_nb.__file__).parent/'results'/'robustness'
small = dict(epochs=8, every=0, lr=1e-3, dim=32, depth=2, heads=2)
small_as_typed = dict(epochs=8, lr=1e-3, setting=['every=0', 'dim=32', 'depth=2', 'heads=2'])

# The commands; each works in the current folder
def train(sections, panel, **options): histogene_train(sections, out='model', cache='cache', panel=panel, **options)

def predict(model, section, superres): histogene_predict(model, section, superres=superres, out='predicted.h5ad', cache='cache')

def validate(sections, panel):
    read, catalogue = reader(sections)
    cross_validate(read, catalogue, {'baselines': baselines, 'HisToGene': partial(histogene, **{**small, 'epochs': 4})}, '.', panel=read_panel(panel), cache='patches')
    write_tables('.', 'tables', read)

def download(url, hashes): download_her2st('.', base_url=url, hashes=hashes, progress=False)

def typed(*words): os.execv(words[0], [str(w) for w in words])

class Slow(SimpleHTTPRequestHandler):
    "A web server that takes its time over a file"
    def log_message(self, *args): pass
    def copyfile(self, source, out):
        while block := source.read(1 << 14):
            try: out.write(block)
            except ConnectionError: return                                                           # who asked was killed
            time.sleep(.01)

@contextmanager
def commands(folder):
    "Make what the commands need; for each its name, its share of the kills, the call, what of its work is never done again, and what is there before"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Slow, directory=str(folder/'site')))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sections = [synthetic_section(folder/'tissue', n, px=1200) for n in ('X1', 'X2', 'Y1')]
    for s in sections[:2]: write_her2st(s, folder/'site'/'data')
    hashes = {p.relative_to(folder/'site'/'data').as_posix(): git_blob_sha1(p) for p in files(folder/'site'/'data')}
    *known, new = [str(write_h5ad(s, folder/f'{n}.h5ad')) for s,n in zip(sections, ('X1', 'X2', 'Y1'))]
    panel = str(folder/'genes.txt')
    Path(panel).write_text('\n'.join(select_panel(sections[:2], n_top=20, min_spots=5)), encoding='utf-8')
    for name,epochs in ('older', 1), ('model', 3): histogene_train(known, out=folder/name, panel=panel, **{**small_as_typed, 'epochs': epochs})
    histogene_predict(str(folder/'older'), new, out=folder/'before'/'predicted.h5ad')
    options = ['--epochs=8', '--lr=1e-3', '--setting', *small_as_typed['setting']]
    shell = {c: Path(sys.executable).parent/c for c in ('histogene_train', 'histogene_predict')}
    yield [('train', .2, partial(train, known, panel, **small_as_typed), 'cache/*', None),
           ('train the texture model', .04, partial(train, known[:1], panel, model='texture'), 'cache/*', None),
           ('predict', .1, partial(predict, str(folder/'model'), new, 1), 'cache/*', folder/'before'),
           ('predict 4x', .1, partial(predict, str(folder/'model'), new, 4), 'cache/*', folder/'before'),
           ('download', .22, partial(download, f'http://127.0.0.1:{server.server_port}', hashes), '**/*', None),
           ('cross-validate', .24, partial(validate, known, panel), '**/*.npy **/fold.json', None),
           ('histogene_train in a shell', .06, partial(typed, shell['histogene_train'], *known, '--out=model', '--cache=cache', f'--panel={panel}', *options), 'cache/*', None),
           ('histogene_predict in a shell', .04, partial(typed, shell['histogene_predict'], folder/'model', new), 'cache/*', folder/'before')]
    server.shutdown(); server.server_close()

# What is in a folder
def files(folder): return [p for p in sorted(folder.rglob('*')) if p.is_file()]

def hidden(path): return any(part.startswith('.') for part in path.parts)

_CHANGING = 'date', 'seconds', 'peak_memory_GB', 'resumed'                                           # from run to run

def _steady(x):
    return {k: _steady(v) for k,v in x.items() if k not in _CHANGING} if isinstance(x, dict) else [_steady(v) for v in x] if isinstance(x, list) else x

def content(file):
    "What a file says, apart from dates and times; an error where it cannot be read"
    if file.suffix == '.safetensors': return {k: t.numpy().tobytes() for k,t in read_tensors(file)[0].items()}
    if file.suffix == '.json': return json.dumps(_steady(json.loads(file.read_text(encoding='utf-8'))))
    if file.suffix == '.csv': return pd.read_csv(file, dtype=str).drop(columns=list(_CHANGING), errors='ignore').to_csv()
    if file.suffix != '.h5ad': return file.read_bytes()
    a = ad.read_h5ad(file)
    return a.to_df().to_numpy().tobytes(), a.obs.to_csv(), a.var.to_csv(), a.obsm['spatial'].tobytes()

def contents(folder): return {str(p.relative_to(folder)): content(p) for p in files(folder) if not hidden(p.relative_to(folder))}

def damaged(folder, good):
    "What is wrong with files that are neither as they were nor as they are to be; of a checkpoint, also a hidden one, only that it can be read"
    found = []
    for p in files(folder):
        name = p.relative_to(folder)
        if hidden(name) and p.name != 'training.safetensors': continue
        try:
            if content(p) not in good.get(str(name), []) and p.name != 'training.safetensors': found.append(f'{name}: neither old nor new')
        except Exception as e: found.append(f'{name}: {e}')                                          # whatever its reader says
    return found

# Runs
def _child(work, folder, pipe, last):
    os.setsid(); os.chdir(folder)
    log = os.open(f'{folder}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for out in (1, 2): os.dup2(log, out)
    changes = 0
    def count(event, args):
        nonlocal changes
        if not (event in ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir') or event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR)): return
        if not (isinstance(args[0], (str, os.PathLike)) and Path(args[0]).absolute().is_relative_to(folder)): return
        changes += 1
        if changes == last: os.killpg(0, signal.SIGKILL)
    pipe.send(None)
    sys.addaudithook(count)
    work()
    pipe.send(changes)

def run(work, folder, seconds=None, change=None):
    "A command in `folder`, killed after so many seconds or before that change of a file: whether it was, how long it took, and the changes it made"
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(work, folder, there, change))
    process.start(); there.close(); here.recv()
    start = time.perf_counter()
    process.join(seconds)
    if process.is_alive(): os.killpg(process.pid, signal.SIGKILL); process.join()
    took, log = time.perf_counter() - start, Path(f'{folder}.log').read_text(encoding='utf-8')
    if process.exitcode == -signal.SIGKILL: return True, took, None
    if process.exitcode and 'there is a trained model already' not in log: raise RuntimeError(f'{folder.name}: {log}')   # that one was killed after its work was done
    with suppress(EOFError): return False, took, here.recv()
    return False, took, None                                                                         # typed in a shell: not counted

def trial(command, kind, n, folder, rng):
    "A row of the table: `n` kills of a command, at moments ('time') or before changes of files ('change')"
    name, _, work, keep, before = command
    def new(k):
        (out := folder/str(k)).mkdir(parents=True)
        return copytree(before, out, dirs_exist_ok=True) if before else out
    whole = new('whole')
    old = contents(whole)
    _, length, changes = run(work, whole)
    wanted, all_files = contents(whole), [p.relative_to(whole) for p in files(whole)]
    good = {k: [c[k] for c in (old, wanted) if k in c] for k in {**old, **wanted}}
    moments = list(rng.permutation((np.arange(n) + rng.random(n))/n))
    row = dict(command=name, killed='at a moment' if kind == 'time' else 'before a change of a file', seconds=round(length, 2), changes=changes, kills=0, earliest=1., latest=0.,
               while_writing=0, ended=0, equal=0, left_over=0, damaged=0, repeated=0)
    while row['kills'] < n:
        out, kept = new(row['ended']), {}
        for _ in range(rng.integers(1, 4)):
            at = float(moments.pop() if moments else rng.random())                                         # more where a run ended before its moment came
            killed, _, _ = run(work, out, seconds=at*length) if kind == 'time' else run(work, out, change=1 + int(at*changes))
            if not killed: break
            bad = damaged(out, good)
            for b in bad: print(f'{name}, killed at {at:.3f}: {b}', flush=True)
            row.update(kills=row['kills'] + 1, earliest=min(row['earliest'], at), latest=max(row['latest'], at), damaged=row['damaged'] + len(bad),
                       while_writing=row['while_writing'] + any('.part' in p.name for p in files(out)))
            kept |= {p: p.stat() for pattern in keep.split() for p in out.glob(pattern) if p.is_file() and not hidden(p.relative_to(out))}
            if row['kills'] == n: break
        if killed: run(work, out)
        more = sorted({p.relative_to(out) for p in files(out)} - set(all_files))
        for m in more: print(f'{name}, left over: {m}', flush=True)
        row.update(ended=row['ended'] + 1, equal=row['equal'] + (contents(out) == wanted), left_over=row['left_over'] + len(more),
                   repeated=row['repeated'] + sum((p.stat().st_ino, p.stat().st_mtime_ns) != (s.st_ino, s.st_mtime_ns) for p,s in kept.items()))
    return row

def main(n=50, seed=0):
    start, rng, rows = time.perf_counter(), np.random.default_rng(int(seed)), []
    results.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, commands(folder := Path(folder).resolve()) as them:
        for command in them:
            kinds = ['time'] if 'shell' in command[0] else ['time', 'change']
            for kind in kinds:
                rows.append(trial(command, kind, max(1, round(int(n)*command[1])), folder/command[0]/kind, rng))
                pd.DataFrame(rows).round(3).to_csv(results/'kills.csv', index=False)                   # as they come
                print(rows[-1], flush=True)
    (results/'kills.json').write_text(json.dumps(provenance(f'tools/kills.py {n} {seed}', start, 'cpu', seed=int(seed)), indent=1))

if __name__ == '__main__': main(*sys.argv[1:])
