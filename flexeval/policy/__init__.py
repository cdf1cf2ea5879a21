"""The machine, the cost model and the search: decides where data lives; moves nothing.

`policy.py` is the vocabulary. `hardware.py` and `memory.py` measure the machine (`hardware.py` alone imports torch).
`sweeps.py` counts passes over the layers, `cost.py` prices them, `program.py` places data at the least price (PuLP),
and `search.py` chooses how much work is in flight.
"""
