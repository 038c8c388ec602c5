"""``python -m bench.emulated_gpu -m bench memory --how emulated``: run Python on the emulated GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.emulated_gpu import VARIABLE
from bench.emulated_gpu.libraries import build

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulated-gpu"


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """``given`` with the emulated GPU in it, and caches of its own: kernels of real ones must not mix with them."""
    runtime, driver = build(FOLDER)
    before = given.get("LD_LIBRARY_PATH")
    return {
        **given,
        VARIABLE: "1",
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": f"{driver.parent}:{before}" if before else str(driver.parent),
        "TRITON_LIBCUDA_PATH": str(driver.parent),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Become ``python`` with the arguments."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        chosen = environment(os.environ)
    except RuntimeError as error:
        print(f"python -m bench.emulated_gpu: {error}", file=sys.stderr)
        return 2
    os.execve(sys.executable, [sys.executable, *given], chosen)


if __name__ == "__main__":
    sys.exit(main())
