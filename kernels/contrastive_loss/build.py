# SPDX-License-Identifier: Apache-2.0
"""
Make a kernel repository of the contrastive losses, for `kernels.get_kernel`, from the sources of the package.

    python kernels/contrastive_loss/build.py OUT

OUT then has `build/torch-cpu` and `build/torch-cuda` with the files of `llm2clip_hf/ops`; upload it as it is. They are
plain Python and Triton, so one form serves all versions of torch and CUDA. The operators get a namespace of their own,
a digest of the sources, so that several versions, and the package itself, can be loaded side by side.
"""

import argparse
import hashlib
import json
from pathlib import Path


NAME = "contrastive-loss"
HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src" / "llm2clip_hf" / "ops"


def build(output: Path) -> None:
    """Write the repository to a folder that does not exist yet."""
    if output.exists():
        raise SystemExit(f"`{output}` exists. Give a new folder.")
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.py"))}
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12]
    namespace = f"_{NAME.replace('-', '_')}_{digest}"
    for backend in ("cpu", "cuda"):
        folder = output / "build" / f"torch-{backend}"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text.replace("llm2clip_hf::", f"{namespace}::"), encoding="utf-8")
        metadata = {
            "id": f"{namespace}_{backend}",
            "name": NAME,
            "version": 1,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    for name in ("README.md", "build.toml"):
        (output / name).write_text((HERE / name).read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the kernel repository, a new one")
    build(parser.parse_args().output)
