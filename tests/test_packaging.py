"""An installed package carries what it needs, runs anywhere, and imports on every system."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data/prompts", "data/portraits", "experiments")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel holds it."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={folder}", "build", f"--build-base={folder}"]
    subprocess.run([*command, f"--build-lib={folder / 'lib'}"], cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


def shipped_files(root: Path) -> set[str]:
    files = [file for folder in FOLDERS for file in (root / folder).rglob("*") if file.is_file()]
    return {file.relative_to(root).as_posix() for file in files if ".work" not in file.parts}


def test_the_package_carries_prompts_experiments_and_the_miniature(built: Path) -> None:
    package = built / "lib" / "fairness_dft"
    assert shipped_files(package) == shipped_files(ROOT)
    assert (package / "reports" / "templates" / "report.html").is_file() and (package / "py.typed").is_file()
    assert {file.name for file in (built / "lib").iterdir()} == {"fairness_dft"}


def test_the_source_distribution_carries_them_too(built: Path) -> None:
    listed = set((built / "fairness_dft.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    assert shipped_files(ROOT) | {"setup.py", "setup.cfg", "pyproject.toml"} <= listed


def test_an_installed_package_finds_its_files_from_any_folder(built: Path, tmp_path: Path) -> None:
    code = (
        "import fairness_dft, sys\n"
        "from pathlib import Path\n"
        "from fairness_dft.cli.configuration import prepared, shipped_names\n"
        "from fairness_dft.files import resolve\n"
        "package = Path(fairness_dft.__file__).parent\n"
        "assert package == Path(sys.argv[1], 'lib', 'fairness_dft'), package\n"
        "assert resolve('data/portraits/pipeline') == package / 'data/portraits/pipeline'\n"
        "assert 'race' in shipped_names() and len(prepared(['--config=race', '--config=portraits'])) == 3\n"
    )
    command = [sys.executable, "-c", code, str(built)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(built / "lib")}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_every_module_imports_on_other_systems(platform: str) -> None:
    """By a simulation: what Windows or macOS lacks is gone once the libraries are imported."""
    code = (
        "import sys, importlib, os, signal, pkgutil\n"
        "import torch, lightning.pytorch.cli, diffusers, transformers, peft, onnxruntime, torchmetrics, matplotlib\n"
        "import fairness_dft\n"
        f"missing = {['resource', 'fcntl', 'pwd', 'grp', 'termios'] if platform == 'win32' else []}\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        "for name in ('SIGKILL', 'SIGHUP', 'SIGUSR1', 'SIGALRM') if missing else ():\n"
        "    delattr(signal, name)\n"
        "for name in ('sched_getaffinity', 'fork') + (('getuid', 'killpg', 'uname') if missing else ()):\n"
        "    delattr(os, name)\n"
        f"sys.platform = {platform!r}\n"
        "for module in pkgutil.walk_packages(fairness_dft.__path__, 'fairness_dft.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "from fairness_dft.training.plan import peak_memory\n"
        "from fairness_dft.faces.finders import threads\n"
        "assert threads() >= 1\n"
        "assert (peak_memory() == 0) == bool(missing)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_peak_memory_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    from fairness_dft.training.plan import peak_memory

    usage = type("Usage", (), {"ru_maxrss": 2048})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory() == 2 * 2**20
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory() == 2048
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 0
