"""What the workshop's checks know, and so its answers.

Made by tools/exercises.py from the notebooks with solutions: do not edit."""
import numpy as np
from histogene_nb.expression import normalize

def exercise_1_1(N, W, H):
    return dict(right=N*3*W*H, eps=0, hint='Rows times columns of the matrix.', mistakes={
        'A pixel is three numbers: red, green and blue.': N*W*H,
        'That is one patch. How many spots are there?': 3*W*H,
        'That is one row of pixels of each patch. How many rows has a patch?': N*3*W,
        'A matrix has rows times columns numbers: nothing is added.': N + 3*W*H})

def exercise_1_2(image, spatial):
    x, y = np.floor(spatial[10]).astype(int)
    hint = 'Both ranges are as long as a patch is wide, and the centre is in their middle.'
    return dict(right=image[y-56:y+56, x-56:x+56], eps=0, hint=hint, mistakes={
        'Rows are y and columns are x: which did you write first?': image[x-56:x+56, y-56:y+56],
        'The spot is the centre of its patch, not its corner.': image[y:y+112, x:x+112],
        'Up to, not including: Python\'s ranges leave their end out already.': image[y-56:y+57, x-56:x+57],
        'Half a width to each side, not a whole one.': image[y-112:y+112, x-112:x+112],
        'That is one colour: leave the third axis alone.': image[y-56:y+56, x-56:x+56, 0]})

def exercise_1_3(image, spatial, W):
    low = np.floor(spatial) - 4*W
    left_top, right_bottom = low < 0, low + 8*W > image.shape[0]
    over = left_top | right_bottom
    return dict(right=over.any(1).sum(), eps=0,
                hint='A number: the windows with at least one side outside the photograph.', mistakes={
        'Left and top are right. What about right and bottom?': left_top.any(1).sum(),
        'Right and bottom are right. What about left and top?': right_bottom.any(1).sum(),
        'In a corner two sides of a window are outside, but it is one window: '
        'use any(axis=1) before you count.': over.sum(),
        'Those are the windows that stay inside.': (~over).all(1).sum(),
        'Those are in a corner: one side outside is enough, any in place of all.': over.all(1).sum(),
        'That says which they are: count them.': over.any(1)})

def exercise_1_4(W, H):
    return dict(right=W*H + 3*W + 5, eps=0, hint='All red values, then the green rows before this one, '
                                                'then the pixels of the row before this one.', mistakes={
        'That is red: counted from 0, green is channel 1.': 3*W + 5,
        'That is blue: counted from 0, green is channel 1.': 2*W*H + 3*W + 5,
        'Row and column are swapped.': W*H + 5*W + 3,
        'Count from 0: row 3 has three rows before it, and the first place is 0.':
            lambda p: p in (W*H + 2*W + 4, W*H + 3*W + 6, W*H + 2*W + 5),
        'You let the colour change fastest, as the released code does. Here it changes slowest.':
            3*(3*W + 5) + 1})

def exercise_1_5():
    values = np.array([[255, 127], [31, 0]], dtype=np.uint8)
    def density(pixels): return -np.log((pixels.astype(float) + 1)/256)
    hint = 'Try it on 255, 127, 31 and 0: each halving of value + 1 must add the same amount.'
    return dict(right=density, of=lambda f: f(values), eps=1e-5, hint=hint, mistakes={
        '255 + 1 does not fit into uint8 and becomes 0: convert the pixels to float first.':
            lambda d: not np.isfinite(np.asarray(d)[0, 0]),
        'Black is infinite: the + 1 is missing.': lambda d: not np.isfinite(np.asarray(d)).all(),
        'Light is divided by 256, not 255: clear glass must have exactly 0.':
            -np.log((values.astype(float) + 1)/255),
        'That is negative: mind the minus sign.': lambda d: (np.asarray(d) < 0).any(),
        'Right, in another base: use the natural logarithm.':
            lambda d: np.allclose(np.asarray(d)/np.asarray(d)[0, 1], [[0, 1], [3, 8]])})

def exercise_1_6(section, counts, in_panel):
    per_million = counts[in_panel]/counts.sum()*1e6
    return dict(right=np.log(per_million + 1), eps=1e-6,
                hint='Divide by the total, times a million, plus one, logarithm: in this order.', mistakes={
        'The total is over all genes of the spot, not over the panel.':
            np.log(counts[in_panel]/counts[in_panel].sum()*1e6 + 1),
        'The + 1 is missing: a gene without a molecule would be minus infinity.': np.log(per_million),
        'Natural logarithm: np.log, or np.log1p.': np.log10(per_million + 1),
        'That is the logarithm to base 2: np.log.': np.log2(per_million + 1),
        'The 1 is added after the multiplication, to counts per million.':
            np.log((counts[in_panel] + 1)/counts.sum()*1e6),
        'A million is missing.': np.log(per_million/1e6 + 1),
        'The logarithm is missing.': lambda a: np.max(a) > 100})

def exercise_1_7(section, expression, red):
    r = np.array([np.corrcoef(red, e)[0, 1] for e in expression.T])
    names = section.var_names
    hint = 'One r per gene, over spots; then the name of the gene with the largest.'
    return dict(right=names[r.argmax()], hint=hint, mistakes={
        'That one has the lowest r.': names[r.argmin()],
        'That one has the r nearest to 0.': names[np.abs(r).argmin()],
        'That one is expressed most. Which one follows the darkness?': names[expression.mean(0).argmax()],
        'That is its number: section.var_names has its name.': r.argmax(),
        'That is its r: give its name.': r.max(),
        'One gene: the one with the largest r.': lambda g: np.size(g) > 1})

import numpy as np, torch
from histogene_nb.attention import attention

def exercise_2_1(x, P_x, W_x):
    return dict(right=W_x[x], hint='Row i of the answer is the row of W_x whose number is x[i].', mistakes={
        'Those are the first four rows, whatever x says.': W_x[:4],
        'In order of size: but spot 0 is at place 2.': W_x[x.sort().values],
        'Counted from 0: place 2 is the third row.': W_x[x - 1],
        'That is P_x: now without it, the rows of W_x.': P_x,
        'Each row once? Two spots are at the same place.': W_x[x.unique()]})

def exercise_2_2(model, F_h, positions):
    with torch.no_grad():
        raw, seen, by255, by127 = (model.patch_embed(v) for v in (
            F_h.float(), (F_h - 127.5)/255, F_h/255, (F_h - 127.5)/127.5))
        x, y = model.x_embed(positions[:, 0]), model.y_embed(positions[:, 1])
        swapped = model.x_embed(positions[:, 1]) + model.y_embed(positions[:, 0])
    return dict(right=seen + x + y, hint='Three terms, added: patches, x, y.', mistakes={
        'The pixels are not centred: (value - 127.5)/255.': raw + x + y,
        'The pixels are divided by 255, but not centred: (value - 127.5)/255.': by255 + x + y,
        'Divide by 255, not by its half.': by127 + x + y,
        'Right for the patches. And where do they lie?': seen,
        'There is no y yet.': seen + x,
        'There is no x yet.': seen + y,
        'x and y are swapped.': seen + swapped})

def exercise_2_3():
    Q, K, V = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    S = Q @ K.T
    return dict(right=lambda Q, K, V: attention(Q, K, V)[0], of=lambda f: f(Q, K, V), eps=1e-4,
                hint='Scores Q K^T, divided by the root of d_k, softmax over each row, times V.', mistakes={
        'The scores are not divided by the root of d_k.': S.softmax(-1) @ V,
        'The softmax goes over each row: the weights of one spot add up to 1.': (S/5**.5).softmax(0) @ V,
        'Those are the weights. What do the spots take up?': (S/5**.5).softmax(-1),
        'Divided by d_k, where it should be its root.': (S/5).softmax(-1) @ V,
        'The root of 2 is right for the three spots above only: d_k is the number of columns of Q.':
            (S/2**.5).softmax(-1) @ V,
        'Queries ask and keys answer: Q K^T, not K Q^T.': (S.T/5**.5).softmax(-1) @ V,
        'There is no softmax yet.': S/5**.5 @ V,
        'That is the plain mean of the values: nobody asked for anything.': V.mean(0).expand(4, 5),
        'Return one thing: what the spots take up.': lambda a: isinstance(a, tuple)})

def exercise_2_4(q, k):
    scores = (q*k).sum(-1)
    return dict(right=scores.std(), hint='One score for each query and its key, a thousand in all; '
                                         'then their standard deviation.', mistakes={
        'That is the spread of single products. A score is a sum of them.': (q*k).std(),
        'That is the variance.': scores.var(),
        'That is of the scores divided already: measure them as they are.': scores.std()/8,
        'That is what theory says for infinitely many. Measure the thousand.': 8,
        'That is of every query with every key. Each with its own: q*k, then a sum.': (q @ k.T).std(),
        'Nearly. Give what you measure, or at least two decimals of it.':
            lambda s: abs(s - scores.std()) < .2})

def exercise_2_5(d, h):
    right = 3*d*d + (d*d + d) + (d*h + h) + (h*d + d) + 2*2*d
    return dict(right=right, eps=0, hint='Go through the list once more, biases too.', mistakes={
        'There are two layer norms, and each has a scale and a shift for every feature.': right - 2*d,
        'The layer norms are missing, or the biases, which are as many.': right - 4*d,
        'Queries, keys and values have no bias.': right + 3*d,
        'The matrix after the heads is missing.': right - d*d - d,
        'The heads share the d columns: three d x d matrices for all of them.': right + 3*15*d*d})

def exercise_2_6(straight, shuffled, order):
    return dict(right=straight, hint='Row i must be the prediction for spot i of the section.', mistakes={
        'That shuffles once more: order instead of its inverse.': shuffled[order],
        'They are still in the other order.': shuffled,
        'That turns the order round. Where is spot i in it?': shuffled.flip(0),
        'That sorts the numbers of each gene: keep the rows whole.': shuffled.sort(0).values,
        'That is the inverse order itself: take the rows of shuffled by it.': order.argsort()})

def exercise_2_7(weights, distance):
    right = torch.einsum('lhn,n->lh', weights, distance)
    return dict(right=right, hint='Sum over spots, the last axis, of weight times distance.', mistakes={
        'The weights add up to 1 already: a sum, not a mean.': (weights*distance).mean(-1),
        'That is the mean distance of all spots, without the weights.': distance.mean(),
        'One number for each layer and head: sum over the last axis alone.': right.mean(),
        'That is the distance of the spot with the largest weight. On average, over all of them.':
            distance[weights.argmax(-1)],
        'Those are products: add them up over the spots.': weights*distance})

import numpy as np, torch
from scipy.spatial import cKDTree
from torch.nn import functional as F
from histogene_nb.interface import run_model
from histogene_nb.superres import recover_spots
from histogene_nb.training import one_pass

def exercise_3_1(Y):
    right = ((Y - Y.mean(0))**2).mean()
    hint = 'One number: the mean, over spots and genes, of the squared difference from the mean of the gene.'
    return dict(right=right, eps=5e-3, hint=hint, mistakes={
        'That is one mean for all genes. Each gene has its own level: mean over spots, axis 0.':
            ((Y - Y.mean())**2).mean(),
        'That is the root of it.': right.sqrt(),
        'That is the sum: take the mean.': right*Y.numel(),
        'That is one number a gene: take the mean over these too.': ((Y - Y.mean(0))**2).mean(0),
        'Mean over spots is axis 0.': ((Y - Y.mean(1, keepdim=True))**2).mean(),
        'Square the differences, where you took their size.': (Y - Y.mean(0)).abs().mean()})

def exercise_3_2(small_model, examples):
    def three_losses(step):
        model = small_model(dropout=0.)                    # without dropout nothing is random
        opt = torch.optim.Adam(model.parameters(), lr=3e-3)
        return [step(model, opt, *examples[0]) for _ in range(3)]
    theirs = three_losses(lambda model, opt, *e: one_pass(model, opt, [e], torch.device('cpu'), False))
    def near(l, *wanted): return all(abs(float(a) - b) < .01*b for a,b in zip(l, wanted))
    hint = 'Loss, zero_grad, backward, step, in this order; and return the loss.'
    return dict(right=theirs, of=three_losses, hint=hint, mistakes={
        'The loss does not change. Does anything call opt.step(), after loss.backward()?':
            lambda l: float(l[0]) == float(l[2]),
        'The first two losses are right, the third is not: '
        'are old gradients cleared, with opt.zero_grad()?':
            lambda l: near(l[:2], *theirs[:2]),
        'Return the loss before the step: that is the one of the weights before they change.':
            lambda l: near(l[:2], *theirs[1:]),
        'That is the sum of the squares. The loss is their mean.':
            lambda l: near(l[:1], theirs[0]*examples[0][2].numel()),
        'Return the loss, one number.': lambda l: np.size(l[0]) > 1})

def exercise_3_3(greedy, examples, test_example, Y):
    half = Y.var(0, correction=0).mean().item()/2
    first, second, test = (F.mse_loss(torch.tensor(run_model(greedy, e[:2], 'cpu')), e[2]).item()
                           for e in (*examples[:2], test_example))
    hint = (f'The error of greedy on the first section is {first:.2f}, and it should be below {half:.2f}: '
            'train longer. If the losses jump about, take a smaller lr.')
    return dict(right=None, accepts=lambda l: first < half < min(second, test) and np.ndim(l) == 1,
                hint=hint, mistakes={
        'That is no list of losses. fit returns one, with the loss of each epoch.': lambda l: np.ndim(l) != 1,
        f'Was greedy trained? Its error on the first section is still {first:.1f}.': lambda l: first > 8*half,
        'greedy knows the test section too well: train on examples[:1] alone.': lambda l: test < half,
        'greedy knows the second section too: train on examples[:1] alone.': lambda l: second < half})

def exercise_3_4(model, test_example):
    right = run_model(model, test_example[:2], 'cpu')
    def alike(X): return np.corrcoef(np.ravel(X), right.ravel())[0, 1] > .9
    hint = 'Give the model the patches and positions of test_example, as for predicting: see the hint above.'
    return dict(right=right, hint=hint, mistakes={
        'Those are measured: let the model predict them.': test_example[2],
        'One row a spot, one column a gene: yours are the other way round.': right.T,
        'That is one number a gene: the model gives one for each spot.': right.mean(0),
        'Nearly. Run your cell twice: if the answers differ, dropout is still on.': alike})

def exercise_3_5(centres, p, alone):
    apart = np.abs(centres - p)
    def mean(covers): return alone[covers].mean(0)
    right = mean((apart < 56).all(1))
    return dict(right=right, hint='The mean over patches, axis 0, of the four that cover p.', mistakes={
        'Those are too many: half a side of a patch, not a whole one.': mean((apart < 112).all(1)),
        'Near in x and in y: all(1).': mean((apart < 56).any(1)),
        'A patch is a square: p can be in its corner, farther than 56 from its centre.':
            mean(np.hypot(*apart.T) < 56),
        'That is the nearest patch alone.': alone[np.hypot(*apart.T).argmin()],
        'That is their sum.': 4*right,
        'Those are the four predictions: take their mean, axis 0.': alone[(apart < 56).all(1)],
        'One number a gene: the mean over patches is axis 0.': right.mean()})

def exercise_3_6(dense, held_out):
    right = recover_spots(dense, held_out).X[20]
    apart = np.abs(dense.obsm['spatial'] - held_out.obsm['spatial'][20])
    shared = (84 - apart).clip(0, 56)                      # (m, 2): lengths shared with the spot's square
    hint = 'Areas of zero for most sub-patches, and weights that add up to 1.'
    return dict(right=right, eps=1e-4, hint=hint, mistakes={
        'Those are the sub-patches whose centre is inside, all with the same weight.':
            dense.X[(apart < 56).all(1)].mean(0),
        'The right sub-patches, but those that the spot only touches weigh as much as those inside it.':
            dense.X[(apart < 84).all(1)].mean(0),
        'That is their sum: divide by the sum of the areas.': shared.prod(1) @ dense.X,
        'An area is a product, where you added the two lengths.':
            shared.sum(1)*shared.all(1) @ dense.X/(shared.sum(1)*shared.all(1)).sum(),
        'Without the clip two negative lengths make an area.':
            (84 - apart).clip(max=56).prod(1) @ dense.X/(84 - apart).clip(max=56).prod(1).sum(),
        'That is the sub-patch nearest to the spot alone.': dense.X[apart.sum(1).argmin()]})

def exercise_3_7(dense, held_out, predicted, observed):
    far, number = cKDTree(held_out.obsm['spatial']).query(dense.obsm['spatial'])
    hint = 'A row for each sub-patch: the predicted row of the spot nearest to it.'
    return dict(right=predicted.X[number], hint=hint, mistakes={
        'Those are the numbers of the spots. What was predicted there?': number,
        'Those are the distances: query returns two things.': far,
        'Those are measured: take what was predicted.': observed.X[number],
        'That is the super-resolved map. What does a map know that has no number between the spots?': dense.X,
        'That is one row a spot: one for each sub-patch, with its nearest spot\'s.': predicted.X})

import numpy as np, pandas as pd
from inspect import ismodule
from scipy.stats import spearmanr
from types import FunctionType
from histogene_nb.evaluation import gene_correlations, position_baseline, summarize
from histogene_nb.interface import predict
from histogene_nb.measures import noise_ceiling

def exercise_4_1(observed, predicted, O, P):
    right, a, b = gene_correlations(observed, predicted).r, O - O.mean(0), P - P.mean(0)
    squares = (a**2).sum(0)*(b**2).sum(0)
    hint = 'One r for each gene, over spots: every sum and every mean is along axis 0.'
    return dict(right=right, eps=1e-4, hint=hint, mistakes={
        'That is one r for each spot, over genes: axis 0, not 1.': lambda v: np.shape(v) == (len(O),),
        'The means are not taken away.': (O*P).sum(0)/np.sqrt((O**2).sum(0)*(P**2).sum(0)),
        'The root is missing below the line.': (a*b).sum(0)/squares,
        'That is the covariance: divide by the root of both sums of squares.': (a*b).mean(0),
        'One r for each gene: not their mean yet.': right.mean(),
        'One mean for all genes is not the mean of each: O.mean(0).':
            ((O - O.mean())*(P - P.mean())).sum(0)
            / np.sqrt(((O - O.mean())**2).sum(0)*((P - P.mean())**2).sum(0))})

def exercise_4_2(observed, known, r_genes):
    here = gene_correlations(observed, position_baseline(known, observed)).r
    return dict(right=here.mean(), hint='One number: the mean over genes.', mistakes={
        'That is the model, not the baseline.': r_genes.mean(),
        'The section that is predicted must not be among those that are known.':
            lambda v: np.size(v) == 1 and v > here.mean() + .02,
        'That is one r a gene: take the mean.': here,
        'That is the best gene: the mean over all of them.': here.max(),
        'That is the median: the mean.': here.median()})

def exercise_4_3(observed, lazy, r_lazy):
    return dict(right=summarize(gene_correlations(observed, lazy))['mean_r_all'],
                hint='Over all genes of the panel, those without an r as 0.', mistakes={
        'That leaves the undefined ones out.': r_lazy.mean(),
        'Those that are undefined are not zero yet.': lambda v: np.isnan(v).any(),
        'That is the sum: divide by the number of all genes.': r_lazy.sum(),
        'That is one r a gene: take the mean.': r_lazy.fillna(0),
        'They count as 0, not as the mean of the others.': r_lazy.fillna(r_lazy.mean()).mean(),
        'Undefined is 0 here, not 1.': r_lazy.fillna(1).mean()})

def exercise_4_4(O, P):
    ratio = P.std(0)/O.std(0)
    return dict(right=ratio.mean(), hint='One number: the mean of a ratio for each gene.', mistakes={
        'Predicted divided by observed, not the other way round.': (1/ratio).mean(),
        'That mixes the genes: their levels differ more than their spots. Over spots, axis 0.':
            P.std()/O.std(),
        'Over spots, axis 0, not over genes.': (P.std(1)/O.std(1)).mean(),
        'That is a ratio of variances.': (ratio**2).mean(),
        'That is one number a gene: take the mean.': ratio,
        'Divide first, gene by gene, then take the mean.': P.std(0).mean()/O.std(0).mean()})

def exercise_4_5(P, O):
    away = P - P.mean(0)
    hint = 'Each gene: its mean, plus a hundredth of what is left.'
    return dict(right=P.mean(0) + away/100, eps=1e-5, hint=hint, mistakes={
        'The means are a hundredth, too: shrink the distance from the mean only.': P/100,
        'The means are gone: add them again.': away/100,
        'That is the mean of all genes together: each keeps its own.': P.mean() + (P - P.mean())/100,
        'Those are the means of what was observed: P keeps its own.': O.mean(0) + away/100,
        'The variance is a hundredth; the spread is its root.': P.mean(0) + away/10,
        'That is constant: it has no r at all.': lambda v: (np.std(v, 0) < 1e-9).all(),
        'The spread is as before.': lambda v: np.allclose(np.std(v, 0), P.std(0))})

def exercise_4_6(few, panel):
    signed = noise_ceiling(few, panel, halvings=1, seed=0)                 # below 0 where rho is
    top = signed.clip(lower=0)
    rho = top**2/(2 - top**2)
    hint = 'Halve the raw counts, normalise both halves, correlate them gene by gene, then the formula.'
    return dict(right=top, eps=1e-4, hint=hint, mistakes={
        'Where rho is negative there is no root: let it count as 0, with .clip(lower=0).':
            lambda v: np.isnan(v).any() or (v < 0).any() and np.allclose(np.maximum(v, 0), top),
        'A negative rho counts as 0, and not without its sign.':
            lambda v: not (signed > 0).all() and np.allclose(v[signed > 0], top[signed > 0])
            and (v[signed < 0] > 0).all(),
        'The root is missing.': top**2,
        'That is the agreement of halves: now the formula.': rho,
        'Halves have half of the molecules: 2 rho / (1 + rho) is missing.': np.sqrt(rho),
        'One number for each gene: not their mean yet.': top.mean()})

def exercise_4_7(r_genes, training, known, model, panel):
    def run_blind(f):                                      # it knows modules and functions, and no data
        knows = {k: v for k,v in f.__globals__.items() if callable(v) or ismodule(v)}
        blind = FunctionType(f.__code__, knows, argdefs=f.__defaults__, closure=f.__closure__)
        return blind(training, known, model, panel)
    def fit_in_training(training, known, model, panel):
        return pd.concat([gene_correlations(k, predict(model, s)).r for k,s in zip(known, training)],
                         axis=1).mean(axis=1)
    def agreement(g):
        return spearmanr(g[panel] if isinstance(g, pd.Series) else g, r_genes[panel]).statistic
    return dict(right=fit_in_training, of=run_blind, accepts=lambda g: agreement(g) > .3,
                told=lambda g: f'Rank correlation {agreement(g):.2f}.',
                hint='The two rankings hardly agree. What do genes have in common that follow the picture?',
                mistakes={
        'Return a number for each gene of the panel: pd.Series(values, index=panel).':
            lambda g: np.shape(g) != (len(panel),),
        'It is the wrong way round: the higher, the better.': lambda g: agreement(g) < -.3,
        'Every gene has the same number.': lambda g: np.ptp(g) == 0,
        'Some genes have no number: .fillna(0).': lambda g: np.isnan(g).any()})
