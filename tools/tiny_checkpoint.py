"""Write the tiny model that ships as a checkpoint of transformers, to try `bitgen.hf` on.

    python tools/tiny_checkpoint.py tiny-hf

writes config.json, model.safetensors (BitLinears of two bits a weight, as published checkpoints have them)
and the tokenizer's files into that folder. Needs the extras hf and test.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Write the folder; its name is printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "support")]
    from torch_models import save_tiny

    print(save_tiny(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
