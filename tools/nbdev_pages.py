"""What the site's pages show beyond nbdev's defaults: settings.ini names these as `renderer` and in `procs`."""
import re
from inspect import Parameter
from pathlib import Path
from types import FunctionType
from execnb.nbio import mk_cell
from fastcore.docments import docments, qual_name
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer


def show_source(cell):
    "The pages are lessons, so a definition is read where it is made: `#| export` of a function or class counts as `#| exports`."
    if cell.cell_type == 'code' and 'export' in cell.directives_ and re.search(r'^(def|class|async def) ', cell.source, re.M):
        cell.directives_['exports'] = cell.directives_.pop('export')


def fold_private(cell):
    "Exported code that defines nothing but private names stays folded, under their names, until a reader asks for it; so does what says `#| fold`, with or without a summary"
    names = re.findall(r'^(?:async )?(?:def|class) +(\w+)', cell.source, re.M)
    if cell.cell_type != 'code' or 'exports' not in cell.directives_: return
    if 'fold' in cell.directives_: summary = ' '.join(cell.directives_['fold']) or f'Exported source: {", ".join(names)}'
    elif names and all(n.startswith('_') for n in names): summary = f'Exported source: {", ".join(names)}'
    else: return
    cell.source = cell.source.replace('#| code-fold: show\n#| code-summary: "Exported source"', f'#| code-fold: true\n#| code-summary: "{summary}"', 1)


class tables_last(Processor):
    "On a page with a heading `## API`, the tables of parameters stand below it"
    def begin(self):
        cells = self.nb.cells
        at = next((c for c in cells if c.cell_type == 'markdown' and re.search(r'^## API$', c.source, re.M)), None)
        tables = [c for c in cells if c.cell_type == 'code' and re.search(r'^show_doc\(', c.source, re.M)]
        if at is None: return
        self.nb.cells = [c for c in cells if not any(c is t for t in tables)]
        i = 1 + next(i for i,c in enumerate(self.nb.cells) if c is at)
        self.nb.cells[i:i] = tables


class answer_first(Processor):
    "Folded code that stands before the answer of a page of results (`#| echo: false`) goes below it, in front of the next heading; code with a figure stays with its figure"
    def end(self):
        cells = self.nb.cells
        def says(c, what): return c.cell_type == 'code' and re.search(rf'^#\| *{what}', c.source, re.M)
        answer = next((i for i,c in enumerate(cells) if says(c, 'echo: *false') and 'show_doc(' not in c.source), 0)
        def draws(c): return any('image/png' in o.get('data', {}) for o in c.get('outputs', []))
        folds = [c for c in cells[:answer] if says(c, 'code-fold: *true') and not draws(c)]
        rest = [c for c in cells if not any(c is f for f in folds)]
        after = answer - len(folds)
        i = next((i for i,c in enumerate(rest) if i > after and c.cell_type == 'markdown' and re.match('## ', c.source)), len(rest))
        self.nb.cells = rest[:i] + folds + rest[i:]


class page_links(Processor):
    "Under the title, the page in Colab, and its notebook to download"
    def end(self):
        cfg = get_config()
        path = f'{cfg.user}/{cfg.repo}', f"{cfg.branch}/nbs/{Path(self.nb.path_).resolve().relative_to(cfg.nbs_path.resolve()).as_posix()}"
        links = {'Open in Colab': 'https://colab.research.google.com/github/{}/blob/{}', 'Download the notebook': 'https://raw.githubusercontent.com/{}/{}'}
        self.nb.cells.insert(1, mk_cell('<p class="page-links">' + ' · '.join(f'<a href="{url.format(*path)}">{label}</a>' for label,url in links.items()) + '</p>', 'markdown'))


def one_line(text): return ' '.join(text.replace('|', r'\|').split())

def type_name(o):
    "The name of an annotation, without the modules in front; nothing where there is none"
    if o is Parameter.empty or o is type(None): return ''
    return one_line(o.__name__ if isinstance(o, (type, FunctionType)) else re.sub(r'\b(?:\w+\.)+(\w+)', r'\1', str(o)))

class ParameterTable(BasicMarkdownRenderer):
    "nbdev's `show_doc`, with the comment beside each parameter in a table rather than in the signature"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        params = [p.replace(annotation=p.empty) for p in self.sig.parameters.values() if p.name != 'self'] if self.sig else []
        sig = ', '.join(map(str, params))
        if len(self.nm + sig) > 85: sig = '\n    ' + ',\n    '.join(map(str, params)) + '\n'
        self.dm = f'{self.nm}({sig})'
        self.fn = qual_name(self.sym)                                     # nbdev finds the line of a name, and not of module.name: that link would end in #LNone

    def _repr_markdown_(self):
        about = {k:v for k,v in docments(self.sym, full=True, args_kwargs=True).items() if k != 'self'}
        if not any(v.get('docment') for v in about.values()): return super()._repr_markdown_()
        def row(name, v):                                                 # HTML: in backticks a parameter that is called as some function would become a link to that
            default = '' if name == 'return' or v['default'] is Parameter.empty else f"`{one_line(getattr(v['default'], '__name__', repr(v['default'])))}`"
            stars = {Parameter.VAR_POSITIONAL: '&#42;', Parameter.VAR_KEYWORD: '&#42;'*2}.get(v.get('kind'), '')
            return '*returns*' if name == 'return' else f'<code>{stars}{name}</code>', type_name(v['anno']), default, one_line(v['docment'] or '')
        rows = [row(k, v) for k,v in about.items() if k != 'return' or v['docment']]
        table = [('Parameter', 'Type', 'Default', 'What it is'), ('---',)*4, *rows]
        return super()._repr_markdown_() + '\n\n' + '\n'.join(f'| {" | ".join(r)} |' for r in table)
