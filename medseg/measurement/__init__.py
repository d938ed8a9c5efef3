"""`medseg measure`: tables of computational features, and of what a trained network makes of the cases.

`cases` finds which label belongs to which image, `regions` takes the label apart into structures, `table` measures
them (by `medseg.features`) and writes the table, `embedding` asks a network.
"""
