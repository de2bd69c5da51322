"""Loading of weights: hub files, checkpoints, exports, and models on the meta device."""
