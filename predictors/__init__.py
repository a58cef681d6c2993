"""What guesses without running: training-free metrics, encodings and learned predictors."""
