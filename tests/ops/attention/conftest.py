"""What runs the operator here: `inference_tools.backend` in place of the fixture of the directory above."""

from inference_tools import backend  # noqa: F401
