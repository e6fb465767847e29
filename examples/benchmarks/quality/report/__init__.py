"""Tables and pictures of RESULTS.md and the pages of docs/results, from the records alone."""
