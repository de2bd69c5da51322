"""Where weights come from: hub files, checkpoints, exports, meta models."""
