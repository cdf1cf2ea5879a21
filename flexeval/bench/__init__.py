"""How fast: the engine and its peers on the same requests, and how near the machine's own bounds they come.

`run.py` is the order of the steps. `work.py` makes requests; `child.py` runs each system in a process of its own;
`systems.py` measures there; `phases.py` and `bounds.py` are the arithmetic; `figures.py` the result as plain data;
`table.py` shows it.
"""
