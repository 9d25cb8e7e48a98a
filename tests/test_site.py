"""The site that `make docs` builds: complete, and readable without a network from any folder."""
import json, re
from html import unescape
import pytest, yaml
from build_site import listed, table, with_scopes
from check_site import check_site, read_page
from conftest import cells, name, notebooks, page_of, root
from histogene_nb.interface import SpotModel
from histogene_nb.model import HisToGene
from nbdev.config import get_config
from nbdev_pages import ParameterTable

pytestmark = pytest.mark.xdist_group('site')                       # one build for all

def test_nothing_missing(site): assert check_site(site) == []

@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_page(site, path):
    "Each notebook has a page with its title, as many figures as it saved, and each formula of its text and docstrings set."
    html = (site/page_of(path)).read_text(encoding='utf-8')
    page, text = read_page(site/page_of(path)), '\n'.join(c['source'] for c in cells(path, 'markdown'))
    assert re.search(r'^# (.+)', text, re.M)[1].replace('`', '') in page.title
    hidden = re.compile(r'^#\| *(hide\b|output: *false|include: *false)', re.M)
    pictures = sum(any(k.startswith('image/') for k in o.get('data', {})) and 'text/html' not in o['data']
                   for c in cells(path) if not hidden.search(c['source']) for o in c['outputs'])
    assert page.figures == pictures
    said = [text, *(d for c in cells(path) if c['source'].startswith('#| export') for d in re.findall(r'^ {4}"([^"\n]*)"$', c['source'], re.M))]
    formulas = [f for s in said for f in re.findall(r'\$\$.+?\$\$|(?<![\\$])\$(?=\S)(?:[^$\n]|\n(?!\n))+?(?<=\S)\$', re.sub(r'```.*?```|`[^`\n]*`', '', s, flags=re.S), re.S)]
    assert page.maths == len(formulas)
    assert r'\(' not in re.sub(r'<(code|script|style|annotation)\b.*?</\1>', '', html, flags=re.S)

def test_links_of_a_page(site, about):
    "Under the title, a link that opens the notebook in Colab, and one to the notebook itself, which lies beside the page."
    for path in notebooks():
        html, nb = (site/page_of(path)).read_text(encoding='utf-8'), path.relative_to(root).as_posix()
        assert f'href="https://colab.research.google.com/github/{about["user"]}/{about["repo"]}/blob/{about["branch"]}/{nb}"' in html
        assert f'<a href="{path.name}" download>' in html and (site/page_of(path)).with_name(path.name).read_bytes() == path.read_bytes()

def test_llms(site):
    "llms.txt names each page and says what it is for; its Markdown is text to read."
    index = (site/'llms.txt').read_text(encoding='utf-8')
    for path in notebooks():
        about = re.search(r'^> (.+)', cells(path, 'markdown')[0]['source'], re.M)[1]
        assert f"{page_of(path).removesuffix('.html')}.llms.md): {about}\n" in index
        text = (site/page_of(path)).with_suffix('.llms.md').read_text(encoding='utf-8')
        assert len(text) < 2e5 and not re.search(r'^\s*<script', text, re.M)

QUARTO = {'echo', 'output', 'code-fold', 'code-summary', 'label', 'fig-alt'}      # the cell options that are used here; nbdev's own directives are none of them

@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_what_quarto_reads(site, path):
    "nbdev's processing leaves what `nbdev_docs` hands to Quarto: title, description and address as YAML, and options that Quarto has"
    first, *others = json.loads((root/'_proc'/path.relative_to(root/'nbs')).read_text(encoding='utf-8'))['cells']
    front = yaml.safe_load(''.join(first['source']).strip().strip('-'))
    assert first['cell_type'] == 'raw' and front['title'] and front['description'] and front['output-file'] == page_of(path).rpartition('/')[2]
    for c in others:
        options = re.findall(r'^#\|(.*)', ''.join(c['source']), re.M) if c['cell_type'] == 'code' else []
        assert set(yaml.safe_load('\n'.join(options)) or ()) <= QUARTO
        if c['cell_type'] == 'markdown': assert not re.search(r'^\s*#\|', ''.join(c['source']), re.M)

def test_quarto_config(site):
    "The site's description is YAML, names files that are there, and takes title and addresses from settings.ini"
    config = yaml.safe_load((root/'_proc'/'_quarto.yml').read_text(encoding='utf-8'))
    assert all((root/'_proc'/f).is_file() for f in [*config['metadata-files'], config['website']['favicon'], config['format']['html']['css'], *listed(config['website']['sidebar'])])
    generated = yaml.safe_load((root/'_proc'/'nbdev.yml').read_text(encoding='utf-8'))['website']
    assert generated['title'] and generated['repo-url'] == get_config().git_url and generated['site-url'].startswith('https://')

def test_search_index(site):
    "Search reads its index from a script, since browsers refuse to fetch from a folder."
    index = json.loads((site/'search.js').read_text(encoding='utf-8').removeprefix('window.searchIndex = ').rstrip(';\n'))
    assert {page_of(p) for p in notebooks()} <= {e['href'].split('#')[0] for e in index}
    assert 'fetch(' not in (site/'site_libs/smalldocs.js').read_text(encoding='utf-8')

def test_api(site):
    "An exported function has an entry with a table of its parameters, and its code."
    html = (site/'tissue/her2st.html').read_text(encoding='utf-8')
    entry = html[html.index('id="read_her2st"'):]
    assert '<th scope="col">Parameter</th>' in entry and '<th scope="row"><code>root</code></th>' in entry
    assert 'Exported source: read_her2st' in html
    assert not [p.name for p in site.rglob('*.html') if re.search(r'&lt;\w+ \w+ at 0x', p.read_text(encoding='utf-8'))], 'a type or default without a name'

@pytest.mark.parametrize('sym', [SpotModel.train_on, HisToGene], ids=lambda s: s.__qualname__)
def test_entry(sym):
    "An entry says what each parameter is, those behind ** too, and links to the line that defines it, wherever the function comes from"
    entry = ParameterTable(sym)._repr_markdown_()
    path, line = re.search(r'/blob/\w+/(\S+?)#L(\w+)\)', entry).groups()
    assert re.search(rf'(def|class) {sym.__name__}\b', (root/path).read_text(encoding='utf-8').splitlines()[int(line) - 1])
    rows = dict(re.findall(r'^\| <code>(\S+)</code> \|.*\| (.*) \|$', entry, re.M))
    assert all(rows.values()) and (sym is HisToGene or rows['&#42;&#42;settings'].startswith('of the model and of its training'))

def test_sources(site):
    "Every source link on the site leads to the line that defines what its entry is about"
    links = [(m, p) for p in site.rglob('*.html') for m in re.findall(r'/blob/\w+/([\w/]+\.py)#L(\w+)"[^>]*>source</a>.*?<h3[^>]*>(.*?)</h3>', p.read_text(encoding='utf-8'), re.S)]
    for (path, line, entry),page in links:
        name = re.sub('<.*?>', '', entry).split('.')[-1].strip()
        assert re.search(rf'(def|class) {name}\b', (root/path).read_text(encoding='utf-8').splitlines()[int(line) - 1]), (page.name, name)
    assert len(links) > 100

def test_what_is_folded(site):
    "Code of private names alone is folded, with its names, and what says `#| fold`; all other exported code is open."
    folds = [f for p in site.rglob('*.html') for f in re.findall(r'<details( open="")? class="code-fold">\s*<summary>(Exported source[^<]*)', p.read_text(encoding='utf-8'))]
    assert all(bool(is_open) == (summary == 'Exported source') for is_open,summary in folds)
    assert any('_visium_positions' in summary for is_open,summary in folds if not is_open)
    said = {n for p in notebooks() for c in cells(p) if re.search(r'^#\| *fold$', c['source'], re.M) for n in re.findall(r'^(?:def|class) +(\w+)', c['source'], re.M)}
    shown = {n for _,s in folds for n in s.partition(': ')[2].split(', ') if n}
    assert 'read_her2st' in said and {n for n in shown if not n.startswith('_')} == {n for n in said if not n.startswith('_')}

@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_figures_keep_their_order(site, path):
    "What is folded may move below an answer, but no figure leaves the text that is about it: a page has them in its notebook's order"
    alts = [m[1] for c in cells(path, 'code') if 'image/png' in str(c['outputs']) and (m := re.search(r'^#\| *fig-alt: "(.*)"', c['source'], re.M))]
    html = unescape((site/page_of(path)).read_text(encoding='utf-8'))
    at = [html.index(f'alt="{a}"') for a in dict.fromkeys(alts)]
    assert at == sorted(at)

def test_answers_stand_before_code(site):
    "A page of results says its answer first: the folded code that the answer needs is on the page, but below it."
    for path in [p for p in notebooks() if p.parent.name in ('paper', 'judging')]:
        code = [c['source'] for c in cells(path, 'code')]
        answer = next((i for i,c in enumerate(code) if re.search(r'^#\| *echo: *false', c, re.M)), None)
        if answer is None: continue
        html = (site/page_of(path)).read_text(encoding='utf-8')
        before, _, after = html[html.index('<main'):].partition('cell-output')
        assert 'code-fold' not in before and '<pre' not in before, name(path)
        folds = sum('code-fold: true' in c for c in code[:answer])
        assert folds and after.count('class="code-fold"') >= folds, name(path)

def test_glossary(site):
    "Words are targets of links, listed on top, in order; each leads to a page; references have addresses."
    text = ''.join(c['source'] + '\n\n' for c in cells(root/'nbs'/'glossary.ipynb', 'markdown'))
    entries, references = text.split('## References')
    top = ' '.join(entries.partition('\n## ')[0].split())
    listed = re.findall(r'\[([^\]]+)\]\((#[^)]+)\)', top)
    explained = dict(re.findall(r'^### (.+)\n\n((?:.+\n)+)', entries, re.M))
    assert [w for w,_ in listed] == sorted(explained, key=str.lower)
    assert len({a for _,a in listed}) == len(listed) > 40
    assert not [w for w,said in explained.items() if not re.search(r'\]\(\w+/\w+\.ipynb\)$', said.rstrip())]
    html = unescape((site/'glossary.html').read_text(encoding='utf-8')).replace('’', "'")
    headings = dict(re.findall(r'<h3[^>]* data-anchor-id="([^"]+)"[^>]*>(.*?)</h3>', html))
    assert all(headings[a[1:]] == w.replace('\\', '') and f'id="{a[1:]}"' in html for w,a in listed)
    items = re.findall(r'^- (?:.+\n)(?:  .+\n)*', references, re.M)
    addressed = [i for i in items if re.search(r'\]\(https://(doi\.org/10\.|arxiv\.org/abs/)', i)]
    assert len(items) > 10 and addressed == items

def test_skip_link(site):
    "The first thing that the keyboard reaches on each page is a link past navigation, to the text."
    for path in notebooks():
        body = (site/page_of(path)).read_text(encoding='utf-8').partition('<body')[2]
        first = re.search(r'<(?:a|button|input|select|summary)\b.*?>', body)[0]
        assert 'href="#quarto-document-content"' in first, name(path)
        assert re.search(r'<main [^>]*id="quarto-document-content"', body)

@pytest.mark.parametrize('before, after', [
    ('<thead><tr><th></th><th style="a">r</th></tr></thead><tr><th>C2</th><td>0.1</td></tr>',
     '<thead><tr><td></td><th style="a" scope="col">r</th></tr></thead><tr><th scope="row">C2</th><td>0.1</td></tr>'),
    ('<thead><tr><th class="a" >&nbsp;</th><th colspan="2">r</th></tr></thead>',
     '<thead><tr><td class="a" >&nbsp;</td><th colspan="2" scope="colgroup">r</th></tr></thead>'),
    ('<thead></thead><tr><th rowspan="2">C</th><th>C2</th></tr>',
     '<thead></thead><tr><th rowspan="2" scope="rowgroup">C</th><th scope="row">C2</th></tr>'),
    ('<thead><tr><th>Parameter</th></tr></thead><tr>\n<td><code>q</code></td><td>b</td></tr>',
     '<thead><tr><th scope="col">Parameter</th></tr></thead><tr>\n<th scope="row"><code>q</code></th><td>b</td></tr>'),
    ('<thead><tr><th scope="row">a</th></tr></thead><tr><td>b</td></tr>', None)])
def test_scopes(before, after):
    "Headers of columns, of rows, over several, and parameters; not those that say so, nor what a script holds"
    assert table.sub(with_scopes, f'<table>{before}</table>') == f'<table>{after or before}</table>'
    assert table.sub(with_scopes, script := f'<script>"<table>{before}</table>"</script>') == script

@pytest.mark.parametrize('html, fault', [
    ('<a href="gone.html">', 'gone.html is not there'),
    ('<a href="#gone">', 'the page has no #gone'),
    ('<a href="/index.html">', 'is not relative'),
    ('<a href="../../index.html">', 'is outside the site'),
    ('<img src="gone.png">', 'gone.png is not there'),
    ('<p>see [<a href="#top"><code>fit</code></a>](07_training.html)</p>', 'a link shows as text: ](07_training.html)'),
    ('<script src="https://cdn.example.org/a.js"></script>', 'loads https://cdn.example.org/a.js'),
    ('<link rel="stylesheet" href="//cdn.example.org/a.css">', 'loads //cdn.example.org/a.css'),
    ('<style>@font-face{src:url(https://example.org/a.woff2)}</style>', 'loads https://example.org/a.woff2'),
    ('<script type="module">import a from "https://example.org/a.mjs"</script>', 'loads https://example.org/a.mjs'),
    ('<link rel="stylesheet" href="a.css">', 'loads https://fonts.example.org/b'),
    ('<table><thead><tr><th>r</th></tr></thead></table>', '1 headers of tables'),
    ('<table><thead><tr><th scope="col">r</th></tr></thead></table>', None),
    ('<a href="https://example.org"><img src="data:image/png;base64,AA=="><a href="?q#top"><code>[a](b)</code>', None)])
def test_checker(tmp_path, html, fault):
    "The checker finds each kind of fault, and lets links to other sites be."
    (tmp_path/'index.html').write_text(f'<html><body id="top">{html}</body></html>')
    (tmp_path/'a.css').write_text('@import url("https://fonts.example.org/b");' if 'a.css' in html and fault and 'fonts' in fault else '')
    found = check_site(tmp_path)
    assert (fault in '\n'.join(found) and len(found) == 1) if fault else not found
