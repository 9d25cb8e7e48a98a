"What reaches beyond: tissue past its array, images with none, other scales, descriptions larger than their weights; and what a training knows of itself"
import json, numpy as np, pytest, time, torch
from PIL import Image
from torch import nn
from histogene_nb import plots
from histogene_nb.expression import normalize, select_panel
from histogene_nb.files import InputError
from histogene_nb.interface import SpotModel, from_pretrained, gene_trust, learned, predict, save_pretrained, scale_note, trust_summary, trusted
from histogene_nb.model import HisToGene, load_released
from histogene_nb.patches import extract_patches
from histogene_nb.position import spot_um
from histogene_nb.sections import place
from histogene_nb.superres import predict_image, predict_superres, recover_spots, without_array
from histogene_nb.tensors import no_larger_than
from histogene_nb.texture import TextureModel
from histogene_nb.tissue import synthetic_section

TINY = dict(epochs=2, lr=1e-3, dim=16, depth=1, heads=2, patch_size=16, progress=False)

class Colour(SpotModel):
    def __init__(self, n_genes):
        super().__init__(n_genes=n_genes)
        self.linear = nn.Linear(3, n_genes)
    def look(self, section, cache=None): return (extract_patches(section, 8, cache=cache).float().mean((2, 3))/255,)
    def forward(self, colour): return self.linear(colour)
FAST = dict(epochs=60, lr=.2, progress=False)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('beyond')
    sections = [synthetic_section(folder, n, px=1200) for n in ('X1', 'Y1', 'X2')]
    panel = select_panel(sections, n_top=15, min_spots=20)
    return folder, sections, panel, HisToGene.train_on(sections[:1], panel, **TINY)[0]

def refused(f, *args, **kwargs):
    with pytest.raises(InputError) as e: f(*args, **kwargs)
    return str(e.value)

def on_canvas(folder, section, before, after):
    "The section on a photograph that shows its tissue again beside it: pixels added before and after"
    path = place(section).path
    wide = np.pad(np.asarray(Image.open(path).convert('RGB')), ((before, after), (before, after), (0, 0)), mode='wrap')
    file = folder/f'canvas_{before}_{after}.png'
    Image.fromarray(wide).save(file)
    moved = section.copy()
    moved.obsm['spatial'] = section.obsm['spatial'] + before
    moved.uns['spatial'] = {'X1': dict(images={}, scalefactors=dict(spot_diameter_fullres=112.), metadata=dict(source_image_path=str(file), image_width=wide.shape[1], image_height=wide.shape[0]))}
    return moved

def test_tissue_beyond_the_array_is_left_out_counted_and_said(made, capsys):
    folder, (section, *_), panel, model = made
    moved, (low, high) = on_canvas(folder, section, 600, 600), model.about['positions']
    whole = predict_superres(model, section, 4)
    capsys.readouterr()
    dense = predict_superres(model, moved, 4)
    n = dense.uns['histogene']['n_beyond']
    said = capsys.readouterr().out
    assert n > 10 and f'X1: {n} of ' in said and 'beyond the array' in said and 'image alone' in said
    at = dense.obs[['array_col', 'array_row']].to_numpy()                       # of sub-patches, half a patch past the last patch
    assert (at >= np.array(low) - 2).all() and (at <= np.array(high) + 2).all() and np.isfinite(dense.X).all()
    assert recover_spots(dense, moved).n_obs == section.n_obs and whole.uns['histogene']['n_beyond'] == 0
    assert np.isfinite(predict_superres(model, moved, 4, tile=8).X).all()

def test_a_model_without_positions_predicts_beyond_the_array(made):
    folder, (section, *_), panel, _ = made
    model, moved = Colour.train_on([section], panel, **FAST)[0], on_canvas(folder, section, 600, 600)
    dense = predict_superres(model, moved, 1)
    assert dense.uns['histogene']['n_beyond'] == 0 and np.ptp(dense.obsm['spatial'], axis=0).min() > 1500

def test_an_image_alone_begins_where_its_tissue_does(made):
    folder, (section, *_), _, model = made
    path = place(section).path
    glass = folder/'glass.png'
    Image.fromarray(np.pad(np.asarray(Image.open(path).convert('RGB')), ((1120, 0), (1120, 0), (0, 0)), constant_values=250)).save(glass)
    a, b = (predict_image(model, p, 112) for p in (path, glass))
    low, _ = model.about['positions']
    for p in (a, b): assert np.abs(p.obs[['array_col', 'array_row']].min().to_numpy() - low).max() <= 1
    assert place(a).diameter == 112 and np.isfinite(b.X).all()

def test_tiles_follow_by_themselves_where_training_had_too_few_positions(made, tmp_path):
    folder, (section, *_), panel, model = made
    path, low, high = place(section).path, *map(np.array, model.about['positions'])
    seen = []
    class Watched(HisToGene):
        def look(self, section, cache=None):
            seen.append(section.obs[['array_col', 'array_row']].to_numpy())
            return super().look(section, cache)
    watched = Watched(**model.config); watched.load_state_dict(model.state_dict()); watched.about = model.about
    image = predict_image(watched, path, 56)                                        # spots of half the width: twice as many positions
    assert np.isfinite(image.X).all() and image.obs.array_col.max() > high[0] + 2 and len(seen) > 1
    for at in seen: assert (at.min(0) == low).all() and (at <= high + 1).all()        # none that training did not know
    assert (predict_image(model, path, 56, tile=1000).X == image.X).all()             # no tile is larger than that
    old = from_pretrained(save_pretrained(model, tmp_path/'old'))
    del old.about['positions']                                                        # as models were saved before
    grid, tile, first = without_array(old, np.array([[5., 5], [6, 6]]))
    assert tile is first is None and ([5, 5] @ grid[:2] + grid[2]).tolist() == [0, 0]
    tiled, whole = (predict_image(model, path, 112, tile=t).obs for t in (2, None))          # enough: each place keeps its position
    assert tiled.equals(whole)

def test_other_scales_are_said(made, capsys):
    folder, (section, *_), panel, model = made
    assert scale_note(model, section) == ''
    predict_image(model, place(section).path, 40)
    said = capsys.readouterr().out
    assert 'a spot is 40 pixels wide, in training 112' in said and 'fewer pixels' in said
    known, other = from_pretrained(save_pretrained(model, folder/'known')), section.copy()
    known.about['spot_um'], other.uns['histogene']['spot_um'] = 100., 55.
    assert spot_um(other) == 55 and spot_um(section) is None
    assert 'pixels = 55 µm wide, in training 112 pixels = 100 µm, so a patch shows less tissue' in scale_note(known, other)
    assert scale_note(known, section) == '' and predict(model, other).uns['histogene']['spot_um'] == 55

def test_a_training_says_whether_it_learned_the_mean(made, capsys):
    _, sections, panel, model = made
    capsys.readouterr()
    worse, _ = HisToGene.train_on(sections[:2], panel, **{**TINY, 'lr': 1e-6})
    said = capsys.readouterr().out.strip()
    assert said == learned(worse) and 'worse than that mean alone' in said and 'epochs=1550 (--epochs)' in said and 'It took 4 steps' in said
    good, _ = Colour.train_on(sections[:2], panel, **FAST)
    assert capsys.readouterr().out == '' and 'worse than' not in learned(good)
    Y = np.concatenate([normalize(s, panel).X for s in sections[:2]])
    P = np.concatenate([predict(good, s).X for s in sections[:2]])
    assert good.about['training']['mean_error'] == pytest.approx(Y.var(0).mean(), rel=1e-3) and good.about['training']['error'] == pytest.approx(((P - Y)**2).mean(), rel=1e-3)

def test_which_genes_to_believe(made, tmp_path):
    _, (a, b, c), panel, _ = made
    model, _ = Colour.train_on([a, b, c], panel, **FAST)
    assert gene_trust(model, [a, b, c], 3, **FAST).r.round(4).to_list() == model.about['gene_trust']['r']
    table = trusted(model)
    assert list(table.index) == panel and table.trust_r.between(-1, 1).all() and (table.trust_spread >= 0).all()
    by_hand = []
    from histogene_nb.evaluation import gene_correlations
    for left in (a, b, c):
        other, _ = Colour.train_on([s for s in (a, b, c) if s is not left], panel, **FAST)
        by_hand.append(gene_correlations(normalize(left, panel), predict(other, left)).r.to_numpy())
    assert np.allclose(table.trust_r, np.mean(by_hand, 0), atol=1e-4) and np.allclose(table.trust_spread, np.std(by_hand, 0, ddof=1), atol=1e-4)
    again = from_pretrained(save_pretrained(model, tmp_path/'model'), Colour)
    for p in (predict(again, a), predict_superres(again, a, 1), predict_image(again, place(a).path, 112)): assert np.allclose(p.var.trust_r, table.trust_r)
    best = table.trust_r.idxmax()
    assert trust_summary(again).split(': ')[1].startswith(f'{best} ') and plots.genes_to_show([predict(again, a)], n=1) == [best]
    config = tmp_path/'model'/'config.json'
    config.write_text(json.dumps({**(d := json.loads(config.read_text())), 'about': {**d['about'], 'gene_trust': dict(r=[1.])}}))
    assert 'gene_trust' in refused(from_pretrained, tmp_path/'model', Colour)

def test_where_nothing_is_known_of_genes(made):
    _, (a, b, _), panel, model = made
    assert 'on one section, so none could be left out' in trust_summary(model) and not len(predict(model, a).var.columns)
    assert 'folds (trust_folds) is from 2 to their number, here 1, not 2. Give' in refused(gene_trust, model, [a], 2)
    for folds in (0, 1, 3, -1): assert 'trust_folds' in refused(gene_trust, model, [a, b], folds)

def test_a_training_is_not_lost_for_a_comparison(made, monkeypatch, capsys):
    def ends(*_): raise InputError('There is no memory.') from why
    monkeypatch.setattr('histogene_nb.interface.run_model', ends)
    why = ValueError()                                           # the model is no good: that is said, and nothing saved
    assert 'There is no memory.' in refused(HisToGene.train_on, made[1][:1], made[2], **TINY)
    why = MemoryError()
    model, losses = HisToGene.train_on(made[1][:1], made[2], **TINY)
    assert len(losses) == 2 and 'HisToGene is trained, but how well it learned cannot be told: There is no memory.' in capsys.readouterr().out
    assert learned(model) == 'HisToGene: how well it learned is not known'

def test_some_thousand_places_tell_how_well_a_model_learned(made, monkeypatch):
    "Where each is predicted on its own: a pass over a large section in full precision would cost as much as an epoch"
    section, panel, seen = made[1][0], made[2], []
    class Alone(Colour): alone = True
    def counted(model, tensors, *_):
        seen.append(len(tensors[0]))
        return np.zeros((len(tensors[0]), len(panel)), dtype=np.float32)
    monkeypatch.setattr('histogene_nb.interface.run_model', counted)
    many = section[np.tile(np.arange(len(section)), 200)].copy()
    monkeypatch.setattr('histogene_nb.interface._geometry', lambda sections: {})
    monkeypatch.setattr(Alone, 'learn', lambda *_, **__: [])
    monkeypatch.setattr('histogene_nb.interface._examples', lambda model, sections, *_: [(torch.zeros(len(many), 3), torch.zeros(len(many), len(panel)))])
    Alone.train_on([many], panel)
    assert len(many) > 3000 and 1000 <= sum(seen) < 2000

def test_processes_share_the_time_that_is_foretold(monkeypatch):
    from histogene_nb import training
    told, model, example = [], HisToGene(3, dim=16, depth=1, heads=2, patch_size=8), (torch.zeros(5, 3, 8, 8), torch.zeros(5, 2), torch.zeros(5, 3))
    monkeypatch.setattr(training, 'expect', lambda what, cost, *_: told.append(cost))
    for world in 1, 2:
        monkeypatch.setattr(training, 'processes', lambda *_: (0, world))
        training._foretell(model, [example], 10, torch.device('cpu'), 'float32')
    assert told[0][0] == 2*told[1][0] > 0 and told[0][1] == told[1][1]

def test_each_predictions_trust_is_drawn():
    import anndata as ad, pandas as pd
    a, b, none = (ad.AnnData(np.zeros((1, 1)), var=pd.DataFrame(v, index=['G'])) for v in (dict(trust_r=[.31]), dict(trust_r=[.05]), dict()))
    assert [plots._label('G', m) for m in ([a], [a, a], [a, b], [b, none], [none])] == ['G\nexpected r 0.31', 'G\nexpected r 0.31', 'G\nexpected r 0.31, 0.05', 'G\nexpected r 0.05, ?,\ndoubtful', 'G']

def test_pathways_of_genes_that_none_ranked(made):
    import pandas as pd
    from histogene_nb.fold_tables import best_pathways
    columns = pd.MultiIndex.from_tuples([('training mean', 'X1', 'X1', 0, 9), ('training mean', 'Y1', 'Y1', 0, 9)],
                                        names=['method', 'fold', 'section', 'seed', 'n'])
    tables = dict(run=dict(sections=dict(X1='X', Y1='Y')), r=pd.DataFrame(np.inf, pd.Index(['A', 'B'], name='gene'), columns))   # inf: undefined
    assert 'no best genes. Run another method' in refused(best_pathways, tables, {'some': ['A']})

def test_folds_of_a_killed_training_are_kept(made, tmp_path):
    _, (a, b, _), panel, _ = made
    file = tmp_path/'training.safetensors'
    model, _ = HisToGene.train_on([a, b], panel, **TINY)
    first = gene_trust(model, [a, b], 2, checkpoint=file, **TINY)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert sorted(kept) == [f'without_{i}_of_2.training.safetensors' for i in (1, 2)]
    assert first.equals(gene_trust(model, [a, b], 2, checkpoint=file, **TINY)) and kept == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

@pytest.mark.parametrize('wrong', [dict(depth=int('8'*30)), dict(depth=88_888), dict(n_pos=10**12), dict(patch_size=10**7), dict(dim=10**8), dict(n_genes=10**11), dict(mlp_dim=10**13)])
def test_a_description_larger_than_its_weights(made, tmp_path, wrong):
    model = made[3]
    file = save_pretrained(model, tmp_path/'model')/'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong}))
    start = time.process_time()
    assert str(tmp_path/'model') in refused(from_pretrained, tmp_path/'model') and time.process_time() - start < 10
    assert from_pretrained(save_pretrained(model, tmp_path/'model')).config == model.config

@pytest.mark.parametrize('wrong', [dict(members=10**9), dict(depth=10**20), dict(windows=[1.]*10**5), dict(rank=10**10), dict(array=[10**6, 10**6])])
def test_a_texture_model_larger_than_its_weights(tmp_path, wrong):
    model = TextureModel(3, rank=2, members=1, dim=8, heads=2, pretrained=False)
    model.about = dict(genes=['A', 'B', 'C'], normalization='paper')
    file = save_pretrained(model, tmp_path/'model')/'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong}))
    refused(from_pretrained, tmp_path/'model')

def test_a_released_checkpoint_with_a_layer_far_away():
    from histogene_nb.model import _released_name
    weights = {_released_name(k): v for k,v in HisToGene(2, 4, 4, 64, 1, 1, pixels='raw', order='released').state_dict().items()}
    weights['vit.transformer.layers.99999999999999999999.0.norm.weight'] = weights['gene_head.0.weight']
    with pytest.raises(InputError, match='This released HisToGene checkpoint is damaged .*far larger'): load_released(weights)

def test_models_are_made_as_before_outside_of_a_file():
    with pytest.raises(ValueError, match='far larger'), no_larger_than({}): nn.Linear(10_000, 10_000)
    assert nn.Linear(10_000, 4_000).weight.numel() == 40_000_000                     # no hook is left behind

def test_a_plot_of_long_names_and_no_picture(made):
    _, (section, *_), panel, model = made
    p, long = predict(model, section), 'a_name_of_a_prediction_that_is_very_long_indeed_and_goes_on'
    p.var_names = ['ENSG00000123456.17_PAR_Y_AND_MORE', *panel[1:]]
    p.uns['histogene']['spot_um'] = 100.
    fig = plots.plot_predictions({f'{long}\nHisToGene_SR': p, f'{long}\ntexture': p}, list(p.var_names[:2]))
    fig.canvas.draw()
    inside = fig.bbox
    for ax in fig.axes:
        for text in (ax.title, ax.yaxis.label):
            box = text.get_window_extent()
            assert not text.get_text() or inside.x0 <= box.x0 and box.x1 <= inside.x1 + 1 and inside.y0 <= box.y0 and box.y1 <= inside.y1 + 1, text.get_text()
    bars = [a for ax in fig.axes for a in ax.artists]
    assert len(bars) == 2 and bars[0].txt_label.get_text() in ('200 µm', '500 µm')
    plots.plt.close(fig)
