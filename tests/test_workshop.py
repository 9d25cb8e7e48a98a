"""The workshop: exercises are cut from the solutions, right answers are right, wrong ones are told what to look at, and nothing gives an answer away.

A lesson is run once, in this process and an empty folder, with its exercises not answered, so that what follows an exercise is seen to need no answer. What its names
were at each check is kept: answers (workshop_cases.py) are tried in a copy of them."""
import ast, io, os, re, shutil, warnings
from contextlib import redirect_stdout
from functools import cache
import matplotlib, numpy as np, pytest
import matplotlib.pyplot as plt
import exercises
from conftest import cells, root
from workshop_cases import RIGHT, WRONG

solutions = sorted((root/'nbs'/'workshop').glob('*_solutions.ipynb'))
def group(path): return pytest.mark.xdist_group(f'lesson {path.stem[0]}')
lessons = pytest.mark.parametrize('path', [pytest.param(p, marks=group(p), id=exercises.twin(p).stem) for p in solutions])

def each(cases):
    "A test for each answer"
    found = [(e, *([c] if isinstance(cases[e], list) else [c, cases[e][c]])) for e in cases for c in cases[e]]
    return [pytest.param(*f, marks=group(solutions[int(f[0][0]) - 1]), id=f'{f[0]}-{i}') for i,f in enumerate(found)]

def said(source, names):
    "What running a cell prints; figures are closed, and what they say is added"
    with redirect_stdout(io.StringIO()) as out: exec(compile(source, '<cell>', 'exec'), names)
    texts = [t.get_text() for n in plt.get_fignums() for t in plt.figure(n).findobj(matplotlib.text.Text)]
    plt.close('all')
    return out.getvalue(), '\n'.join(texts)

def checked(source):
    "The exercise that a cell checks, or None"
    return m[1] if (m := re.match(r"check\('([\d.]+)', ", source)) else None

def left(path):
    "The code cells of a notebook with solutions that exercises have too"
    return [c for c in cells(path) if not c['source'].startswith('#| check')]

@cache
def run_all(path):
    "A lesson run as Run All would: for each exercise its check, the cell with its solution, and the names at its check; what each cell printed and drew"
    here, found, shown, names = os.getcwd(), {}, [], {}
    matplotlib.use('agg')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for given, solved in zip(cells(exercises.twin(path)), left(path), strict=True):
            if given['source'] != solved['source']: answer = solved['source']
            if n := checked(given['source']): found[n] = given['source'], answer, dict(names)
            shown.append((given, *said(given['source'], names)))
    return found, shown

def answered(exercise, answer):
    "What the check of an exercise says to an answer"
    check, solution, names = run_all(solutions[int(exercise[0]) - 1])[0][exercise]
    names = dict(names)
    if exercise == '3.3':                                   # trained again and again: on fewer spots
        names.update({k: v for k,v in dict(examples=[tuple(t[:40] for t in e) for e in names['examples']], test_example=tuple(t[:40] for t in names['test_example'])).items()})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        said(solution if answer is None else answer, names)
        return said(check, names)[0]

@lessons
def test_run_all(path):
    "Without an answer everything runs, open checks say so in a line, and the solutions stand in the same order"
    found, shown = run_all(path)
    assert list(found) == [e for e in RIGHT if e[0] == path.stem[0]] and len(found) == 7
    for cell,printed,_ in shown:
        if n := checked(cell['source']): assert printed.startswith(f'Exercise {n} is open. Write your code') and printed.count('\n') == 1
    assert shown[-1][0]['source'] == 'check_all()' and f'Lesson {path.stem[0]}: 0 of 7 right; open: {", ".join(found)}' in shown[-1][1]

@pytest.mark.parametrize('exercise, answer', each({e: [None, *RIGHT[e]] for e in RIGHT}))
def test_right(exercise, answer):
    "The answer of the solutions, and others that are as good"
    assert answered(exercise, answer).startswith(f'Exercise {exercise}: right.')

@pytest.mark.parametrize('exercise, answer, words', each(WRONG))
def test_wrong(exercise, answer, words):
    told = answered(exercise, answer)
    assert told.startswith(f'Exercise {exercise}, not yet.') and words in told

@cache
def for_lecturers():
    "The table of exercises on the lecturers' page"
    names = {}
    exec(next(c['source'] for c in cells(root/'nbs'/'workshop'/'0_instructor.ipynb') if 'EXERCISES = {' in c['source']), names)
    return names['EXERCISES']

@pytest.mark.parametrize('exercise', [pytest.param(e, marks=group(solutions[int(e[0]) - 1])) for e in RIGHT])
def test_answers_for_lecturers(exercise): assert answered(exercise, for_lecturers()[exercise][2]).startswith(f'Exercise {exercise}: right.')

def test_cases():
    "Two other right answers and four mistakes for each exercise"
    assert list(RIGHT) == list(WRONG) == list(for_lecturers()) and len(RIGHT) == 28 and all(len(RIGHT[e]) >= 2 and len(WRONG[e]) >= 4 for e in RIGHT)


# ---- nothing gives an answer away

def expressions(source):
    "What a cell computes that is more than a name or a call of one function with names"
    tree = ast.parse(re.sub(r'^[%!].*', 'pass', source, flags=re.M))
    return {ast.dump(n) for n in ast.walk(tree) if isinstance(n, ast.expr) and sum(isinstance(o, (ast.Call, ast.BinOp, ast.Subscript, ast.Compare)) for o in ast.walk(n)) > 1}

def last_expression(source):
    "What a solution ends with computing"
    last = ast.parse(exercises.dedent(exercises.block.search(source)[2])).body[-1]
    while hasattr(last, 'body'): last = last.body[-1]
    return ast.dump(last.value)

def spelled(answer):
    "A number or name as it might be printed; nothing for arrays"
    if isinstance(answer, str): return {answer}
    if np.ndim(answer) or callable(answer): return set()
    return {f'{answer:,}', str(answer)} if float(answer).is_integer() else {f'{float(answer):.{d}f}' for d in (2, 3)}

def given_away(answers, texts):
    return [(e, t) for e,a in answers.items() for t in texts for s in spelled(a) if re.search(rf'(?<![\w.,]){re.escape(s)}(?![\w]|[.,]\d)', t)]

def saved(cell): return [''.join(t) for o in cell['outputs'] for k,t in (o.get('data') or {'text/plain': o.get('text', '')}).items() if k.startswith('text/')]

def right_answers(path):
    "Of the exercises of a lesson, from the names at their checks"
    found = {}
    for n,(_,solution,names) in run_all(path)[0].items():
        names = dict(names, solved=names['solved'])
        if n not in ('3.3', '4.7'): found[n] = eval(f"solved({n!r})", names)
    return found

@lessons
def test_outputs_keep_answers(path):
    "What an exercise notebook was saved with: nothing printed, nothing below the first exercise, and above it no answer, in figures neither; in its text neither"
    answers, shown = right_answers(path), run_all(path)[1]
    nb = [c for c in exercises.nbformat.read(exercises.twin(path), 4).cells]
    first = next(i for i,c in enumerate(nb) if '### Exercise' in c.source)
    assert not [c.source for i,c in enumerate(nb) if c.cell_type == 'code' and (i > first and c.outputs or any(o.output_type == 'stream' for o in c.outputs))]
    kept = [(c, drawn) for c,_,drawn in shown if c['outputs']]
    assert kept, 'a page without a picture'
    assert given_away(answers, [t for c,drawn in kept for t in (*saved(c), drawn)]) == []
    assert given_away(answers, [c.source for c in nb if c.cell_type == 'markdown']) == []

def test_answers_are_found():
    "With the outputs of the solutions, it would be seen"
    path = solutions[0]
    assert {e for e,_ in given_away(right_answers(path), [t for c in cells(path) for t in saved(c)])} >= {'1.7'}
    assert given_away({'1': 12.3456, '2': 5531904}, ['r = 12.35.', '5,531,904 numbers', '112.35', '12.351']) == [('1', 'r = 12.35.'), ('2', '5,531,904 numbers')]

@lessons
def test_code_keeps_answers(path):
    "No cell of the exercises computes what a solution computes"
    wanted = {n: last_expression(solution) for n,(_,solution,_) in run_all(path)[0].items()}
    given = set().union(*(expressions(c['source']) for c in cells(exercises.twin(path))))
    assert not [n for n,e in wanted.items() if e in given]
    solved = set().union(*(expressions(c['source']) for c in cells(path)))
    assert sum(e in solved for e in wanted.values()) >= 3, 'with the solutions, it would be seen'


# ---- the lessons, and how exercises are cut

@lessons
def test_lesson(path):
    "What each lesson has: outcomes, a warm-up with a folded answer, exercises with hints, what to take home, where to read on; and one solution for each check"
    text = [c['source'] for c in cells(path, 'markdown')]
    for part in ('you can**', '### Warm-up', '## To take home', '**Go deeper:**'): assert sum(part in t for t in text) == 1, part
    assert '<summary>Answer</summary>' in next(t for t in text if '### Warm-up' in t)
    tasks = re.split(r'^### Exercise (?=\d)', '\n'.join(text), flags=re.M)[1:]
    assert all('<summary>Hint</summary>' in t for t in tasks) and 5 <= len(tasks) <= 8
    code = [c['source'] for c in cells(path)]
    assert len(tasks) == sum(len(exercises.block.findall(s)) for s in code) == sum(checked(s) is not None for s in code) == sum(s.startswith('#| check') and 'def exercise_' in s for s in code)
    level = [dict(easy=0, medium=1, hard=2)[re.match(r'\d+ \((\w+)\): \w', t)[1]] for t in tasks]
    assert level == sorted(level), 'the exercises rise in difficulty'

def test_cut():
    "The learners' notebooks are what the tool cuts, and what checks know is what it gathers"
    assert exercises.main(check=True) == [], 'run python tools/exercises.py'
    for path in solutions:
        for given,solved in zip(cells(exercises.twin(path)), left(path), strict=True): assert 'solution>' not in given['source'] and given['outputs'] in ([], [o for o in solved['outputs'] if o['output_type'] != 'stream'])

def test_cut_finds_changes(tmp_path, monkeypatch):
    shutil.copytree(exercises.workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(exercises, 'workshop', tmp_path)
    monkeypatch.setattr(exercises, 'known', tmp_path/'_answers.py')
    assert exercises.main() == ['_answers.py']
    twin, source = tmp_path/'1_tissue.ipynb', tmp_path/'1_tissue_solutions.ipynb'
    before = twin.read_text(encoding='utf-8')
    twin.write_text(before.replace('easy', 'simple'), encoding='utf-8')
    assert exercises.main(check=True) == ['1_tissue.ipynb'] and twin.read_text(encoding='utf-8') != before
    assert exercises.main() == ['1_tissue.ipynb'] and twin.read_text(encoding='utf-8') == before and exercises.main(check=True) == []
    text = source.read_text(encoding='utf-8')
    source.write_text(text.replace('Rows times columns of the matrix.', 'Rows by columns.'), encoding='utf-8')
    assert exercises.main(check=True) == ['_answers.py']
    for old, new, told in (('"# </solution>"', '"# solved"', 'begin or end'), (', with solutions', '', 'title'), ('**These are the solutions.**', 'Solutions.', 'second cell')):
        source.write_text(text.replace(old, new, 1), encoding='utf-8')
        with pytest.raises(ValueError, match=told): exercises.main()

@pytest.mark.parametrize('solution, left', [
    ('# <solution>\na = 1\nb = a*2\n# </solution>', 'b = ...  # your code here'),
    ('def f(x):\n    "of x"\n    # <solution>\n    y = x\n    return (y +\n            1)\n    # </solution>\nz = 3', 'def f(x):\n    "of x"\n    ...  # your code here\nz = 3'),
    ('a = 1', 'a = 1')])
def test_what_is_left(solution, left): assert exercises.block.sub(exercises.emptied, solution) == left

def test_learners_sidebar():
    "Solutions stand apart from what learners read, and learners' pages do not link to them"
    import yaml
    sections = {s['section']: s['contents'] for s in yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'] if 'section' in s}
    assert [f'workshop/{exercises.twin(p).name}' for p in solutions] == sections['Workshop'][1:] and [f'workshop/{p.name}' for p in solutions] == sections['For lecturers'][1:]
    for page in ('workshop', *(exercises.twin(p).stem for p in solutions)): assert not [c for c in cells(root/'nbs'/'workshop'/f'{page}.ipynb', 'markdown') if '_solutions' in c['source']]

def test_check_all(monkeypatch, capsys):
    from histogene_nb import workshop
    monkeypatch.setattr(workshop, 'standing', {'1.1': 'right', '1.4': 'not yet', '3.2': 'open'})
    workshop.check_all()
    assert capsys.readouterr().out.splitlines() == ['Lesson 1: 1 of 7 right; not yet: 1.4; open: 1.2, 1.3, 1.5, 1.6, 1.7', 'Lesson 3: 0 of 7 right; open: 3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7']
