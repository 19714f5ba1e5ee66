"""The solvers of ``second_order`` where people already minimize: as other libraries call them.

Nothing here imports these libraries before it is used.
"""
