"""The machine, the cost model and the search: decides where data lives; moves nothing.

`policy.py` is the vocabulary; `hardware.py` measures the machine (the only module here that imports torch);
`cost.py` predicts seconds and bytes; `search.py` finds the policy that costs least.
"""
