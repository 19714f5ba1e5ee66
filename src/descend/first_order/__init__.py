"""The optimizers of ``torch.optim``, and newer ones.

A class holds options and forms the scalars of its rule; the arithmetic on tensors is in ``rules``. In order of
complexity: ``sgd`` (SGD, ASGD), ``signs`` (Lion, Rprop), ``squares`` (Adagrad, RMSprop, Adadelta), ``adam`` (Adam,
AdamW), ``adam_variants`` (Adamax, NAdam, RAdam), ``schedule_free`` (AdamWScheduleFree), ``adopt`` (ADOPT), ``momenta``
(AdEMAMix, Adan).
"""
