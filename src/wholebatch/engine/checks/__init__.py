"""Does the cut change the gradient, and why?"""
