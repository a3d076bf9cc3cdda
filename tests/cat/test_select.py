import pytest
import torch

from fxquant.cat import Candidate, default_candidates, fit_cat, select_cat
from fxquant.cat.select import split_folds
from fxquant.errors import CATError
from fxquant.metrics import kl_divergence


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def logits(n, classes=6, seed=0):
    """A teacher, and a student that is too loud, biased and noisy."""
    f = 2 * randn(n, classes, seed=seed)
    return 2 * f + torch.linspace(-2, 2, classes) + randn(n, classes, seed=seed + 1), f


def planted(n, seed):
    """Two blobs of student logits that need opposite shifts."""
    side = torch.arange(n)[:, None] % 2 * 2.0 - 1
    q = randn(n, 6, seed=seed) + 8 * side * torch.tensor([0.0, 0, 0, 0, 0, 1])
    return q, q + side * torch.tensor([2.0, -2, 1, -1, 0, -8])


def test_helps_on_new_images_by_about_what_it_says():
    (q, f), (new_q, new_f) = logits(600), logits(4000, seed=7)
    choice = select_cat(q, f)
    assert choice.cat is not None
    assert choice.fit == "kl"
    before, after = (kl_divergence(z, new_f).mean().item() for z in (new_q, choice.cat(new_q)))
    assert after < before / 2
    assert choice.kl_before - choice.kl_after == pytest.approx(before - after, abs=4 * choice.kl_gain_se)


def test_one_map_for_all_is_preferred_until_clusters_pay():
    assert select_cat(*logits(600)).clusters == 1
    choice = select_cat(*planted(600, 0))
    assert choice.clusters == choice.cat.clusters == 2
    q, f = planted(1000, 5)
    one = select_cat(*planted(600, 0), candidates=[Candidate("kl", 1)]).cat
    assert kl_divergence(choice.cat(q), f).mean() < 0.2 * kl_divergence(one(q), f).mean()


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_identity_when_nothing_is_to_be_gained(scale):
    f = 3 * randn(400, 6)
    q = f + scale * randn(400, 6, seed=1)
    choice = select_cat(q, f, candidates=[Candidate("moments", 8, 3), Candidate("moments", 16, 3)])
    assert choice.cat is None
    assert (choice.fit, choice.clusters, choice.pca, choice.alpha) == ("identity", 1, 0, 0.0)
    assert choice.kl_after == choice.kl_before
    assert not any(row["chosen"] for row in choice.table)


def test_kl_after_is_that_of_new_images_and_not_of_its_own():
    """80 unknowns from 64 images: the fit looks twice as good on its own images as it is."""
    f = 2 * randn(4000, 40)
    q = f + randn(4000, 40, seed=1)
    choice = select_cat(q[:64], f[:64], candidates=[Candidate("kl", 1, shrinkage=0.0)])
    (cv,) = [row["kl"] for row in choice.table if row["alpha"] == 1.0]
    kl = kl_divergence(fit_cat(q[:64], f[:64], fit="kl", clusters=1, alpha=1.0, shrinkage=0.0)(q), f)
    own, new = kl[:64].mean().item(), kl[64:].mean().item()
    assert own < 0.8 * new
    assert cv == pytest.approx(new, rel=0.1)


def test_table_has_every_trial_and_marks_the_choice():
    calls = []
    candidates = [Candidate("kl", 2, 3), Candidate("ridge", 1)]
    choice = select_cat(*logits(200), candidates=candidates, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]
    assert [(r["fit"], r["clusters"], r["alpha"]) for r in choice.table[::5]] == [("ridge", 1, 0.2), ("kl", 2, 0.2)]
    (row,) = [r for r in choice.table if r["chosen"]]
    assert (row["fit"], row["clusters"], row["pca"], row["alpha"]) == (choice.fit, choice.clusters, choice.pca, choice.alpha)
    assert row["kl"] == choice.kl_after
    assert row["gain"] == pytest.approx(choice.kl_before - choice.kl_after)
    assert row["gain_se"] == choice.kl_gain_se


def test_stops_when_more_clusters_do_not_help():
    tried = {row["clusters"] for row in select_cat(*logits(600)).table}
    assert tried == {1, 2, 4}


def test_same_seed_same_choice():
    one, two = (select_cat(*planted(300, 0), seed=5) for _ in range(2))
    assert one.table == two.table
    assert all(torch.equal(a, b) for a, b in zip(one.cat.buffers(), two.cat.buffers(), strict=True))


def test_folds_never_split_groups_and_are_even():
    groups = torch.arange(50).repeat(6) * 3 + 100
    group, fold = split_folds(300, groups, 4, seed=0)
    assert all(len(fold[groups == g].unique()) == 1 for g in groups.unique())
    assert len(group.unique()) == 50
    assert sorted(fold.bincount().tolist()) == [72, 72, 78, 78]


def test_views_of_one_image_do_not_vouch_for_each_other():
    """Ten copies of every image: alone they look like ten times the data, grouped they give the error of the images."""
    q, f = logits(40)
    alone = select_cat(q.repeat(10, 1), f.repeat(10, 1))
    grouped = select_cat(q.repeat(10, 1), f.repeat(10, 1), groups=torch.arange(40).repeat(10))
    assert grouped.kl_gain_se > 2 * alone.kl_gain_se
    assert grouped.kl_after > alone.kl_after
    assert grouped.kl_before == pytest.approx(alone.kl_before, rel=1e-5)


def test_default_candidates_have_enough_images_per_cluster():
    assert default_candidates(20, 10) == [Candidate(fit, 1) for fit in ("moments", "ridge", "kl")]
    many = default_candidates(1024, 1000)
    assert {c.clusters for c in many} == {1, 2, 4, 8, 16, 64}
    assert {c.pca for c in many if c.clusters > 1} == {10, 50}
    assert {c.pca for c in default_candidates(1024, 10) if c.clusters > 1} == {5}


def test_few_images_and_one_class_work():
    assert select_cat(*logits(2), folds=4).kl_before > 0
    assert select_cat(randn(30, 1), randn(30, 1, seed=1)).cat is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": torch.zeros(8, dtype=torch.long)}, "1 group of images and 1 fold cannot be cross-validated"),
        ({"folds": 1}, "8 group of images and 1 fold cannot"),
        ({"groups": torch.zeros(7)}, r"groups has shape \[7\] for 8 images"),
        ({"candidates": []}, "no candidates to choose from"),
    ],
)
def test_refuses_with_advice(arguments, message):
    with pytest.raises(CATError, match=message):
        select_cat(*logits(8), **arguments)
