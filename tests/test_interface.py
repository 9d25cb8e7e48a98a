"What the one interface of a model refuses: a model that lacks something, a name, a saved model of somebody else's"
import os, pickle
import pytest
from torch import nn
from histogene_nb import interface
from histogene_nb.expression import select_panel
from histogene_nb.files import InputError
from histogene_nb.interface import MODELS, SpotModel, class_name, from_pretrained, model_class, predict, save_pretrained
from histogene_nb.patches import extract_patches
from histogene_nb.tissue import synthetic_section

class MeanColour(SpotModel):
    def __init__(self, n_genes, px=8):
        super().__init__(n_genes=n_genes, px=px)
        self.linear = nn.Linear(3, n_genes)
    def look(self, section, cache=None): return (extract_patches(section, self.config['px'], cache=cache).float().mean((2, 3))/255,)
    def forward(self, colour): return self.linear(colour)

class Forgets(MeanColour):
    def __init__(self, n_genes, px=8, alpha=1.): super().__init__(n_genes, px)
class OneTensor(MeanColour):
    def look(self, section, cache=None): return super().look(section, cache)[0]
class OneRow(MeanColour):
    def look(self, section, cache=None): return tuple(t[:1] for t in super().look(section, cache))
class OneGene(MeanColour):
    def forward(self, colour): return super().forward(colour)[:, :1]
class NoLosses(MeanColour):
    def learn(self, examples, sections, **settings): return super().learn(examples, sections, **settings)[0]
class TakenName(MeanColour):
    def __init__(self, n_genes, px=8, lr=1.):
        super().__init__(n_genes, px)
        self.config['lr'] = lr
class Blind(SpotModel):
    def __init__(self, n_genes): super().__init__(n_genes=n_genes)
class Twice(MeanColour):
    "Every classmethod and method of the base class by way of `super()`"
    @classmethod
    def train_on(cls, *args, **settings): return super().train_on(*args, **settings)
    @classmethod
    def settings(cls): return super().settings()
    @classmethod
    def suited(cls, sections): return {**super().suited(sections), 'px': 4}
    def begin(self, sections, **settings): super().begin(sections, **settings)
    def learn(self, examples, sections, **settings): return super().learn(examples, sections, **settings)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('interface')
    section = synthetic_section(folder, 'X1', px=1200)
    panel = select_panel([section], n_top=20, min_spots=5)
    return folder, section, panel, MeanColour.train_on([section], panel, epochs=2, lr=.05, progress=False)[0]

def refused(f, *args, **kwargs):
    with pytest.raises(InputError) as e: f(*args, **kwargs)
    return str(e.value)

def test_what_train_on_refuses(made):
    _, section, panel, _ = made
    assert 'MeanColour has no setting depth; it has px, epochs' in refused(MeanColour.train_on, [section], panel, depth=8)
    assert '2 times' in refused(MeanColour.train_on, [section]*2, panel)
    assert 'no section to train on' in refused(MeanColour.train_on, [], panel)
    assert 'does not know its genes' in refused(MeanColour(2).known, 'genes')

@pytest.mark.parametrize('wrong,said', [(Forgets, 'Forgets does not keep alpha in its config'), (OneTensor, 'OneTensor.look returns Tensor, not a tuple of tensors'),
                                        (OneRow, 'Give a row for each place'), (OneGene, 'for targets of'), (NoLosses, 'not a list of losses'),
                                        (TakenName, 'has a setting lr, a name that training or its file needs'), (Blind, 'Blind has no method look')])
def test_what_a_model_lacks(made, wrong, said):
    _, section, panel, _ = made
    assert said in refused(wrong.train_on, [section], panel, epochs=1, progress=False)

def test_super_and_pickle(made):
    "The base class is put together from several cells: its methods are inherited, extended and pickled as any class's"
    _, section, panel, model = made
    twice, losses = Twice.train_on([section], panel, epochs=2, lr=.05, progress=False)
    assert twice.config['px'] == 4 and len(losses) == 2 and list(Twice.settings()) == list(MeanColour.settings())
    again = pickle.loads(pickle.dumps(model))
    assert (predict(again, section).X == predict(model, section).X).all() and pickle.loads(pickle.dumps(MeanColour.train_on)) == MeanColour.train_on
    for name in ('look', 'learn', 'begin', 'check', 'suited', 'known', 'settings', 'train_on'):
        method = getattr(SpotModel, name)
        assert method.__qualname__ == f'SpotModel.{name}' and method.__module__ == 'histogene_nb.interface' and method.__doc__

def test_names(made):
    assert [class_name(model_class(k)) for k in MODELS] == list(MODELS)
    own = f'{__name__}:MeanColour'
    assert class_name(MeanColour) == own and model_class(own) is MeanColour
    for wrong,why in {'HisTogene': 'there are HisToGene', 'no_such_module:Model': 'cannot be imported', 'pathlib:Path': 'not a SpotModel'}.items(): assert why in refused(model_class, wrong)
    for wrong in ('./mine:Net', ':Net', 'mine.py'): assert 'There is no model' in refused(model_class, wrong)

def test_whose_model_it_is(made, tmp_path):
    "A class that was not imported is refused until somebody vouches for it"
    config = save_pretrained(made[3], tmp_path/'model')/'config.json'
    mine, own = config.read_text(), f'{__name__}:MeanColour'
    assert f'not {__name__}:OneGene' in refused(from_pretrained, tmp_path/'model', OneGene)
    for other in ('somebody_elses:MeanColour', f'{__name__}:NotDefinedHere'):
        config.write_text(mine.replace(own, other))
        assert 'If you trust it' in refused(from_pretrained, tmp_path/'model')
    config.write_text(mine)
    assert type(from_pretrained(tmp_path/'model')) is type(from_pretrained(tmp_path/'model', own)) is MeanColour
    weights = tmp_path/'model'/'model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert 'checksum' in refused(from_pretrained, tmp_path/'model')

def test_what_is_imported(tmp_path, monkeypatch):
    "A module in the current folder stands in for nothing that is installed, and one that is broken is said to be"
    (tmp_path/'timm.py').write_text('raise SystemExit("run though nobody asked for it")')
    (tmp_path/'broken.py').write_text('this is no Python')
    monkeypatch.chdir(tmp_path)
    assert 'SyntaxError' in refused(model_class, 'broken:Net')
    assert interface.model_class('ST-Net').__name__ == 'STNet'                          # it imports timm, the installed one
    import sys
    assert os.getcwd() not in sys.path
