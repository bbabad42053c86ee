"""How we know: the plain loop, the user's model cut and uncut, and what a run left behind."""
