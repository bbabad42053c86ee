"""How is each system used? One page each, as its own documentation says; a page translates and never computes."""
