"""Private names of other libraries, so that a new release of theirs is checked against two files."""
