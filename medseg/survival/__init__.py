"""`medseg survival`: how long until an event, from features of images: Cox model, C-index, Kaplan–Meier by risk.

`data` reads and joins tables, `cox` fits (lifelines, the extra medseg[survival]), `concordance` has the C-index and its
interval, `analysis` is the story, `figures` draws.
"""
