"""What recorded routing and expert outputs say, with answers known on paper."""

from dataclasses import replace

import numpy as np

from runner.profiling.statistics import (
    LayerRecord,
    best_error,
    mean_gram,
    power_behind,
    standing_in,
    tae_percentiles,
    uses,
)


def record(expert_ids: list[list[int]], outputs: np.ndarray) -> LayerRecord:
    """outputs (n_tokens, n_expert, n_embd)."""
    ids = np.array(expert_ids, np.int32)
    gram = np.einsum("tad,tbd->tab", outputs, outputs).astype(np.float32)
    n_expert = outputs.shape[1]
    return LayerRecord(
        ids, np.full(ids.shape, 0.5, np.float32), np.zeros((len(ids), n_expert), np.float32), gram
    )


def test_scale_and_error_are_those_of_one_vector_drawn_on_another() -> None:
    # f_0 = (2, 0), f_1 = (1, 1): the best factor is 1, what is left of f_0 is (1, -1), half of it
    scale, error = standing_in(record([[0]], np.array([[[2.0, 0.0], [1.0, 1.0]]])))
    assert scale[0].tolist() == [1.0, 1.0] and error[0].tolist() == [0.0, 0.5]


def test_only_the_tokens_of_an_expert_count_for_it() -> None:
    outputs = np.array([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [5.0, 0.0]]])
    scale, error = standing_in(record([[0], [1]], outputs))
    assert np.allclose(scale, [[1, 1 / 3], [0, 1]]) and np.allclose(error, [[0, 0], [1, 0]])


def test_the_mean_gram_counts_a_token_by_the_square_of_its_smallest_weight() -> None:
    both = record([[0, 1], [0, 1]], np.array([[[2.0], [1.0]], [[0.0], [3.0]]]))
    weights = np.array([[0.8, 0.2], [0.6, 0.4]], np.float32)  # 0.04 and 0.16: 1/5 and 4/5
    gram = mean_gram(replace(both, weights=weights))
    assert np.allclose(gram, [[0.8, 0.4], [0.4, 0.2 + 0.8 * 9]])
    assert (gram == gram.T).all() and gram.dtype == np.float32


def test_the_power_behind_a_layer_is_that_before_the_next_one() -> None:
    # the last layer puts out 0.5 * 2 + 0.5 * 4 = 3, of power 9
    last = record([[0, 1]], np.array([[[2.0], [4.0]]]))
    assert power_behind([last, last], [5.0, 7.0]).tolist() == [7.0, 16.0]


def test_an_opposite_expert_stands_in_with_a_negative_factor() -> None:
    scale, error = standing_in(record([[0]], np.array([[[2.0, 4.0], [-1.0, -2.0]]])))
    assert scale[0, 1] == -2.0 and error[0, 1] == 0.0


def test_an_expert_without_tokens_has_error_1() -> None:
    scale, error = standing_in(record([[0, 1]], np.ones((1, 3, 2))))
    assert error[2].tolist() == [1.0, 1.0, 0.0] and scale[2].tolist() == [0.0, 0.0, 1.0]
    assert best_error(error, uses(np.array([[0, 1]]), 3)) == 0.0


def test_an_expert_that_puts_out_nothing_replaces_nobody() -> None:
    outputs = np.array([[[0.0, 0.0], [1.0, 1.0]]])
    scale, error = standing_in(record([[0, 1]], outputs))
    assert scale[1, 0] == 0.0 and error[1, 0] == 1.0 and error[0, 1] == 1.0
    assert np.isfinite(scale).all()


def test_outputs_that_are_no_numbers_are_not_hidden() -> None:
    outputs = np.array([[[np.nan, 0.0], [1.0, 1.0]]])
    assert np.isnan(standing_in(record([[0, 1]], outputs))[1][0, 1])


def test_the_gram_of_a_token_gives_the_exact_error_of_any_policy() -> None:
    rng = np.random.default_rng(1)
    outputs = rng.standard_normal((1, 4, 8))
    gram = record([[0, 1]], outputs).gram[0].astype(np.float64)
    router, policy = np.array([0.7, 0.3, 0.0, 0.0]), np.array([0.7, 0.0, 0.3, 0.0])
    change = (router - policy) @ outputs[0]
    assert np.isclose((router - policy) @ gram @ (router - policy), change @ change)


def test_uses_count_every_expert() -> None:
    assert uses(np.array([[0, 3], [3, 1]], np.int32), 5).tolist() == [1, 1, 0, 2, 0]


def test_percentiles_of_the_entropy_rise_from_the_surest_to_the_least_sure_token() -> None:
    scores = np.array([[50.0, 0.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 0.0]], np.float32)
    found = tae_percentiles(scores, np.array([[0, 1]] * 3, np.int32))
    assert found.shape == (101,) and found.dtype == np.float32
    assert found[0] < 1e-6 and found[50] == found[100] == 1.0 and (np.diff(found) >= 0).all()


def test_the_best_buddy_is_never_the_expert_itself() -> None:
    error = np.array([[0.0, 0.4, 0.2], [0.6, 0.0, 0.8], [1.0, 1.0, 0.0]], np.float32)
    assert np.isclose(best_error(error, np.array([3, 1, 0])), (0.2 + 0.6) / 2)
