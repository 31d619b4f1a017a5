# SPDX-License-Identifier: Apache-2.0
"""The common tests of transformers, taken from the source archive of the installed version, which pip fetches.

The wheel carries no tests, the source archive carries the files `tests/test_*.py`, but not the folders that some of
them import. These are replaced by the few lines of `STAND_INS`. The archive is kept in the user's cache, unpacked to a
temporary package and never becomes part of this repository. `TRANSFORMERS_SDIST` may name an archive instead.
"""

import atexit
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock


PACKAGE = "transformers_common_tests"

# What the files import from folders that the archive lacks. None of it concerns a model like ours: tests of generation
# and export, the values of common config fields for a check that composite configs are exempt from, and a look-up of
# downloaded pictures for chat templates.
STAND_INS = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/__init__.py": "",
    f"{PACKAGE}/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}

# After a failed download the next attempt waits this long, so that of many test processes one tries.
RETRY_SECONDS = 60
DOWNLOAD_SECONDS = 300


class PeerTestsUnavailable(Exception):
    """The source archive cannot be had; the message says why."""


def load_peer_module(name: str) -> ModuleType:
    """
    Imports one of the common test modules of transformers.

    Args:
        name (`str`): Its name, for example `"test_modeling_common"`.

    Raises:
        PeerTestsUnavailable: if `parameterized` is not installed, or pip cannot fetch the source archive.
        ValueError: if `TRANSFORMERS_SDIST` does not name the source archive of the installed version.
    """
    if importlib.util.find_spec("parameterized") is None:
        raise PeerTestsUnavailable("the common tests of transformers need `pip install parameterized`")
    _unpack(_archive())
    return importlib.import_module(f"{PACKAGE}.{name}")


def _archive() -> Path:
    named = os.environ.get("TRANSFORMERS_SDIST")
    if named is not None:
        expected = f"transformers-{transformers.__version__}.tar.gz"
        if not Path(named).is_file() or Path(named).name != expected:
            raise ValueError(f"`TRANSFORMERS_SDIST` must name a file {expected}, got {named!r}.")
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2clip_hf"
    archive = cache / f"transformers-{transformers.__version__}.tar.gz"
    if archive.is_file():
        return archive
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{archive}.lock"):
            if not archive.is_file():
                _download(archive)
    except OSError as error:
        raise PeerTestsUnavailable(f"the cache folder {str(cache)!r} cannot be used: {error}") from error
    return archive


def _download(archive: Path) -> None:
    """Fetches `archive` with pip; it appears under its name when it is complete."""
    failure = archive.with_name(f"{archive.name}.failed")
    if failure.is_file() and time.time() - failure.stat().st_mtime < RETRY_SECONDS:
        raise PeerTestsUnavailable(failure.read_text())
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
        # pip reads the version from the archive with its build backend; the installed one saves a second download.
        command += ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
        command += ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", folder]
        command += [f"transformers=={transformers.__version__}"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            problem = (result.stderr.strip() or f"status {result.returncode}").splitlines()[-1]
        except subprocess.TimeoutExpired:
            problem = f"it took longer than {DOWNLOAD_SECONDS} s"
        fetched = list(Path(folder).glob("transformers-*.tar.gz"))
        if not fetched:
            reason = f"pip cannot fetch the source archive of transformers {transformers.__version__}: {problem}"
            failure.write_text(reason)
            raise PeerTestsUnavailable(reason)
        os.replace(fetched[0], archive)


@functools.cache
def _unpack(archive: Path) -> None:
    """Writes the test files of `archive` and the stand-ins to a temporary folder and makes them importable."""
    root = Path(tempfile.mkdtemp(prefix="transformers-common-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for name, text in STAND_INS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if len(parts) != 3 or parts[1] != "tests" or not parts[2].startswith("test_"):
                continue
            content = tar.extractfile(member)
            if content is not None:
                (root / PACKAGE / parts[2]).write_bytes(content.read())
    sys.path.append(str(root))
