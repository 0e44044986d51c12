"""Other methods' choices of what to train, as plans: the baselines that need nothing else.

Each is written from its paper at component granularity; what it does outside a plan is named in its docstring.
"""
