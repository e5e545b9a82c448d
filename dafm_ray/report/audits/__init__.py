"""One file an audit; `base` is what they share."""
