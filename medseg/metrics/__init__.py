"""How far a segmentation is from its reference, one class of one case at a time.

A metric is one function in one file of this package, made known with `@metric(...)` (see `medseg.metrics.metric`).
`medseg.metrics.case.measure_case` computes them for a case; means over cases are made in
`medseg.reports.evaluation`.

`docs/metrics.md` has the definitions in one table, with when not to use them. Those that are cheap and mean something
for any structure are computed by default, the others by name (`medseg.metrics.metric.metric_names`). Beside them, for
what label maps do not hold: `instances.panoptic_quality` and `partition.partition_scores` for maps of instances
(`medseg evaluate --instances`), `calibration.calibration` for probabilities (`--probabilities`).

**Empty masks.** Written once, here; `ClassMasks.state` names the situation:

=========  =========  ==========  ==============================================================================
state      reference  prediction  what the metrics are
=========  =========  ==========  ==============================================================================
present    some       some        their definitions
missed     some       none        what is better the higher (Dice, clDice, lesions found, PQ, …): 0; distances: the
                                  diagonal of the case's volume (edge to edge: more than any two voxel centres are
                                  apart); volumes and counts: as they are
spurious   none       some        the same; sensitivities and the relative volume error are undefined: NaN
absent     none       none        every metric is NaN
=========  =========  ==========  ==============================================================================

NaN values are left out of means, and the numbers of absent, missed and spurious cases stand beside every mean.
So **a missed structure never improves a mean** of a metric that ranks (`Metric.better` is "higher" or "lower"): it
gets the worst value that any prediction of that structure can get. Specificity, volumes, their errors and numbers of
lesions do not rank (`Metric.better` is None): predicting nothing has a perfect specificity and no false positive, and
is nearer in volume than three times too much. They are reported as they are found; read them beside Dice and
sensitivity.
"""
