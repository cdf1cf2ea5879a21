"""Where bytes rest and how they move: tiers, codecs, slabs, stores, lanes."""
