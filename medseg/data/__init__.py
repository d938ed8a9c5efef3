"""From a folder to batches: cases, splits, survey, plan, preprocessing, sampling, augmentation."""
