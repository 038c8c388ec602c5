"""The demo: one fine-tuning, with plain ``torch.compile`` and with slimfit_fx, and a comparison of the two.

::

    task (data, pretrained model, recipe)  --->  fine_tune(torch.compile(model))       \
                                           --->  fine_tune(slimfit_fx.optimize(model))  >-->  plan, table, pictures

By default a small vision transformer that knows the digits 0 to 4 learns all ten (real images, scikit-learn). With
``text`` a pretrained MiniLM learns which library a docstring comes from.
"""

from __future__ import annotations

from slimfit_fx.demo.compare import run

__all__ = ["run"]
