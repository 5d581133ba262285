"""Lets torchvision (and timm, which imports it) run beside a CPU build of torch.

The wheel of torchvision on PyPI is compiled against the CUDA build of torch. Beside a CPU build its shared
library does not load, and `import torchvision` fails on the operators that it would have registered, when it
registers their fake implementations from Python. Their schemas are enough for the import, and no model of the
zoo calls them: they serve detection (boxes, regions), which the zoo leaves out.

For the same reason such a wheel must not lie among the installed packages: transformers imports torchvision
as soon as it finds it, and none of its models would import any more. It is installed into a folder of its own
(requirements.txt has the command), which only a process that builds one of its models has on its path.

Where the installed torchvision works, nothing is declared.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "zoo"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


def available() -> bool:
    """Whether torchvision is installed, among the other packages or in `FOLDER`."""
    return (FOLDER / "torchvision").is_dir() or importlib.util.find_spec("torchvision") is not None


@functools.cache
def prepare() -> tuple[torch.library.Library, ...]:
    """Put `FOLDER` on the path and declare what torchvision's import needs, each only if need be.

    The declarations live as long as the result, which is kept. Raises `ModuleNotFoundError` if there is no
    torchvision.
    """
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(FOLDER))
    if not available():
        raise ModuleNotFoundError(
            f"There is no torchvision in {FOLDER}: benchmarks/zoo/requirements.txt says how to install it."
        )
    with warnings.catch_warnings():
        # Says that the image extension does not load, which nothing here reads.
        warnings.filterwarnings("ignore", "Failed to load image Python extension")
        try:
            import torchvision
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
        else:
            return ()
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        import torchvision  # noqa: F401
    return (library,)
