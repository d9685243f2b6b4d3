"""Triton kernels of qdiff-engine, one file per operator; they import torch and triton only."""
