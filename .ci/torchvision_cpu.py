"""Makes the installed torchvision import beside a CPU build of torch; run it once, with the Python that has both.

vLLM needs torchvision, whose only wheel may be the one for CUDA. Its compiled half cannot load without CUDA, and then
its Python half stops at two operators that nobody has defined. It wants no more than their signatures: images are
resized in Python.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

DEFINITIONS = """

if not _has_ops():
    _names = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _names.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> int:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        print("torchvision is not installed", file=sys.stderr)
        return 1
    extension = Path(spec.origin).with_name("extension.py")
    if DEFINITIONS not in extension.read_text(encoding="utf-8"):
        with extension.open("a", encoding="utf-8") as file:
            file.write(DEFINITIONS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
