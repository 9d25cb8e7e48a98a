"""Every real section and slide of HISTOGENE_DATA by the commands: read, predicted with a small quick model, plotted; and a table of what was read.

    python tools/every_section.py FOLDER        some minutes on one core

The two models (human from C2, mouse from the olfactory bulb's replicate 1) are small and hardly trained: they show that each section goes the whole way, not how well it is predicted.
"""
import io, sys, time
from contextlib import redirect_stdout
from pathlib import Path
import anndata as ad, pandas as pd
from histogene_nb.commands import histogene_plot, histogene_predict, histogene_train
from histogene_nb.files import InputError, data_folder

DATA = data_folder().parent
QUICK = dict(n_top=60, min_spots=20, epochs=3, lr=1e-3, setting=['dim=32', 'depth=1', 'heads=2', 'patch_size=56'], device='cpu')

def samples():
    "The sections with counts: path, image (where it is not found beside the counts), and whose genes they have"
    her2 = [(f'her2st/{n}', None, 'human') for n in ('B4', 'C2', 'C3', 'C4', 'C5')]
    reduced = [(f'her2st/{n}', f'her2st/reduced/{n}_HE_image_dark.png', 'human') for n in ('A1', 'A2')]
    visium = [('visium/outs', None, 'human'), ('visium/mouse_colon', None, 'mouse'), *((f'visium/fixtures/{p}', None, None) for p in (
              '10xVisium/section1', '10xVisium/section2/outs', 'binned_outputs/square_002um'))]
    return her2 + reduced + [(f'mob/MOB_Rep{i}', None, 'mouse') for i in (1, 2)] + visium

def said(f, *args, **kwargs):
    "What a command printed, or why it refused"
    out = io.StringIO()
    try:
        with redirect_stdout(out): f(*args, **kwargs)
    except InputError as e: return out.getvalue(), str(e)
    return out.getvalue(), ''

def main(home):
    home.mkdir(parents=True, exist_ok=True)
    for kind,path in dict(human='her2st/C2', mouse='mob/MOB_Rep1').items():
        if not (home/kind).exists(): histogene_train([str(DATA/path)], out=str(home/kind), **QUICK)
    rows = []
    def run(path, models, **given):
        for kind in models:
            out, start = home/f'{path.replace("/", "_")}.h5ad', time.perf_counter()
            printed, refused = said(histogene_predict, str(home/kind), out=str(out), device='cpu', **given)
            if not refused:
                section = dict(section=given['section']) if 'section' in given else {}
                printed2, refused = said(histogene_plot, [str(out)], out=str(out.with_suffix('.png')), **section)
            row = dict(path=path, model=kind, read=printed.strip().splitlines()[0] if printed.strip() else '', refused=refused.replace(str(DATA), '…'), seconds=round(time.perf_counter() - start, 1))
            if not refused and out.exists(): row['predicted'] = '{} x {}'.format(*ad.read_h5ad(out).shape)
            rows.append(row)
            if not refused: break
    for path,image,kind in samples():
        if image:
            table = home/'one.csv'
            table.write_text(f'path,image\n{DATA/path},{DATA/image}\n')
            printed, refused = said(histogene_predict, str(home/kind), samples=str(table), out=str(home/'tables'), device='cpu')
            out = home/'tables'/f'{Path(path).name}.h5ad'
            if not refused: _, refused = said(histogene_plot, [str(out)], out=str(home/f'{path.replace("/", "_")}.png'))
            rows.append(dict(path=path, model=kind, read=printed.strip().splitlines()[0] if printed.strip() else '', refused=refused.replace(str(DATA), '…'), predicted='{} x {}'.format(*ad.read_h5ad(out).shape) if not refused else ''))
        else: run(path, [kind] if kind else ['human', 'mouse'], section=str(DATA/path))
    for image,wide in [('slides/cmu-1-small-region.svs', 110), ('slides/tcga-cr-7395-01a-01-ts1.svs', 220), ('slides/kidney-48-5.tif', 60), *((f'cscc/P2_{i}_0.0625.jpg', 14) for i in (1, 2, 3))]:
        run(image, ['human'], image=str(DATA/image), spot_diameter=wide)
    table = pd.DataFrame(rows)
    table.to_csv(home/'every_section.csv', index=False)
    with pd.option_context('display.max_colwidth', None, 'display.width', 250): print(table.to_string())

if __name__ == '__main__': main(Path(sys.argv[1] if len(sys.argv) > 1 else 'every_section'))
