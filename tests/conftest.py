"""What holds for every test: one thread, the same random numbers; what the machine cannot run is skipped."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = "needs a CUDA device"
    if "large" not in config.getoption("markexpr"):
        skips["large"] = "needs gigabytes and minutes: -m large"
    for item in items:
        for mark, reason in skips.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
