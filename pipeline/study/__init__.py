"""A study of cuts: what each would keep of a finished run, and which one trains the better model."""
