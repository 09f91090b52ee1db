"""`pytest` alone stays at a minute: of the tests in this folder it runs test_convert.py. `pytest experiments` runs them all
(pip install -r experiments/requirements.txt)."""

from pathlib import Path

HERE = Path(__file__).parent
LONGER = [f"test_{name}.py" for name in ("bad_input", "ecosystem", "evidence", "faults", "harness", "numerics", "properties", "training")]


def pytest_ignore_collect(collection_path, config):
    named = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    if collection_path.name in LONGER and not any(path == HERE or HERE in path.parents for path in named):
        return True
