"""The sets of rows that a run is given: read, checked, and turned into tokens."""
