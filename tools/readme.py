"""README.md from the front page of the site, nbs/index.ipynb, without Quarto; a picture with a label goes into nbs/images/."""
import base64, json, re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def text(s): return ''.join(s) if isinstance(s, list) else s

def fence(s, lang=''):
    "`s` as a fenced block, with a fence that `s` does not contain."
    ticks = max([3] + [len(m)+1 for m in re.findall('`{3,}', s)])*'`'
    return f'{ticks}{lang}\n{s.rstrip()}\n{ticks}'

def page_url(path, site):
    "Where the site has the page of the notebook `path`: nbdev leaves out the number in front of the name."
    folder, _, name = path.rpartition('/')
    page = re.sub(r'^\d+[a-z0-9]*_', '', name.lower()).replace('.ipynb', '.html')
    return '/'.join(o for o in (site, folder, page) if o)

def link_pages(s, site):
    "Links to notebooks, relative to nbs/, as links to their pages on the site."
    return re.sub(r'\]\((?![a-z]+:)([^)#\s]+\.ipynb)', lambda m: f']({page_url(m[1], site)}', s)

def picture_path(label): return f'nbs/images/{label}.png'

def pictures(cells):
    "The pictures that have a label: path -> PNG"
    labelled = {m[1]: c for c in cells if (m := re.search(r'^#\| *label: *(\S+)', text(c['source']), re.M))}
    return {picture_path(k): base64.b64decode(text(o['data']['image/png'])) for k,c in labelled.items() for o in c['outputs'] if 'image/png' in o.get('data', {})}

def outputs(cell, site):
    "The text that a code cell printed or returned, and its picture if that has a label; other pictures are left to the site."
    label, alt = (re.search(rf'^#\| *{k}: *"?([^"\n]+)', text(cell['source']), re.M) for k in ('label', 'fig-alt'))
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data: yield link_pages(text(data['text/markdown']), site)
        elif o['output_type'] == 'stream': yield fence(text(o['text']))
        elif 'image/png' in data and label: yield f'![{alt[1]}]({picture_path(label[1])})'
        elif 'text/plain' in data and not any(k.startswith('image/') for k in data): yield fence(text(data['text/plain']))

def blocks(cell, site):
    "The Markdown blocks of a cell; none if it is hidden or front matter."
    src = text(cell['source']).strip()
    if cell['cell_type'] == 'markdown':
        yield re.sub(r'^:::.*\n?', '', link_pages(src, site), flags=re.M).strip()
    if cell['cell_type'] != 'code': return
    lines = src.split('\n')
    flags = [l[2:].replace(' ', '') for l in lines if l.startswith('#|')]
    if any(o in flags for o in ('hide', 'include:false', 'export', 'exporti')): return
    code = '\n'.join(l for l in lines if not l.startswith('#|')).strip()
    if code and 'echo:false' not in flags: yield fence(code, 'python')
    if 'output:false' not in flags: yield from outputs(cell, site)

def readme(folder=root):
    "The text of README.md for the project in `folder`, and its pictures: path -> PNG."
    config = ConfigParser()
    config.read(folder/'settings.ini', encoding='utf-8')
    about = config['DEFAULT']
    site = about['doc_host'].rstrip('/') + '/' + about['doc_baseurl'].strip('/')
    cells = json.loads((folder/'nbs'/about['readme_nb']).read_text(encoding='utf-8'))['cells']
    parts = ['<!-- Made from nbs/index.ipynb by make sync: edit that. -->'] + [b for c in cells for b in blocks(c, site) if b]
    return '\n\n'.join(parts) + '\n', pictures(cells)


if __name__ == '__main__':
    page, drawn = readme()
    (root/'README.md').write_text(page, encoding='utf-8')
    for path,png in drawn.items():
        (root/path).parent.mkdir(exist_ok=True)
        (root/path).write_bytes(png)
