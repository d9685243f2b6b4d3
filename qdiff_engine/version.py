"""The engine's version, written into artifacts and reports."""

__version__ = "0.1.0"
