"""SupSup, *Supermasks in Superposition* (Wortsman et al., NeurIPS 2020): the algorithm.

One network with fixed random weights, one binary mask per task, and the gradient of the
output's entropy tells which mask the data belongs to. This package is the numerics alone: it
knows nothing of Ray, Optuna or MLflow and runs whole in a plain loop. See docs/python.md.
"""

__version__ = "0.1.0"
