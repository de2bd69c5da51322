"""What several rooms need: files, locks, words."""
