"""How fast this machine computes, moves and reads: timed with torch. Knows no model and no policy."""
