"""A pytest plugin: each falsifier a test of its own, for an implementation of one's own.

Installed with kdcore, and idle until a test asks for its fixture::

    import pytest
    from my_library import loss_and_gradient

    @pytest.mark.kdcore(features=["cross_entropy", "distillation", "temperature", "float64"])
    def test_my_loss(kdcore_falsifier):
        kdcore_falsifier(loss_and_gradient)

The test runs once for each falsifier, under its ID. The mark is optional; its keywords are those of
:func:`kdcore.testing.falsify`: ``divergence``, ``features``, ``max_examples``, ``seed``. A falsifier of a feature that
is not claimed is skipped, which is not passed. A falsified one fails with its counterexample.

pytest loads this module in every run, so that it imports nothing.
"""

from __future__ import annotations

__all__ = ["pytest_configure", "pytest_generate_tests"]

_FIXTURE = "kdcore_falsifier"
_OPTIONS = ("divergence", "features", "max_examples", "seed")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", f"kdcore({', '.join(_OPTIONS)}): what the fixture {_FIXTURE} holds an implementation to"
    )


def pytest_generate_tests(metafunc):
    if _FIXTURE not in metafunc.fixturenames:
        return
    from kdcore.errors import DomainError
    from kdcore.testing.registry import selected

    options: dict = {}
    for mark in metafunc.definition.iter_markers("kdcore"):
        if mark.args or set(mark.kwargs) - set(_OPTIONS):
            raise DomainError(f"the mark kdcore takes the keywords {', '.join(_OPTIONS)}, got {mark}")
        options = {**mark.kwargs, **options}  # the nearest mark wins
    tried, left = selected(options.get("divergence", "forward_kl"), options.get("features"))
    metafunc.parametrize(
        _FIXTURE,
        [_Falsifier(entry, options) for entry in (*tried, *left)],
        ids=[entry.id for entry in (*tried, *left)],
    )


class _Falsifier:
    """Called with the implementation, it fails the test with the counterexample, if there is one."""

    def __init__(self, entry, options):
        self.entry, self.options = entry, options

    def __call__(self, loss_and_gradient):
        import pytest

        from kdcore.testing.runner import try_one

        __tracebackhide__ = True
        result = try_one(self.entry, loss_and_gradient, **self.options)
        if result.passed is None:
            pytest.skip(str(result))
        if not result.passed:
            pytest.fail(str(result), pytrace=False)
        return result
