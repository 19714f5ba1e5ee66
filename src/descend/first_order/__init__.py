"""The optimizers of ``torch.optim``, and two more: hyper-parameters only, the mathematics is in ``rules``.

In order of complexity: ``sgd`` (SGD, ASGD), ``signs`` (Lion, Rprop), ``squares`` (Adagrad, RMSprop, Adadelta), ``adam``
(Adam, AdamW), ``adam_variants`` (Adamax, NAdam, RAdam), ``schedule_free`` (AdamWScheduleFree).
"""
