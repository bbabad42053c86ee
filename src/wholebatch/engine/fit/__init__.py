"""What fits into memory, and how is a batch cut so that it does?"""
