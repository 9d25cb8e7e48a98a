"""Cut the learners' notebooks of the workshop from those with solutions: python tools/exercises.py [--check]

nbs/workshop/1_tissue_solutions.ipynb gives nbs/workshop/1_tissue.ipynb, and so on. In its code cells what stands between the lines `# <solution>` and
`# </solution>` becomes `...`, or `name = ...` where it ends by giving the answer a name; the outputs of these cells and of checks are dropped, and what is printed; title and link to the twin are those of exercises. With --check
nothing is written: it exits with 1, and names the notebooks that differ from what would be cut.
"""
import ast, re, sys
from pathlib import Path
from textwrap import dedent, indent
import nbformat

workshop = Path(__file__).resolve().parent.parent/'nbs'/'workshop'
block = re.compile(r'^( *)# <solution>\n(.*?)^\1# </solution>$', re.M | re.S)
title = ', with solutions'                                                    # at the end of the first line of a notebook with solutions
here = '**These are the solutions.** Try the [exercises]({exercises}) first: the same page, without the lines between `# <solution>` and `# </solution>`.'
there = '**These are the exercises.** Write your code where it says `# your code here`, run the cell, then the check below it (run it before you read it: its code gives things away). The [solutions]({solutions}) are a page of their own.'

def twin(path): return path.with_stem(path.stem.removesuffix('_solutions'))

def emptied(match):
    "What a learner finds in place of a solution"
    last = ast.parse(dedent(match[2]))
    while hasattr(last, 'body'): last = last.body[-1]                         # into a `with`, say
    name = f'{last.targets[0].id} = ' if isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name) else ''
    return indent(f'{name}...  # your code here', match[1])

def cut(path):
    "The text of the learners' notebook that belongs to a notebook with solutions"
    nb, links = nbformat.read(path, 4), dict(exercises=twin(path).name, solutions=path.name)
    top = nb.cells[0].source.split('\n')
    if not top[0].endswith(title): raise ValueError(f'{path.name}: its title does not end with {title!r}')
    if nb.cells[1].source != here.format(**links): raise ValueError(f'{path.name}: its second cell is not\n{here.format(**links)}')
    nb.cells[0].source = '\n'.join([top[0].removesuffix(title), *top[1:]])
    nb.cells[1].source = there.format(**links)
    for c in nb.cells:
        c.metadata = {}
        if c.cell_type != 'code': continue
        given = block.sub(emptied, c.source)
        needs_answer = given != c.source or 'check(' in c.source
        c.outputs = [o for o in c.outputs if not needs_answer and o.output_type != 'stream']    # what is printed is often what learners are asked to guess
        c.execution_count, c.source = None, given
        if 'solution>' in c.source: raise ValueError(f'{path.name}: a solution does not begin or end:\n{c.source}')
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    return nbformat.writes(nb) + '\n'

def main(check=False):
    "Write the learners' notebooks, or with `check` name those that differ"
    differ = []
    for path in sorted(workshop.glob('*_solutions.ipynb')):
        text, file = cut(path), twin(path)
        if file.is_file() and file.read_text(encoding='utf-8') == text: continue
        differ.append(file.name)
        if not check: file.write_text(text, encoding='utf-8')
    return differ

if __name__ == '__main__':
    differ = main('--check' in sys.argv)
    print('\n'.join(differ))
    if differ and '--check' in sys.argv: sys.exit('These are not what python tools/exercises.py cuts from the solutions.')
