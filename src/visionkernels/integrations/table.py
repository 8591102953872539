"""The table of integrations: what a row of it says, and all rows; the files of this package hold their own."""

from dataclasses import dataclass
from importlib import import_module

# Each has ROWS.
_FILES = ("transformers", "kernels_hub", "transformers_vit", "deformable_detr", "mmcv", "detrex", "layouts")


@dataclass(frozen=True)
class Row:
    """One upstream code base, or one model of it, for people.

    Args:
        upstream: the project, and the model where it has several.
        versions: the upstream versions that it is tested with.
        replaces: what is replaced, as upstream calls it.
        switch_on: the line that switches it on, to be copied, under `import visionkernels`.
    """

    upstream: str
    versions: str
    replaces: str
    switch_on: str


def rows() -> list[Row]:
    """Every integration, in the order in which people look for them; imports no upstream project.

    Example:
        >>> rows()[0].switch_on
        'visionkernels.patch(model)'
    """
    return [row for name in _FILES for row in import_module(f"visionkernels.integrations.{name}").ROWS]
