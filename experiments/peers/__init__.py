"""Scripts that record what other libraries compute, so that tests can compare without them."""
