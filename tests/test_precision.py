"What every device must keep to: exact resume in each precision, heads in float32, checkpoints by time, too little memory said in one line"
import json, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from histogene_nb import devices, training
from histogene_nb.devices import all_digits, attend, gradient_scaler, in_blocks
from histogene_nb.files import InputError
from histogene_nb.model import HisToGene
from histogene_nb.tensors import read_tensors
from histogene_nb.texture import _ridge
from histogene_nb.stnet import STNet, spot_batches
from histogene_nb.training import fit, training_example
from histogene_nb.patches import extract_patches
from histogene_nb.tissue import synthetic_section
from histogene_nb.interface import run_model

TINY = dict(n_genes=12, patch_size=16, dim=32, depth=2, heads=4)

def examples():
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=g), torch.randint(64, (40, 2), generator=g), 5 + .1*torch.randn(40, 12, generator=g))
            for _ in range(3)]

def fresh():
    torch.manual_seed(0)
    return HisToGene(**TINY)

@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_a_stopped_run_ends_as_the_whole_one(tmp_path, precision):
    how = dict(lr=1e-3, device='cpu', progress=False, precision=precision)
    whole, first, second = fresh(), fresh(), fresh()
    wanted = fit(whole, examples(), epochs=6, **how)
    fit(first, examples(), epochs=3, checkpoint=tmp_path/'c.safetensors', **how)
    state = json.loads(read_tensors(tmp_path/'c.safetensors')[1]['state'])
    assert state['precision'] == precision and bool(state['scaler']) == (precision == 'float16')
    assert fit(second, examples(), epochs=6, checkpoint=tmp_path/'c.safetensors', **how) == wanted
    assert all(torch.equal(a, b) for a,b in zip(whole.parameters(), second.parameters()))

def test_a_run_goes_on_in_another_precision(tmp_path):
    "As it does when it was begun on a card"
    how = dict(lr=1e-3, device='cpu', progress=False, checkpoint=tmp_path/'c.safetensors')
    fit(fresh(), examples(), epochs=3, precision='float16', **how)
    losses = fit(fresh(), examples(), epochs=6, precision='float32', **how)
    assert losses == pytest.approx(fit(fresh(), examples(), epochs=6, lr=1e-3, device='cpu', progress=False), rel=.02)

def test_the_scaler_goes_on_where_it_was(tmp_path):
    "Gradients too large for float16 at first: the scale is lowered, kept, and taken up again"
    how, large = dict(lr=1e-3, device='cpu', progress=False, precision='float16'), [(p, q, 1e6*t) for p,q,t in examples()]
    file = tmp_path/'c.safetensors'
    wanted, stopped = fresh(), fresh()
    whole = fit(wanted, large, epochs=4, **how)
    fit(stopped, large, epochs=2, checkpoint=file, **how)
    assert json.loads(read_tensors(file)[1]['state'])['scaler']['scale'] < 2**16, 'it began at 2**16 and was lowered'
    assert fit(again := fresh(), large, epochs=4, checkpoint=file, **how) == whole
    assert all(torch.equal(a, b) for a,b in zip(wanted.parameters(), again.parameters()))

def test_a_process_without_a_section_has_a_scaler_too():
    "With more processes than sections, in its first step"
    model, device = fresh(), torch.device('cpu')
    opt, scaler = torch.optim.Adam(model.parameters(), lr=1e-3), gradient_scaler(torch.device('cpu'), 'float16')
    training.one_pass(model, opt, examples()[:1], device, False, precision='float16', scaler=scaler)
    began = gradient_scaler(device, 'float16')
    began.scale(torch.zeros(()))
    for w in model.parameters(): w.grad = torch.zeros_like(w)
    began.step(opt); began.update()

def test_other_types_of_weights():
    "A model in float64 computes in float64, head included"
    model, (patches, positions, _) = fresh().double().eval(), examples()[0]
    assert model(patches, positions).dtype == torch.float64

def test_st_net_where_one_spot_is_left_over():
    "Batch normalisation takes no batch of one"
    torch.manual_seed(0)
    model = STNet(4, 'efficientnet_lite0', pretrained=False, patch_size=32)
    example = (torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8), torch.randn(9, 4))
    losses = fit(model, [example], epochs=2, lr=1e-3, device='cpu', progress=False, one_pass=partial(spot_batches, batch_size=4))
    assert np.isfinite(losses).all()

def test_a_prediction_out_of_float16s_range(monkeypatch):
    model, (patches, positions, _) = fresh(), examples()[0]
    monkeypatch.setattr(model, 'forward', lambda *_: torch.full((40, 12), float('inf')))
    with pytest.raises(InputError, match='range of float16.*precision=float32'): run_model(model, (patches, positions), 'cpu', 'float16')

def test_textures_take_all_digits_and_leave_settings_alone():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = True
    try:
        with all_digits(): assert not torch.backends.cudnn.enabled or torch.backends.cudnn.deterministic
    finally: torch.backends.cudnn.deterministic = before[1]
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)

def test_heads_are_float32():
    "Predictions of spots that differ little do not fall together"
    model, (patches, positions, _) = fresh(), examples()[0]
    model.head[1].bias.data.fill_(5.); model.head[1].weight.data.mul_(.1)
    full, half = (run_model(model, (patches, positions), 'cpu', p) for p in ('float32', 'bfloat16'))
    rounded = torch.from_numpy(full).bfloat16().float().numpy()
    assert len(np.unique(half[:, 0])) == 40 > 2*len(np.unique(rounded[:, 0]))
    assert 0 < np.abs(half - full).max() < np.abs(rounded - full).max()

@pytest.mark.skipif(sys.platform != 'linux', reason='asks Linux what a process has in its address space')
def test_patches_from_the_cache_are_views_of_its_files(tmp_path):
    "The system loads what is needed and drops the rest when it needs the room"
    section = synthetic_section(tmp_path, 'X1', px=1200)
    def mapped(): return str(tmp_path/'cache') in Path('/proc/self/maps').read_text()
    extract_patches(section, cache=tmp_path/'cache')
    before, patches = mapped(), training_example(section, list(section.var_names[:5]), cache=tmp_path/'cache')[0]
    assert not before and mapped() and torch.equal(patches, extract_patches(section))

def test_one_checkpoint_a_minute(tmp_path, monkeypatch):
    "And one at the end; the clock here goes a minute every third epoch"
    written, clock = [], iter(np.repeat(np.arange(0, 6000, 60), 3))
    monkeypatch.setattr(training, 'time', SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(training, 'save_checkpoint', lambda file, model, opt, scaler, state: written.append(len(state['losses'])))
    fit(fresh(), examples(), epochs=8, lr=1e-3, device='cpu', checkpoint=tmp_path/'c.safetensors', progress=False)
    assert written[-1] == 8 and 2 <= len(written) < 8 and 1 not in written
    written.clear()
    fit(fresh(), examples(), epochs=3, lr=1e-3, device='cpu', checkpoint=tmp_path/'c.safetensors', every=0, progress=False)
    assert written == [1, 2, 3]

@pytest.mark.parametrize('error', [RuntimeError('CUDA out of memory. Tried to allocate 6.40 GiB. GPU 0 has a total capacity of 14.56 GiB'),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 6400000000 bytes."),
                                   MemoryError('Unable to allocate 6.40 GiB for an array')])
def test_too_little_memory(error, monkeypatch):
    model, (patches, positions, targets) = fresh(), examples()[0]
    def forward(*_): raise error
    monkeypatch.setattr(model, 'forward', forward)
    with pytest.raises(InputError, match=r'A sequence of 40 patches takes more memory than .* has: 6.*are free\. Predict in tiles \(tile=40, or --tile 40\)'): run_model(model, (patches, positions), 'cpu')
    with pytest.raises(InputError, match='Training takes more memory'): fit(model, [(patches, positions, targets)], epochs=1, device='cpu', progress=False)
    def broken(*_): raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')
    monkeypatch.setattr(model, 'forward', broken)
    with pytest.raises(RuntimeError, match='shapes'): run_model(model, (patches, positions), 'cpu')

def test_a_whole_model_with_attention_in_blocks(monkeypatch):
    "As on a device without a kernel for it: the same predictions and gradients"
    model, (patches, positions, targets) = fresh().eval(), examples()[0]
    def out_and_gradient():
        model.zero_grad()
        out = model(patches, positions)
        (out - targets).square().sum().backward()
        return out.detach(), model.patch_embed.weight.grad.clone()
    wanted = out_and_gradient()
    monkeypatch.setattr('histogene_nb.attention.attend', lambda q, k, v: in_blocks(q, k, v, few=7))
    for a,b in zip(wanted, out_and_gradient()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_long_sequences_go_in_blocks_where_there_is_no_kernel(monkeypatch):
    said = []
    monkeypatch.setattr('histogene_nb.devices.has_kernel', lambda q: False)
    monkeypatch.setattr('histogene_nb.devices.in_blocks', lambda q, k, v: said.append(q.shape[-2]) or q)
    for n in (100, 1024, 1025): attend(*torch.randn(3, 1, 2, n, 4))
    assert said == [1025]

@pytest.mark.parametrize('n', [20, 200])
def test_ridge_by_either_matrix(n):
    "The penalised normal equations, solved directly, for fewer spots than numbers and for more"
    rng = np.random.default_rng(0)
    H, T = rng.normal(size=(n, 60)).astype(np.float32), rng.normal(size=(n, 3)).astype(np.float32)
    A, B = H.astype(float), T.astype(float)
    for alpha,w in zip((.2, 5.), _ridge([H[:9], H[9:]], [T[:9], T[9:]], (.2, 5.))):
        np.testing.assert_allclose(w, np.linalg.solve(A.T @ A + alpha*60*np.eye(60), A.T @ B), rtol=1e-8, atol=1e-12)

@pytest.mark.parametrize('ranks,cards,asked,places,backend', [
    (2, 2, None, ['cuda:0', 'cuda:1'], 'cpu:gloo,cuda:nccl'), (2, 2, 'cuda', ['cuda:0', 'cuda:1'], 'cpu:gloo,cuda:nccl'), (3, 2, None, ['cuda:0', 'cuda:1', 'cuda:0'], 'gloo'),
    (2, 1, None, ['cuda:0', 'cuda:0'], 'gloo'), (2, 2, 'cuda:0', ['cuda:0', 'cuda:0'], 'gloo'), (2, 1, 'cpu', [None, None], 'gloo')])
def test_which_process_takes_which_card(monkeypatch, ranks, cards, asked, places, backend):
    "More processes than cards share them, and cards that share go through gloo: nccl takes no two processes on one card"
    began = []
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'here'); monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    for name,value in dict(is_available=lambda: True, device_count=lambda: cards, set_device=lambda d: began.append(str(d))).items(): monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: None)
    for name,value in dict(is_initialized=lambda: False, is_nccl_available=lambda: True, init_process_group=lambda b: began.append(b), get_rank=lambda: 0, get_world_size=lambda: ranks).items():
        monkeypatch.setattr(devices.dist, name, value)
    monkeypatch.setattr(devices, 'atexit', SimpleNamespace(register=lambda f: None))
    for rank,place in enumerate(places):
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        began.clear()
        devices.processes(asked)
        assert began == [p for p in (place, backend) if p], (rank, began)
    with pytest.raises(InputError, match='no device'): monkeypatch.undo() or devices.default_device('gpu')
