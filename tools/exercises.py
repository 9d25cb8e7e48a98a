"""Cut the learners' notebooks of the workshop from those with solutions, and gather what their checks know: python tools/exercises.py [--check]

nbs/workshop/1_tissue_solutions.ipynb gives nbs/workshop/1_tissue.ipynb, and so on. In its code cells what stands between the lines `# <solution>` and
`# </solution>` becomes `...`, or `name = ...` where it ends by giving the answer a name. Figures and tables are kept above the first exercise, and what is printed nowhere:
below, they show what exercises ask for. Title and link to the twin are those of exercises. Cells that begin with `#| check` are left out: they go to histogene_nb/_answers.py, where
`histogene_nb.workshop.check` finds them. With --check nothing is written: it exits with 1, and names the files that differ from what would be written.
"""
import ast, re, sys
from pathlib import Path
from textwrap import dedent, indent
import nbformat

root = Path(__file__).resolve().parent.parent
workshop, known = root/'nbs'/'workshop', root/'histogene_nb'/'_answers.py'
block = re.compile(r'^( *)# <solution>\n(.*?)^\1# </solution>$', re.M | re.S)
title = ', with solutions'                                                    # at the end of the first line of a notebook with solutions
here = '**These are the solutions.** Try the [exercises]({exercises}) first: the same page, without the lines between `# <solution>` and `# </solution>`.'
there = '**These are the exercises.** Write your code where it says `# your code here`, run the cell, then the check below it, which says whether it is right or what to look at. What is still open stops nothing.'

top_of_answers = '''"""What the workshop's checks know, and so its answers.

Made by tools/exercises.py from the notebooks with solutions: do not edit."""
'''

def twin(path): return path.with_stem(path.stem.removesuffix('_solutions'))

def emptied(match):
    "What a learner finds in place of a solution"
    last = ast.parse(dedent(match[2]))
    while hasattr(last, 'body'): last = last.body[-1]                         # into a `with`, say
    name = f'{last.targets[0].id} = ' if isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name) else ''
    return indent(f'{name}...  # your code here', match[1])

def for_check(cell): return cell.cell_type == 'code' and cell.source.startswith('#| check')

def answers():
    "The module of what checks know: the cells for them, of all lessons"
    found = [c.source for path in sorted(workshop.glob('*_solutions.ipynb')) for c in nbformat.read(path, 4).cells if for_check(c)]
    return top_of_answers + '\n\n'.join(re.sub(r'^#\|.*\n', '', s, flags=re.M) for s in found) + '\n'

def cut(path):
    "The text of the learners' notebook that belongs to a notebook with solutions"
    nb, links = nbformat.read(path, 4), dict(exercises=twin(path).name, solutions=path.name)
    top = nb.cells[0].source.split('\n')
    if not top[0].endswith(title): raise ValueError(f'{path.name}: its title does not end with {title!r}')
    if nb.cells[1].source != here.format(**links): raise ValueError(f'{path.name}: its second cell is not\n{here.format(**links)}')
    nb.cells[0].source = '\n'.join([top[0].removesuffix(title), *top[1:]])
    nb.cells[1].source = there.format(**links)
    nb.cells = [c for c in nb.cells if not for_check(c)]
    exercises_begin = False
    for c in nb.cells:
        c.metadata = {}
        exercises_begin |= c.cell_type == 'markdown' and '### Exercise' in c.source
        if c.cell_type != 'code': continue
        given = block.sub(emptied, c.source)
        c.outputs = [o for o in c.outputs if not exercises_begin and o.output_type != 'stream']    # what is printed is often what learners are asked to guess
        c.execution_count, c.source = None, given
        if 'solution>' in c.source: raise ValueError(f'{path.name}: a solution does not begin or end:\n{c.source}')
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    return nbformat.writes(nb) + '\n'

def main(check=False):
    "Write the learners' notebooks and what checks know, or with `check` name those that differ"
    made = {twin(path): cut(path) for path in sorted(workshop.glob('*_solutions.ipynb'))} | {known: answers()}
    differ = {file: text for file,text in made.items() if not file.is_file() or file.read_text(encoding='utf-8') != text}
    if not check:
        for file,text in differ.items(): file.write_text(text, encoding='utf-8')
    return [file.name for file in differ]

if __name__ == '__main__':
    differ = main('--check' in sys.argv)
    print('\n'.join(differ))
    if differ and '--check' in sys.argv: sys.exit('These are not what python tools/exercises.py cuts from the solutions.')
