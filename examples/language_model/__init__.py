"""The parts of example 03: model, text, training, comparison."""
