"""Fixtures and the Hypothesis profile that all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# Times on shared machines are noisy: a deadline would make correct tests fail. A fixed seed keeps a failure repeatable.
settings.register_profile(
    "curvlib",
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,  # ``device`` is the same for all examples
    ],
)
settings.load_profile("curvlib")


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
