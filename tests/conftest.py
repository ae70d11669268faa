"""Set up every test: one thread and the same random numbers; skip what this machine cannot run."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = "needs a CUDA device"
    if "large" not in config.getoption("markexpr"):
        skips["large"] = "needs gigabytes of memory and minutes: -m large"
    for item in items:
        for mark, reason in skips.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion; a test that changes it works on a copy."""
    from tiny import build_tiny_pipeline  # here, because most tests need no diffusers

    return build_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
