"""Scaling laws: a table of runs into a law, its intervals, its doubts, a plan and pictures.

NumPy and SciPy only; nothing here imports torch.
"""
