"Synthetic tissue: what must hold of every section, and what is refused: `histogene_nb.histology`, `histogene_nb.tissue`"
import hashlib
from pathlib import Path
import numpy as np, pandas as pd, pytest
from anndata import AnnData, read_h5ad
from fastcore.test import test_close as close
from histogene_nb.files import InputError
from histogene_nb.histology import *
from histogene_nb.histology import _nucleus_bank, _stamp
from histogene_nb.sections import LABEL_COLORS, place
from histogene_nb.tissue import *
from histogene_nb.tissue import _RNA

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('tissue')

@pytest.fixture(scope='module')
def sections(folder): return synthetic_sections(folder, ('X1', 'X2', 'Y1', 'Y2'), progress=False)

@pytest.fixture(scope='module')
def layout(): return section_layout('X1')

@pytest.fixture(scope='module')
def shares(layout): return region_shares(layout)

def fingerprint(section):
    "Hash of the counts and of the image file"
    return hashlib.sha256(section.X.toarray().tobytes() + Path(place(section).path).read_bytes()).hexdigest()


# ---- the picture

def test_fields():
    "A field has mean 0 and standard deviation 1, and is the same for the same words; a region takes the share that it asks for."
    field = smooth_field(seeded(0), 425, 170)
    close(smooth_field(seeded(0), 100, 60).std(), 1, 1e-3)
    assert (smooth_field(seeded(0, 'a'), 50, 60) == smooth_field(seeded(0, 'a'), 50, 60)).all()
    close((claim(field, 170, np.full((425, 425), True), .3) > 0).mean(), .3, 1e-3)
    with pytest.raises(InputError, match='seed -1'): seeded(-1)

def test_layout(layout, shares):
    assert layout['nest'].shape == (425, 425)
    close(shares.sum(0), 1, 1e-5)
    assert set(REGIONS) < set(LABEL_COLORS)
    with pytest.raises(InputError, match='section name'): section_layout('tumour')
    with pytest.raises(InputError, match='multiple'): section_layout('X1', px=1001)

def test_stamp():
    "Of pictures that overlap the darker one stays, also at the same place; one that reaches over the border is left out."
    rng = np.random.default_rng(0)
    bank, index = rng.random((6, 5, 5), dtype=np.float32), rng.integers(0, 6, 300)
    points = rng.integers(0, 40, (300, 2)) + .7
    canvas = rng.random((40, 40), dtype=np.float32)/2
    wanted = canvas.copy()
    for (y,x),i in zip(points.astype(int), index):
        part = wanted[y-2:y+3, x-2:x+3]
        if min(y, x) >= 2 and max(y, x) < 38: part[:] = np.maximum(part, bank[i])
    _stamp(canvas, bank, points, index)
    assert (canvas == wanted).all()

def test_nucleus_bank():
    "Pictures of a kind are 24 nuclei in 16 directions; those with a cytoplasm reach further"
    banks = {k: _nucleus_bank(seeded(1), k) for k in NUCLEI.index}
    for k,b in banks.items():
        assert b.shape[0] == 384 and b.shape[1] == b.shape[2] and b.shape[1]%2 == 1 and b.dtype == np.float32
        assert 0 <= b.min() and b.max() <= 1.7 and b.max() > .3
    assert (banks['plasma'] > .05).mean() > (banks['lymphocyte'] > .05).mean()

def test_stains(layout, shares):
    "No stain leaves the light of the lamp; the image is the densities' colours."
    stains = patient_traits('X')['stains']
    none = np.zeros((2, 2), np.float32)
    assert mix_stains(none, none, stains)[0, 0].tolist() == [245, 243, 246]
    small = section_layout('X1', px=800)
    haematoxylin, eosin = stain_densities('X1', small, region_shares(small))
    assert haematoxylin.shape == eosin.shape == (800, 800)
    assert (draw_tissue('X1', small, region_shares(small)) == mix_stains(haematoxylin, eosin, stains)).all()


# ---- genes and counts

def test_profiles():
    "Profiles add up to a million, and null genes are the same in all programmes."
    profiles = gene_programmes('X')
    close(profiles.sum(axis=1), 1e6, 10)
    assert (profiles[NULL].nunique() == 1).all()

def test_windows(layout, shares):
    "Shares add up to one, as bytes to 255; a window of whole cells has their mean."
    running = programme_shares(layout, shares)
    close(running.sum(0), 1, 1e-5)
    packed = pack_shares(running)
    assert (packed.sum(0, dtype=int) == 255).all()
    close(window_means(packed, np.array([[800., 1200.]]), 112)[0], packed[:, 143:157, 93:107].mean((1, 2)), 1e-9)

def test_counts():
    "Mean and variance of the counts are those of a negative binomial."
    drawn = draw_counts(seeded(0), np.full((200_000, 1), 1e6), np.full(200_000, 20.))
    close(drawn.mean(), 20, .1)
    close(drawn.var(), 20 + .25*20**2, 2)

def test_same_section(folder):
    "The same seed and name give the same section, byte for byte; another seed gives another."
    a, b, c = (fingerprint(synthetic_section(folder, 'Z1', seed, px=800)) for seed in (0, 0, 1))
    assert a == b != c

def test_labels(sections, layout, shares):
    "Labels are about as frequent as their regions are large, and each section has all of them."
    labels, area = pd.get_dummies(sections[0].obs['annotation']).mean(), shares[:, layout['edge'] > 0].mean(1)
    assert ((labels[REGIONS].values - area) < .1).all()
    assert all(set(s.obs['annotation']) >= set(REGIONS) for s in sections)

def test_library(sections, shares):
    "The mean count is near what the patient's library and the tissue lead us to expect."
    section = sections[0]
    region = window_means(shares, section.obsm['spatial'], 112)
    wanted = (patient_traits('X')['library']*(region @ _RNA).mean()*np.exp(.3**2/2))
    close(section.X.sum(1).mean()/wanted, 1, .12)

def test_truth(sections, folder):
    "The truth is linear in area, adds up to a million, is flat for null genes, and travels with the section."
    section = sections[0]
    c = section.obsm['spatial']
    whole = true_expression(section, c, 112)
    quarters = [true_expression(section, c + np.array(d), 56) for d in ((-28, -28), (28, -28), (-28, 28), (28, 28))]
    close(np.mean(quarters, axis=0)/whole, 1, 1e-5)
    close(whole.sum(1), 1e6, 5)
    everywhere = np.stack(np.meshgrid(*[np.arange(20., 3400, 40)]*2), -1).reshape(-1, 2)
    close(np.ptp(true_expression(section[:, NULL], everywhere, 40), axis=0), 0, .01)
    assert true_expression(section[:5, ['COL1A1']], c[:2], 10).shape == (2, 1)
    section.write_h5ad(folder/'X1.h5ad', compression='gzip')
    assert (true_expression(read_h5ad(folder/'X1.h5ad'), c, 56) == true_expression(section, c, 56)).all()

def test_refusals(sections, folder):
    section = sections[0]
    c = section.obsm['spatial']
    unknown = section[:, :2].copy()
    unknown.var_names = ['ERBB2', 'NOGENE']
    for f,words in [(lambda: true_expression(section, [[20., 500]], 112), 'outside the image'),
                    (lambda: true_expression(section, c, 0), 'above 0'),
                    (lambda: true_expression(section, c[:, 0], 112), 'one row'),
                    (lambda: true_expression(unknown, c, 112), 'NOGENE'),
                    (lambda: true_expression(AnnData(np.ones((2, 2))), c, 112), 'no true expression'),
                    (lambda: synthetic_section(folder, 'X'), 'section name'),
                    (lambda: synthetic_section(folder, pitch=0), 'above 0')]:
        with pytest.raises(InputError, match=words): f()
    with pytest.raises((InputError, OSError), match='X1.jpg'): synthetic_section(folder/'X1.jpg', px=800)
