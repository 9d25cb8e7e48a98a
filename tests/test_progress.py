"What is shown while something takes long: a bar in a terminal, lines elsewhere, nothing where it is short"
import os, re, subprocess, sys, time
from contextlib import contextmanager
import numpy as np, pytest, torch
from histogene_nb import progress
from histogene_nb.devices import expect
from histogene_nb.files import InputError
from histogene_nb.interface import foretell, run_model
from histogene_nb.model import HisToGene
from histogene_nb.progress import working
from histogene_nb.texture import TextureModel, Textures, texture_numbers
from histogene_nb.tissue import synthetic_sections
from histogene_nb.training import fit

PROGRAM = '''
import time
from histogene_nb import progress
progress.FIRST, progress.EVERY = FIRST, EVERY
with progress.working('sections', 2, 'section') as outer:
    for i in range(2):
        with progress.working('spots', range(4), 'spot') as spots:
            for s in spots: time.sleep(.15)
        outer.update()
        if not i: print('one is done')
'''

def program(first=99, every=99): return [sys.executable, '-c', PROGRAM.replace('FIRST, EVERY\n', f'{first}, {every}\n')]

def in_terminal(argv):
    "What a terminal of 80 columns gets"
    pty, termios = pytest.importorskip('pty'), pytest.importorskip('termios')
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    child, said = subprocess.Popen(argv, stdout=theirs, stderr=theirs), b''
    os.close(theirs)
    try:
        while piece := os.read(ours, 65536): said += piece
    except OSError: pass                                                        # so ends a terminal whose program has ended
    os.close(ours)
    assert child.wait() == 0, said.decode()
    return said.decode()

def screen(said):
    "The lines that are left to be read in the end"
    shown = []
    for line in said.split('\n'):
        row = ''
        for piece in line.split('\r'): row = piece + row[len(piece):]
        shown.append(row.rstrip())
    return shown

def test_lines_where_output_is_no_terminal():
    p = subprocess.run(program(first=.1, every=.4), capture_output=True, text=True)
    lines = p.stderr.splitlines()
    assert p.returncode == 0 and p.stdout == 'one is done\n'
    assert lines[0].startswith('spots: ') and lines[-1].startswith('sections: 1 of 2, ') and lines[-1].endswith(' left')
    assert len(lines) <= 4 and '\r' not in p.stderr and p.stderr.isascii()

def test_asked_for_no_bars(monkeypatch):
    monkeypatch.setenv('TQDM_DISABLE', '1')
    assert screen(in_terminal(program(first=.1))) == ['one is done', '']
    p = subprocess.run(program(first=.1, every=.2), capture_output=True, text=True)
    assert (p.returncode, p.stdout, p.stderr) == (0, 'one is done\n', '')

def test_a_bar_in_a_terminal():
    said = in_terminal(program(first=.1))
    assert 'spots:' in said and 'sections:  50%|' in said and '1/2 [' in said
    assert screen(said) == ['one is done', '']                                 # printed above the bar, which is gone
    assert all(len(s) <= 80 for s in said.replace('\n', '\r').split('\r'))

def test_nothing_of_what_is_short():
    assert in_terminal(program()) == 'one is done\r\n'
    p = subprocess.run(program(), capture_output=True, text=True)
    assert (p.stdout, p.stderr) == ('one is done\n', '')

def test_what_is_not_to_be_shown_hides_what_is_inside(monkeypatch, capsys):
    monkeypatch.setattr(progress, 'EVERY', .02)
    for show in (False, True):
        with working('outer', 2, show=show):
            with working('inner'): time.sleep(.2)
        assert ('inner: 00:00 so far' in capsys.readouterr().err) == show

def test_an_error_ends_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, 'EVERY', .02)
    with pytest.raises(ZeroDivisionError):
        with working('outer'), working('inner', range(3)) as each:
            for i in each: 1/i
    capsys.readouterr(); time.sleep(.1)
    assert not progress._open and capsys.readouterr().err == ''

def test_only_the_first_of_several_processes_speaks(monkeypatch, capsys):
    monkeypatch.setattr(progress, 'EVERY', .02); monkeypatch.setenv('TORCHELASTIC_RUN_ID', '1')
    for rank in '10':
        monkeypatch.setenv('RANK', rank)
        with working('training'): time.sleep(.2)
        assert bool(capsys.readouterr().err) == (rank == '0')

def test_layers_are_counted_and_the_prediction_is_the_same_to_the_bit(monkeypatch):
    torch.manual_seed(0)
    model, seen = HisToGene(5, 8, 8, 16, 3, 2).eval(), (torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8), torch.randint(8, (20, 2)))
    with torch.no_grad(): alone = model(*seen).numpy()
    slow = model.blocks[1].register_forward_pre_hook(lambda *_: time.sleep(.2))   # so that a bar is drawn between two layers
    found = []
    @contextmanager
    def noted(*args):
        with working(*args) as bar: yield bar; found.append((bar.desc, bar.n, bar.total))
    monkeypatch.setattr('histogene_nb.interface.working', noted)
    np.testing.assert_array_equal(run_model(model, seen, 'cpu', 'float32'), alone)
    assert found == [('prediction', 3, 3)]
    slow.remove()
    assert not any(m._forward_hooks for m in model.modules())

# --- beforehand

def test_what_a_model_says_it_costs_is_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel                       # the counter does not know the processor's own kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, n = HisToGene(5, 8, 8, 32, 2, 2).eval(), 200
    seen = torch.zeros(n, 3, 8, 8), torch.zeros(n, 2, dtype=torch.long)
    for train in (False, True):
        with FlopCounterMode(display=False) as counted, torch.set_grad_enabled(train), sdpa_kernel(SDPBackend.MATH):
            out = model.train(train)(*seen)
            if train: out.sum().backward()
        assert model.cost(n, train)[0] == pytest.approx(counted.get_total_flops(), rel=.1)

def test_what_the_transformers_on_textures_cost_is_twice_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = TextureModel(5, rank=3, members=2, pretrained=False)
    seen = torch.zeros(200, 641)
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for m in model.members.eval(): m(seen)
    assert model.cost(200)[0] == pytest.approx(2*counted.get_total_flops(), rel=.1)
    assert model.cost(200, True)[0] < 3*model.cost(200)[0]                       # a step shows a share of them, and
    assert model.cost(10_000, True) == model.cost(20_000, True)                  # of a large section no more than of a smaller one

def test_looking_at_tissue_is_foretold_unless_it_is_kept(monkeypatch, capsys, tmp_path):
    (section,), textures = synthetic_sections(tmp_path, ['X1']), Textures()
    monkeypatch.setattr('histogene_nb.devices.operations', lambda *_: 1e11)
    monkeypatch.setattr('histogene_nb.texture._A_PIXEL', 6.15e12/(len(section)*40**2))    # windows of 24, a rim of 8 around each
    for _ in range(2): texture_numbers(textures, section, (1.,), 24, cache=tmp_path/'cache')
    assert re.fullmatch(rf'Looking at {len(section)} places takes about 01:01 and \d\.\d GB of memory\n', capsys.readouterr().out)

def test_what_does_not_fit_is_refused_before_it_begins(monkeypatch):
    model = HisToGene(5, 8, 8, 16, 1, 2)
    monkeypatch.setattr('histogene_nb.devices.memory', lambda device: (10_000, 20_000))
    def forward(*_): pytest.fail('it has begun')
    monkeypatch.setattr(model, 'forward', forward)
    monkeypatch.setattr(model, 'look', forward)
    example = torch.zeros(20, 3, 8, 8), torch.zeros(20, 2, dtype=torch.long), torch.zeros(20, 5)
    with pytest.raises(InputError, match=r'Training takes more memory than .*: about 0\.0 GB.*Give sections of fewer spots'): fit(model, [example], 1, device='cpu')
    with pytest.raises(InputError, match=r'Predicting 20 places takes more memory.*Predict in tiles'): foretell(model, [(np.arange(20), None)], 'cpu', 'auto')

def test_what_takes_long_is_said(monkeypatch, capsys):
    monkeypatch.setattr('histogene_nb.devices.operations', lambda *_: 1e11)
    for work in (5.9e12, 6.1e12): expect('Training', (work, 2e9), torch.device('cpu'), 'float32', '')
    assert capsys.readouterr().out == 'Training takes about 01:01 and 2.0 GB of memory\n'
