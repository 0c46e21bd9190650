"""The acts of a run, one file each, in the order that data flows:

ask      ``offering`` (which recipes), ``wanted`` (what they need measured), ``opening``, ``images``, ``activations``,
         ``prepare`` (everything that is checked before long work), ``forecast``, ``disk``
measure  ``measuring`` and ``slopes`` (for allocators), ``rewriting`` and ``removal`` (alternatives of a block),
         ``candidates`` (every recipe at every site), ``kept`` and ``shortlist`` (what a finished search left)
choose   ``quality`` (the smallest plan within a loss), ``uniform`` (the plain baseline)
build    ``refit``, ``sequential``, ``tuning`` with ``network_tuning`` and ``tuned_forms``, ``apply``
prove    ``record``

What an act needs from an earlier one travels in the value, or the work folder, that the earlier one returned.
``layerwise.compress`` strings them together.
"""
