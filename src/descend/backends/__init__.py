"""How a rule runs: eagerly on tensors, or compiled for CPUs. A backend receives rules and imports none."""

BACKENDS = ("auto", "eager", "cpu")
