"""Build the site into _docs/ without Quarto: nbdev processes the notebooks, smalldocs renders them, KaTeX sets the formulas.

Quarto needs none of this. What smalldocs 0.5.4 lacks is put right here: pages are named as nbdev's links expect, formulas are
set while building (so that a wrong one is found), fonts and search work without a network and from a folder on a stick."""
import base64, contextlib, hashlib, html, io, json, os, re, shutil, subprocess, sys, tarfile
from pathlib import Path, PurePosixPath

import bokeh, yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs import layout, site as smalldocs_site
from smalldocs.config import BuildError, ConfigError, load
from smalldocs.notebook import DISPLAY_ORDER, IMAGES, cell_options

from check_site import check_site, read_page

root = Path(__file__).resolve().parents[1]


class SiteError(Exception): "What keeps the site from being built, with what to do about it."


# ---- the notebooks, processed by nbdev

def listed(o):
    "The pages that the sidebar lists, in order."
    if isinstance(o, str): return [o]
    if isinstance(o, list): return [p for x in o for p in listed(x)]
    return listed(o.get('href', [])) + listed(o.get('contents', []))

def check_listed(nbs):
    "The sidebar lists each notebook, and nothing else."
    names = [str(PurePosixPath(*Path(f).relative_to(nbs).parts)) for f in sorted(nbglob(nbs))]
    sidebar = yaml.safe_load((nbs/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']
    pages = [p for p in listed(sidebar) if '://' not in p]
    gone, new = [p for p in pages if not (nbs/p).is_file()], [n for n in names if n not in pages]
    if gone: raise SiteError(f"_quarto.yml lists pages that are not in nbs/: {', '.join(gone)}. Write them or take them off the list.")
    if new: raise SiteError(f"_quarto.yml does not list {', '.join(new)}. Add it to the sidebar where it should be read.")
    return pages

def process(cfg):
    "nbdev's processing of the notebooks into _proc, again where a notebook, the library or a tool has changed."
    cache, key = root/'_proc', hashlib.sha1()
    for f in sorted([*cfg.lib_path.glob('*.py'), *(root/'tools').glob('*.py'), root/'settings.ini']): key.update(f.read_bytes())
    stamp = cache/'_key'
    force = not stamp.is_file() or stamp.read_text() != key.hexdigest()
    proc_nbs(force=force, n_workers=0)                                      # here: each other process would import PyTorch and its like anew
    for f in cache.rglob('*.ipynb'):
        if not (cfg.nbs_path/f.relative_to(cache)).exists(): f.unlink()
    stamp.write_text(key.hexdigest())
    return cache


# ---- smalldocs, with nbdev's names for the pages

class Site(smalldocs_site.Site):
    "A smalldocs site whose pages have nbdev's names, and whose links to its own published address are relative."
    def __init__(self, *args, url, **kwargs):
        super().__init__(*args, **kwargs)
        self.url = url.rstrip('/') + '/'

    def read(self, src):
        page = super().read(src)
        page.out = page.out.with_name(page.front.get('output-file', page.out.name))
        return page

    def resolve(self, href, page, record=True):
        if not href.startswith(self.url): return super().resolve(href, page, record)
        path, hash, anchor = href[len(self.url):].partition('#')
        return smalldocs_site.rel(path or 'index.html', page) + hash + anchor

def render(proc, url):
    "Render the processed notebooks into _proc/_docs."
    site = Site(load(proc), quiet=True, url=url)
    shutil.rmtree(site.out, ignore_errors=True)
    site.build()
    known = ('output-file is not read', 'html-math-method is ignored', 'broken link')    # the last are found again below
    for w in site.warnings:
        if not any(k in w for k in known): print(f'  note: {w}')
    return site


# ---- formulas

def fetch_katex():
    "The KaTeX that smalldocs is written for, from the npm registry, once."
    version = re.search(r'katex@([\d.]+)', layout.KATEX)[1]
    katex = root/'build'/f'katex-{version}'
    if not katex.is_dir():
        if not shutil.which('npm'): raise SiteError('npm is needed to fetch KaTeX, which sets the formulas: install node and npm.')
        katex.parent.mkdir(exist_ok=True)
        subprocess.run(['npm', 'pack', '--silent', f'katex@{version}'], cwd=katex.parent, check=True, stdout=subprocess.DEVNULL)
        half = katex.with_suffix('.half')
        shutil.rmtree(half, ignore_errors=True)
        with tarfile.open(katex.with_name(katex.name + '.tgz')) as t: t.extractall(half, filter='data')
        (half/'package').rename(katex)
        shutil.rmtree(half)
    return katex/'dist'

set_formulas = '''
const katex = require(process.argv[1]), formulas = JSON.parse(require("fs").readFileSync(0));
const set = ([tex, displayMode]) => { try { return katex.renderToString(tex, {displayMode, strict: "ignore"}) } catch (e) { return {error: e.message} } };
process.stdout.write(JSON.stringify(formulas.map(set)));'''

formula = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)

def typeset(out, katex):
    "Replace the formulas of all pages by what KaTeX makes of them, and its scripts by its style sheet."
    pages = {f: f.read_text(encoding='utf-8') for f in sorted(out.rglob('*.html'))}
    found = [(f, html.unescape(m[2]), m[1] == 'display') for f, s in pages.items() for m in formula.finditer(s)]
    res = subprocess.run(['node', '-e', set_formulas, str(katex/'katex.js')], input=json.dumps([o[1:] for o in found]),
                         capture_output=True, text=True, check=True)
    done = json.loads(res.stdout)
    wrong = [f"{f.relative_to(out)}: {tex}\n    {d['error']}" for (f, tex, _), d in zip(found, done) if isinstance(d, dict)]
    if wrong: raise SiteError('KaTeX cannot read these formulas:\n  ' + '\n  '.join(wrong))
    done = iter(done)
    for f, s in pages.items():
        libs = '../'*(len(f.relative_to(out).parts)-1) + 'site_libs'
        s = formula.sub(lambda m: f'<span class="math {m[1]}">{next(done)}</span>', s)
        s = s.replace(f'{layout.KATEX}/katex.min.css', f'{libs}/katex/katex.min.css')
        f.write_text(re.sub(rf'<script[^>]*{re.escape(layout.KATEX)}[^>]*></script>', '', s), encoding='utf-8')
    (out/'site_libs/katex').mkdir()
    for name in ('katex.min.css', 'fonts'):
        copy = shutil.copytree if (katex/name).is_dir() else shutil.copy
        copy(katex/name, out/'site_libs/katex'/name)


# ---- tables that say what heads what

table = re.compile(r'<(script|style)\b.*?</\1>|<table\b.*?</table>', re.S)

def heads(s, way):
    "Each header in a part of a table, with its `scope`; an empty one heads nothing, and becomes a cell."
    s = re.sub(r'<th\b([^>]*)>(\s*(?:&nbsp;)?\s*)</th>', r'<td\1>\2</td>', s)
    def scope(m):
        over_several = 'group' if re.search(r'(row|col)span', m[1]) else ''
        return f'<th{m[1].rstrip()} scope="{way}{over_several}">'
    return re.sub(r'<th\b(?![^>]*\bscope=)([^>]*)>', scope, s)

def with_scopes(m):
    "A table in which each header says whether it heads a column or a row; a parameter's name heads its row."
    if m[1]: return m[0]                                                     # what scripts hold is theirs
    head, end, body = m[0].rpartition('</thead>')
    if '<th>Parameter</th>' in head:
        body = re.sub(r'(<tr>\s*)<td>(.*?)</td>', r'\1<th>\2</th>', body, flags=re.S)
    return heads(head, 'col') + end + heads(body, 'row')

def head_tables(out):
    "Screen readers say of a number what it is of: see `with_scopes`."
    for f in sorted(out.rglob('*.html')):
        f.write_text(table.sub(with_scopes, f.read_text(encoding='utf-8')), encoding='utf-8')


# ---- nothing from a network

font_faces = re.compile(r'@font-face\s*\{[^}]*\}')

def inline_fonts(css):
    "A style sheet that holds its own fonts, as browsers refuse font files of a page opened from a folder; none from a network."
    def face(m):
        file = css.parent/re.search(r'''url\(['"]?([^'")?]+\.woff2)''', m[0])[1]
        data = base64.b64encode(file.read_bytes()).decode()
        return re.sub(r'src:.*?(?=;|\})', f'src:url(data:font/woff2;base64,{data}) format("woff2")', m[0], flags=re.S)
    s = re.sub(r'@import\s+url\(\s*[\'"]?https?://fonts[^)]*\)\s*;', '', css.read_text(encoding='utf-8'))
    css.write_text(font_faces.sub(face, s), encoding='utf-8')

fetched = 'const r = await fetch(offset + "search.json");\n      index = await r.json();'
loaded = '''index = await new Promise((done, failed) => {
        const s = document.createElement("script");
        s.src = offset + "search.js"; s.onload = () => done(window.searchIndex); s.onerror = failed;
        document.head.append(s);
      });'''

hits = 'fuse.search(q, { limit }).map((h) => h.item)'
solutions_last = 'fuse.search(q).map((h) => h.item).sort((a, b) => a.href.includes("_solutions") - b.href.includes("_solutions")).slice(0, limit)'

bokeh_script = re.compile(r'<script[^>]*src="https://cdn[^"]*/(bokeh(?:-[a-z]+)?)-([\d.]+)\.min\.js"[^>]*>\s*</script>')

def bring_bokeh(out):
    "The scripts of interactive figures, which notebooks fetch from Bokeh's address, from the Bokeh that is installed."
    js = Path(bokeh.__file__).parent/'server/static/js'
    for f in sorted(out.rglob('*.html')):
        s = f.read_text(encoding='utf-8')
        for name, version in set(bokeh_script.findall(s)):
            if version != bokeh.__version__: raise SiteError(f'{f.relative_to(out)} holds figures of Bokeh {version}, and {bokeh.__version__} is installed. Run its notebook again, and save it.')
            (out/'site_libs/bokeh').mkdir(exist_ok=True)
            shutil.copy(js/f'{name}.min.js', out/'site_libs/bokeh')
        libs = '../'*(len(f.relative_to(out).parts)-1) + 'site_libs'
        f.write_text(bokeh_script.sub(lambda m: f'<script src="{libs}/bokeh/{m[1]}.min.js"></script>', s), encoding='utf-8')

def bring_notebooks(out, pages, cfg):
    "Each page's notebook beside it, and the page's link to that."
    raw = re.escape(f'https://raw.githubusercontent.com/{cfg.user}/{cfg.repo}/{cfg.branch}/nbs/')
    for p in pages: shutil.copy(cfg.nbs_path/p, out/p)
    for f in sorted(out.rglob('*.html')):
        s = f.read_text(encoding='utf-8')
        f.write_text(re.sub(rf'href="{raw}(?:[^"/]+/)*([^"/]+\.ipynb)"', r'href="\1" download', s), encoding='utf-8')

def bring_llms(site):
    "What each page is for, in llms.txt; no scripts and no links to notebooks in the pages' Markdown."
    index = site.out/'llms.txt'
    s = index.read_text(encoding='utf-8')
    for page in site.pages.values():
        md = page.out.with_suffix('.llms.md').as_posix()
        s = s.replace(f'/{md})\n', f"/{md}): {page.front['description']}\n")
        file = site.out/md
        file.write_text(re.sub(r'^\s*<script\b.*?</script>\s*|<p class="page-links">.*?</p>\s*', '', file.read_text(encoding='utf-8'), flags=re.S | re.M), encoding='utf-8')
    index.write_text(s, encoding='utf-8')

def localise(out):
    "Fonts and the search index in a form that a browser reads from a folder; the workshop's solutions are found after all else."
    bring_bokeh(out)
    libs = out/'site_libs'
    for css in libs.rglob('*.css'): inline_fonts(css)
    for fonts in [*libs.rglob('fonts')]: shutil.rmtree(fonts)
    js = (libs/'smalldocs.js').read_text(encoding='utf-8')
    if fetched not in js or hits not in js: raise SiteError('smalldocs.js reads its search index in another way than 0.5.4 does: see localise()')
    (libs/'smalldocs.js').write_text(js.replace(fetched, loaded).replace(hits, solutions_last), encoding='utf-8')
    index = (out/'search.json').read_text(encoding='utf-8')
    (out/'search.js').write_text(f'window.searchIndex = {index};\n', encoding='utf-8')


# ---- is it all there?

def figures(nb):
    "How many pictures a processed notebook shows."
    n = 0
    for cell in json.loads(nb.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code': continue
        opts = cell_options(''.join(cell['source']))[0]
        if opts.get('output', True) is False or opts.get('include', True) is False: continue
        n += sum(next((k for k in DISPLAY_ORDER if k in o.get('data', {})), None) in IMAGES for o in cell.get('outputs', []))
    return n

def faults(site, pages, proc):
    "Everything that is wrong with the rendered site, one line each."
    found = check_site(site.out)
    for src in pages:
        page = site.pages.get(PurePosixPath(src))
        file = page and site.out/page.out
        if not file or not file.is_file(): found.append(f'{src}: there is no page of it'); continue
        shown, want = read_page(file).figures, figures(proc/src)
        if shown < want: found.append(f'{src}: has {want} figures, its page {shown}')
        if formula.search(file.read_text(encoding='utf-8')): found.append(f'{src}: a formula was not set')
    return found

def build():
    "Build and check the site in _proc/_docs, then put it in the place of _docs."
    os.chdir(root)
    cfg = get_config()
    pages = check_listed(cfg.nbs_path)
    with contextlib.redirect_stdout(io.StringIO()): refresh_quarto_yml()
    print(f'Processing {len(pages)} notebooks', flush=True)
    proc = process(cfg)
    site = render(proc, f'{cfg.doc_host}{cfg.doc_baseurl}')
    typeset(site.out, fetch_katex())
    head_tables(site.out)
    bring_notebooks(site.out, pages, cfg)
    bring_llms(site)
    localise(site.out)
    found = faults(site, pages, proc)
    if found: raise SiteError(f'{len(found)} things are wrong with the site in {site.out.relative_to(root)}:\n  ' + '\n  '.join(found))
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    site.out.rename(cfg.doc_path)
    print(f'{len(site.pages)} pages in {cfg.doc_path.relative_to(root)}/: open {cfg.doc_path.relative_to(root)}/index.html')


if __name__ == '__main__':
    try: build()
    except (SiteError, BuildError, ConfigError) as e: sys.exit(f'The site was not built. {e}')
