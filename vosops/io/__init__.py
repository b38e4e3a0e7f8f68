"""What reads and writes frames, masks, lists and results; needs no model and nothing of :mod:`vosops.inference`."""
