"""Floor 6: one file per published method; its docstring is its page. Methods never import each other."""
