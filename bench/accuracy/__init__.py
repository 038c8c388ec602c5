"""Does it still learn? ``python -m bench accuracy``: fine-tuning with slimfit_fx against its rivals, on real data.

::

    cells.py   data: what is trained (task, method, seed, learning rate)      store.py   one line per finished cell
    methods.py acting: set a model up      train.py  train and score a cell    run.py     the order, the choice of rates
    stats.py   means, intervals, pairs     table.py  text                      tasks/     data and pretrained models

``tasks/hub.py`` loads the paper's own tasks (GLUE, SQuAD 2.0, CIFAR, ImageNet), for which a network is needed.
"""
