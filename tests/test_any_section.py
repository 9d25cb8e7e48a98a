"A section of another kind than the model was trained on, one without an image file, and one of any size: by the commands"
import anndata as ad, numpy as np, pytest
from PIL import Image
from histogene_nb.commands import histogene_plot, histogene_predict, histogene_train
from histogene_nb.folds import write_h5ad
from histogene_nb.interface import from_pretrained, save_pretrained, predict
from histogene_nb.position import array_steps, fit_grid, grid_positions, spot_positions
from histogene_nb.files import InputError
from histogene_nb.sections import new_section, section_name
from histogene_nb.superres import predict_superres
from histogene_nb.stnet import load_lite0
from histogene_nb.texture import Textures, texture_numbers
from histogene_nb.tissue import synthetic_section
from histogene_nb.model import HisToGene

TINY = dict(epochs=2, lr=1e-3, dim=32, depth=1, heads=2)
TYPED = dict(epochs=2, lr=1e-3, setting=['dim=32', 'depth=1', 'heads=2'])  # the same, for the command

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A square section, a model of it, and a hexagonal section cut from the same tissue, both as .h5ad"
    folder = tmp_path_factory.mktemp('any')
    square = synthetic_section(folder, 'X1', px=2400)
    path = square.uns['spatial']['X1']['metadata']['source_image_path']
    pitch, rng = 70., np.random.default_rng(0)
    row, k = (a.ravel() for a in np.mgrid[:int(2100/(pitch*3**.5/2)), :int(2100/pitch)])
    col = 2*k + row % 2
    centres = 150 + np.stack([col*pitch/2, row*pitch*3**.5/2], 1)
    hexagonal = new_section(rng.poisson(1., (len(row), square.n_vars)), square.var_names, [f'{x}x{y}' for x,y in zip(col, row)], centres, col, row, 'H1', 'H', path, spot_diameter=38.)
    for s in (square, hexagonal): write_h5ad(s, folder/f'{section_name(s)}.h5ad')
    histogene_train([str(folder/'X1.h5ad')], out=str(folder/'model'), n_top=30, min_spots=20, **TYPED)
    return dict(folder=folder, square=square, hexagonal=hexagonal, model=from_pretrained(folder/'model'))

def test_positions_by_place_on_another_array(made, capsys):
    model, hexagonal, folder = made['model'], made['hexagonal'], made['folder']
    trained = model.about['grid']
    positions = spot_positions(hexagonal, trained)
    d = 38.
    real = (hexagonal.obsm['spatial'] - hexagonal.obsm['spatial'].min(0))/d/array_steps(trained)          # in the model's steps
    assert np.abs(positions.numpy() - real).max() <= .51 and (positions != grid_positions(hexagonal, 128)).any()
    assert (model.look(hexagonal)[1] == positions).all()
    histogene_predict(str(folder/'model'), str(folder/'H1.h5ad'), out=str(folder/'H1_predicted.h5ad'))
    said = capsys.readouterr().out
    assert 'positions are places' in said and f'{array_steps(fit_grid(hexagonal))[0]:.2f}' in said
    assert np.isfinite(ad.read_h5ad(folder/'H1_predicted.h5ad').X).all()
    dense = predict_superres(model, hexagonal, 4)
    assert np.isfinite(dense.X).all() and dense.obs.array_col.max() <= positions[:, 0].max() + 2

def test_the_same_array_keeps_its_positions(made):
    square, model = made['square'], made['model']
    scan = square.copy()                                                     # a third finer, as patient A's scans are to the others of the HER2+ data
    scan.uns['spatial']['X1']['scalefactors']['spot_diameter_fullres'] = 112*1.33
    for s in (square, scan): assert (model.look(s)[1] == grid_positions(s)).all()

def test_two_kinds_of_arrays_are_not_trained_together(made):
    with pytest.raises(InputError, match='X1 and H1 are on different kinds of arrays'): HisToGene.train_on([made['square'], made['hexagonal']], made['model'].about['genes'], **TINY)

def test_a_picture_in_the_file_is_all_that_is_needed(made, tmp_path):
    square = made['square'].copy()
    path = square.uns['spatial']['X1']['metadata'].pop('source_image_path')
    picture = np.asarray(Image.open(path).reduce(2), dtype=np.float32)/255
    square.uns['spatial']['X1'] = dict(images=dict(hires=picture), scalefactors=dict(spot_diameter_fullres=112., tissue_hires_scalef=.5), metadata={})
    square.write_h5ad(tmp_path/'alone.h5ad')
    file, model, out = (str(tmp_path/n) for n in ('alone.h5ad', 'model', 'predicted.h5ad'))
    histogene_train([file], out=model, n_top=30, min_spots=20, cache=str(tmp_path/'cache'), **TYPED)
    histogene_predict(model, file, out=out)
    histogene_predict(model, file, superres=4, out=str(tmp_path/'4x.h5ad'))
    histogene_plot([out, str(tmp_path/'4x.h5ad')], section=file, out=str(tmp_path/'maps.png'))
    assert Image.open(tmp_path/'maps.png').size[0] > 300
    assert ad.read_h5ad(out).obsm['spatial'].max() < 1200 and ad.read_h5ad(tmp_path/'4x.h5ad').n_obs > 4*square.n_obs

def test_textures_of_a_picture_in_the_file_are_those_of_the_file(made, tmp_path):
    alone, textures = made['square'].copy(), Textures(load_lite0())
    path = alone.uns['spatial']['X1']['metadata'].pop('source_image_path')
    alone.uns['spatial']['X1'] = dict(images=dict(hires=np.asarray(Image.open(path))), scalefactors=dict(spot_diameter_fullres=112., tissue_hires_scalef=1.), metadata={})
    few = alone.obsm['spatial'][:3]
    ours, theirs = (texture_numbers(textures, s, windows=(1., 2.), size=64, centres=few, cache=tmp_path) for s in (alone, made['square']))
    assert (ours == theirs).all() and len(list(tmp_path.iterdir())) == 2

def test_one_tile_is_one_sequence_and_many_share_out_all(made):
    model, square = made['model'], made['square']
    assert (predict(model, square, tile=1000).X == predict(model, square).X).all()
    many = predict(model, square, tile=6)
    assert np.isfinite(many.X).all() and list(many.obs_names) == list(square.obs_names)
    assert np.corrcoef(many.X.ravel(), predict(model, square).X.ravel())[0, 1] > .9

def test_an_image_of_more_positions_than_the_model_has(made, tmp_path):
    model, _ = HisToGene.train_on([made['square']], made['model'].about['genes'], n_pos=16, **TINY)
    save_pretrained(model, tmp_path/'model')
    path = made['square'].uns['spatial']['X1']['metadata']['source_image_path']
    histogene_predict(str(tmp_path/'model'), image=path, spot_diameter=40, out=str(tmp_path/'p.h5ad'))            # in tiles, by itself
    found = ad.read_h5ad(tmp_path/'p.h5ad')
    assert np.isfinite(found.X).all() and found.obs.array_col.max() > 16
