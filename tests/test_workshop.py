"""The workshop: exercises are cut from the solutions, fail exactly where an answer is missing, and tell a wrong answer what to look at.

A lesson runs once, in this process and an empty folder, with its exercises not answered. At each check a wrong answer and that of the solutions are tried too.
Then all names of the exercise and its check are forgotten, so that what follows is seen to need none of them: an exercise may be left out."""
import re, shutil, warnings
import matplotlib, pytest
import matplotlib.pyplot as plt
import exercises
from conftest import cells, root
from histogene_nb.workshop import NotYet

solutions = sorted((root/'nbs'/'workshop').glob('*_solutions.ipynb'))
lessons = pytest.mark.parametrize('path', solutions, ids=lambda p: exercises.twin(p).stem)

# For each exercise a wrong answer that somebody might well give, and words of what the check says to it
WRONG = {
    '1_tissue': {
        1: ('numbers = N*W*H', 'three numbers'),
        2: ('patch = image[x - W//2:x + W//2, y - H//2:y + H//2]', 'Rows are y'),
        3: ('n_over = (low < 0).any(1).sum()', 'right and bottom'),
        4: ('place = 3*(3*W + 5) + 1', 'colour change fastest'),
        5: ('def optical_density(pixels): return -np.log((pixels + 1)/256)', 'uint8'),
        6: ('scaled = np.log(counts[in_panel]/counts[in_panel].sum()*1e6 + 1)', 'over all genes of the spot'),
        7: ('gene = np.argmax([np.corrcoef(red, e)[0, 1] for e in expression.T])', 'give its name')},
    '2_transformer': {
        1: ('E_x = W_x[:4]', 'first four rows'),
        2: ('E = model.patch_embed((F_h - 127.5)/255) + model.x_embed(positions[:, 1]) + model.y_embed(positions[:, 0])', 'x and y are swapped'),
        3: ('def my_attention(Q, K, V): return (Q @ K.T).softmax(-1) @ V', 'root of d_k'),
        4: ('spread = (q*k).std()', 'sum of them'),
        5: ('n_weights = 3*(d*d + d) + (d*d + d) + (d*h + h) + (h*d + d) + 2*2*d', 'no bias'),
        6: ('restored = shuffled[order]', 'shuffles once more'),
        7: ('reach = (weights*distance).mean(-1)', 'a sum, not a mean')},
    '3_training': {
        1: ('bar = Y.var(correction=0)', 'Each gene has its own level'),
        2: ('def training_step(model, opt, *xyt):\n    loss = F.mse_loss(model(*xyt[:2]), xyt[2]); loss.backward(); opt.step(); return loss', 'zero_grad'),
        3: ('losses = fit(small_model(dropout=0.), examples[:1], epochs=10, lr=1e-3, progress=False)', 'train longer'),
        4: ('with torch.no_grad(): X = model.train()(patches, positions)', 'dropout is still on'),
        5: ('value = alone[(np.abs(centres - p) < 112).all(1)].mean(0)', 'half a side'),
        6: ('star = dense.X[((cells > spot_low) & (cells < spot_high)).all(1)].mean(0)', 'all with the same weight'),
        7: ("_, nearest = tree.query(dense.obsm['spatial'])", 'numbers of the spots')},
    '4_evaluation': {
        1: ('r = np.array([pearsonr(o, p).statistic for o,p in zip(O, P)])', 'one r for each spot'),
        2: ('r_position = gene_correlations(observed, position_baseline([*known, observed], observed)).r.mean()', 'must not be among'),
        3: ('honest = r_lazy.mean()', 'leaves the undefined ones out'),
        4: ('spread = P.std()/O.std()', 'mixes the genes'),
        5: ('flat = P/100', 'shrink the distance'),
        6: ('rho = gene_correlations(*(normalize(h, panel) for h in halve_counts(held_out, 0))).r.clip(lower=0); ceiling = 2*rho/(1 + rho)', 'root is missing'),
        7: ('guess = mean', 'hardly agree')}}

def result(source, names):
    "What running a cell raises, or None"
    try: exec(compile(source, '<cell>', 'exec'), names)
    except Exception as e: return e
    finally: plt.close('all')

def checked(source):
    "The exercise that a cell checks, or None"
    return int(m[1]) if (m := re.search(r'^ *check\((\d+),', source, re.M)) else None

def not_yet(error, exercise, *words):
    return isinstance(error, NotYet) and str(error).startswith(f'Exercise {exercise}') and all(w in str(error) for w in words)

@lessons
def test_exercises(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use('agg')
    warnings.simplefilter('ignore')
    names, found, wrong = {}, [], WRONG[exercises.twin(path).stem]
    for given, solved in zip(cells(exercises.twin(path)), cells(path), strict=True):
        if given['source'] != solved['source']: open_cell, answer, before = given['source'], solved['source'], set(names)
        error, n = result(given['source'], names), checked(given['source'])
        if n is None: assert error is None, f'{error!r} in\n{given["source"]}'
        else:
            assert not_yet(error, n, 'not answered yet'), f'exercise {n}, not answered: {error!r}'
            assert result(wrong[n][0], names) is None and not_yet(error := result(given['source'], names), n, 'not yet', wrong[n][1]), f'exercise {n}, {wrong[n][0]}: {error!r}'
            assert result(answer, names) is None and (error := result(given['source'], names)) is None, f'exercise {n}, as in the solutions: {error!r}'
            for k in set(names) - before: del names[k]
            found.append(n)
    assert found == list(range(1, len(found) + 1)) == list(wrong)

@lessons
def test_lesson(path):
    "What each lesson has: outcomes, a warm-up with a folded answer, exercises with hints, what to take home, where to read on; and one solution for each check"
    text = [c['source'] for c in cells(path, 'markdown')]
    for part in ('you can**', '### Warm-up', '## To take home', '**Go deeper:**'): assert sum(part in t for t in text) == 1, part
    assert '<summary>Answer</summary>' in next(t for t in text if '### Warm-up' in t)
    tasks = re.split(r'^### Exercise (?=\d)', '\n'.join(text), flags=re.M)[1:]
    assert all('<summary>Hint</summary>' in t for t in tasks) and 5 <= len(tasks) <= 8
    code = [c['source'] for c in cells(path)]
    assert len(tasks) == sum(len(exercises.block.findall(s)) for s in code) == sum(checked(s) is not None for s in code)
    level = [dict(easy=0, medium=1, hard=2)[re.match(r'\d+ \((\w+)\): \w', t)[1]] for t in tasks]
    assert level == sorted(level), 'the exercises rise in difficulty'

def test_cut():
    "The learners' notebooks are what the tool cuts"
    assert exercises.main(check=True) == [], 'run python tools/exercises.py'
    for path in solutions:
        pairs = list(zip(cells(exercises.twin(path)), cells(path), strict=True))
        assert not [g for g,s in pairs if g['outputs'] and (g['source'] != s['source'] or 'check(' in g['source']) or 'solution>' in g['source']]
        assert all(g['outputs'] == [o for o in s['outputs'] if o['output_type'] != 'stream'] for g,s in pairs if g['source'] == s['source'] and 'check(' not in g['source']) and any(g['outputs'] for g,_ in pairs)

def test_cut_finds_changes(tmp_path, monkeypatch):
    shutil.copytree(exercises.workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(exercises, 'workshop', tmp_path)
    twin, source = tmp_path/'1_tissue.ipynb', tmp_path/'1_tissue_solutions.ipynb'
    before = twin.read_text(encoding='utf-8')
    twin.write_text(before.replace('easy', 'simple'), encoding='utf-8')
    assert exercises.main(check=True) == ['1_tissue.ipynb'] and twin.read_text(encoding='utf-8') != before
    assert exercises.main() == ['1_tissue.ipynb'] and twin.read_text(encoding='utf-8') == before and exercises.main(check=True) == []
    text = source.read_text(encoding='utf-8')
    for old, new, told in (('"# </solution>"', '"# solved"', 'begin or end'), (', with solutions', '', 'title'), ('**These are the solutions.**', 'Solutions.', 'second cell')):
        source.write_text(text.replace(old, new, 1), encoding='utf-8')
        with pytest.raises(ValueError, match=told): exercises.main()

@pytest.mark.parametrize('solution, left', [
    ('# <solution>\na = 1\nb = a*2\n# </solution>', 'b = ...  # your code here'),
    ('def f(x):\n    "of x"\n    # <solution>\n    y = x\n    return (y +\n            1)\n    # </solution>\nz = 3', 'def f(x):\n    "of x"\n    ...  # your code here\nz = 3'),
    ('a = 1', 'a = 1')])
def test_what_is_left(solution, left): assert exercises.block.sub(exercises.emptied, solution) == left

def test_message_alone(capsys):
    "In a notebook an exercise that is not answered shows a message, and no traceback"
    from IPython.core.interactiveshell import InteractiveShell
    InteractiveShell.instance().run_cell('from histogene_nb.workshop import check\ncheck(3, ..., 1, "Look again.")')
    assert capsys.readouterr().out.strip().startswith('NotYet: Exercise 3 is not answered yet.')
    InteractiveShell.clear_instance()
