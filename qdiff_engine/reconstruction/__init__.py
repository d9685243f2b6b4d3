"""Reconstruction: integer weights that make the quantised layers' outputs those of the float network."""
