"""How far a segmentation is from its reference, one class of one case at a time.

A metric is one function in one file of this package, made known with `@metric(...)` (see `medseg.metrics.metric`).
`medseg.metrics.case.measure_case` computes them for a case; means over cases are made in
`medseg.reports.evaluation`.

**Empty masks.** Written once, here; `ClassMasks.state` names the situation:

=========  =========  ==========  ==============================================================================
state      reference  prediction  what the metrics are
=========  =========  ==========  ==============================================================================
present    some       some        their definitions
missed     some       none        Dice, IoU, sensitivity, precision, surface Dice = 0; HD95 and ASD = the diagonal
                                  of the case's volume (edge to edge: more than any two voxel centres are apart)
spurious   none       some        Dice, IoU, precision, surface Dice = 0; HD95 and ASD = the diagonal; sensitivity
                                  and relative volume error are undefined: NaN
absent     none       none        every metric is NaN
=========  =========  ==========  ==============================================================================

NaN values are left out of means, and the numbers of absent, missed and spurious cases stand beside every mean.
So **a missed structure never improves a mean** of a metric that ranks (`Metric.better` is "higher" or "lower"): it
gets the worst value that any prediction of that structure can get. Specificity and the volumes and their errors do
not rank (`Metric.better` is None): predicting nothing has a perfect specificity, and is nearer in volume than three
times too much. They are reported as they are found; read them beside Dice and sensitivity.
"""
