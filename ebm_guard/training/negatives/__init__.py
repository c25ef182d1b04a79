"""Where negatives come from, one file for each source."""
