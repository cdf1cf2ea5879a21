"""What is kept of a distribution, against sorting it whole."""

import numpy as np
import pytest
import torch
from kept_rows import kept_of

from flexeval.engine.compute.keeping import Keeper, make_keeper, shifts
from flexeval.errors import RequestError
from flexeval.request import TokenRequest

K, VOCAB = 5, 60


def logprobs(num, vocab_size=VOCAB, seed=0):
    logits = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.log_softmax(-1)


def log_uniforms(place):
    """The random numbers of one place, read off the priorities of a flat distribution that is ranked whole."""
    keeper = Keeper(1, VOCAB, torch.device("cpu"))
    return keeper._log_uniforms[place].clone()


def test_the_most_probable_tokens_come_first_then_those_of_highest_priority():
    values_RV, places = logprobs(200), shifts(np.arange(200) % 7, np.arange(200))
    ids, kept = (one.numpy() for one in Keeper(K, VOCAB, torch.device("cpu")).keep(values_RV, torch.from_numpy(places)))
    for row, (one, place) in enumerate(zip(values_RV, places.tolist(), strict=True)):
        order = one.argsort(descending=True).tolist()
        assert ids[row, :K].tolist() == order[:K]
        priority = one - log_uniforms(place)
        rest = sorted(order[K:], key=lambda token: -float(priority[token]))
        assert ids[row, K : 2 * K].tolist() == rest[:K]
        assert kept[row, -1] == pytest.approx(float(priority[rest[K]])) and ids[row, -1] == -1
        assert kept[row, : 2 * K].tolist() == one[ids[row, : 2 * K]].tolist()


def test_a_token_is_sampled_as_often_as_its_chance_says():
    """Horvitz and Thompson: each unkept token's indicator over its chance is 1 on average."""
    one, num = logprobs(1, seed=1), 30_000
    kept = kept_of(one.repeat(num, 1).numpy(), K)
    sampled, threshold = kept.token_ids_NC[:, K : 2 * K], kept.logprobs_NC[:, -1:]
    weights = 1 / np.minimum(1, np.exp(kept.logprobs_NC[:, K : 2 * K] - threshold))
    totals = np.bincount(sampled.ravel(), weights=weights.ravel(), minlength=VOCAB) / num
    rest = one[0].argsort(descending=True)[K:].numpy()
    squares = np.bincount(sampled.ravel(), weights=weights.ravel() ** 2, minlength=VOCAB) / num
    errors = np.sqrt((squares - totals**2) / num)[rest]
    assert (np.abs(totals[rest] - 1) < 5 * errors + 1e-9).all()
    assert totals[one[0].argsort(descending=True)[:K].numpy()].tolist() == [0] * K


def test_models_that_are_alike_keep_the_same_sample_at_the_same_place_only():
    values = logprobs(1, seed=2).repeat(50, 1)
    close = (values + 1e-4 * logprobs(50, seed=3)).log_softmax(-1)
    same = kept_of(values.numpy(), K).token_ids_NC == kept_of(close.numpy(), K).token_ids_NC
    assert same.mean() > 0.97
    moved = kept_of(values.numpy(), K).token_ids_NC == kept_of(values.numpy(), K, first=1000).token_ids_NC
    assert moved[:, :K].all() and moved[:, K : 2 * K].mean() < 0.5


def test_places_follow_the_token_and_its_position():
    assert shifts([5, 5, 6], [1, 2, 1]).tolist() == [shifts([one], [at])[0] for one, at in ((5, 1), (5, 2), (6, 1))]
    many = shifts(np.arange(1000) % 10, np.arange(1000) // 10)
    assert len(set(many.tolist())) > 990 and many.min() >= 0 and many.max() < 2**20


@pytest.mark.parametrize("vocab_size", [1, K - 1, K, K + 1, 2 * K, 2 * K + 1])
def test_a_small_vocabulary_leaves_places_empty(vocab_size):
    kept = kept_of(logprobs(3, vocab_size).numpy(), K)
    assert kept.token_ids_NC.shape == (3, 2 * K + 1)
    for ids, values in zip(kept.token_ids_NC, kept.logprobs_NC, strict=True):
        there = ids[ids >= 0].tolist()
        assert sorted(there) == sorted(set(there)) and len(there) == min(vocab_size, 2 * K)
        assert np.isneginf(values[:-1][ids[:-1] < 0]).all() and ids[-1] == -1
        assert np.isneginf(values[-1]) == (vocab_size <= 2 * K)


def test_tokens_of_no_probability_are_never_kept():
    values = logprobs(4)
    values[:, 3:] = -torch.inf
    kept = kept_of(values.log_softmax(-1).numpy(), K)
    assert [sorted(ids[ids >= 0].tolist()) for ids in kept.token_ids_NC] == [[0, 1, 2]] * 4
    assert np.isneginf(kept.logprobs_NC[:, -1]).all()


def test_a_batch_keeps_one_number_of_tokens():
    asked = [TokenRequest(prompt_ids=(1,), max_tokens=1, keep_top=number) for number in (0, 3, 3)]
    keeper = make_keeper(asked, VOCAB, torch.device("cpu"))
    assert keeper is not None and keeper.num_columns == 7
    assert make_keeper(asked[:1], VOCAB, torch.device("cpu")) is None
    other = TokenRequest(prompt_ids=(1,), max_tokens=1, keep_top=4)
    with pytest.raises(RequestError, match="3 and 4"):
        make_keeper([*asked, other], VOCAB, torch.device("cpu"))
