"""A local web page over run folders and evidence. Everything is read from disk; nothing is written and nothing kept."""
