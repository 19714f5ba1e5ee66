"""``descend bench``: what a step costs on this machine, ours beside torch's and beside the memory's limit.

``shapes``, ``methods``, ``clock`` and ``contenders`` are shared with the scripts in ``benchmarks/``.
"""
