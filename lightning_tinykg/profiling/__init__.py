"""What compression would gain in a model, before it is trained: bytes by module and op, and the gradient's error."""

from lightning_tinykg.profiling.probe import profile
from lightning_tinykg.profiling.report import Point, Profile

__all__ = ["Point", "Profile", "profile"]
