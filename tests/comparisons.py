"""Comparisons that the tests of the kernels share."""

from __future__ import annotations

import numpy as np
import oracle

import kdcore
from kdcore.testing import bounds


def same_bits(actual, expected):
    """The same dtype, shape and bits (so NaN equals NaN, and -0 differs from 0)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


def in_the_oracle(divergence):
    """The oracle's words for a ``divergence=``: a name, or a Divergence of kdcore's own with its parameter."""
    if isinstance(divergence, str):
        return {"divergence": divergence}
    return {"divergence": divergence.name, "parameter": divergence.parameter}


def assert_kd(student, teacher, labels, temperature, alpha, **options):
    """kd_loss_and_gradient within the contract of the oracle: loss, ce, kl and each gradient row on its own.

    Options are those of kd_loss_and_gradient. Returns its result.
    """
    result = kdcore.kd_loss_and_gradient(student, teacher, labels, temperature, alpha, **options)
    assert_answer(result, student, teacher, labels, temperature, alpha, **options)
    return result


def assert_answer(result, student, teacher, labels, temperature, alpha, **options):
    """A KDOutput against the oracle."""
    # The oracle's rows come from the scales that reduction, weights and masks amount to.
    masks = ("ignore_index", "weights", "reduction", "denominator")
    masking = {name: options[name] for name in masks if name in options}
    kind = {name: options[name] for name in ("divergence", "teacher_temperature", "scale_t2") if name in options}
    lead, V = student.shape[:-1], student.shape[-1]
    rows = int(np.prod(lead))
    student, teacher = student.reshape(rows, V), teacher.reshape(rows, V)
    labels = None if labels is None else np.reshape(labels, rows)
    scales = oracle.row_scales(rows, labels, **masking)
    textbook = {**kind, **in_the_oracle(kind.get("divergence", "forward_kl"))}
    exact = oracle.kd(student, teacher, labels, temperature, alpha, weights=scales, reduction="none", **textbook)

    assert np.shape(result.gradient) == (*lead, V)
    gradient = np.asarray(result.gradient).reshape(rows, V)
    read = scales > 0
    np.testing.assert_array_equal(gradient[~read].astype(np.float64), 0.0)

    def allowed(weight_of_ce, values):
        return bounds.kd_bounds(
            student[read],
            teacher[read],
            values[read],
            temperature=temperature,
            alpha=weight_of_ce,
            scale=scales[read],
            **kind,
        )

    assert_values("loss", result.loss, exact.loss, read, allowed(alpha, exact.loss).loss, lead, options)
    if alpha > 0:
        assert_values("ce", result.ce, exact.ce, read, allowed(1.0, exact.ce).loss, lead, options)
    else:
        assert result.ce is None
    if alpha < 1:
        assert_values("kl", result.kl, exact.kl, read, allowed(0.0, exact.kl).loss, lead, options)
    else:
        assert result.kl is None

    undefined = np.isnan(exact.gradient).any(axis=-1)
    assert np.isnan(gradient[undefined].astype(np.float64)).all()
    error = bounds.gradient_error(gradient, exact.gradient, student.dtype)[read & ~undefined]
    limit = allowed(alpha, exact.loss).gradient[~undefined[read]]
    assert (error <= limit).all(), ("gradient", error / np.where(limit > 0, limit, 1))


def assert_values(name, actual, exact_rows, read, row_bounds, lead, options):
    """A loss, reduced or not, against the oracle's scaled rows."""
    actual = np.asarray(actual)
    assert actual.dtype == np.float64
    if options.get("reduction", "mean") == "none":
        assert actual.shape == lead
        actual, exact = actual.reshape(-1), exact_rows
        limit = np.zeros(exact.shape)
        limit[read] = row_bounds
    else:
        assert actual.shape == ()
        exact, limit = exact_rows.sum(), row_bounds.sum()
    assert bounds.within(actual, exact, limit).all(), (name, actual, exact, limit)
