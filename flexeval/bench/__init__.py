"""How fast: the engine and its peers on the same requests, and how near the machine's own bounds they come.

`run.py` is the order of the steps. `work.py` makes requests; `child.py` runs each system in a process of its own;
`engine.py` and `peers.py` measure there; `phases.py`, `bounds.py` and `comparison.py` are the arithmetic; `figures.py`
the result as plain data, which `reading.py` reads back and `table.py` shows.
"""
