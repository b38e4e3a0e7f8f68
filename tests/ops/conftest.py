import pytest

from tests.ops import backends


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    return backends.load(request.param)
