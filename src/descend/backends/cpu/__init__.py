"""Rules compiled by Numba for CPUs."""
