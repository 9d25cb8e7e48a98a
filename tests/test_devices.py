"""Every page, the workshop's solutions, the front page and the commands on a graphics card and on an Apple, neither of which is there (tools/pretend.py).

`make devices` runs these. `make test` runs what comes first here: it shows that each kind of fault is found, so that a page which passes has none."""
import copy, json, os, re
import numpy as np, pytest, torch
import forks, pretend
from conftest import cells, exports, name, notebooks
from pretend import Pretended
from run_notebooks import library, modules_used
from torch import nn
from torch.nn import functional as F
from histogene_nb.folds import write_h5ad
from histogene_nb.tissue import synthetic_section

KINDS = ('cuda', 'mps')
ON = os.environ.get('DEVICES', 'cuda mps').split()                       # what pages and commands are run on: `make devices DEVICES=cuda`
kinds = pytest.mark.parametrize('kind', KINDS)

# --- the pretence: what must fail on the device, and works on the processor

def wide(device): return torch.ones(3, 3, device=device)

def split_model(device):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].to(device)
    return model(wide('cpu'))

def forgotten_gradient(device):
    "A weight stays on the processor, its gradient's other half is on the device"
    w = wide('cpu').requires_grad_()
    return (w.to(device)*wide(device)).sum().backward() or w.grad + wide(device)

def fused_step(device):
    "Adam's count of steps is left on the processor"
    settings = dict(lr=.1, beta1=.9, beta2=.99, weight_decay=0., eps=1e-8, amsgrad=False, maximize=False)
    torch._fused_adam_(*([wide(device)] for _ in range(4)), [], [torch.tensor(1.)], **settings)

FAULTS = {
    'sum': lambda d: wide(d) + wide('cpu'),
    'product': lambda d: wide('cpu') @ wide(d),
    'list': lambda d: torch.cat([wide(d), wide('cpu')]),
    'numbers in a list': lambda d: torch.stack([wide(d).sum(), wide('cpu').sum()]),
    'a number of the device': lambda d: wide('cpu') + wide(d).sum(),
    'a total on the processor': lambda d: torch.tensor(0.).add_(wide(d).sum()),
    'one element': lambda d: torch.zeros(1).add_(wide(d).sum()),
    'comparison': lambda d: torch.equal(wide(d), wide('cpu')),
    'indices': lambda d: wide('cpu')[torch.tensor([0], device=d)],
    'values': lambda d: wide(d).index_put_((torch.tensor([0]),), torch.ones(3)),
    'embedding': lambda d: nn.Embedding(5, 3).to(d)(torch.tensor([1])),
    'input': lambda d: nn.Linear(3, 3).to(d)(wide('cpu')),
    'loss': lambda d: F.mse_loss(wide(d), wide('cpu')),
    'after a copy': lambda d: copy.deepcopy(wide(d)) + wide('cpu'),
    'views': lambda d: wide(d).T[1:] + torch.ones(2, 3),
    'model on two': split_model, 'gradient': forgotten_gradient, 'fused': fused_step}
NUMPY = {
    'numpy': lambda d: wide(d).numpy(),
    'asarray': lambda d: np.asarray(wide(d)),
    'list': lambda d: np.mean([wide(d)[0], wide(d)[1]], 0)}
DOUBLE = {
    'made': lambda d: torch.zeros(2, dtype=torch.float64, device=d),
    'from numpy': lambda d: torch.from_numpy(np.ones(2)).to(d),
    'tensor': lambda d: torch.tensor(np.ones(2), device=d),
    'converted': lambda d: wide(d).double(),
    'type': lambda d: wide(d).to(torch.float64),
    'on its way back': lambda d: wide(d).to('cpu', torch.float64),
    'sum': lambda d: wide(d).sum(dtype=torch.float64),
    'model': lambda d: nn.Linear(2, 2).double().to(d)}

def found(faults, kinds=KINDS):
    return pytest.mark.parametrize('kind, fault', [pytest.param(k, f, id=f'{k}-{n}'.replace(' ', '_')) for k in kinds for n,f in faults.items()])

@found(FAULTS)
def test_mixed(kind, fault):
    fault('cpu')
    with Pretended(kind), pytest.raises(RuntimeError, match='same device'): fault(kind)

@found(NUMPY)
def test_to_numpy(kind, fault):
    fault('cpu')
    with Pretended(kind), pytest.raises(TypeError, match="can't convert"): fault(kind)

@found(DOUBLE, ['mps'])
def test_double(kind, fault):
    fault('cpu')
    with Pretended('cuda'): fault('cuda')
    with Pretended(kind), pytest.raises(TypeError, match='float64'): fault(kind)

@kinds
def test_others(kind):
    "16 bits to NumPy; a device that is not there; autocast where it is not known or only emulated"
    with Pretended(kind):
        with pytest.raises(TypeError, match='BFloat16'): wide(kind).bfloat16().cpu().numpy()
        with pytest.raises(RuntimeError, match='ordinal'): torch.empty(0, device=f'{kind}:99')
    with Pretended('cuda', (7, 5)), pytest.raises(RuntimeError, match='emulates'): torch.autocast('cuda', torch.bfloat16)
    with Pretended('cuda', (7, 5)): torch.autocast('cuda', torch.float16)
    with Pretended('mps', old=True), pytest.raises(RuntimeError, match='unsupported'): torch.autocast('mps', enabled=False)
    with Pretended('mps'): torch.autocast('mps', enabled=False)

# --- the pretence: what must work

@kinds
def test_allowed(kind):
    with Pretended(kind) as there:
        x = wide(kind)
        assert x.device == torch.device(kind, 0) == x.cpu().to(kind).device and x.cpu().device.type == 'cpu'
        assert (x.is_cuda, x.is_mps) == (kind == 'cuda', kind == 'mps')
        assert (x + torch.tensor(1.)).device == x[torch.tensor([0])].device == x.new_zeros(2).device == F.one_hot(x.long()).device == x.device
        x[0], x[torch.tensor([1])] = 5., torch.tensor(4.)
        x[2] = torch.ones(3)
        assert x.sum().item() == 30 and x.tolist()[0] == [5.]*3 and x.cpu().numpy()[1, 0] == 4 and str(x.device) in repr(x)
        assert torch.zeros_like(x, device='cpu').device.type == 'cpu' and (wide('cpu').copy_(x) + wide('cpu')).max() == 6
        w = wide('cpu').requires_grad_(); w.to(kind).prod(0).sum().backward(); assert w.grad.device.type == 'cpu'
        assert there.used > 0
    assert torch.ones(2).device.type == 'cpu' and not {'to', 'device', 'numpy'} & vars(torch.Tensor).keys()

@kinds
def test_random(kind):
    "The device's random numbers leave the processor's alone, and are drawn from the same seed"
    with Pretended(kind):
        torch.manual_seed(1); wanted, first = torch.rand(2), torch.rand(3, device=kind)
        torch.manual_seed(1); again = torch.rand(3, device=kind)
        assert torch.equal(first, again) and torch.equal(torch.rand(2), wanted)
        assert not torch.equal(torch.rand(3, device=kind), again)
        module = getattr(torch, kind)
        state, first = module.get_rng_state(), F.dropout(wide(kind))
        module.set_rng_state(state)
        assert torch.equal(F.dropout(wide(kind)), first)

CARDS = dict(cuda=('cuda', (8, 0), torch.bfloat16), T4=('cuda', (7, 5), torch.float16), mps=('mps', (8, 0), torch.float16))

@pytest.mark.parametrize('kind, capability, precision', CARDS.values(), ids=CARDS)
def test_training(kind, capability, precision):
    with Pretended(kind, capability):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(.1), nn.LayerNorm(8), nn.Linear(8, 2)).to(kind)
        x, y, losses = torch.randn(64, 3).to(kind), torch.randn(64, 2, device=kind), []
        scaler = torch.amp.GradScaler('cuda' if kind == 'cuda' else 'cpu', enabled=precision == torch.float16)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2, fused=kind == 'cuda')
        for _ in range(40):
            opt.zero_grad()
            with torch.autocast(kind, precision):
                out = model(x)
                assert out.dtype == precision and torch.is_autocast_enabled(kind)
            loss = F.mse_loss(out.float(), y)
            scaler.scale(loss).backward(); scaler.step(opt); scaler.update()
            losses.append(loss.item())
        assert losses[-1] < .9*losses[0] and {w.grad.device.type for w in model.parameters()} == {kind}
        again = torch.optim.Adam(model.parameters(), fused=kind == 'cuda')
        again.load_state_dict(opt.state_dict()); again.step()

def test_card():
    with Pretended('cuda', (7, 5)):
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1 and not torch.backends.mps.is_available()
        assert torch.cuda.get_device_capability() == (7, 5) and not torch.cuda.is_bf16_supported(including_emulation=False)
        assert torch.cuda.get_device_properties(0).total_memory == 15*2**30 == torch.cuda.mem_get_info()[1]
    with Pretended('mps'):
        assert torch.backends.mps.is_available() and not torch.cuda.is_available()
        assert torch.mps.recommended_max_memory() > torch.mps.driver_allocated_memory()

def test_page_with_a_fault(tmp_path):
    "A notebook is run as a page is, and its fault found"
    def cell(i, source): return dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], execution_count=None, source=source)
    cells = [cell(i, s) for i,s in enumerate(['import torch\nx = torch.ones(2).to("cuda")', 'x + torch.ones(2)'])]
    for n in (1, 2):
        (tmp_path/f'{n}.ipynb').write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells[:n])), encoding='utf-8')
    good, bad = [forks.run(pretend.notebook, ('cuda',), tmp_path/f'{n}.ipynb', tmp_path/'tissue', folder=tmp_path) for n in (1, 2)]
    assert good.returncode == 0 and good.out == 'last used in cell 1\n', good.err
    assert bad.returncode != 0 and 'same device' in bad.err

# --- pages and commands

@pytest.fixture(scope='session')
def store(tmp_path_factory):
    "Where all tests keep synthetic tissue, once it is drawn"
    shared = tmp_path_factory.getbasetemp()
    return (shared.parent if 'PYTEST_XDIST_WORKER' in os.environ else shared)/'tissue'

def may_use_a_device(path):
    "Whether a page's code, or a module that it comes to import, speaks of devices; the module `devices` itself does nothing unless it is asked"
    code = '\n'.join(c['source'] for c in cells(path) if 'eval: false' not in c['source'])
    modules = [library/f'{m}.py' for m in modules_used(code) if m != 'devices']
    return any(re.search(r'device|cuda|\bmps\b', text) for text in (code, *(m.read_text(encoding='utf-8') for m in modules)))

@pytest.mark.parametrize('code, may', [('import torch\ntorch.ones(2)', False), ('from histogene_nb.patches import extract_patches', False), ('torch.ones(2).cuda()', True),
                                       ('model.to(default_device())', True), ('from histogene_nb.superres import predict_superres', True)])
def test_pages_that_may_use_a_device(tmp_path, code, may):
    (tmp_path/'page.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[code])])), encoding='utf-8')
    assert may_use_a_device(tmp_path/'page.ipynb') == may

PAGES = [p for p in notebooks() if (exports(p) or p.stem in ('index', 'tour') or p.stem.endswith('_solutions')) and may_use_a_device(p)]

@pytest.mark.devices
@pytest.mark.parametrize('path', PAGES, ids=name)
def test_page(path, tmp_path, store):
    "On the one device and, as far as it used that, on the other"
    upto = None
    for kind in ON:
        if upto == 0: break
        ran = forks.run(pretend.notebook, (kind,), path, store, upto, folder=tmp_path, environment={'MPLBACKEND': 'agg'})
        if ran.returncode != 0: pytest.fail(f'{name(path)} on {kind}: {ran.err or "hung"}', pytrace=False)
        upto = int(re.search(r'last used in cell (\d+)\n$', ran.out)[1])

@pytest.fixture(scope='module')
def sections(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sections')
    for n in ('X1', 'X2', 'Y1'): write_h5ad(synthetic_section(folder, n, px=960), folder/f'{n}.h5ad')
    return folder

MADE = {'HisToGene': """histogene_train {0}/X1.h5ad {0}/X2.h5ad --out model --setting dim=16 depth=1 heads=2 --epochs 2 --n-top 40 --min-spots 5
                        histogene_predict model {0}/Y1.h5ad --out spots.h5ad
                        histogene_predict model {0}/Y1.h5ad --superres 4 --out finer.h5ad
                        histogene_predict model --image {0}/Y1.jpg --spot-diameter 112 --out image.h5ad
                        histogene_plot spots.h5ad finer.h5ad --section {0}/Y1.h5ad --out maps.png""",
        'texture': """histogene_train {0}/X1.h5ad {0}/X2.h5ad --model texture --out model --n-top 40 --min-spots 5 --cache cache
                      histogene_predict model {0}/X1.h5ad --out spots.h5ad --cache cache
                      histogene_predict model --image {0}/Y1.jpg --spot-diameter 112 --out image.h5ad""",
        'demo': 'histogene_demo --out demo --epochs 2',
        'reproduce': 'histogene_reproduce synthetic --only X1 --epochs 1 --backbone efficientnet_lite0 --stnet-epochs 1 --stnet-px 32 --out run'}

@pytest.mark.devices
@pytest.mark.parametrize('kind', ON)
@pytest.mark.parametrize('what', MADE)
def test_commands(what, kind, sections, tmp_path, store):
    for line in MADE[what].format(sections).splitlines():
        ran = forks.run(pretend.command, (kind,), store, *line.split(), folder=tmp_path, environment={'MPLBACKEND': 'agg'})
        if ran.returncode != 0: pytest.fail(f'{line} on {kind}: {ran.out}{ran.err}', pytrace=False)
