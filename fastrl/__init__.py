"""fastrl: fused losses, a lean post-training engine and honest benchmarks.

Importing the package costs nothing: torch is imported when an op, a loss or a recipe is.
"""

__version__ = "0.1.0"
