"""The command ``qdiff``."""

from .main import main as main
