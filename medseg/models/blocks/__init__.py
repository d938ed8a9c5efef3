"""The parts that networks are composed of, 2D and 3D by one code path; one family per file.

A block maps (N, C, *spatial) to (N, K, *spatial'), knows the channels K that it returns and how it changes the length
of each axis (`block.py`). Terms: K filters (`out_channels`), filter size F (`kernel`), stride S, padding P; F, S and P
are one number or one per axis.
"""
