"""From the command line's Namespace to the frozen settings of the packages below: `args` goes no further.

One function for each settings class: of the models (models.py), of what is worked out before any weight is read (plan.py), of the
loop (training.py), of what runs between steps (monitoring.py) and of the files (saving.py).
"""
