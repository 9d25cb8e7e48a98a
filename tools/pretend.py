"""A device that is not there: what would fail on a graphics card or on an Apple fails here, on any computer.

    python tools/pretend.py cuda nbs/idea/training.ipynb
    python tools/pretend.py cuda --capability 7.5 nbs/index.ipynb
    python tools/pretend.py mps -- histogene_train A.h5ad B.h5ad --out model

Tensors of the device stay in this computer's memory; their storages are marked. Mixing them with others
raises what PyTorch raises, and so do float64 on mps and tensors of the device that are given to NumPy. The
device draws its random numbers from a generator of its own. Autocast is the processor's, which leaves
layer_norm and softmax in 16 bits where a card's takes 32. It knows nothing of kernels, memory or speed.
"""
import argparse, shutil, sys, tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import torch, torch._dynamo                                           # imported before anything is replaced
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Base, Optimizer, Tag = torch._C.TensorBase, torch.optim.Optimizer, torch.Tag
MEMORY = {(7, 5): 15*2**30}                                           # of a T4; any other card has 40 GiB
SAME = 'Expected all tensors to be on the same device, but found at least two devices, {} and cpu! [{}]'
DOUBLE = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
NUMPY = "can't convert {} device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."

# --- marks

def storage(x):
    try: return Base.untyped_storage(x)
    except (NotImplementedError, RuntimeError): return None           # such as a sparse tensor

def mark(x, there):
    "Put a tensor on the device, or take it off; 'either' goes with whatever it meets"
    if (s := storage(x)) is not None: s.pretended = there
    return x

def place(x): return getattr(storage(x), 'pretended', False)

def on(x): return place(x) is True

def tensors(*what):
    "Those in nested lists, tuples and dictionaries"
    found = []
    for w in what:
        if isinstance(w, torch.Tensor): found.append(w)
        elif isinstance(w, (list, tuple)): found += tensors(*w)
        elif isinstance(w, dict): found += tensors(*w.values())
    return found

class Move(torch.autograd.Function):
    "A copy on the device or back from it; its gradient goes the other way"
    @staticmethod
    def forward(ctx, x, there):
        ctx.was = on(x)
        return mark(x.clone(), there)

    @staticmethod
    def backward(ctx, grad): return Move.apply(grad, ctx.was), None

# --- what PyTorch refuses

def in_place(func):
    arguments = func._schema.arguments
    return bool(arguments) and getattr(arguments[0].alias_info, 'is_write', False)

def refused(func, args, given):
    "Whether it takes tensors of the device and others together"
    name = func._schema.name.removeprefix('aten::').rstrip('_')
    if name in ('copy', '_to_copy'): return False
    if name in ('index', 'index_put', '_index_put_impl'):             # indices may come from the processor
        return not on(args[0]) or any(v.ndim and not on(v) for v in tensors(args[2:]))
    numbers = Tag.pointwise in func.tags or name.startswith(('_foreach', 'fill', 'masked_fill'))
    places = {place(t) for t in given if t.ndim or not numbers} - {'either'}
    if not places: return in_place(func) and not on(args[0])
    return places != {True}                                           # a number of the processor is welcome

CONVOLUTIONS = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default

def in_32_bits(func, *args):
    "What an operation of 16-bit tensors gives, which a processor may compute several times faster in 32 bits"
    short = {x.dtype for x in tensors(args)} & {torch.bfloat16, torch.float16}
    if not short: return func(*args)
    out = func(*(x.float() if isinstance(x, torch.Tensor) else x for x in args))
    return tree_map_only(torch.Tensor, lambda x: x.to(*short), out)

# --- the device

class Pretended(TorchDispatchMode):
    "Within this context there is a device `kind`, cuda or mps"
    def __init__(self, kind='cuda', capability=(8, 0), old=False):
        super().__init__()
        self.kind, self.capability, self.old = kind, tuple(capability), old        # old: as PyTorch 2.4
        self.device, self.here, self.used = torch.device(kind, 0), torch.device('cpu'), 0
        self.seed(0)
        self.stack = ExitStack()

    def __enter__(self):
        for where,name,value in self.replaced():
            self.stack.enter_context(patch.object(where, name, value))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def ours(self, device):
        device = torch.device(device)
        if device.type == self.kind and device.index: raise RuntimeError(f'{device}: invalid device ordinal')
        return device.type == self.kind

    # operations

    def wanted(self, func, places, kwargs):
        "Where one leaves its result"
        there = True if True in places else 'either' if places == {'either'} else False
        if kwargs.get('device') is None: return there
        if self.ours(kwargs['device']): return True
        if not places: return 'either'                                # made within another, unless `settled`
        backward = torch._C._current_graph_task_id() != -1
        return there if backward or func._schema.name == 'aten::_to_copy' else False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = tensors(*args, kwargs)
        places = {place(t) for t in given}
        self.used += True in places
        there = self.wanted(func, places, kwargs)
        if there is True and 'device' in kwargs: kwargs['device'] = self.here
        if places >= {True, False} and refused(func, args, given):
            raise RuntimeError(SAME.format(self.device, func))
        random = there is True and Tag.nondeterministic_seeded in func.tags
        call = partial(self.draw if random else in_32_bits, func) if random or func in CONVOLUTIONS else func
        out = call(*args, **kwargs)
        if there and func._schema.name not in ('aten::copy_', 'aten::set_'):       # what these change stays
            for t in tensors(out): mark(self.known(t) if there is True else t, there)
        return out

    def known(self, x):
        "A tensor, unless its type is unknown there"
        if self.kind == 'mps' and x.dtype in (torch.float64, torch.complex128): raise TypeError(DOUBLE)
        return x

    # random numbers

    def draw(self, func, *args, **kwargs):
        kept = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try: return func(*args, **kwargs)
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(kept)

    def seed(self, seed): self.random = torch.Generator().manual_seed(int(seed)).get_state()

    def set_random(self, state, *_): self.random = state.clone()

    # what replaces PyTorch's

    def to(self, x, *args, **kwargs):
        "Tensor.to; the type is converted before the tensor moves, as PyTorch does it"
        if args and isinstance(args[0], torch.Tensor): args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop('copy', False)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        there = on(x) if device is None else self.ours(device)
        if device is not None and not there and device.type != 'cpu': return Base.to(x, *args, **kwargs)
        moves, layout = there != on(x), layout or torch.preserve_format
        x = Base.to(x, dtype or x.dtype, copy=copy and not moves, memory_format=layout)
        if not moves: return x
        self.used += 1
        return Move.apply(self.known(x) if there else x, there)

    def settled(self, make):
        "torch.zeros and its like"
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return mark(x, False) if place(x) == 'either' else x
        return made

    def made_of(self, make):
        "torch.tensor and its like, whose device PyTorch looks at before any operation"
        fresh = make is torch.tensor
        def made(*args, device=None, **kwargs):
            x = make(*args, **kwargs)
            if device is None: return x
            if not (fresh and self.ours(device)): return self.to(x, device)
            self.used += 1
            return mark(self.known(x), True)
        return made

    def numpy(self, x, *, force=False):
        if on(x) and not force: raise TypeError(NUMPY.format(self.device))
        return Base.numpy(self.to(x, 'cpu').detach() if on(x) else x, force=force)

    def autocast(self, start):
        def init(context, device_type, dtype=None, enabled=True, cache_enabled=None):
            if device_type == self.kind:
                dtype, device_type = dtype or torch.float16, 'cpu'
                if self.kind == 'mps' and self.old:
                    raise RuntimeError("User specified an unsupported autocast device_type 'mps'")
                if self.kind == 'cuda' and enabled and dtype == torch.bfloat16 and self.capability < (8, 0):
                    raise RuntimeError('this card only emulates bfloat16')
            start(context, device_type, dtype, enabled, cache_enabled)
        return init

    def as_processor(self, ask): return lambda *kind: ask(*('cpu' if k == self.kind else k for k in kind))

    def grouped(self, group):
        "An optimiser's tensors by device, which PyTorch takes for the processor's"
        def groups(*args, **kwargs):
            found = group(*args, **kwargs)
            return {(tensors(g[0])[0].device, dtype): g for (_,dtype),g in found.items()}
        return groups

    def methods(self):
        "Of tensors"
        where, new, copied = Base.device.__get__, Base.new_tensor, torch.Tensor.__deepcopy__
        def at(kind): return property(lambda x: on(x) and self.kind == kind)
        return dict(to=lambda x, *a, **k: self.to(x, *a, **k), cpu=lambda x, *a, **k: self.to(x, 'cpu', **k),
                    cuda=lambda x, device=None, **k: self.to(x, 'cuda' if device is None else device),
                    numpy=lambda x, **k: self.numpy(x, **k), get_device=lambda x: on(x) - 1,
                    device=property(lambda x: self.device if on(x) else where(x)),
                    is_cpu=property(lambda x: not on(x)), is_cuda=at('cuda'), is_mps=at('mps'),
                    pin_memory=lambda x, *a: x, new_tensor=lambda x, *a, **k: mark(new(x, *a, **k), on(x)),
                    __deepcopy__=lambda x, memo: mark(copied(x, memo), on(x)))

    def answers(self):
        "What torch.cuda or torch.mps say, and what they do"
        (major, minor), total = self.capability, MEMORY.get(self.capability, 40*2**30)
        about = SimpleNamespace(name='pretended', major=major, minor=minor, total_memory=total)
        memory = ('memory_allocated', 'memory_reserved', 'max_memory_allocated', 'max_memory_reserved',
                  'current_allocated_memory', 'driver_allocated_memory')
        nothing = 'synchronize', 'empty_cache', 'set_device', 'reset_peak_memory_stats', '_lazy_init'
        said = dict(is_available=True, is_initialized=True, device_count=1, current_device=0,
                    get_device_capability=self.capability, get_device_name='pretended',
                    get_device_properties=about, mem_get_info=(total - 2**30, total),
                    recommended_max_memory=total, is_current_stream_capturing=False,
                    **dict.fromkeys(memory, 2**30), **dict.fromkeys(nothing))
        def is_bf16_supported(including_emulation=True): return including_emulation or major >= 8
        return {**{name: lambda *a, value=value, **k: value for name,value in said.items()},
                **dict.fromkeys(('manual_seed', 'manual_seed_all'), self.seed),
                'is_bf16_supported': is_bf16_supported, 'get_rng_state': lambda *a, **k: self.random.clone(),
                'set_rng_state': self.set_random}

    def replaced(self):
        "What is another while the device is there: an object, a name, the value"
        autocast, module = torch.amp.autocast_mode.autocast, getattr(torch, self.kind)
        for name,value in self.methods().items(): yield torch.Tensor, name, value
        for name,make in {f.__name__: f for f in _device_constructors()}.items():
            if getattr(torch, name, None) is not make: continue
            of = name in ('tensor', 'as_tensor', 'asarray')
            yield torch, name, self.made_of(make) if of else self.settled(make)
        for kind in (torch.cuda, torch.backends.mps): yield kind, 'is_available', lambda: False
        if self.kind == 'mps': yield torch.backends.mps, 'is_available', lambda: True
        for name,value in self.answers().items():
            if hasattr(module, name): yield module, name, value
        yield autocast, '__init__', self.autocast(autocast.__init__)
        for name in ('is_autocast_enabled', 'get_autocast_dtype'):
            yield torch, name, self.as_processor(getattr(torch, name))
        if hasattr(torch, 'accelerator'):
            yield torch.accelerator, 'current_accelerator', lambda *a, **k: torch.device(self.kind)
        for name in dir(Optimizer):                                   # asks whether a card records its work
            if 'graph_capture_health_check' in name: yield Optimizer, name, lambda optimizer: None
        group = Optimizer._group_tensors_by_device_and_dtype
        yield Optimizer, '_group_tensors_by_device_and_dtype', staticmethod(self.grouped(group))

def install(*args, **kwargs):
    "For the rest of this process there is a device"
    return Pretended(*args, **kwargs).__enter__()

# --- notebooks and commands

def notebook(device, path, store, cells=None):
    """Run a notebook's first `cells` cells, or all, on a device, given as the arguments of `Pretended`. Figures are made, not painted.

    It says which was the last cell to have anything on the device: from there on it is all one which device that was"""
    import forks
    there, used, last = install(*device), 0, 0
    for n in forks.cells_run(path, store, cells=cells, painted=False):
        if there.used > used: used, last = there.used, n
    print(f'last used in cell {last}')

def command(device, store, *words):
    "Run a command of this package on a device; `store`, which keeps synthetic tissue, may be None"
    import forks
    install(*device)
    if store: forks.draw_once(store)
    forks.script(shutil.which(str(words[0]), path=str(Path(sys.executable).parent)) or words[0], *words[1:])

def main():
    parser = argparse.ArgumentParser(description='Run a notebook or a command on a device that is not there')
    parser.add_argument('kind', choices=('cuda', 'mps'))
    parser.add_argument('--capability', default='8.0', help='of the card; 7.5 is a T4')
    parser.add_argument('--old', action='store_true', help='as PyTorch 2.4, which has no autocast on mps')
    parser.add_argument('what', nargs='+', help='a notebook; or, after --, a command with its arguments')
    args = parser.parse_args()
    device = args.kind, tuple(int(n) for n in args.capability.split('.')), args.old
    if not args.what[0].endswith('.ipynb'): return command(device, None, *args.what)
    import forks
    path = Path(args.what[0]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        ran = forks.run(notebook, device, path, Path(folder)/'tissue', folder=folder,
                        environment={'MPLBACKEND': 'agg'})
    print(ran.out + ran.err, end='')
    sys.exit(ran.returncode)

if __name__ == '__main__': main()
