"""Studies of cuts: what each cut would keep of a finished run, and which one trains the better model."""
