"""Whether a run is worse than the one before it: the gate that continuous integration passes or not.

`baseline.py` is what is kept of a run, as a small file; `quality.py` and `throughput.py` hold a run against it;
`detectable.py` says what so many questions can show; `findings.py` is what comes out, `junit.py` and `text.py` show it.
"""
