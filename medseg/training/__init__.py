"""The loop that turns prepared cases into a trained model; `train.py` reads top-down as the story of a run."""
