"""Where do I already train? A page a framework, each thin: what makes an update exact is the engine's."""
