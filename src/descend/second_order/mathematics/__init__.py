"""Directions, line searches and models in a trust region: formulas that evaluate nothing and import nothing else."""
