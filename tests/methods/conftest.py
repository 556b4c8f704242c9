"""The bundled model, once for all tests that measure a paper's claim on real weights."""

from __future__ import annotations

import pytest

from quantlab.models import LoadedModel, load


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """In float32. Tests must not change it; mark them `xdist_group("bundled")`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLAB_HOME", str(tmp_path_factory.mktemp("bundled")))
        return load("bundled")
