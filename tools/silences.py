"""How long each command says nothing, as somebody sees it who waits before a terminal: every command runs on one core with a pseudo-terminal,
and what it writes there is timed. The table, command by command: seconds in all, until the first sign of life, the longest silence and the line
of this package that was at work in it, and what Python takes to end after the last word. Takes some fifteen minutes:

    python tools/silences.py SECTION --image FILE --spot-diameter PIXELS [--out FOLDER] [--only WORD ...]

SECTION is one of your own of a size that takes long, such as a Visium folder, and FILE its image."""
import argparse, functools, http.server, os, pty, re, select, shutil, signal, subprocess, sys, tempfile, termios, threading, time
from pathlib import Path
import pandas as pd

# the command as it is typed; a signal makes it write down where it is
BOOT = '''import faulthandler, runpy, signal, sys
faulthandler.register(signal.SIGUSR1, open(sys.argv[1], 'w'), all_threads=True)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')'''
DOWNLOAD = '''import sys; from histogene_nb.her2st import download_her2st; from histogene_nb.files import data_folder
download_her2st(sys.argv[2], ['B4', 'C2'], base_url=sys.argv[1])'''
SILENT = 3 # seconds

def watched(argv, env, log):
    "Run a command on a pseudo-terminal: its exit status, the seconds at which it wrote and what; where it was in each silence"
    start, wrote, was, (ours, theirs) = time.monotonic(), [(0., '')], {}, pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    while True:
        ready = select.select([ours], [], [], .1)[0]
        now = time.monotonic() - start
        if ready:
            try: said = os.read(ours, 65536).decode(errors='replace')
            except OSError: said = ''
            if not said: break
            wrote.append((now, said))
        elif now - wrote[-1][0] > SILENT and len(wrote) not in was:
            was[len(wrote)] = ''
            if log and log.is_file():
                at = log.stat().st_size
                child.send_signal(signal.SIGUSR1); time.sleep(.2)
                was[len(wrote)] = log.read_text()[at:]
    os.close(ours)
    return child.wait(), [*wrote, (time.monotonic() - start, '')], was

def our_line(dump):
    "The innermost lines of this package in a dump of the main thread's calls"
    main = dump.rpartition('Current thread')[2] or dump
    ours = re.findall(r'histogene_nb/(\w+)\.py", line (\d+) in (\w+)', main.partition('\n\n')[0])
    return ' < '.join(f'{m}.{f}:{n}' for m,n,f in ours[:3]) or 'not in this package'

def row(command, argv, env, log=None):
    "A command's row of the table"
    rc, wrote, was = watched(argv, env, log)
    *gaps, (end, _) = [(b[0] - a[0], i) for i,(a,b) in enumerate(zip(wrote, wrote[1:]), 1)]
    longest, i = max(gaps or [(end, 0)])
    last = [l for l in re.split(r'[\r\n]+', ''.join(w for _,w in wrote[:-1])) if l.strip()]
    if rc: print(f'{command}: exit {rc}', *last[-3:], sep='\n')
    return dict(command=command, seconds=round(wrote[-1][0], 1), first_sign=round(wrote[1][0], 1), longest_silence=round(longest, 1),
                over_3_s=sum(g > SILENT for g,_ in gaps), end=round(end, 1), writes=len(wrote) - 2, at=our_line(was.get(i, '')) if longest > SILENT else '')

class Slow(http.server.SimpleHTTPRequestHandler):
    "A server at 400 kB a second"
    def log_message(self, *args): pass
    def copyfile(self, source, out):
        while piece := source.read(40_000): out.write(piece); out.flush(); time.sleep(.1)

def served(folder):
    "The address of a slow server of this folder's files below data/"
    site = Path(tempfile.mkdtemp())
    (site/'data').symlink_to(folder)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Slow, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}'

def commands(section, image, diameter, out):
    "What is run, in this order: a name and the words of its command"
    small, tiny = ['--setting', 'dim=128', 'depth=4', 'heads=4'], ['--n-top', 500, '--min-spots', 50]
    yield 'demo', ['histogene_demo', '--out', out/'demo']
    yield 'train HisToGene, full size', ['histogene_train', section, '--out', out/'full', '--epochs', 2, *tiny]
    yield 'train HisToGene, small', ['histogene_train', section, '--out', out/'small', '--epochs', 3, *small, *tiny]
    yield 'train ST-Net', ['histogene_train', section, '--model', 'ST-Net', '--out', out/'stnet', '--epochs', 1, *tiny, '--setting',
                           'backbone=efficientnet_lite0', 'patch_size=64']
    yield 'train texture', ['histogene_train', section, '--model', 'texture', '--out', out/'texture', *tiny]
    predict = lambda model, *more: ['histogene_predict', out/model, *more]
    yield 'predict 1x, full size', predict('full', section, '--out', out/'full.h5ad')
    yield 'predict 1x, texture', predict('texture', section, '--out', out/'texture.h5ad')
    yield 'predict 4x, small, one sequence', predict('small', section, '--superres', 4, '--out', out/'small4.h5ad')
    yield 'predict 4x, small, tiles', predict('small', section, '--superres', 4, '--tile', 40, '--out', out/'tiles4.h5ad')
    yield 'image alone, texture', predict('texture', '--image', image, '--spot-diameter', diameter, '--out', out/'image.h5ad')
    yield 'plot', ['histogene_plot', out/'texture.h5ad', out/'small4.h5ad', '--section', section, '--out', out/'maps.png']
    yield 'reproduce synthetic', ['histogene_reproduce', 'synthetic', '--methods', 'baselines,HisToGene,ridge,texture', '--only', 'X1',
                                  '--out', out/'reproduced']

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('section'); parser.add_argument('--image', required=True); parser.add_argument('--spot-diameter', required=True)
    parser.add_argument('--out', default='silences'); parser.add_argument('--only', nargs='*', default=[''], help='words of the names of the commands to run')
    given = parser.parse_args()
    out = Path(given.out); out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'COLUMNS': '120'}
    rows = []
    def add(found):
        rows.append(found); print('  '.join(f'{v}' for v in found.values()), flush=True)
        pd.DataFrame(rows).to_csv(out/'silences.csv', index=False)
    asked = lambda name: any(word in name for word in given.only)
    if asked('download'):
        from histogene_nb.files import data_folder
        shutil.rmtree(out/'her2st', ignore_errors=True)
        add(row('download, 400 kB/s', [sys.executable, '-c', DOWNLOAD, served(data_folder()), str(out/'her2st')], env))
    for name,words in commands(given.section, given.image, given.spot_diameter, out):
        if not asked(name): continue
        log = out/'where.txt'
        script = Path(sys.executable).with_name(words[0])
        add(row(name, [sys.executable, '-c', BOOT, str(log), str(script), *map(str, words[1:])], env, log))
    print(pd.DataFrame(rows).to_string(index=False))

if __name__ == '__main__': main()
