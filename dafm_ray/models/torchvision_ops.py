"""Lets torchvision be imported beside a CPU-only torch.

Published torchvision wheels for Linux are CUDA builds: beside a CPU-only torch their compiled part
does not load and `import torchvision` raises "operator torchvision::nms does not exist", which
breaks open_clip, timm and transformers. Defining the two schemas first cures it; the operators
themselves stay unavailable, and nothing here calls them.
"""

import sys
import threading
from typing import Any

_one_at_a_time = threading.Lock()
"""A thread that finds a half-imported torchvision fails."""


def make_torchvision_importable() -> None:
    """Import torchvision, defining its operator schemas first where its own library is missing.

    Call it before the first import of open_clip, timm or transformers in a process.
    """
    with _one_at_a_time:
        if "torchvision" not in sys.modules:
            _import()


def _import() -> None:
    try:
        import torchvision
    except RuntimeError:
        import torch

        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.schemas = library  # they last as long as this object
