"""How do micro-batches meet, and what comes of it?"""
