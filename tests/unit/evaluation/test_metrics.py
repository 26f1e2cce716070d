from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cp_plugin.config.settings import UserError
from cp_plugin.evaluation.knn_search import search
from cp_plugin.evaluation.metrics import default_k, features, knn, linear_probe, vote


def clusters(count: int, classes: int = 7, width: int = 24, noise: float = 1.6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, width, generator=generator), labels


def brute_force(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, truth: Tensor, k: int, temperature: float
) -> float:
    """Weighted kNN by the definition, one query at a time, in float64."""
    bank, queries = bank.double(), queries.double()
    right = 0
    for query, label in zip(queries, truth, strict=True):
        cosines = [float(row @ query / (row.norm() * query.norm())) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda row: -cosines[row])[:k]
        votes: dict[int, float] = {}
        for row in nearest:
            weight = 2.718281828459045 ** (cosines[row] / temperature)
            votes[int(bank_labels[row])] = votes.get(int(bank_labels[row]), 0.0) + weight
        right += max(votes, key=lambda name: votes[name]) == int(label)
    return 100 * right / len(truth)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (60, 0.02)])
def test_knn_equals_brute_force(k: int, temperature: float) -> None:
    bank, labels = clusters(300)
    queries, truth = clusters(80, seed=1)
    expected = brute_force(bank, labels, queries, truth, k, temperature)
    assert 30 < expected < 100
    assert knn(bank, labels, queries, truth, k, temperature).accuracy == pytest.approx(expected)


def test_an_inverted_file_finds_almost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_plugin.evaluation.metrics.SMALL_BANK", 1000)
    bank, labels = clusters(2000)
    queries, truth = clusters(400, seed=1)
    exact = knn(bank, labels, queries, truth, 20)
    found = knn(bank, labels, queries, truth, 20, index="ivf")
    assert (exact.index, found.index) == ("flat", "ivf")
    assert found.accuracy == pytest.approx(exact.accuracy, abs=3)
    # Far more neighbours than the lists hold: what is missing has no vote.
    assert knn(bank, labels, queries, truth, 1900, index="ivf").accuracy > 30


def test_an_inverted_file_tells_cosines_of_wide_features() -> None:
    bank, queries = clusters(2000)[0], clusters(100, seed=1)[0]
    turn = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(0)))[0]
    turn = turn[: bank.shape[1]]  # no more components than it had, so nothing is lost
    (exact, rows), (told, found) = (
        next(search(bank @ turn, queries @ turn, 1, kind)) for kind in ("flat", "ivf")
    )
    same = rows == found
    assert same.double().mean() > 0.9
    assert_close(told[same], exact[same], atol=1e-4, rtol=0)


def test_a_small_bank_is_searched_exactly() -> None:
    bank, labels = clusters(300)
    assert knn(bank, labels, bank, labels, 5, index="ivf") == knn(bank, labels, bank, labels, 5)


def test_knn_depends_on_k_and_temperature() -> None:
    bank, labels = clusters(300)
    queries, truth = clusters(400, seed=1)
    found = {knn(bank, labels, queries, truth, k).accuracy for k in (1, 5, 50)}
    assert len(found) == 3
    accuracies = {knn(bank, labels, queries, truth, 100, t).accuracy for t in (0.01, 10.0)}
    assert len(accuracies) == 2


def test_knn_batches_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels = clusters(200)
    queries, truth = clusters(101, seed=1)
    whole = knn(bank, labels, queries, truth, 10)
    for module in ("metrics", "knn_search"):
        monkeypatch.setattr(f"cp_plugin.evaluation.{module}.QUERY_BATCH", 7)
    assert knn(bank, labels, queries, truth, 10) == whole


def test_knn_ignores_length_and_order_of_the_bank() -> None:
    bank, labels = clusters(200)
    queries, truth = clusters(50, seed=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    lengths = torch.rand(200, 1, generator=torch.Generator().manual_seed(4)) + 0.1
    plain = knn(bank, labels, queries, truth, 9)
    assert knn((bank * lengths)[order], labels[order], 5 * queries, truth, 9) == plain


def test_knn_of_the_bank_itself_is_perfect_with_one_neighbour() -> None:
    bank, labels = clusters(150)
    assert knn(bank, labels, bank, labels, 1).accuracy == 100


def test_knn_leaves_unlabelled_images_out_of_bank_and_queries() -> None:
    bank, labels = clusters(120)
    queries, truth = clusters(40, seed=1)
    mixed = labels.clone()
    mixed[::3] = -1
    kept = mixed >= 0
    result = knn(bank, mixed, queries, truth, 5)
    assert result == knn(bank[kept], labels[kept], queries, truth, 5)
    assert result.bank_size == 80
    hidden = truth.clone()
    hidden[:10] = -1
    assert knn(bank, labels, queries, hidden, 5) == knn(bank, labels, queries[10:], truth[10:], 5)


def test_knn_result_names_its_settings() -> None:
    bank, labels = clusters(50)
    result = knn(bank, labels, bank, labels, k=500, temperature=0.2)
    assert (result.k, result.temperature, result.distance, result.bank_size) == (
        50,
        0.2,
        "cosine",
        50,
    )
    assert knn(bank, labels, bank, labels).k == 20


def test_default_k() -> None:
    assert [default_k(size) for size in (10, 4_999, 5_000, 50_000)] == [20, 20, 200, 200]


def test_vote_prefers_the_lowest_label_at_equal_votes() -> None:
    cosines = torch.tensor([[0.5, 0.5], [0.9, 0.8]])
    assert vote(cosines, torch.tensor([[2, 1], [2, 1]]), 0.07, 3).tolist() == [1, 2]


def test_vote_survives_a_tiny_temperature() -> None:
    assert vote(torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[1, 0, 0]]), 1e-4, 2).item() == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"classes": 2}, "classes=2, but a label is"),
        ({"bank_labels": torch.full((30,), -1)}, "bank has no labelled image"),
        ({"bank_labels": torch.zeros(29, dtype=torch.int64)}, r"features \(N, D\)"),
        ({"query_MD": torch.zeros(30, 5)}, "features of one width"),
        ({"bank_ND": torch.full((30, 24), float("nan"))}, "bank are not finite"),
    ],
)
def test_knn_refuses(change: dict[str, object], text: str) -> None:
    bank, labels = clusters(30)
    arguments = {"bank_ND": bank, "bank_labels": labels, "query_MD": bank, "query_labels": labels}
    with pytest.raises(UserError, match=text):
        knn(**{**arguments, **change})


def test_knn_without_faiss_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    bank, labels = clusters(30)
    with pytest.raises(UserError, match=r"pip install 'cp-plugin\[cpu\]'"):
        knn(bank, labels, bank, labels)


def test_features_are_the_encoder_of_normalised_images_in_order() -> None:
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)

    def encode(batch: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return batch.flatten(1).double()

    found = features(encode, images, lambda batch: (batch - 0.5) / 0.25, batch_size=5)
    assert found.dtype == torch.float32
    assert torch.allclose(found, (images.flatten(1) / 255 - 0.5) / 0.25, atol=1e-6)
    listed = torch.utils.data.TensorDataset(images, torch.arange(23))
    again = features(encode, listed, lambda batch: (batch - 0.5) / 0.25, batch_size=4)
    assert torch.equal(again, found)


def test_features_refuse() -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="one row of features an image"):
        features(lambda batch: batch, images, lambda batch: batch)
    with pytest.raises(UserError, match=r"uint8 images \(N, C, H, W\)"):
        features(lambda batch: batch.flatten(1), images.float(), lambda batch: batch)
    with pytest.raises(UserError, match="no images"):
        features(lambda batch: batch.flatten(1), images[:0], lambda batch: batch)


def test_linear_probe_separates_what_is_separable_and_guesses_at_noise() -> None:
    train, labels = clusters(600, noise=0.5)
    test, truth = clusters(200, noise=0.5, seed=1)
    assert linear_probe(train, labels, test, truth, epochs=30).last > 99
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(5))]
    assert linear_probe(train, shuffled, test, truth, epochs=30).last < 45


def test_linear_probe_reaches_the_optimum_of_its_own_loss() -> None:
    """Outside oracle: L-BFGS on the same convex problem, which 2,000 images determine well."""
    train, labels = clusters(2_000, noise=2.0)
    test, truth = clusters(1_000, noise=2.0, seed=1)
    scaled = [(part - train.mean(0)) / train.std(0, unbiased=False) for part in (train, test)]
    head = torch.nn.Linear(24, 7)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(scaled[0]), labels)
        loss.backward()
        return loss

    solver.step(closure)
    expected = 100 * float((head(scaled[1]).argmax(1) == truth).double().mean())
    assert 40 < expected < 90
    assert linear_probe(train, labels, test, truth).last == pytest.approx(expected, abs=1)


def test_linear_probe_does_not_depend_on_the_scale_of_features() -> None:
    train, labels = clusters(300)
    test, truth = clusters(200, seed=1)
    plain = linear_probe(train, labels, test, truth, epochs=10)
    moved = linear_probe(1000 * train + 50, labels, 1000 * test + 50, truth, epochs=10)
    assert moved.last == pytest.approx(plain.last, abs=1)
    assert plain.best >= plain.last


def test_linear_probe_is_repeatable_and_leaves_global_randomness_alone() -> None:
    train, labels = clusters(1200)
    test, truth = clusters(300, seed=1)
    state = torch.get_rng_state()
    first = linear_probe(train, labels, test, truth, epochs=3, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_probe(train, labels, test, truth, epochs=3, seed=4) == first
    assert (first.epochs, first.lr) == (3, 1.0)


def test_linear_probe_leaves_unlabelled_images_out() -> None:
    train, labels = clusters(300)
    test, truth = clusters(100, seed=1)
    mixed = labels.clone()
    mixed[:100] = -1
    expected = linear_probe(train[100:], labels[100:], test, truth, epochs=5)
    assert linear_probe(train, mixed, test, truth, epochs=5) == expected


def test_linear_probe_refuses() -> None:
    train, labels = clusters(30)
    with pytest.raises(UserError, match="epochs >= 1"):
        linear_probe(train, labels, train, labels, epochs=0)
    with pytest.raises(UserError, match="one width"):
        linear_probe(train, labels, train[:, :5], labels)
    with pytest.raises(UserError, match="test has no labelled image"):
        linear_probe(train, labels, train, torch.full((30,), -1))
