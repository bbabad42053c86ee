"""How do weights move, once or not at all?"""
